"""Validation of a built data set: layout, content, leakage between splits.

A data set without errors is usable: its files are those that were written, its columns fit each
other, its numbers are finite, and no object, group or equal content is in two splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from roma_core.data.manifest import (
    MANIFEST,
    SPLITS,
    Split,
    find_damage,
    large_columns,
    read_manifest,
    series_columns,
    shard_name,
    split_counts,
)
from roma_core.data.store import StoredDataset, Subset
from roma_core.schema import DataError, Normaliser
from roma_core.settings import Frozen

Severity = Literal["error", "warning"]
_MAX_EXAMPLES = 5
_READ_AT_ONCE = 1 << 18  # observations


class Finding(Frozen):
    """One kind of problem in one data set."""

    check: str = Field(description="Name of the check.")
    severity: Severity
    count: int = Field(gt=0, description="Number of series, files or names concerned.")
    examples: tuple[str, ...] = Field(description="A sentence each, for the first few of them.")

    def lines(self) -> list[str]:
        """The examples, and how many more there are."""
        more = self.count - len(self.examples)
        return [*self.examples, *([f"… and {more:,} more: {self.check}"] if more > 0 else [])]


def findings_table(findings: Iterable[Finding]) -> str:
    """The findings as a Markdown table."""
    rows = [
        f"| {f.severity} | {f.check} | {f.count:,} | {f.examples[0].replace('|', '/')} |"
        for f in findings
    ]
    head = ["| severity | check | count | example |", "| --- | --- | --: | --- |"]
    return "\n".join([*head, *rows]) if rows else "nothing found"


def check_dataset(path: Path) -> list[Finding]:
    """Every error and warning about a data-set folder; damaged files hide later checks."""
    try:
        manifest = read_manifest(path)
    except DataError as error:
        return findings_of("manifest", "error", [str(error)])
    if damaged := find_damage(path, manifest):
        return findings_of("files", "error", damaged)
    dataset = StoredDataset(path, verify=False)
    if broken := _broken_layout(dataset):
        return findings_of("layout", "error", broken)
    bad: list[int] = []
    for part in dataset.parts(_READ_AT_ONCE):
        known = np.isfinite(part.values)
        if dataset.schema.missing_values:  # of an observation at least one value is known
            known = (known | np.isnan(part.values)) & known.any(axis=1, keepdims=True)
        finite = np.isfinite(part.positions).all(1) & known.all(1)  # (T,)
        if part.targets is not None:
            finite &= np.isfinite(part.targets).all(1)
        for k, axis in enumerate(dataset.schema.axes):
            if axis.categories:
                n_categories = len(axis.categories) + axis.unknown
                finite &= np.isin(part.positions[:, k], range(n_categories))
        bad += part.ids[~np.logical_and.reduceat(finite, part.starts)].tolist()
    if dataset.series_targets is not None:
        finite = np.isfinite(dataset.series_targets).all(axis=1)
        bad = sorted({*bad, *np.flatnonzero(~finite).tolist()})
    if bad:
        problem = "holds numbers that are not finite, or no index of a category"
        return _series_finding(dataset, "finite", "error", bad, problem)
    return [
        *find_leakage(dataset),
        *(_near_duplicates(dataset) if manifest.leakage != "ignore" else []),
        *_numbers(dataset),
        *_units_and_classes(dataset),
        *_splits_and_covariates(dataset),
    ]


def findings_of(
    check: str, severity: Severity, examples: Sequence[str], count: int = 0
) -> list[Finding]:
    """A list with one finding, or an empty one without examples; ``count`` defaults to theirs."""
    if not examples:
        return []
    shown = tuple(examples[:_MAX_EXAMPLES])
    count = count or len(examples)
    return [Finding(check=check, severity=severity, count=count, examples=shown)]


def _series_finding(
    dataset: StoredDataset, check: str, severity: Severity, rows: Sequence[int], problem: str
) -> list[Finding]:
    examples = [f"series {dataset.ids[i]!r} {problem}" for i in rows[:_MAX_EXAMPLES]]
    return findings_of(check, severity, examples, len(rows))


# -- layout and numbers


def _broken_layout(dataset: StoredDataset) -> list[str]:
    """Columns and lists whose shape, dtype or content contradicts the manifest or each other."""
    schema, n = dataset.schema, len(dataset.splits)
    columns: dict[str, tuple[NDArray[Any], tuple[int, ...], Any]] = {
        "offsets.npy": (dataset.offsets, (n + 1,), np.int64)
    }
    if dataset.offsets.shape == (n + 1,):
        for k, part in enumerate(dataset.parts()):
            for name, (dtype, width) in large_columns(schema).items():
                shape = (int(part.lengths.sum()), width)
                columns[shard_name(name, k)] = (getattr(part, name), shape, dtype)
    for name, (dtype, row) in series_columns(schema).items():
        field = "series_targets" if name == "targets" else name
        columns[f"{name}.npy"] = (getattr(dataset, field), (n, *row), dtype)
    if found := [
        f"{name}: {array.dtype} of shape {array.shape}, expected {np.dtype(dtype)} of {shape}"
        for name, (array, shape, dtype) in columns.items()
        if array.shape != shape or array.dtype != dtype
    ]:
        return found
    if dataset.offsets[0] != 0 or (dataset.lengths < 1).any():
        found.append("offsets.npy: must start at 0 and give every series at least one observation")
    if len(dataset.ids) != n or len(dataset.groups or dataset.ids) != n:
        found.append(f"ids.json, groups.json: not {n} entries")
    elif len(set(dataset.ids)) != n:
        found.append(f"ids.json: {n - len(set(dataset.ids))} ids are not unique")
    if not np.isin(dataset.splits, range(len(SPLITS))).all():
        found.append(f"splits.npy: holds other numbers than the indices of {SPLITS}")
    elif (counts := split_counts(dataset.offsets, dataset.splits)) != dataset.manifest.counts:
        found.append(f"{MANIFEST}: counts {dataset.manifest.counts}, the columns hold {counts}")
    if dataset.labels is not None and not np.isin(dataset.labels, range(len(schema.classes))).all():
        found.append(f"labels.npy: holds other numbers than the indices of {schema.classes}")
    for k, covariate in enumerate(schema.covariates):
        numbers = known_covariate(dataset, k)
        words = range(len(covariate.categories))
        if not (np.isin(numbers, words) if words else np.isfinite(numbers)).all():
            found.append(
                f"covariates.npy: {covariate.name!r} holds no finite numbers, or no indices"
            )
    by = schema.normalisation_axis
    n_groups = 1 if by is None else len(schema.axes[by].categories) + schema.axes[by].unknown
    if len(schema.normalisation) != schema.n_values * n_groups:
        found.append(
            f"{MANIFEST}: needs one normalisation per channel, in each of {n_groups} groups"
        )
    return found


def _numbers(dataset: StoredDataset) -> list[Finding]:
    """Order, duplicates, reach of normalised positions, values that dominate the loss, lengths."""
    schema, limit = dataset.schema, 50.0  # std
    normaliser, by_channel = Normaliser(schema), Normaliser(schema.joint)
    unsorted: list[int] = []
    duplicates: list[int] = []
    reach = np.zeros(len(schema.axes))
    n_far = 0
    furthest: dict[int, tuple[float, int]] = {}  # channel -> (size, series)
    sentinels = _sentinels(dataset)
    n_sentinels = [dict.fromkeys(numbers, 0) for numbers in sentinels]
    parts = zip(dataset.parts(_READ_AT_ONCE), dataset.joint_parts(_READ_AT_ONCE), strict=True)
    for part, joint in parts:
        step = np.diff(part.positions[:, 0], prepend=part.positions[:1, 0])
        step[part.starts] = 1.0  # the first observation of a series follows none
        least = np.minimum.reduceat(step, part.starts)  # (B,)
        unsorted += part.ids[least < 0].tolist()
        if (least <= 0).any():
            rows = np.column_stack([part.series, part.positions])
            rows = rows[np.lexsort(rows.T)]
            again = rows[1:][(rows[1:] == rows[:-1]).all(axis=1), 0]
            duplicates += part.ids[np.unique(again).astype(np.int64)].tolist()
        seen = normaliser.normalise_positions(part.positions, part.lengths)  # (T, D)
        reach = np.maximum(reach, np.abs(seen).max(axis=0))
        values = joint.values.copy()  # (T, C)
        for k, counts in enumerate(n_sentinels):
            for number in counts:
                counts[number] += int((values[:, k] == number).sum())
            values[np.isin(values[:, k], list(counts)), k] = np.nan
        size = np.nan_to_num(np.abs(by_channel.normalise(values, joint.positions)))
        n_far += int((size > limit).sum())
        for k in np.flatnonzero((size > limit).any(axis=0)).tolist():
            row = int(size[:, k].argmax())
            here = (float(size[row, k]), int(joint.ids[joint.series[row]]))
            furthest[k] = max(furthest.get(k, (0.0, 0)), here)
    too_far = [
        f"axis {axis.name!r} reaches {number:.3g} radians of the fastest rotation; set its anchor "
        f"to 'first', an offset, or a larger scale (or 'auto')"
        for axis, number in zip(schema.axes, reach, strict=True)
        if number > 1e5
    ]
    outliers = [
        f"channel {schema.channels[k].name!r} is {most:,.0f} standard deviations from its mean in "
        f"series {dataset.ids[i]!r}; a transform such as arcsinh may help"
        for k, (most, i) in furthest.items()
    ]
    recurring = [
        _sentinel(f"channel {channel.name!r}", number, n, "observations")
        for channel, counts in zip(schema.channels, n_sentinels, strict=True)
        for number, n in counts.items()
    ]
    leak = "has observations at equal positions: a duplicate leaks a masked value"
    order = "is not in order of the first axis"
    single = np.flatnonzero(dataset.lengths == 1).tolist()
    long = np.flatnonzero(dataset.lengths > 10_000).tolist()
    too_short = "has one observation: nothing can be hidden, so pretraining leaves it out"
    too_long = (
        "has more than 10,000 observations; the cost of attention is quadratic: consider "
        "trainer.augment_crop_tokens or a shorter window"
    )
    return [
        *_series_finding(dataset, "order", "warning", unsorted, order),
        *_series_finding(dataset, "duplicates", "warning", duplicates, leak),
        *findings_of("reach", "warning", too_far),
        *findings_of("far", "warning", outliers, n_far),
        *findings_of("sentinels", "warning", recurring),
        *_series_finding(dataset, "single", "warning", single, too_short),
        *_series_finding(dataset, "long", "warning", long, too_long),
    ]


MAX_OBSERVATIONS = 1_000_000  # that statistics are taken from, per version
_N_RECURRING = 3  # times
_MIN_KNOWN = 0.05  # of the objects, for which a covariate is of use


def _sentinels(dataset: StoredDataset) -> list[list[float]]:
    """For every channel the exact values far outside that recur, such as -999."""
    every = -(-int(dataset.offsets[-1]) // MAX_OBSERVATIONS)
    values = np.concatenate([part.values for part in dataset.joint_parts(_READ_AT_ONCE, every)])
    return [_recurring(column[~np.isnan(column)]) for column in values.T]


def _recurring(numbers: NDArray[Any]) -> list[float]:
    """Values at the ends of ``(n,)`` that recur, further from the others than twice their spread."""
    numbers, found = np.sort(numbers), list[float]()
    while len(numbers):
        low, high = numbers[0], numbers[-1]
        a, b = np.searchsorted(numbers, low, "right"), np.searchsorted(numbers, high, "left")
        inner = numbers[a:b]
        if len(np.unique(inner)) < 5:  # an indicator, or a few doses
            break
        reach = 2 * (inner[int(0.95 * len(inner))] - inner[int(0.05 * len(inner))])
        is_low = bool(a >= _N_RECURRING and inner[0] - low > reach)
        is_high = bool(len(numbers) - b >= _N_RECURRING and high - inner[-1] > reach)
        found += [float(low)] * is_low + [float(high)] * is_high
        if not (is_low or is_high):
            break
        numbers = numbers[a if is_low else 0 : b if is_high else len(numbers)]
    return found


def _sentinel(what: str, number: float, n: int, unit: str) -> str:
    text = np.format_float_positional(np.float32(number), trim="-")
    return (
        f"{what} is exactly {text} in {n:,} {unit}, far from its other values: if that stands for a "
        f"missing value, set missing_values: [{text}] in the source (or write NaN there)"
    )


def known_covariate(
    dataset: StoredDataset, k: int, split: Split | None = None
) -> NDArray[np.float32]:
    """Covariate k of the objects for which it is not missing."""
    assert dataset.covariates is not None
    rows = slice(None) if split is None else dataset.split(split).indices
    column = dataset.covariates[rows, k]
    return column[~np.isnan(column)]


def _splits_and_covariates(dataset: StoredDataset) -> list[Finding]:
    """Empty splits, classes that validation or test lack, and covariates that say nothing."""
    schema, lacking, useless, recurring = dataset.schema, [], [], []
    for split in SPLITS[1:]:
        rows = dataset.split(split).indices
        if not len(rows):
            lacking.append(f"{split} has no series, so nothing can be measured on it")
        elif dataset.labels is not None:
            lacking += [
                f"class {name!r} has no series in {split}, so that its recall there is unknown"
                for name, n in dataset.split(split).class_counts.items()
                if not n
            ]
    n_train = len(dataset.split("train"))
    for k, covariate in enumerate(schema.covariates):
        known, what = known_covariate(dataset, k, "train"), f"covariate {covariate.name!r}"
        if len(known) < _MIN_KNOWN * n_train:
            useless.append(f"{what} is known for {len(known):,} of {n_train:,} objects of train")
        elif (known == known[0]).all():
            useless.append(f"{what} is the same for all objects of train that have it")
        if not covariate.categories:
            everywhere = known_covariate(dataset, k)
            recurring += [
                _sentinel(what, number, int((everywhere == number).sum()), "objects")
                for number in _recurring(everywhere)
            ]
    return [
        *findings_of("splits", "warning", lacking),
        *findings_of("covariates", "warning", useless),
        *findings_of("sentinels of covariates", "warning", recurring),
    ]


def _units_and_classes(dataset: StoredDataset) -> list[Finding]:
    """Missing units, and classes with few or no train series."""
    schema = dataset.schema
    groups: dict[str, Sequence[Any]] = {
        "channel": schema.channels,
        "axis": schema.axes,
        "target": schema.targets,
        "covariate": [one for one in schema.covariates if not one.categories],
    }
    no_unit = [
        f"{what} {part.name!r} has no unit; write '1' for a pure number"
        for what, parts in groups.items()
        for part in parts
        if not part.unit.strip()
    ]
    in_all = Subset(dataset, np.arange(len(dataset))).class_counts
    rare = [
        f"class {name!r} has {n} series in train and {in_all[name]} in all"
        for name, n in dataset.split("train").class_counts.items()
        if n < 5
    ]
    return [*findings_of("units", "warning", no_unit), *findings_of("classes", "warning", rare)]


# -- leakage between splits

_N_BINS = 16  # of a sketch
_MAX_QUERIES, _MAX_TRAIN = 5_000, 50_000  # series compared, evenly spaced among more
_MIN_CHANGES = 7  # of values from one observation to the next, fewer may be equal by chance
_MAX_SKETCH = 64  # numbers; longer sketches are projected
_NEAR = 0.1  # of the usual distance to the nearest series of train


def find_leakage(dataset: StoredDataset) -> list[Finding]:
    """Groups and equal content in two splits, errors or what ``leakage`` says; duplicates in one.

    Content is equal if every position and value is. That of series whose values hardly change, short
    and flat ones, may be so by chance and is a warning. Two copies of an object with different
    observations dropped are not equal, but near.
    """
    severity: Severity = "error" if dataset.manifest.leakage == "error" else "warning"
    first_of: dict[str, int] = {}
    divided = []
    for i, group in enumerate(dataset.groups or []):
        other = first_of.setdefault(group, i)
        if dataset.splits[other] != dataset.splits[i]:
            divided.append(
                f"group {group!r} is in two splits: series {_described(dataset, other)} and "
                f"{_described(dataset, i)}; set split.by to 'group'"
            )
    apart: list[str] = []
    by_chance: list[str] = []
    together: list[str] = []
    first_with: dict[bytes, int] = {}
    for i in range(len(dataset)):
        positions, values = (array + 0.0 for array in dataset.raw(i))  # -0.0 becomes 0.0
        content = hashlib.sha256(positions.tobytes())
        content.update(values.tobytes())
        other = first_with.setdefault(content.digest(), i)
        if other != i:
            changes = _n_changes(dataset.joint(i)[1])
            found = by_chance if changes < _MIN_CHANGES else apart
            if dataset.splits[other] == dataset.splits[i]:
                found = together
            found.append(
                f"series {_described(dataset, other)} and {_described(dataset, i)} have equal "
                f"content: remove one of them"
                + ", or set leakage to 'warn' in the data set's configuration"
                * (found is apart)
            )
    if dataset.manifest.leakage == "ignore":
        divided, apart, by_chance = [], [], []
    return [
        *findings_of("group in two splits", severity, divided),
        *findings_of("equal content in two splits", severity, apart),
        *findings_of("equal short or flat series", "warning", by_chance),
        *findings_of("equal content in one split", "warning", together),
    ]


def _n_changes(values: NDArray[np.float32]) -> int:
    """Rows of ``(N, C)`` in which a channel differs from its last known value."""
    rows = np.where(np.isnan(values), 0, np.arange(len(values))[:, None])
    last = np.take_along_axis(values, np.maximum.accumulate(rows, axis=0), axis=0)
    changed = (last[1:] != last[:-1]) & ~np.isnan(last[:-1])
    return int(changed.any(axis=1).sum())


def _described(dataset: StoredDataset, i: int) -> str:
    return f"{dataset.ids[i]!r} ({SPLITS[dataset.splits[i]]})"


def _near_duplicates(dataset: StoredDataset) -> list[Finding]:
    """Series of validation and test that are ten times nearer to a series of train than is usual.

    They must also be ten times nearer than they vary: flat series are all alike.
    """
    from sklearn.neighbors import NearestNeighbors
    from sklearn.random_projection import GaussianRandomProjection

    train = _thinned(dataset.split("train").indices, _MAX_TRAIN)
    queries = _thinned(np.flatnonzero(dataset.splits != SPLITS.index("train")), _MAX_QUERIES)
    if len(train) < 2 or len(queries) < 10:  # too few to know what is usual
        return []
    sketches = _sketches(dataset)
    short = sketches
    if sketches.shape[1] > _MAX_SKETCH:  # keeps distances, so that many channels cost no more
        short = GaussianRandomProjection(_MAX_SKETCH, random_state=0).fit_transform(sketches)
    nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(short[train])
    partner = train[nearest.kneighbors(short[queries])[1][:, 0]]
    distance = np.sqrt(((sketches[queries] - sketches[partner]) ** 2).mean(axis=1))
    usual = float(np.median(distance))
    own = sketches[queries].reshape(len(queries), _N_BINS, -1)
    variation = np.sqrt(((own - own.mean(axis=1, keepdims=True)) ** 2).mean(axis=(1, 2)))
    close = np.flatnonzero(distance < _NEAR * np.minimum(usual, variation))
    sentences = [
        f"series {_described(dataset, int(queries[k]))} is {distance[k]:.2g} standard deviations from "
        f"{_described(dataset, int(partner[k]))}, where {usual:.2g} is usual: a near duplicate?"
        for k in close[np.argsort(distance[close])]
    ]
    return findings_of("near duplicates in two splits", "warning", sentences)


def _thinned(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return rows[:: -(-len(rows) // most)] if len(rows) else rows


def _sketches(dataset: StoredDataset) -> NDArray[np.float32]:
    """``(n_series, 16 * C)`` means of values in equal bins of time; of the series in empty bins.

    A channel that a series lacks is 0, the mean of train.
    """
    normaliser, n_channels = Normaliser(dataset.schema.joint), len(dataset.schema.channels)
    sketches = np.empty((len(dataset), _N_BINS, n_channels), dtype=np.float32)
    for part in dataset.joint_parts(_READ_AT_ONCE):
        values, time = normaliser.normalise(part.values, part.positions), part.positions[:, 0]
        first = np.minimum.reduceat(time, part.starts)[part.series]  # (T,)
        span = np.maximum.reduceat(time, part.starts)[part.series] - first
        span[span == 0] = 1.0
        bins = np.minimum(((time - first) / span * _N_BINS).astype(np.int64), _N_BINS - 1)
        bins += part.series * _N_BINS
        for c in range(n_channels):
            observed = ~np.isnan(values[:, c])
            size = len(part.ids) * _N_BINS
            counts = np.bincount(bins[observed], minlength=size).reshape(-1, _N_BINS)
            weights = values[observed, c]
            sums = np.bincount(bins[observed], weights, size).reshape(-1, _N_BINS)
            whole = sums.sum(axis=1) / np.maximum(counts.sum(axis=1), 1)
            means = np.where(counts > 0, sums / np.maximum(counts, 1), whole[:, None])
            sketches[part.ids, :, c] = means
    return sketches.reshape(len(dataset), -1)
