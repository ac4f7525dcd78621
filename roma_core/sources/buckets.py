"""Sorting rows by object on disk, with memory for one bucket of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST = 256  # open files


class Buckets:
    """Rows of consecutive objects share a bucket, a file of their own.

    Args:
        folder: empty, for the files.
        sizes: ``(n_objects,)`` rows of each object, in the wanted order of objects.
        rows: a bucket aims at; more where the data would need more than 256 buckets, or for an
            object that is larger by itself.
    """

    def __init__(self, folder: Path, sizes: NDArray[np.int64], rows: int) -> None:
        ends = np.cumsum(sizes)
        rows = max(rows, -(-int(ends[-1]) // _MOST))
        self._bucket_of = ((ends - 1) // rows).astype(np.int64)  # (n_objects,)
        self._paths = [folder / f"{k:03d}" for k in range(int(self._bucket_of[-1]) + 1)]
        self._kind: np.dtype[Any] | None = None

    def add(self, ranks: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Put ``(n,)`` structured rows into the buckets of their objects, ``(n,)`` ranks."""
        self._kind = np.dtype([("rank", np.int64), ("row", rows.dtype)])
        both = np.empty(len(rows), dtype=self._kind)
        both["rank"], both["row"] = ranks, rows
        buckets = self._bucket_of[ranks]
        order = np.argsort(buckets, kind="stable")
        buckets, both = buckets[order], both[order]
        starts = np.flatnonzero(np.diff(buckets, prepend=-1))
        for a, b in zip(starts, [*starts[1:], len(both)], strict=True):
            with self._paths[buckets[a]].open("ab") as file:
                file.write(both[a:b].data)

    def sorted_blocks(self) -> Iterator[NDArray[Any]]:
        """The rows of bucket after bucket, those of an object together and in the order added."""
        assert self._kind is not None, "nothing was added"
        for path in self._paths:
            if path.exists():
                both = np.fromfile(path, dtype=self._kind)
                path.unlink()
                yield both["row"][np.argsort(both["rank"], kind="stable")]
