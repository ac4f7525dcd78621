"""Building a data set: source → cleaning → split → subsampling → columns → normalisation → manifest.

The files are written into a hidden folder, which is renamed to the digest of its content when it is
complete. Memory holds a chunk of observations and a few numbers per series. While series are read, these
are saved beside the folder every minute and at a stop, so that the next build of the same input resumes one
that was killed or stopped. It opens the source again (hashes its files, scans and, if need be, sorts a
table) and continues with the series after the last that were saved.
"""

from __future__ import annotations

import errno
import logging
import pickle
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.metadata import version
from operator import length_hint
from pathlib import Path

from filelock import FileLock, Timeout

from roma_core.data.cleaning import SeriesCleaner
from roma_core.data.config import DatasetConfig
from roma_core.data.manifest import MANIFEST, ColumnFiles, Manifest, find_damage, read_manifest
from roma_core.data.writer import DatasetWriter, state_file
from roma_core.files import digest_of, sha256_of, sync_folder, write_bytes
from roma_core.job import Interrupted
from roma_core.progress import Progress
from roma_core.schema import DataError
from roma_core.sources.base import Source

log = logging.getLogger(__name__)

_LOOK_EVERY_S, _SAVE_EVERY_S = 0.5, 60.0


def build_dataset(
    config: DatasetConfig,
    root: Path,
    cache: Path,
    progress: Progress | bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    saved: Callable[[int], object] = lambda n_series: None,
) -> Path:
    """Build the data set that ``config`` describes, or find it built; returns its folder.

    The folder is ``<root>/<name>/<digest[:12]>/``. Equal input gives an equal folder; an existing one
    is verified and used, or replaced if it is damaged. ``cache`` is for what the source downloads.
    ``saved`` is called whenever so many series are done for good. ``should_stop`` is asked twice a second
    while series are read and while another process builds in ``<root>/<name>/``.

    Raises:
        DataError: the source or a series cannot be used; nothing of this build is left behind.
        OSError: the disk is full, and nothing is left behind; or another operation on it failed.
        Interrupted: ``should_stop`` returned True.

    What is left behind, after a kill too, the same call resumes: with the series after the last saved.
    """
    home = root / config.name
    aside = home / ".building"
    with ExitStack() as stack:
        if progress is True:
            progress = Progress(f"building {config.name}", unit="series", log=sys.stderr)
            stack.enter_context(progress)
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{config.name}.lock")
        waits = False
        while not lock.is_locked:
            try:
                lock.acquire(timeout=waits * _LOOK_EVERY_S)
            except Timeout:
                if not waits:
                    log.warning("another process is building in %s; waiting for it", home)
                waits = True
                if should_stop():
                    raise Interrupted(f"stopped while another process builds in {home}") from None
        stack.callback(lock.release)
        source = config.source.open(cache)  # under the lock: its hashes are of what is read
        try:
            manifest = _build(config, source, aside, progress or None, should_stop, saved)
            path = _commit(aside, home / manifest.digest[:12], manifest)
        except BaseException as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or isinstance(error, ValueError) or not state_file(aside).exists():
                _remove(aside)
                with suppress(OSError):  # there are other versions
                    home.rmdir()
            if not full:
                raise
            raise OSError(
                f"no space left while building in {home}; nothing was left behind: free some space "
                f"or choose another folder, then run the same command again"
            ) from error
        _remove(aside)
    return path


def _build(
    config: DatasetConfig,
    source: Source,
    aside: Path,
    progress: Progress | None,
    should_stop: Callable[[], bool],
    saved: Callable[[int], object],
) -> Manifest:
    """Write all files into a folder, beginning with those of a killed build of the same input."""
    file, key, state = state_file(aside), _state_key(config, source, aside.parent).encode(), {}
    content = file.read_bytes() if file.exists() and aside.is_dir() else b""
    if content.startswith(key):  # else it is of other input, or of code that may differ
        state = pickle.loads(content[len(key) :])
        log.info("resuming after %d series", state["n_read"])
    else:
        _remove(aside)
        aside.mkdir(parents=True)
    cleaner = SeriesCleaner(source, config.repair)
    cleaner.n_read, cleaner.counts = state.get("n_read", 0), state.get("counts", cleaner.counts)
    with ColumnFiles(aside, state.get("sizes", {})) as files:

        def save() -> None:
            done = {"n_read": cleaner.n_read, "counts": cleaner.counts, "sizes": files.sync()}
            write_bytes(file, key + pickle.dumps({**done, "writer": writer.state()}))
            saved(cleaner.n_read)

        def show(force: bool = False) -> None:
            if progress is not None:
                numbers = {"observations": writer.n_observations, "mb_written": files.n_bytes / 1e6}
                progress.update(cleaner.n_read, numbers, force=force)

        writer = DatasetWriter(config, source, files, state.get("writer"))
        if writer.splitter.options.stratified and not state:
            writer.splitter.restore(versions=aside.parent)
        if progress is not None:
            progress.begin(length_hint(source), cleaner.n_read)
        looked_at = saved_at = time.monotonic()
        for series in cleaner:
            writer.add(series)
            if (now := time.monotonic()) - looked_at < _LOOK_EVERY_S:
                continue
            looked_at = now
            show()
            if (stop := should_stop()) or now - saved_at >= _SAVE_EVERY_S:
                saved_at = now
                save()
                if stop:
                    n = cleaner.n_read
                    raise Interrupted(f"stopped after {n} series; to resume, repeat the command")
        if not len(writer):
            raise DataError(
                f"the source of {config.name} ({config.source.kind}) has no series; look into its "
                f"files: {', '.join(source.files) or 'it has none'}"
            )
        show(force=True)
        if file.exists():
            save()
    return writer.finish(cleaner.repairs())


def _state_key(config: DatasetConfig, source: Source, home: Path) -> str:
    """Digest of all that determines the content: settings, input, code, versions with their splits."""
    package = Path(__file__).parents[1]
    code = [p for part in ("", "data/", "sources/") for p in sorted(package.glob(f"{part}*.py"))]
    plugins = (sys.modules.get(type(one).__module__) for one in (config.source, source))
    code += filter(Path.is_file, (Path(getattr(one, "__file__", None) or "") for one in plugins))
    libraries = [*map(version, ("duckdb", "numpy", "pyarrow"))]
    versions = sorted(path.parent.name for path in home.glob(f"[!.]*/{MANIFEST}"))
    hashes = [*map(sha256_of, code)]
    document = config.model_dump(mode="json"), dict(source.files), hashes, libraries, versions
    return digest_of(document)


def _remove(aside: Path) -> None:
    state_file(aside).unlink(missing_ok=True)
    shutil.rmtree(aside, ignore_errors=True)


def _commit(aside: Path, target: Path, manifest: Manifest) -> Path:
    """Move the complete folder to its name, unless an intact one is there."""
    if target.exists():
        try:
            existing = read_manifest(target)
            problems = find_damage(target, existing)
            if (found := existing.digest) != manifest.digest:
                problems = [f"{MANIFEST} has the digest {found}, expected {manifest.digest}"]
        except DataError as error:
            problems = [str(error)]
        if not problems:
            log.info("%s exists already", target)
            return target
        warnings.warn(f"{target} is damaged and is replaced: {'; '.join(problems)}", stacklevel=3)
        shutil.rmtree(target)
    aside.rename(target)
    sync_folder(target.parent)
    return target
