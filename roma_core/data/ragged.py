"""Series of different lengths in one numpy batch, from the store through augmentation to the model.

Shapes:
    B series   T observations of all series   C numbers of an observation   D axes   K targets
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_OF_SERIES = ("labels", "series_targets", "covariates")  # optional fields


@dataclass(frozen=True)
class RaggedBatch:
    """Some series, one after the other, without padding."""

    values: NDArray[np.float32]  # (T, C), NaN where missing; for a model of tubelets, (T, P) tokens
    positions: NDArray[Any]  # (T, D) float64 as delivered, or float32 as the model takes them
    lengths: Ints  # (B,) observations of each series, at least 1
    ids: Ints  # (B,) stable names of the series
    labels: NDArray[Any] | None = None  # (B,) int64 or (B, K) float, one per series
    targets: NDArray[Any] | None = None  # (T,) or (T, K), one per observation
    series_targets: NDArray[np.float32] | None = None  # (B, K), one per series
    covariates: NDArray[np.float32] | None = None  # (B, K) of each series, NaN where missing

    @classmethod
    def of(
        cls,
        values: Sequence[NDArray[Any]],
        positions: Sequence[NDArray[Any]],
        ids: Sequence[int] | Ints,
    ) -> RaggedBatch:
        """Copy single series, each ``(N, C)`` and ``(N, D)``, into one batch."""
        return cls(
            np.ascontiguousarray(np.concatenate(values)),
            np.ascontiguousarray(np.concatenate(positions)),
            np.array([len(v) for v in values]),
            np.asarray(ids),
        )

    @cached_property
    def starts(self) -> Ints:
        """``(B,)`` row of the first observation of each series."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def series(self) -> Ints:
        """``(T,)`` index into ``lengths`` and ``ids`` of each observation's series."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def index(self) -> Ints:
        """``(T,)`` 0 for the first observation of each series."""
        return np.arange(len(self.series)) - np.repeat(self.starts, self.lengths)

    def select(self, kept: NDArray[np.bool_]) -> RaggedBatch:
        """The observations where ``(T,)`` kept is True; at least one of every series must be."""
        lengths = np.bincount(self.series[kept], minlength=len(self.lengths))
        return replace(self._take(np.flatnonzero(kept)), lengths=lengths)

    def reorder(self, order: Ints) -> RaggedBatch:
        """Series in another order, or fewer: ``(B,)`` indices into the present ones."""
        lengths = self.lengths[order]
        shift = self.starts[order] - (np.cumsum(lengths) - lengths)  # of each series' rows
        rows = np.arange(lengths.sum()) + np.repeat(shift, lengths)
        arrays = ((name, getattr(self, name)) for name in _OF_SERIES)
        own: dict[str, Any] = {name: array[order] for name, array in arrays if array is not None}
        return replace(self._take(rows), lengths=lengths, ids=self.ids[order], **own)

    def split(self) -> tuple[list[NDArray[np.float32]], list[NDArray[Any]]]:
        """Values and positions of each series."""
        return np.split(self.values, self.starts[1:]), np.split(self.positions, self.starts[1:])

    def _take(self, rows: Ints) -> RaggedBatch:
        """Only the ``(n,)`` rows given; ``lengths`` is not updated."""
        return replace(
            self,
            values=self.values.take(rows, axis=0),
            positions=self.positions.take(rows, axis=0),
            targets=None if self.targets is None else self.targets.take(rows, axis=0),
        )
