"""Fitting a channel's mean and standard deviation on the train split, in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from roma_core.schema import (
    Channel,
    ChannelNormalisation,
    DataError,
    DataSchema,
    Float32,
    Normaliser,
)


class Fit:
    """Mean and standard deviation per channel, in one pass over the train split."""

    def __init__(
        self, channels: Sequence[Channel], transforms: Sequence[ChannelNormalisation]
    ) -> None:
        """Begin with nothing seen.

        Args:
            channels: for the names in warnings.
            transforms: one per channel; their mean and std are ignored.
        """
        self.channels, self.transforms = channels, transforms
        schema = DataSchema(channels=(), axes=(), normalisation=tuple(transforms))
        self._transform = Normaliser(schema).transform
        self._n = 0
        self._mean = np.zeros(len(channels))
        self._squares = np.zeros(len(channels))  # sum of squared deviations from the mean
        self._low = np.full(len(channels), np.inf)
        self._high = np.full(len(channels), -np.inf)

    def add(self, chunk: Float32) -> None:
        """Take in ``(n, C)`` train observations; how they are cut into chunks does not matter."""
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
        """The transforms with mean and std set.

        They are rounded to 10 digits, so that computers whose arithmetic differs in the last bit
        agree on the data set's digest. A channel that never changes gets a std of 1, with a warning.

        Raises:
            DataError: there was no observation to fit on.
        """
        if self._n == 0:
            raise DataError("the train split has no observations; normalisation cannot be fitted")
        std = np.where(self._low == self._high, 0.0, np.sqrt(self._squares / self._n))
        for channel in (
            c for c, is_constant in zip(self.channels, std == 0, strict=True) if is_constant
        ):
            warnings.warn(
                f"channel {channel.name!r} never changes in the train split; its std is set to 1",
                stacklevel=2,
            )
        std[std == 0] = 1.0
        return tuple(
            t.model_copy(update={"mean": float(f"{m:.10g}"), "std": float(f"{s:.10g}")})
            for t, m, s in zip(self.transforms, self._mean, std, strict=True)
        )


def fit(
    chunks: Iterable[Float32],
    channels: Sequence[Channel],
    transforms: Sequence[ChannelNormalisation],
) -> tuple[ChannelNormalisation, ...]:
    """``Fit`` over chunks ``(n, C)`` that together are the whole train split."""
    fit = Fit(channels, transforms)
    for chunk in chunks:
        fit.add(chunk)
    return fit.result()
