"""Schema shared by a model and its data: channels, axes, classes, and normalisation.

    values     (transform(value) - mean) / std        per channel, fitted on the train split
    positions  (position - anchor - offset) / scale   per axis

All arithmetic is in float64; the result is rounded once. The served model repeats ``Normaliser``;
``ChannelFit`` and ``AxisScaleFit`` take means, standard deviations and scales from the train split.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from roma_core.settings import Frozen

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
_TILE = 2048  # numbers
_TURN = 6000.0  # scales that the slowest rotation needs for most of a turn


class DataError(ValueError):
    """Data, or a description of data, that cannot be used; the text names the object or the file,
    what was expected, what came, and what to do."""


class Channel(Frozen):
    """One measured quantity of an observation."""

    name: str
    unit: str = Field(description="Unit of the values as delivered; '1' for a pure number.")


class PositionAxis(Frozen):
    """One coordinate of an observation: time, a position in space, or a category such as the band.

    On a categorical axis a position is the index of its category, an integer from 0.
    """

    name: str
    unit: str = Field(description="Unit of the positions as delivered.")
    categories: tuple[str, ...] = Field(
        (),
        exclude_if=lambda categories: not categories,
        description="Names of a categorical axis, in the order of their indices.",
    )
    encoding: Literal["rotary", "embedding"] = Field(
        "rotary",
        exclude_if=lambda encoding: encoding == "rotary",
        description="How the model takes the axis: 'embedding' adds a learned vector per category.",
    )
    unknown: bool = Field(
        False,
        exclude_if=lambda unknown: not unknown,
        description="Whether other categories than these are accepted, as one learned 'unknown'; its "
        "index is that after the last.",
    )
    anchor: Literal["none", "first"] = Field(
        "none",
        description="'first' subtracts each series' smallest position, so that dates such as "
        "MJD 60000.001 keep their fraction in float32.",
    )
    offset: float = Field(0.0, description="Subtracted after anchoring, in `unit`.")
    scale: float = Field(
        1.0, gt=0, description="Units of the axis per radian of the fastest rotation."
    )

    @model_validator(mode="after")
    def _categories_fit_the_encoding(self) -> Self:
        if self.encoding == "embedding" and not self.categories:
            raise ValueError(
                f"axis {self.name!r} has encoding='embedding' but no categories; list them, or use 'rotary'"
            )
        if self.encoding == "embedding" and (self.anchor, self.offset, self.scale) != (
            "none",
            0,
            1,
        ):
            raise ValueError(
                f"axis {self.name!r} has encoding='embedding', whose positions are indices of categories; "
                f"leave anchor, offset and scale out"
            )
        if self.unknown and self.encoding != "embedding":
            raise ValueError(
                f"axis {self.name!r}: unknown categories need encoding='embedding', which learns a vector "
                f"for them"
            )
        return self

    @property
    def n_embedded(self) -> int:
        """Learned vectors of the axis; 0 with rotary encoding."""
        return 0 if self.encoding == "rotary" else len(self.categories) + self.unknown


class ChannelTransform(Frozen):
    """Transform of the values of one channel, applied before mean and std are computed."""

    transform: Literal["identity", "arcsinh"] = "identity"
    transform_scale: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="arcsinh(value / transform_scale)."
    )


class ChannelNormalisation(ChannelTransform):
    """``(transform(value) - mean) / std``; mean and std are those of the train split."""

    mean: float
    std: float = Field(gt=0)


class DataSchema(Frozen):
    """Channels, axes, classes and normalisation of a data set; saved with a model's weights."""

    channels: tuple[Channel, ...]
    axes: tuple[PositionAxis, ...]
    classes: tuple[str, ...] = ()
    targets: tuple[Channel, ...] = Field(
        (),
        exclude_if=lambda targets: not targets,
        description="Numbers of every observation that a model may predict; never its input.",
    )
    normalisation: tuple[ChannelNormalisation, ...] = Field(
        description="One entry per channel, in the order of `channels`."
    )

    @property
    def units(self) -> dict[str, str]:
        """Axis or channel name → unit."""
        axes = {axis.name: axis.unit for axis in self.axes}
        return axes | {channel.name: channel.unit for channel in self.channels}


class Normaliser:
    """Normalisation by a schema, prepared as arrays for use on many series."""

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
        """The inverse of :meth:`normalise`: ``(…, C)`` of the model to float32 in delivered units."""
        x = values.astype(np.float64) * self._std + self._mean
        for k, scale in self._arcsinh:
            x[..., k] = np.sinh(x[..., k]) * scale
        return x.astype(np.float32)

    def slope(self, values: Float32) -> Float32:
        """Derivative of :meth:`denormalise` at ``(…, C)``: the factor of standard deviations."""
        slope = np.broadcast_to(self._std, values.shape).copy()
        for k, scale in self._arcsinh:
            inner = values[..., k].astype(np.float64) * self._std[k] + self._mean[k]
            slope[..., k] *= np.cosh(inner) * scale
        return slope.astype(np.float32)

    def normalise_positions(
        self, positions: Float64, lengths: NDArray[np.int64] | None = None
    ) -> Float32:
        """``(T, D)`` positions as delivered to ``(T, D)`` float32 for the model.

        Of one series, or of several of ``(B,)`` lengths, at least 1 each, one after the other.
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

    def add(self, chunk: Float32) -> None:
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
    """Gaps and spans of series on one axis, and the scale (``scale: auto``) that suits them."""

    def __init__(self) -> None:
        self._gaps = array("d")  # the median gap of each series
        self._spans = array("d")

    def add(self, positions: Float64) -> None:
        """``(N,)`` positions of one series on the axis, in any order."""
        gaps = np.diff(np.sort(positions))
        gaps = gaps[gaps > 0]
        if len(gaps):
            self._gaps.append(float(np.median(gaps)))
            self._spans.append(float(gaps.sum()))

    def gap(self) -> float:
        """Median over the series of their median gap; 0 if none has two different positions."""
        return float(np.median(np.frombuffer(self._gaps))) if self._gaps else 0.0

    def span(self, quantile: float) -> float:
        """Quantile of the distances from a series' first position to its last; 0 without any."""
        return float(np.quantile(np.frombuffer(self._spans), quantile)) if self._spans else 0.0

    def scale(self) -> float:
        """The typical gap, or more for series that span long; 1 without gaps.

        It has two digits, so that a few more series do not change it.
        """
        return float(f"{max(self.gap(), self.span(0.95) / _TURN):.2g}") or 1.0


def _tiled(row: Float64) -> Float64:
    """A row of C numbers repeated to about ``_TILE`` numbers."""
    return np.tile(row, max(1, _TILE // max(1, len(row))))


def _shift_and_scale(x: Float64, shift: Float64, scale: Float64) -> None:
    """``(x - shift) / scale`` in place: ``x`` (…, C) in memory order, the others rows from ``_tiled``.

    Broadcasting a row of two numbers over thousands of rows takes ten times as long.
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
