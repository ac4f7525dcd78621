"""Building a data set: one builder at a time, aside, and under its final name only when whole.

The folder appears under its digest; equal input finds the folder that is already there.
"""

from __future__ import annotations

import errno
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from roma_core.data.columns import MANIFEST, damage, read_manifest
from roma_core.data.config import DatasetConfig
from roma_core.data.errors import DataError
from roma_core.data.schema import Manifest
from roma_core.data.writing import write_dataset
from roma_core.files import sync_folder

log = logging.getLogger(__name__)


def build_dataset(config: DatasetConfig, root: Path, cache: Path, progress: bool = True) -> Path:
    """Build the data set that ``config`` describes, or find it built.

    Args:
        config: what to build from and how.
        root: the folder ``<root>/<name>/<digest[:12]>/`` is made in.
        cache: folder for what the source fetches.
        progress: show a progress bar on stderr.

    Returns:
        The folder. Equal input gives an equal folder; one that is already there is verified and
        used, or replaced if it is damaged. Only one process at a time builds under a name.

    Raises:
        DataError: the source or a series cannot be used, or the disk is full. Nothing is left behind.
    """
    source = config.source.open(cache)
    home = root / config.name
    aside = home / ".building"
    with _only_builder(home):
        shutil.rmtree(aside, ignore_errors=True)  # of a builder that was killed
        try:
            aside.mkdir()
            manifest = write_dataset(config, source, aside, progress, versions=home)
            return _commit(aside, home / manifest.digest[:12], manifest)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(
                f"no space left while building in {home}; nothing was left behind: free some space "
                f"or choose another folder, then run the same command again"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _only_builder(home: Path) -> Iterator[None]:
    lock = FileLock(home / ".lock")
    patience_s = 0.0
    while not lock.is_locked:
        home.mkdir(parents=True, exist_ok=True)  # again: a builder that failed takes it away
        try:
            lock.acquire(timeout=patience_s)
        except FileNotFoundError:
            continue
        except Timeout:
            if patience_s == 0:
                log.warning("another process is building in %s; waiting for it", home)
            patience_s = 1.0
    try:
        yield
    finally:
        if not any(home.glob(f"*/{MANIFEST}")):  # it failed, and nobody built here before
            (home / ".lock").unlink(
                missing_ok=True
            )  # whoever waits for it notices, and makes it anew
            with suppress(OSError):
                home.rmdir()
        lock.release()


def _commit(aside: Path, target: Path, manifest: Manifest) -> Path:
    if target.exists():
        problems = _problems(target, manifest.digest)
        if not problems:
            log.info("%s is there already", target)
            return target
        warnings.warn(f"{target} is damaged and is replaced: {'; '.join(problems)}", stacklevel=3)
        damaged = target.with_name(f".damaged-{target.name}")
        shutil.rmtree(damaged, ignore_errors=True)
        target.rename(damaged)
        aside.rename(target)
        shutil.rmtree(damaged)
    else:
        aside.rename(target)
    sync_folder(target.parent)
    return target


def _problems(folder: Path, digest: str) -> list[str]:
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return [str(error)]
    if manifest.digest != digest:
        return [f"{MANIFEST} has the digest {manifest.digest}, expected {digest}"]
    return damage(folder, manifest)
