"""Series on their way in: each is checked, repaired where that is allowed, or refused by name.

What may be repaired is a choice of the data set's configuration; every repair is counted, and the
counts stand in the manifest.

Leaving whole observations out, so that regular data becomes irregular.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from roma_core.data.schema import Repairs
from roma_core.hashing import hash_ints, hash_text
from roma_core.schema import DataError
from roma_core.sources.base import RawSeries, Source, targets_of


def n_dropped(n_observations: int, rate: float) -> int:
    """How many of a series' observations go: ⌊rate · n⌋, which always leaves at least one.

    Raises:
        ValueError: ``rate`` is not in ``[0, 1)``.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop rate must be in [0, 1), got {rate}")
    n = math.floor(rate * n_observations + 1e-9)  # 0.29 * 100 is 28.999999999999996
    return min(n, n_observations - 1)


def kept(n_observations: int, rate: float, seed: int, object_id: str) -> NDArray[np.bool_]:
    """Which observations stay: ``(N,)`` bool, False for exactly ``n_dropped(N, rate)`` of them.

    Every choice of that many observations is equally likely. All channels of an observation go or
    stay together.
    """
    n = n_dropped(n_observations, rate)
    noise = hash_ints(seed, hash_text(object_id), np.arange(n_observations))  # (N,)
    stays = np.ones(n_observations, dtype=bool)
    stays[np.argsort(noise, kind="stable")[:n]] = False
    return stays


def assert_dropped(rate: float, lengths_before: NDArray[np.int64], n_after: int) -> int:
    """The number of observations left out of a whole data set, checked.

    Args:
        rate: the drop rate asked for.
        lengths_before: ``(n_series,)`` lengths as delivered.
        n_after: observations that are left.

    Raises:
        DataError: another number is gone than the rate demands, or the rate demands a drop and the
            series are too short for it to take anything.
    """
    gone = int(lengths_before.sum()) - n_after
    demanded = sum(n_dropped(int(n), rate) for n in lengths_before) if rate > 0 else 0
    if gone != demanded:
        raise DataError(f"a drop of {rate:.0%} should take {demanded} observations, it took {gone}")
    if rate > 0 and gone == 0:
        raise DataError(
            f"a drop of {rate:.0%} takes nothing: the longest series has {lengths_before.max()} "
            f"observations; set drop_rate to 0 or use longer series"
        )
    return gone


