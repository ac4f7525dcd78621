"""Whether a source may have changed, without reading it: names, sizes and times of its files.

An equal fingerprint means that nothing was delivered. Another one only says that it is worth
building: the data set's digest, which is of the content, decides.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from roma_core.data.config import DatasetConfig
from roma_core.files import digest_of


class Fingerprint(NamedTuple):
    """``newest`` is the time of the newest file, seconds since the epoch; 0 without files."""

    digest: str
    n_files: int
    newest: float


def source_fingerprint(config: DatasetConfig) -> Fingerprint:
    """Of every local file that the configuration names, and of the configuration itself.

    A source without local files (a pinned package, generated data) changes with its settings alone.
    """
    files = fingerprint_of(_paths(config.source))
    document = [config.model_dump(mode="json"), files.digest]
    return files._replace(digest=digest_of(document)[:32])


def fingerprint_of(patterns: Iterable[Path]) -> Fingerprint:
    """Of files, of those that match patterns, and of all files below folders.

    Links to nothing, and files that go meanwhile, are passed over.
    """
    found = sorted(
        {(str(path), status.st_size, status.st_mtime_ns) for path, status in _files(patterns)}
    )
    newest = max((mtime for _, _, mtime in found), default=0) / 1e9
    return Fingerprint(digest_of(found)[:32], len(found), newest)


def _paths(value: Any) -> Iterator[Path]:
    """Every path in a configuration, whatever its kind of source calls it."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name))
    elif isinstance(value, dict):
        for one in value.values():
            yield from _paths(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _paths(one)


def _files(patterns: Iterable[Path]) -> Iterator[tuple[Path, os.stat_result]]:
    for pattern in patterns:
        for name in glob.glob(str(pattern)):  # noqa: PTH207 - may be absolute
            for path in _below(Path(name)):
                with contextlib.suppress(FileNotFoundError):  # a dangling link, or it went since
                    yield path, path.stat()


def _below(path: Path) -> Iterator[Path]:
    """A file itself, or all files below a folder."""
    if not path.is_dir():
        yield path
    for where, _, names in os.walk(path):
        yield from (Path(where) / name for name in names)
