"""Layouts of observations: all channels together, or one value each, and the choice between them.

joint         time  hr   sbp          per_channel   time  channel  value
              0.0   71   120                        0.0   hr       71
              1.5   74   NaN                        0.0   sbp      120
                                                    1.5   hr       74
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from roma_core.schema import Layout
from roma_core.sources.base import RawSeries, Source, trait

_SAMPLE = 200  # series read to choose a layout
MAX_TIMES = 2_000_000  # that a grid is found from, and those of one series more
_MAX_OFF_GRID = 0.2  # of a step, by which a time may miss the grid
_MAX_STEPS = 2.0**24  # of a series, beyond which float32 counts no steps
_MIN_OBSERVED = 0.05  # of the channels at a time, down to which tokens hold all of them

Positions = NDArray[np.float64]
Values = NDArray[np.float32]
Rows = NDArray[np.int64]


def melt(positions: Positions, values: Values) -> tuple[Positions, Values, Rows]:
    """``(N, D)`` and ``(N, C)`` with NaN → ``(M, D + 1)``, ``(M, 1)`` and the ``(M,)`` row of each."""
    rows, channels = np.nonzero(~np.isnan(values))
    at = np.column_stack([positions[rows], channels.astype(np.float64)])
    return at, values[rows, channels][:, None], rows


def pivot(
    positions: Positions, values: Values, n_channels: int, targets: Values | None = None
) -> tuple[Positions, Values, Rows]:
    """The inverse of :func:`melt`: a row per position in order of appearance, and its first row.

    Nothing is lost: values of one channel at equal positions, and observations of different ``(N, K)``
    targets, stay apart.
    """
    places = positions[:, :-1] if targets is None else np.hstack([positions[:, :-1], targets])
    channels = positions[:, -1].astype(np.int64)
    order = np.lexsort([channels, *places.T[::-1]])
    places, channels = places[order], channels[order]
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (places[1:] != places[:-1]).any(axis=1)
    inverse = np.cumsum(is_new) - 1
    again = ~is_new
    again[1:] &= channels[1:] == channels[:-1]
    if again.any():
        at = np.arange(len(order))
        rank = at - np.maximum.accumulate(np.where(again, 0, at))
        inverse = np.unique(inverse * len(order) + rank, return_inverse=True)[1].reshape(-1)
    rows = np.full(inverse.max(initial=-1) + 1, len(order))
    np.minimum.at(rows, inverse, order)
    appearance = np.argsort(rows)
    joint = np.full((len(rows), n_channels), np.nan, np.float32)
    joint[inverse, channels] = values[order, 0]
    return positions[rows[appearance], :-1], joint[appearance], rows[appearance]


def choose_layout(
    wanted: Layout | Literal["auto"], source: Source, series: Iterable[RawSeries]
) -> tuple[Layout, str]:
    """The layout to store, and the reason; ``auto`` decides by the first of the cleaned series.

    Joint tokens, whose gaps the model fills by interpolation, did as well as tokens of one value down to
    a tenth of twelve channels, with fewer tokens; ``python -m tests.benchmarks.results
    japanese_vowels_by_channel`` measures them. With very many channels they would be nearly empty.
    """
    n_channels = len(source.channels)
    if wanted != "auto":
        return wanted, "as configured"
    if n_channels == 1:
        return trait(source, "layout"), "one channel"
    n_times = n_values = 0
    for one in itertools.islice(series, _SAMPLE):
        n_values += int((~np.isnan(one.values)).sum())
        n_times += n_times_of(one, trait(source, "layout"))
    if n_values == n_times * n_channels:
        return "joint", f"every observation has all {n_channels} channels"
    at_a_time = n_values / max(1, n_times)
    reason = f"{at_a_time:.1f} of {n_channels} channels are observed at a time"
    return ("joint" if at_a_time >= _MIN_OBSERVED * n_channels else "per_channel"), reason


@dataclass(frozen=True)
class Grid:
    """Equal steps that the times of all series lie on."""

    step: float  # in the unit of the axis
    fill: float  # observed share of the steps between the first and the last of each series


def grid_of(times: Iterable[NDArray[np.float64]]) -> Grid | None:
    """The grid of some series' ``(N,)`` times, or None; it may begin anywhere in each of them.

    No more of them are read once there are ``MAX_TIMES``.
    """
    ordered, n_times = [], 0
    for one in times:
        ordered.append(np.unique(one))
        if (n_times := n_times + len(one)) >= MAX_TIMES:
            break
    gaps = np.concatenate([np.diff(one) for one in ordered]) if ordered else np.zeros(0)
    if not len(gaps):
        return None
    step = gaps.sum() / np.round(gaps / gaps.min()).sum()
    places = [(one - one[0]) / step for one in ordered]
    if max(place[-1] for place in places) > _MAX_STEPS:
        return None
    if max(np.abs(place - place.round()).max() for place in places) > _MAX_OFF_GRID:
        return None
    n_steps = sum(float(place[-1].round()) + 1 for place in places)
    return Grid(float(step), sum(map(len, ordered)) / n_steps)


def n_times_of(series: RawSeries, layout: Layout) -> int:
    """Observations of a series in the ``joint`` layout; ``layout`` is that of the series."""
    if layout == "joint":
        return len(series.values)
    return len(np.unique(series.positions[:, :-1], axis=0))
