"""Cleaning of incoming series, and random subsampling of their observations."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from roma_core.data.manifest import Repairs
from roma_core.hashing import hash_ints, hash_text
from roma_core.schema import Channel, DataError, channel_axis
from roma_core.settings import Frozen
from roma_core.sources.base import RawSeries, Source, trait


class RepairOptions(Frozen):
    """Repairs of series that are not well formed."""

    unsorted: Literal["sort", "keep", "refuse"] = "sort"
    """Observations not in order of the first axis: sort them, stably."""
    duplicates: Literal["refuse", "first", "mean", "keep"] = "refuse"
    """Observations of one series at equal positions on all axes: keep the first, or the mean of
    their values. A duplicate of a masked observation leaks its value to the model."""
    not_finite: Literal["refuse", "drop"] = "refuse"
    """Observations whose position or target is not finite, or with a value that is infinite or too
    large. Of a series whose own target is not finite, the series."""
    missing: Literal["keep", "drop", "refuse"] = "keep"
    """Observations that lack the values of some channels: keep the others, drop the observation, or
    refuse. An observation without any value is dropped."""
    empty: Literal["refuse", "drop"] = Field("refuse", description="Series without observations.")


class SeriesCleaner:
    """Iterates over the valid series of a source, repaired where the options allow it.

    Raises:
        DataError: (while iterating) a series is malformed, or has a defect that is to be refused.
    """

    def __init__(self, source: Source, options: RepairOptions) -> None:
        self.source, self.options = source, options
        self._classes = frozenset(source.classes)
        self._targets = trait(source, "targets")
        self._of_series = trait(source, "target_level") == "series"
        self._origin = f" of {next(iter(source.files))}" if len(source.files) == 1 else ""
        self.counts = dict.fromkeys(Repairs.model_fields, 0)
        self.n_read = 0

    def __iter__(self) -> Iterator[RawSeries]:
        """Every series after the ``n_read`` that were read before."""
        read_from = getattr(self.source, "read_from", None)
        if self.n_read and read_from:
            unread = read_from(self.n_read)
        else:
            unread = itertools.islice(self.source.read(), self.n_read, None)
        for series in unread:
            self.n_read += 1
            self._check(series)
            if (usable := self._repaired(series)) is not None:
                yield usable

    def repairs(self) -> Repairs | None:
        """Number of repairs of each kind so far; None without any."""
        return Repairs(**self.counts) if any(self.counts.values()) else None

    def _name(self, series: RawSeries) -> str:
        return f"series {series.id!r}{self._origin}"

    def _check(self, series: RawSeries) -> None:
        """Raise if the series does not have the id, shapes, targets and label its source declares."""
        if not series.id:
            raise DataError("a series has no id, or it is empty; every object needs one of its own")
        name = self._name(series)
        if re.fullmatch(r"\d[.,]\d+[eE]\+\d+", series.id):
            raise DataError(
                f"{name}: its id has lost digits, and others may have the same; write ids as text"
            )
        if (series.targets is None) != (not self._targets):
            raise DataError(
                f"{name} has {'no' if series.targets is None else 'some'} targets, its source declares "
                f"{len(self._targets) or 'none'}"
            )
        n = len(series.values)
        for what, array, columns in self._arrays(series):
            expected: tuple[int, ...] = n, len(columns)
            if what == "targets" and self._of_series:
                expected = expected[1:]
            if array.shape != expected:
                raise DataError(f"{name}: {what} have the shape {array.shape}, expected {expected}")
        classes = self.source.classes
        if classes and series.label not in self._classes:
            raise DataError(
                f"{name} has the label {series.label!r}, which is none of its {len(classes)} classes "
                f"{', '.join(classes)}; append it to them, or leave the series out"
            )
        if not classes and series.label is not None:
            raise DataError(
                f"{name} has the label {series.label!r}, but its source declares no classes"
            )

    def _repaired(self, series: RawSeries) -> RawSeries | None:
        """The series without defects; None if it is empty and such series are dropped."""
        options, counts = self.options, self.counts
        n_channels = series.values.shape[1]
        positions, values, targets = series.positions, series.values, series.targets
        if targets is not None and self._of_series:
            if not (finite := np.isfinite(targets)).all():
                if options.not_finite == "refuse":
                    k = int(finite.argmin())
                    raise DataError(
                        f"{self._name(series)}: its target {self._targets[k].name!r} is {targets[k]}, expected "
                        f"a finite number: leave the series out, or set repair.not_finite to 'drop'"
                    )
                counts["series_without_targets"] += 1
                return None
        elif targets is not None:  # repaired together with the observation they belong to
            values = np.concatenate([values, targets], axis=1)  # (N, C + K)
        original = values
        if not (np.isfinite(positions).all() and np.isfinite(values).all()):
            missing = np.isnan(values[:, :n_channels])  # (N, C)
            usable = np.isfinite(values)
            usable[:, :n_channels] |= missing
            bad = ~(np.isfinite(positions).all(1) & usable.all(1))  # (N,)
            refused = bad if options.not_finite == "refuse" else np.zeros_like(bad)
            refused = refused | missing.any(1) if options.missing == "refuse" else refused
            if refused.any():
                raise self._not_finite(series, int(np.flatnonzero(refused)[0]))
            counts["observations_not_finite"] += int(bad.sum())
            lacking = missing.any(1) if options.missing == "drop" else missing.all(1)
            counts["observations_without_values"] += int((lacking & ~bad).sum())
            kept = ~(bad | lacking)
            positions, values = positions[kept], values[kept]
        if len(values) == 0:
            if options.empty == "refuse":
                raise DataError(
                    f"{self._name(series)} has no observations{' with a value' * bool(len(original))}; "
                    f"omit it, or set repair.empty to 'drop'"
                )
            counts["empty_series_dropped"] += 1
            return None
        steps = positions[1:, 0] - positions[:-1, 0]
        if options.unsorted != "keep" and (steps < 0).any():
            if options.unsorted == "refuse":
                at = int(np.flatnonzero(steps < 0)[0]) + 1
                raise DataError(
                    f"{self._name(series)}: observation {at} comes before the one it follows "
                    f"({positions[at, 0]} after {positions[at - 1, 0]}); sort the source, or set "
                    f"repair.unsorted to 'sort'"
                )
            order = np.argsort(positions[:, 0], kind="stable")
            positions, values = positions[order], values[order]
            counts["series_sorted"] += 1
        if options.duplicates != "keep":
            positions, values = self._without_duplicates(series, positions, values)
        if values is original:
            return series
        if targets is not None and not self._of_series:
            targets = values[:, n_channels:]
        return dataclasses.replace(
            series, positions=positions, values=values[:, :n_channels], targets=targets
        )

    def _arrays(self, series: RawSeries) -> Iterator[tuple[str, NDArray[Any], Sequence[Any]]]:
        """Name, array and described columns of positions, values and targets."""
        source = self.source
        if trait(source, "layout") == "joint":
            yield "positions", series.positions, source.axes
            yield "values", series.values, source.channels
        else:
            yield "positions", series.positions, (*source.axes, channel_axis(source.channels))
            yield "values", series.values, (Channel(name="value", unit=""),)
        if series.targets is not None:
            yield "targets", series.targets, self._targets

    def _not_finite(self, series: RawSeries, row: int) -> DataError:
        keeps = self.options.missing != "refuse"
        what, array, column, name, is_missing = next(
            (what, array, k, columns[k].name, is_missing)
            for what, array, columns in self._arrays(series)
            for k in np.flatnonzero(~np.isfinite(array[row])).tolist()
            if not ((is_missing := what == "values" and bool(np.isnan(array[row, k]))) and keeps)
        )
        setting = "missing to 'keep' or" if is_missing else "not_finite to"
        return DataError(
            f"{self._name(series)}: {what} hold {array[row, column]} at observation {row}, column "
            f"{column} ({name}), but all must be finite and fit in {array.dtype}: leave such "
            f"observations out, or set repair.{setting} 'drop'"
        )

    def _without_duplicates(
        self, series: RawSeries, positions: NDArray[np.float64], values: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        if len(positions) < 2 or (np.diff(positions[:, 0]) > 0).all():
            return positions, values
        distinct, first, inverse = np.unique(
            positions, axis=0, return_index=True, return_inverse=True
        )
        n_duplicates = len(positions) - len(distinct)
        if n_duplicates == 0:
            return positions, values
        if self.options.duplicates == "refuse":
            row = int(np.setdiff1d(np.arange(len(positions)), first)[0])
            raise DataError(
                f"{self._name(series)} repeats a position, {n_duplicates} times in all, the first at "
                f"{positions[row].tolist()}; set repair.duplicates to 'first', 'mean' or 'keep', or "
                f"add the axis that distinguishes them"
            )
        self.counts["duplicate_observations"] += n_duplicates
        order = np.argsort(first)
        if self.options.duplicates == "first":
            return positions[first[order]], values[first[order]]
        sums = np.zeros((2, len(distinct), values.shape[1]))
        observed = ~np.isnan(values)
        np.add.at(sums[0], inverse.reshape(-1), np.where(observed, values, 0))
        np.add.at(sums[1], inverse.reshape(-1), observed)
        with np.errstate(invalid="ignore"):  # the mean of no value is NaN
            means = sums[0] / sums[1]
        return distinct[order], means[order].astype(np.float32)


def n_to_drop(n_observations: int, rate: float) -> int:
    """Number of observations that subsampling drops: ⌊rate · n⌋, always leaving at least one."""
    if not 0 <= rate < 1:
        raise ValueError(f"drop rate must be in [0, 1), got {rate}")
    n = math.floor(rate * n_observations + 1e-9)  # 0.29 * 100 is 28.999999999999996
    return min(n, n_observations - 1)


def keep_mask(n_observations: int, rate: float, seed: int, object_id: str) -> NDArray[np.bool_]:
    """``(N,)`` bool, False for ``n_to_drop(N, rate)`` observations: a pure function of seed and id."""
    noise = hash_ints(seed, hash_text(object_id), np.arange(n_observations))  # (N,)
    keep = np.ones(n_observations, dtype=bool)
    keep[np.argsort(noise, kind="stable")[: n_to_drop(n_observations, rate)]] = False
    return keep


def check_dropped(rate: float, lengths_before: NDArray[np.int64], n_after: int) -> int:
    """The number of observations that a positive rate dropped from a whole data set.

    Raises:
        DataError: it is another number than the rate requires for ``(n_series,)`` lengths, or 0.
    """
    dropped = int(lengths_before.sum()) - n_after
    expected = sum(n_to_drop(int(n), rate) for n in lengths_before)
    if dropped != expected:
        raise DataError(
            f"a drop rate of {rate:.0%} should drop {expected} observations, it dropped {dropped}"
        )
    if dropped == 0:
        raise DataError(
            f"a drop rate of {rate:.0%} drops nothing: the longest series has "
            f"{lengths_before.max()} observations; set drop_rate to 0 or use longer series"
        )
    return dropped
