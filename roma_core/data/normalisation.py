"""Fitting normalisation on the train split in one pass: mean and std of channels, scales of axes."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from roma_core.schema import Channel, ChannelNormalisation, DataError, DataSchema, Normaliser

_TURN = 6000.0  # scales that the slowest rotation needs for most of a turn


class ChannelFit:
    """Running mean and standard deviation per channel (Chan et al. 1979, pairwise update)."""

    def __init__(
        self, channels: Sequence[Channel], transforms: Sequence[ChannelNormalisation]
    ) -> None:
        self.channels, self.transforms = channels, transforms
        schema = DataSchema(channels=(), axes=(), normalisation=tuple(transforms))
        self._transform = Normaliser(schema).transform
        self._n = 0
        self._mean = np.zeros(len(channels))
        self._squares = np.zeros(len(channels))  # sum of squared deviations from the mean
        self._low = np.full(len(channels), np.inf)
        self._high = np.full(len(channels), -np.inf)

    def add(self, chunk: NDArray[np.float32]) -> None:
        """Add ``(n, C)`` observations of train; how they are cut into chunks does not matter."""
        if len(chunk) == 0:
            return
        x = self._transform(chunk)  # (n, C)
        chunk_mean = x.mean(axis=0)
        shift = chunk_mean - self._mean
        total = self._n + len(x)
        self._squares += ((x - chunk_mean) ** 2).sum(axis=0) + shift**2 * self._n * len(x) / total
        self._mean += shift * len(x) / total
        self._n = total
        self._low = np.minimum(self._low, x.min(axis=0))
        self._high = np.maximum(self._high, x.max(axis=0))

    def result(self) -> tuple[ChannelNormalisation, ...]:
        """The transforms with mean and std, rounded to 10 digits so that the digest is reproducible.

        A constant channel gets a std of 1, with a warning. DataError: no observation was added.
        """
        if self._n == 0:
            raise DataError("the train split has no observations; normalisation cannot be fitted")
        std = np.where(self._low == self._high, 0.0, np.sqrt(self._squares / self._n))
        for k in np.flatnonzero(std == 0).tolist():
            warnings.warn(
                f"channel {self.channels[k].name!r} never changes in the train split; its std is set to 1",
                stacklevel=2,
            )
        std[std == 0] = 1.0
        return tuple(
            t.model_copy(update={"mean": float(f"{m:.10g}"), "std": float(f"{s:.10g}")})
            for t, m, s in zip(self.transforms, self._mean, std, strict=True)
        )


class AxisScaleFit:
    """Scale of one axis (``scale: auto``): the typical gap, or more for series that span long."""

    def __init__(self) -> None:
        self._gaps = array("d")  # the median gap of each series
        self._spans = array("d")

    def add(self, positions: NDArray[np.float64]) -> None:
        """``(N,)`` positions of one series on the axis, in any order."""
        gaps = np.diff(np.sort(positions))
        gaps = gaps[gaps > 0]
        if len(gaps):
            self._gaps.append(float(np.median(gaps)))
            self._spans.append(float(gaps.sum()))

    def scale(self) -> float:
        """The scale, to two digits, so that a few more series do not change it; 1 without gaps."""
        if not self._gaps:
            return 1.0
        gap = float(np.median(np.frombuffer(self._gaps)))
        span = float(np.quantile(np.frombuffer(self._spans), 0.95))
        return float(f"{max(gap, span / _TURN):.2g}")
