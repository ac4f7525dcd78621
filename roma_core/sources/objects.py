"""The objects of a long table, told by the object column alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roma_core.hashing import hash_text
from roma_core.schema import DataError
from roma_core.sources.columns import text

if TYPE_CHECKING:
    import pyarrow as pa


def keys_of(
    column: pa.Array, name: str, where: str, words: dict[int, str] | None = None
) -> NDArray[np.int64]:
    """One int64 per row that stands for the object: its id if that is a whole number, else a hash.

    Args:
        column: of ids.
        name: of the column, for errors.
        where: the file, for errors.
        words: filled with key → id where the id is text.

    Raises:
        DataError: a row has no id.
    """
    import pyarrow as pa

    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise DataError(
            f"{where}: column {name!r} is empty, at first in row {row} of those read at once; every "
            f"row needs an id"
        )
    if pa.types.is_integer(column.type) and column.type != pa.uint64():  # those fit in int64
        return column.cast(pa.int64()).to_numpy()
    coded = text(column).dictionary_encode()
    texts = [word.strip() for word in coded.dictionary.to_pylist()]
    if "" in texts:
        raise DataError(f"{where}: column {name!r} has an empty id; every row needs one")
    keys = np.array([hash_text(t) >> 1 for t in texts], dtype=np.int64)  # 63 bits
    if words is not None:
        words.update(zip(keys.tolist(), texts, strict=True))
    return keys[coded.indices.to_numpy()]


class ObjectIndex:
    """Objects in the order of their first row, and their numbers of rows.

    Memory grows with the number of objects, 24 bytes each, not with the rows.
    """

    def __init__(self) -> None:
        self.is_sorted = True
        self._keys = np.empty(0, np.int64)  # ascending
        self._ranks = np.empty(0, np.int64)  # place of each key in the order of appearance
        self._counts = np.empty(0, np.int64)
        self._last: int | None = None  # key of the last row so far

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, keys: NDArray[np.int64]) -> None:
        """Count more rows, ``(n,)`` keys in file order."""
        if len(keys) == 0:
            return
        starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
        run_keys, run_lengths = keys[starts], np.diff(starts, append=len(keys))
        distinct, first, inverse = np.unique(run_keys, return_index=True, return_inverse=True)
        counts = np.bincount(inverse, weights=run_lengths).astype(np.int64)
        places = np.searchsorted(self._keys, distinct)
        known = np.zeros(len(distinct), bool)
        inside = places < len(self._keys)
        known[inside] = self._keys[places[inside]] == distinct[inside]
        continued = distinct == self._last  # a run over the edge of two batches
        if len(distinct) < len(run_keys) or (known & ~continued).any():
            self.is_sorted = False
        if (known & continued).any() and run_keys[0] != self._last:
            self.is_sorted = False
        self._counts[places[known]] += counts[known]
        new = np.flatnonzero(~known)
        order = np.empty(len(new), np.int64)
        order[np.argsort(first[new])] = np.arange(len(new))
        at = places[new]
        self._ranks = np.insert(self._ranks, at, len(self._keys) + order)
        self._counts = np.insert(self._counts, at, counts[new])
        self._keys = np.insert(self._keys, at, distinct[new])
        self._last = int(keys[-1])

    def ranks(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """``(n,)`` place of each row's object in the order of first appearance."""
        return self._ranks[np.searchsorted(self._keys, keys)]

    def sizes(self) -> NDArray[np.int64]:
        """Rows of each object, in the order of first appearance."""
        sizes = np.empty(len(self), np.int64)
        sizes[self._ranks] = self._counts
        return sizes
