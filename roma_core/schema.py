"""Schema shared by a model and its data: channels, axes, classes, and normalisation.

    values      (transform(value) - mean) / std        per channel, fitted on the train split
    positions   (position - anchor - offset) / scale   per axis
    covariates  (value - mean) / std                   per number of an object
    targets     (value - mean) / std                   per target, in the loss of a regression

A value that is missing is NaN. In the ``joint`` layout an observation has a value of every channel;
in ``per_channel`` it has the value of one, whose index is its position on the last axis.
All arithmetic is in float64; the result is rounded once. The served model repeats ``Normaliser``;
``ChannelFit`` and ``AxisScaleFit`` take means, standard deviations and scales from the train split.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

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
    categories: tuple[str, ...] = Field((), exclude_if=lambda categories: not categories)
    """Names of a categorical axis, in the order of their indices."""
    encoding: Literal["rotary", "embedding"] = Field(
        "rotary", exclude_if=lambda encoding: encoding == "rotary"
    )
    """How the model takes the axis: 'embedding' adds a learned vector per category."""
    unknown: bool = Field(False, exclude_if=lambda unknown: not unknown)
    """Whether other categories than these are accepted, as one learned 'unknown'; its index is that
    after the last."""
    anchor: Literal["none", "first"] = "none"
    """'first' subtracts each series' smallest position, so that dates such as MJD 60000.001 keep
    their fraction in float32."""
    offset: float = Field(0.0, description="Subtracted after anchoring, in `unit`.")
    scale: float = Field(1.0, gt=0)
    """Units of the axis per radian of the fastest rotation."""

    @model_validator(mode="after")
    def _categories_fit_the_encoding(self) -> Self:
        is_embedded = self.encoding == "embedding"
        if is_embedded and not self.categories:
            raise ValueError(
                f"axis {self.name!r} has encoding='embedding' but no categories; list them, or use 'rotary'"
            )
        if is_embedded and (self.anchor, self.offset, self.scale) != ("none", 0, 1):
            raise ValueError(
                f"axis {self.name!r} has encoding='embedding', whose positions are indices of categories; "
                f"leave anchor, offset and scale out"
            )
        if self.unknown and not is_embedded:
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
    transform_scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    """arcsinh(value / transform_scale)."""


class ChannelNormalisation(ChannelTransform):
    """``(transform(value) - mean) / std``; mean and std are those of the train split."""

    mean: float
    std: float = Field(gt=0)


class Covariate(Frozen):
    """A number or a category of a whole object, such as age, sex or redshift; it may be missing."""

    name: str
    unit: str = Field("1", description="Unit as delivered; '1' for a pure number.")
    categories: tuple[str, ...] = Field((), description="All its words; empty for a number.")
    mean: float = Field(0.0, description="Of a number, over the objects of the train split.")
    std: float = Field(1.0, gt=0)


class Target(Channel):
    """A number that a model may predict; data sets of before there was a scale have 0 and 1."""

    mean: float = Field(0.0, exclude_if=lambda mean: mean == 0, description="Over the train split.")
    std: float = Field(1.0, gt=0, exclude_if=lambda std: std == 1)


TargetLevel = Literal["observation", "series"]
Layout = Literal["joint", "per_channel"]
CHANNEL_AXIS = "channel"
"""Name of the axis that holds the channel's index in the ``per_channel`` layout."""


def channel_axis(channels: Sequence[Channel]) -> PositionAxis:
    """The last axis of the ``per_channel`` layout."""
    names = tuple(channel.name for channel in channels)
    unit = f"index of {', '.join(names)}"
    return PositionAxis(name=CHANNEL_AXIS, unit=unit, categories=names, encoding="embedding")


class DataSchema(Frozen):
    """Channels, axes, classes and normalisation of a data set; saved with a model's weights."""

    channels: tuple[Channel, ...]
    axes: tuple[PositionAxis, ...]
    layout: Layout = Field("joint", exclude_if=lambda layout: layout == "joint")
    missing_values: bool = Field(False, exclude_if=lambda missing: not missing)
    """Whether observations of the joint layout may lack the value of a channel."""
    normalise_by: str | None = Field(None, exclude_if=lambda axis: axis is None)
    """Axis with categories that have a normalisation each."""
    covariates: tuple[Covariate, ...] = Field((), exclude_if=lambda covariates: not covariates)
    classes: tuple[str, ...] = ()
    targets: tuple[Target, ...] = Field((), exclude_if=lambda targets: not targets)
    """Numbers that a model may predict; never its input."""
    target_level: TargetLevel = Field(
        "observation", exclude_if=lambda level: level == "observation"
    )
    """Whether every observation has the targets, or every series."""
    normalisation: tuple[ChannelNormalisation, ...]
    """One entry per number of an observation, in the order of `channels`; with `normalise_by` those
    of the first category, of the second, and so on."""

    @property
    def n_values(self) -> int:
        """Numbers of an observation, C: one per channel, or one in the ``per_channel`` layout."""
        return 1 if self.layout == "per_channel" else len(self.channels)

    @property
    def joint(self) -> DataSchema:
        """That of the same data in the joint layout."""
        if self.layout == "joint":
            return self
        changes = {"layout": "joint", "axes": self.given_axes, "normalise_by": None}
        return self.model_copy(update=changes | {"missing_values": True})

    @property
    def needs_version_3(self) -> bool:
        """Whether older versions of the software cannot read a data set of this schema."""
        has_categories = any(axis.categories for axis in self.axes)
        return bool(self.covariates) or self.missing_values or has_categories

    @property
    def normalisation_axis(self) -> int | None:
        """Index of the axis ``normalise_by``."""
        if self.normalise_by is None:
            return None
        return [axis.name for axis in self.axes].index(self.normalise_by)

    @property
    def units(self) -> dict[str, str]:
        """Name → unit of axes, channels and covariates that are numbers."""
        units = {axis.name: axis.unit for axis in self.axes if not axis.categories}
        units |= {channel.name: channel.unit for channel in self.channels}
        return units | {one.name: one.unit for one in self.covariates if not one.categories}

    @property
    def given_axes(self) -> tuple[PositionAxis, ...]:
        """The axes whose positions are delivered: all but that of channels."""
        return self.axes[:-1] if self.layout == "per_channel" else self.axes


