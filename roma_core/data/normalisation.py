"""From delivered numbers to what the model sees, and back.

    values     (transform(value) - mean) / std        per channel, fitted on the train split
    positions  (position - anchor - offset) / scale   per axis

All arithmetic is in float64 and the result is rounded to float32 once. The served model repeats
``Normaliser`` in its own file, so this one holds numpy and nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from roma_core.data.schema import Channel, ChannelNormalisation, DataError, DataSchema, PositionAxis

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
_TILE = 2048  # numbers


class Normaliser:
    """A schema's numbers as arrays, for use on many series."""

    def __init__(self, schema: DataSchema) -> None:
        entries = schema.normalisation
        self._mean = np.array([entry.mean for entry in entries])  # (C,)
        self._std = np.array([entry.std for entry in entries])  # (C,)
        self._means, self._stds = _tiled(self._mean), _tiled(self._std)
        self._arcsinh = [
            (k, e.transform_scale) for k, e in enumerate(entries) if e.transform == "arcsinh"
        ]
        self._first = [k for k, axis in enumerate(schema.axes) if axis.anchor == "first"]
        self._offset = np.array([axis.offset for axis in schema.axes])  # (D,)
        free = np.array([axis.anchor != "first" for axis in schema.axes], dtype=bool)
        self._offsets = _tiled(np.where(free, self._offset, 0.0))
        self._scales = _tiled(np.array([axis.scale for axis in schema.axes]))

    def normalise(self, values: Float32) -> Float32:
        """``(…, C)`` values as delivered to ``(…, C)`` float32 of about zero mean, unit spread."""
        assert values.shape[-1] == len(self._mean), "another number of channels than the schema's"
        x = self.transform(values)
        _shift_and_scale(x, self._means, self._stds)
        return x.astype(np.float32)

    def transform(self, values: Float32) -> Float64:
        """``(…, C)`` values as delivered to ``(…, C)`` float64, before mean and std are applied."""
        x = values.astype(np.float64, order="C")
        for k, scale in self._arcsinh:
            x[..., k] = np.arcsinh(x[..., k] / scale)
        return x

    def denormalise(self, values: Float32) -> Float32:
        """The way back: ``(…, C)`` of the model's to ``(…, C)`` float32 in delivered units."""
        x = values.astype(np.float64) * self._std + self._mean
        for k, scale in self._arcsinh:
            x[..., k] = np.sinh(x[..., k]) * scale
        return x.astype(np.float32)

    def slope(self, values: Float32) -> Float32:
        """Derivative of :meth:`denormalise` at ``(…, C)`` of the model's: what turns deviations back."""
        slope = np.broadcast_to(self._std, values.shape).copy()
        for k, scale in self._arcsinh:
            inner = values[..., k].astype(np.float64) * self._std[k] + self._mean[k]
            slope[..., k] *= np.cosh(inner) * scale
        return slope.astype(np.float32)

    def anchored(self, positions: Float64, lengths: NDArray[np.int64] | None = None) -> Float32:
        """``(T, D)`` positions as delivered to ``(T, D)`` float32 for the model.

        Args:
            positions: of one series, or of several, one after the other.
            lengths: ``(B,)`` observations of each, at least 1; None for one series.
        """
        x = positions.astype(np.float64, order="C")
        for k in self._first:
            if lengths is None:
                x[:, k] -= self._offset[k] + positions[:, k].min()
            else:
                least = np.minimum.reduceat(positions[:, k], np.cumsum(lengths) - lengths)  # (B,)
                x[:, k] -= np.repeat(self._offset[k] + least, lengths)
        _shift_and_scale(x, self._offsets, self._scales)
        return x.astype(np.float32)


def _tiled(row: Float64) -> Float64:
    """A row of C numbers again and again, about ``_TILE`` numbers in all."""
    return np.tile(row, max(1, _TILE // max(1, len(row))))


def _shift_and_scale(x: Float64, shift: Float64, scale: Float64) -> None:
    """``(x - shift) / scale`` in place: ``x`` (…, C) in memory order, the others rows from ``_tiled``.

    Broadcasting a row of two numbers over thousands of rows costs ten times what long runs do.
    """
    flat, run = x.reshape(-1), len(shift)
    if len(flat) > run:
        whole = len(flat) // run * run
        runs = flat[:whole].reshape(-1, run)
        runs -= shift
        runs /= scale
        flat = flat[whole:]
    flat -= shift[: len(flat)]
    flat /= scale[: len(flat)]


def normalise(values: Float32, schema: DataSchema) -> Float32:
    """``Normaliser.normalise`` for a single use."""
    return Normaliser(schema).normalise(values)


def denormalise(values: Float32, schema: DataSchema) -> Float32:
    """``Normaliser.denormalise`` for a single use."""
    return Normaliser(schema).denormalise(values)


def anchored_positions(positions: Float64, axes: Sequence[PositionAxis]) -> Float32:
    """``Normaliser.anchored`` for a single use."""
    schema = DataSchema(channels=(), axes=tuple(axes), normalisation=())
    return Normaliser(schema).anchored(positions)


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