class RepairOptions(BaseModel):
    """What is done about series that are not as they should be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unsorted: Literal["sort", "keep", "refuse"] = Field(
        "sort", description="Observations not in order of the first axis: sort them, stably."
    )
    duplicates: Literal["refuse", "first", "mean", "keep"] = Field(
        "refuse",
        description="Observations of one series at equal positions on all axes: keep the first, or "
        "the mean of their values. To a masked model, a copy gives the hidden number away.",
    )
    not_finite: Literal["refuse", "drop"] = Field(
        "refuse", description="Observations with a number that is missing, infinite or too large."
    )
    empty: Literal["refuse", "drop"] = Field("refuse", description="Series without observations.")


class SeriesCleaner:
    """The usable series of a source, and a count of what was repaired.

    Attributes:
        counts: number of repairs of each kind so far.
    """

    def __init__(self, source: Source, options: RepairOptions) -> None:
        self.source, self.options = source, options
        self.counts = dict.fromkeys(Repairs.model_fields, 0)
        self._classes = frozenset(source.classes)
        self._n_targets = len(targets_of(source))
        self._from = f" of {next(iter(source.files))}" if len(source.files) == 1 else ""

    def __iter__(self) -> Iterator[RawSeries]:
        """Check and repair every series of the source.

        Raises:
            DataError: a series has no id, a wrong shape, an unknown label, or something that is to
                be refused; the text names it.
        """
        for series in self.source.read():
            self._check(series)
            usable = self._repaired(series)
            if usable is not None:
                yield usable

    def _who(self, name: str) -> str:
        return f"series {name!r}{self._from}"

    def repairs(self) -> Repairs | None:
        """What was repaired; None if nothing was."""
        return Repairs(**self.counts) if any(self.counts.values()) else None

    def _check(self, series: RawSeries) -> None:
        if not series.id:
            raise DataError("a series has no id, or it is empty; every object needs one of its own")
        who = self._who(series.id)
        n = len(series.values)
        columns: list[tuple[str, NDArray[Any], int]] = [
            ("positions", series.positions, len(self.source.axes)),
            ("values", series.values, len(self.source.channels)),
        ]
        if (series.targets is None) != (self._n_targets == 0):
            raise DataError(
                f"{who} has {'no' if series.targets is None else 'some'} targets, its source declares "
                f"{self._n_targets or 'none'}"
            )
        if series.targets is not None:
            columns.append(("targets", series.targets, self._n_targets))
        for what, array, width in columns:
            if array.shape != (n, width):
                raise DataError(
                    f"{who}: {what} have the shape {array.shape}, expected {(n, width)}"
                )
        classes = self.source.classes
        if classes and series.label not in self._classes:
            raise DataError(
                f"{who} has the label {series.label!r}, which is none of its {len(classes)} classes "
                f"{', '.join(classes)}; append it to them, or leave the series out"
            )
        if not classes and series.label is not None:
            raise DataError(
                f"{who} has the label {series.label!r}, but its source declares no classes"
            )

    def _repaired(self, series: RawSeries) -> RawSeries | None:
        positions, values = series.positions, series.values
        if series.targets is not None:  # what happens to an observation happens to its targets
            values = np.concatenate([values, series.targets], axis=1)  # (N, C + K)
        untouched = values
        whole = np.isfinite(positions).all() and np.isfinite(values).all()
        if not whole:
            positions, values = self._finite(series.id, positions, values)
        if len(values) == 0:
            if self.options.empty == "refuse":
                raise DataError(
                    f"{self._who(series.id)} has no observations; leave it out of the source, or set "
                    f"repair.empty to 'drop'"
                )
            self.counts["empty_series_left_out"] += 1
            return None
        steps = positions[1:, 0] - positions[:-1, 0]
        if self.options.unsorted != "keep" and (steps < 0).any():
            if self.options.unsorted == "refuse":
                at = int(np.flatnonzero(steps < 0)[0]) + 1
                raise DataError(
                    f"{self._who(series.id)}: observation {at} comes before the one it follows "
                    f"({positions[at, 0]} after {positions[at - 1, 0]}); sort the source, or set "
                    f"repair.unsorted to 'sort'"
                )
            order = np.argsort(positions[:, 0], kind="stable")
            positions, values = positions[order], values[order]
            self.counts["series_sorted"] += 1
        if self.options.duplicates != "keep":
            positions, values = self._without_duplicates(series.id, positions, values)
        if values is untouched:
            return series
        if series.targets is None:
            return dataclasses.replace(series, positions=positions, values=values)
        n_channels = series.values.shape[1]
        return dataclasses.replace(
            series,
            positions=positions,
            values=values[:, :n_channels],
            targets=values[:, n_channels:],
        )

    def _finite(
        self, name: str, positions: NDArray[np.float64], values: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        bad = ~(np.isfinite(positions).all(1) & np.isfinite(values).all(1))  # (N,)
        if self.options.not_finite == "refuse":
            row = int(np.flatnonzero(bad)[0])
            c = len(self.source.channels)
            for what, array, columns in (
                ("positions", positions, self.source.axes),
                ("values", values[:, :c], self.source.channels),
                ("targets", values[:, c:], targets_of(self.source)),
            ):
                for column in np.flatnonzero(~np.isfinite(array[row])):
                    raise DataError(
                        f"{self._who(name)}: {what} hold {array[row, column]} at observation {row}, "
                        f"column {column} ({columns[column].name}), but all must be finite and fit in {array.dtype}: "
                        f"leave such observations out, or set repair.not_finite to 'drop'"
                    )
        self.counts["observations_not_finite"] += int(bad.sum())
        return positions[~bad], values[~bad]

    def _without_duplicates(
        self, name: str, positions: NDArray[np.float64], values: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        if len(positions) < 2 or (np.diff(positions[:, 0]) > 0).all():
            return positions, values
        distinct, first, inverse = np.unique(
            positions, axis=0, return_index=True, return_inverse=True
        )
        if len(distinct) == len(positions):
            return positions, values
        if self.options.duplicates == "refuse":
            copy = int(np.setdiff1d(np.arange(len(positions)), first)[0])
            raise DataError(
                f"{self._who(name)} repeats a position, {len(positions) - len(distinct)} times in all, the first at {positions[copy].tolist()}; set repair.duplicates "
                f"to 'first', 'mean' or 'keep', or add the axis that tells them apart"
            )
        self.counts["duplicate_observations"] += len(positions) - len(distinct)
        order = np.argsort(first)
        if self.options.duplicates == "mean":
            inverse = inverse.reshape(-1)
            sums = np.zeros((len(distinct), values.shape[1]))
            np.add.at(sums, inverse, values)
            means = sums / np.bincount(inverse)[:, None]
            return distinct[order], means[order].astype(np.float32)
        return positions[first[order]], values[first[order]]