class Normaliser:
    """Normalisation by a schema, prepared as arrays for use on many series."""

    def __init__(self, schema: DataSchema) -> None:
        entries, self._group_axis = schema.normalisation, schema.normalisation_axis
        n_values = len(entries) if self._group_axis is None else schema.n_values
        shape = (len(entries) // n_values if n_values else 1, n_values)  # (G, C)
        self._mean = np.array([entry.mean for entry in entries]).reshape(shape)
        self._std = np.array([entry.std for entry in entries]).reshape(shape)
        # scale of arcsinh, NaN for identity
        scales = [e.transform_scale if e.transform == "arcsinh" else np.nan for e in entries]
        self._arcsinh = np.array(scales, dtype=np.float64).reshape(shape)
        self._means, self._stds = _tiled(self._mean[0]), _tiled(self._std[0])
        self._covariate_mean = np.array([c.mean for c in schema.covariates])  # (K,)
        self._covariate_std = np.array([c.std for c in schema.covariates])  # (K,)
        self._first = [k for k, axis in enumerate(schema.axes) if axis.anchor == "first"]
        self._offset = np.array([axis.offset for axis in schema.axes])  # (D,)
        free = np.array([axis.anchor != "first" for axis in schema.axes], dtype=bool)
        self._offsets = _tiled(np.where(free, self._offset, 0.0))
        self._scales = _tiled(np.array([axis.scale for axis in schema.axes]))

    def normalise(self, values: Float32, positions: Float64 | None = None) -> Float32:
        """``(T, C)`` values as delivered to ``(T, C)`` float32 of about zero mean, unit spread.

        ``positions`` ``(T, D)`` as delivered are needed with ``normalise_by``. NaN stays NaN.
        """
        assert values.shape[-1] == self._mean.shape[1], "another number of values than the schema's"
        x = self.transform(values, positions)
        if (group := self._groups(positions)) is None:
            _shift_and_scale(x, self._means, self._stds)
        else:
            x -= self._mean[group]
            x /= self._std[group]
        return x.astype(np.float32)

    def transform(self, values: Float32, positions: Float64 | None = None) -> Float64:
        """``(T, C)`` values as delivered to ``(T, C)`` float64, before mean and std are applied."""
        x = values.astype(np.float64, order="C")
        for k, scale in self._scales_of_arcsinh(positions):
            chosen = np.arcsinh(x[..., k] / scale)
            x[..., k] = np.where(np.isnan(scale), x[..., k], chosen)
        return x

    def denormalise(self, values: Float32, positions: Float64 | None = None) -> Float32:
        """The inverse of :meth:`normalise`: ``(T, C)`` of the model to float32 in delivered units."""
        x = self._scaled_back(values, positions)
        for k, scale in self._scales_of_arcsinh(positions):
            x[..., k] = np.where(np.isnan(scale), x[..., k], np.sinh(x[..., k]) * scale)
        return x.astype(np.float32)

    def slope(self, values: Float32, positions: Float64 | None = None) -> Float32:
        """Derivative of :meth:`denormalise` at ``(T, C)``: the factor of standard deviations."""
        group = self._groups(positions)
        slope = np.broadcast_to(self._std[0 if group is None else group], values.shape).copy()
        inner = self._scaled_back(values, positions)
        for k, scale in self._scales_of_arcsinh(positions):
            slope[..., k] *= np.where(np.isnan(scale), 1.0, np.cosh(inner[..., k]) * scale)
        return slope.astype(np.float32)

    def _groups(self, positions: Float64 | None) -> NDArray[np.int64] | None:
        """``(T,)`` row of ``mean`` and ``std`` for each observation; None if there is only one."""
        if self._group_axis is None:
            return None
        assert positions is not None, "normalise_by needs positions"
        return positions[..., self._group_axis].astype(np.int64)

    def _scales_of_arcsinh(self, positions: Float64 | None) -> Iterator[tuple[int, Float64]]:
        """Columns with arcsinh, and its scale: one, or ``(T,)`` with NaN where there is none."""
        group = self._groups(positions)
        for k in np.flatnonzero(~np.isnan(self._arcsinh).all(axis=0)).tolist():
            yield k, self._arcsinh[0 if group is None else group, k]

    def _scaled_back(self, values: Float32, positions: Float64 | None) -> Float64:
        group = self._groups(positions)
        row = 0 if group is None else group
        return values.astype(np.float64) * self._std[row] + self._mean[row]

    def normalise_covariates(self, covariates: Float32) -> Float32:
        """``(B, K)`` covariates as delivered to float32: numbers normalised, categories as they are."""
        return ((covariates - self._covariate_mean) / self._covariate_std).astype(np.float32)

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
    """Running mean and standard deviation of every number of an observation, missing ones left out.

    With groups, each of them has its own. (Chan et al. 1979, pairwise update)
    """

    def __init__(
        self,
        names: Sequence[str],
        transforms: Sequence[ChannelTransform],
        n_values: int,
        group_axis: int | None = None,
        pooled: bool = False,
    ) -> None:
        """``names`` and ``transforms`` of every number of the first group, of the second, and so on.

        ``group_axis`` is the axis whose positions are indices of groups; None: one group. ``pooled``:
        the last group is of all values, and stands for groups without any.
        """
        self.names, self.group_axis, self.pooled = names, group_axis, pooled
        self.entries = [
            ChannelNormalisation(**t.model_dump(), mean=0.0, std=1.0) for t in transforms
        ]
        shape = (len(names) // n_values, n_values)
        self._n = np.zeros(shape)
        self._mean = np.zeros(shape)
        self._squares = np.zeros(shape)  # sum of squared deviations from the mean
        self._low, self._high = np.full(shape, np.inf), np.full(shape, -np.inf)
        # the transform of one group at a time
        rows = [self.entries[k : k + n_values] for k in range(0, len(names), n_values)]
        self._transforms = [
            Normaliser(DataSchema(channels=(), axes=(), normalisation=tuple(row))).transform
            for row in rows
        ]

    def add(self, values: Float32, positions: Float64) -> None:
        """Add ``(n, C)`` observations of train at ``(n, D)``; their order and cut do not matter."""
        if self.group_axis is None or self.pooled:
            self._add(-1, values)
        if self.group_axis is not None:
            groups = positions[:, self.group_axis].astype(np.int64)
            for group in np.unique(groups).tolist():
                self._add(group, values[groups == group])

    def _add(self, group: int, values: Float32) -> None:
        if len(values) == 0:
            return
        x = self._transforms[group](values)  # (n, C)
        observed = ~np.isnan(x)
        if observed.all():
            n: Any = float(len(x))
            mean = x.mean(axis=0)
            squares = ((x - mean) ** 2).sum(axis=0)
        else:
            n = observed.sum(axis=0)
            mean = np.where(observed, x, 0.0).sum(axis=0) / np.maximum(n, 1)
            squares = np.where(observed, (x - mean) ** 2, 0.0).sum(axis=0)
        shift, before = mean - self._mean[group], self._n[group]
        total = np.maximum(before + n, 1)
        self._squares[group] += squares + shift**2 * before * n / total
        self._mean[group] += shift * n / total
        self._n[group] += n
        self._low[group] = np.fmin(self._low[group], np.fmin.reduce(x))
        self._high[group] = np.fmax(self._high[group], np.fmax.reduce(x))

    def result(self) -> tuple[ChannelNormalisation, ...]:
        """The transforms with mean and std, rounded to 10 digits so that the digest is reproducible.

        A constant channel gets a std of 1, with a warning. DataError: no observation was added, or
        none of a channel.
        """
        if not self._n.any():
            raise DataError("the train split has no observations; normalisation cannot be fitted")
        if self.pooled:
            for each in (self._mean, self._squares, self._low, self._high, self._n):
                np.copyto(each, each[-1], where=self._n == 0)
        if never := [name for name, n in zip(self.names, self._n.flat, strict=True) if n == 0]:
            raise DataError(
                f"{', '.join(never)}: no value is observed in the train split, so that nothing can be "
                f"learned about it; leave it out of the channels or categories, or change the split"
            )
        n = np.maximum(self._n, 1)
        std = np.where(self._low == self._high, 0.0, np.sqrt(self._squares / n)).ravel()
        for k in np.flatnonzero(std == 0).tolist():
            warnings.warn(
                f"{self.names[k]} never changes in the train split; its std is set to 1",
                stacklevel=2,
            )
        std[std == 0] = 1.0
        return tuple(
            t.model_copy(update={"mean": float(f"{m:.10g}"), "std": float(f"{s:.10g}")})
            for t, m, s in zip(self.entries, self._mean.flat, std, strict=True)
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
