"""One pass over a source that is not built yet: how much there is, how long, how spread.

What stands in a ``Survey`` is what settings are chosen by; a built data set has a ``DataProfile``.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roma_core.data.arriving import Arrivals, RepairOptions
from roma_core.data.errors import DataError
from roma_core.data.schema import Repairs
from roma_core.data.sources import Source

_SAMPLE = 200_000  # observations that quantiles are taken from
_LENIENT = RepairOptions(unsorted="sort", duplicates="first", not_finite="drop", empty="drop")


@dataclass(frozen=True)
class ChannelSurvey:
    """Quantiles of the values of one channel as delivered.

    Attributes:
        spread: distance of the quartiles.
        reach: largest distance from the median.
        varies: whether it changes within any series; a channel that never does is a fact of the
            object and no measurement.
    """

    name: str
    median: float
    spread: float
    reach: float
    varies: bool


@dataclass(frozen=True)
class AxisSurvey:
    """Positions on one axis.

    Attributes:
        gap: median distance of neighbouring different positions; 0 if a series never has two.
        span: median distance from a series' smallest to its largest.
        farthest: largest absolute position.
    """

    name: str
    gap: float
    span: float
    farthest: float


@dataclass(frozen=True)
class Survey:
    """What a source holds."""

    n_series: int
    n_observations: int
    longest: int
    classes: dict[str, int]
    recorded_splits: dict[str, int]  # empty if the publisher made none
    has_groups: bool
    channels: tuple[ChannelSurvey, ...]
    axes: tuple[AxisSurvey, ...]
    repairs: Repairs | None

    @property
    def mean_length(self) -> float:
        return self.n_observations / self.n_series


def survey(source: Source) -> Survey:
    """Read a source once; unsorted, doubled and infinite observations are counted, not refused.

    Raises:
        DataError: there is no series, or one has a wrong shape or an unknown label.
    """
    arriving = Arrivals(source, _LENIENT)
    channels, axes = len(source.channels), len(source.axes)
    sample = _Sample(channels)
    classes: Counter[str] = Counter(dict.fromkeys(source.classes, 0))
    splits: Counter[str] = Counter()
    gaps, spans = [array("d") for _ in range(axes)], [array("d") for _ in range(axes)]
    farthest = np.zeros(axes)
    varies = np.zeros(channels, dtype=bool)
    n = total = longest = grouped = 0
    for series in arriving:
        n, total, longest = n + 1, total + len(series.values), max(longest, len(series.values))
        classes.update(filter(None, [series.label]))
        splits.update(filter(None, [series.recorded_split]))
        grouped += series.group is not None
        varies |= (series.values != series.values[:1]).any(axis=0)
        sample.add(series.values)
        farthest = np.maximum(farthest, np.abs(series.positions).max(axis=0))
        for k in range(axes):
            steps = np.diff(np.unique(series.positions[:, k]))
            gaps[k].append(float(np.median(steps)) if len(steps) else 0.0)
            spans[k].append(float(steps.sum()))
    if n == 0:
        raise DataError("the source has no series")
    return Survey(
        n_series=n,
        n_observations=total,
        longest=longest,
        classes=dict(classes),
        recorded_splits=dict(splits),
        has_groups=grouped > 0,
        channels=tuple(
            _channel(channel.name, sample.values()[:, k], bool(varies[k]))
            for k, channel in enumerate(source.channels)
        ),
        axes=tuple(
            AxisSurvey(axis.name, _median(gaps[k]), _median(spans[k]), float(farthest[k]))
            for k, axis in enumerate(source.axes)
        ),
        repairs=arriving.repairs(),
    )


class _Sample:
    """Every so many-th observation; half are let go whenever there are too many."""

    def __init__(self, n_channels: int) -> None:
        self._kept: list[NDArray[np.float32]] = []
        self._step, self._n, self._phase = 1, 0, 0
        self._width = n_channels

    def add(self, values: NDArray[np.float32]) -> None:
        chosen = values[self._phase :: self._step]
        self._phase = (self._phase - len(values)) % self._step
        self._kept.append(chosen.copy())
        self._n += len(chosen)
        if self._n > _SAMPLE:
            self._kept = [self.values()[::2]]
            self._n, self._step = len(self._kept[0]), self._step * 2

    def values(self) -> NDArray[np.float32]:
        if not self._kept:
            return np.empty((0, self._width), np.float32)
        self._kept = [np.concatenate(self._kept)]
        return self._kept[0]


def _channel(name: str, values: NDArray[np.float32], varies: bool) -> ChannelSurvey:
    low, median, high = np.quantile(values.astype(np.float64), (0.25, 0.5, 0.75))
    reach = float(np.abs(values - median).max())
    return ChannelSurvey(name, float(median), float(high - low), reach, varies)


def _median(numbers: array[float]) -> float:
    found = np.frombuffer(numbers)
    found = found[found > 0]
    return float(np.median(found)) if len(found) else 0.0
