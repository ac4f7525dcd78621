"""Atomic writing of files that other processes read at any moment and that a crash may interrupt.

``write_json`` and ``write_bytes`` replace a file whole: a reader sees the old content or the new,
never a part. ``create_json`` makes a file that must not exist yet; of several processes one succeeds.
Every JSON file that outlives a process has a ``schema_version``.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(document: Any) -> str:
    """Hex sha256 of a JSON-able document, independent of key order and white space."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Fingerprint(NamedTuple):
    """Whether files may have changed, without reading them: a digest of their names, sizes and times."""

    digest: str
    n_files: int
    newest: float  # modification time of the newest file, seconds since the epoch; 0 without files


def fingerprint_of(patterns: Iterable[Path]) -> Fingerprint:
    """Fingerprint of files, of files that match glob patterns, and of all files below folders.

    Dangling links, and files that are removed meanwhile, are ignored.
    """
    found: set[tuple[str, int, int]] = set()
    for pattern in patterns:
        for match in glob.glob(str(pattern)):  # noqa: PTH207 - may be absolute
            below = [os.path.join(where, n) for where, _, names in os.walk(match) for n in names]  # noqa: PTH118
            for path in below if Path(match).is_dir() else [match]:
                try:
                    status = Path(path).stat()
                except FileNotFoundError:
                    continue
                found.add((str(Path(path)), status.st_size, status.st_mtime_ns))
    newest = max((mtime for _, _, mtime in found), default=0) / 1e9
    return Fingerprint(digest_of(sorted(found))[:32], len(found), newest)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _written_aside(path: Path, content: bytes) -> Iterator[Path]:
    """A temporary file with the content beside ``path``, removed at the end unless it was renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(0o644)  # mkstemp makes 0600; other users of a shared job folder read too
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step."""
    with _written_aside(path, content) as aside:
        aside.replace(path)
    sync_folder(path.parent)


def _as_json(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, document: Any) -> None:
    """Replace ``path`` by the document in one step."""
    write_bytes(path, _as_json(document))


_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_EMPTY_FOR_S = 1.0  # at most, until its creator has replaced an empty file by the content


def create_json(path: Path, document: Any) -> bool:
    """Create ``path`` with the document, whole; False (and no change) if it exists already.

    Where the file system has no hard links, the file is empty for a moment; ``read_json`` waits.
    """
    with _written_aside(path, _as_json(document)) as aside:
        try:
            os.link(aside, path)
        except FileExistsError:
            if aside.stat().st_nlink != 2:  # over NFS a repeated request fails on its own link
                return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                return False
            aside.replace(path)
    sync_folder(path.parent)
    return True


def read_json(path: Path, *, schema_version: int | None = None) -> Any:
    """Read a JSON file; with ``schema_version``, refuse a file of another version.

    Raises:
        ValueError: the content is not JSON or has another ``schema_version``.
    """
    deadline = time.monotonic() + _EMPTY_FOR_S
    try:
        while not (text := path.read_text(encoding="utf-8")) and time.monotonic() < deadline:
            time.sleep(0.02)
        document = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}), cut short or changed by hand; restore it, or "
            f"remove it and repeat what wrote it"
        ) from error
    if schema_version is not None:
        found = document.get("schema_version") if isinstance(document, dict) else None
        if found != schema_version:
            raise ValueError(
                f"{path} has schema_version {found!r}, this version of the software reads "
                f"{schema_version}; use the version that wrote it, or remove it and build it again"
            )
    return document
