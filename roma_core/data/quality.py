"""Validation of a built data set: layout, content, leakage between splits, changes of a version.

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
    find_damage,
    large_columns,
    read_manifest,
    shard_name,
    split_counts,
)
from roma_core.data.store import StoredDataset
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
        return _finding("manifest", "error", [str(error)])
    if damaged := find_damage(path, manifest):
        return _finding("files", "error", damaged)
    dataset = StoredDataset(path, verify=False)
    if broken := _broken_layout(dataset):
        return _finding("layout", "error", broken)
    bad: list[int] = []
    for part in dataset.parts(_READ_AT_ONCE):
        finite = np.isfinite(part.positions).all(1) & np.isfinite(part.values).all(1)  # (T,)
        if part.targets is not None:
            finite &= np.isfinite(part.targets).all(1)
        bad += part.ids[~np.logical_and.reduceat(finite, part.starts)].tolist()
    if bad:
        problem = "holds numbers that are not finite"
        return _series_finding(dataset, "finite", "error", bad, problem)
    return [
        *find_leakage(dataset),
        *(_near_duplicates(dataset) if manifest.leakage != "ignore" else []),
        *_numbers(dataset),
        *_units_and_classes(dataset),
    ]


def _finding(
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
    return _finding(check, severity, examples, len(rows))


# -- layout and numbers


def _broken_layout(dataset: StoredDataset) -> list[str]:
    """Columns and lists whose shape, dtype or content contradicts the manifest or each other."""
    schema, n = dataset.schema, len(dataset.splits)
    columns: dict[str, tuple[NDArray[Any], tuple[int, ...], Any]] = {
        "offsets.npy": (dataset.offsets, (n + 1,), np.int64),
        "splits.npy": (dataset.splits, (n,), np.int8),
    }
    if dataset.offsets.shape == (n + 1,):
        for k, part in enumerate(dataset.parts()):
            for name, (dtype, width) in large_columns(schema).items():
                shape = (int(part.lengths.sum()), width)
                columns[shard_name(name, k)] = (getattr(part, name), shape, dtype)
    if dataset.labels is not None:
        columns["labels.npy"] = (dataset.labels, (n,), np.int64)
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
    if len(schema.normalisation) != len(schema.channels):
        found.append(f"{MANIFEST}: needs one normalisation per channel")
    return found


def _numbers(dataset: StoredDataset) -> list[Finding]:
    """Order, duplicates, reach of normalised positions, values that dominate the loss, lengths."""
    schema, normaliser, limit = dataset.schema, Normaliser(dataset.schema), 50.0  # std
    unsorted: list[int] = []
    duplicates: list[int] = []
    reach = np.zeros(len(schema.axes))
    n_far = 0
    furthest: dict[int, tuple[float, int]] = {}  # channel -> (size, series)
    for part in dataset.parts(_READ_AT_ONCE):
        step = np.diff(part.positions[:, 0], prepend=part.positions[:1, 0])
        step[part.starts] = 1.0  # the first observation of a series follows none
        least = np.minimum.reduceat(step, part.starts)  # (B,)
        unsorted += part.ids[least < 0].tolist()
        for i in part.ids[least <= 0].tolist():
            own = dataset.raw(i)[0]
            if len(np.unique(own, axis=0)) < len(own):
                duplicates.append(i)
        seen = normaliser.normalise_positions(part.positions, part.lengths)  # (T, D)
        reach = np.maximum(reach, np.abs(seen).max(axis=0))
        size = np.abs(normaliser.normalise(part.values))  # (T, C)
        n_far += int((size > limit).sum())
        for k in np.flatnonzero((size > limit).any(axis=0)).tolist():
            row = int(size[:, k].argmax())
            here = (float(size[row, k]), int(part.ids[part.series[row]]))
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
        *_finding("reach", "warning", too_far),
        *_finding("far", "warning", outliers, n_far),
        *_series_finding(dataset, "single", "warning", single, too_short),
        *_series_finding(dataset, "long", "warning", long, too_long),
    ]


def _units_and_classes(dataset: StoredDataset) -> list[Finding]:
    """Missing units, and classes with few or no train series."""
    schema = dataset.schema
    groups: dict[str, Sequence[Any]] = {
        "channel": schema.channels,
        "axis": schema.axes,
        "target": schema.targets,
    }
    no_unit = [
        f"{what} {part.name!r} has no unit; write '1' for a pure number"
        for what, parts in groups.items()
        for part in parts
        if not part.unit.strip()
    ]
    rare = []
    if dataset.labels is not None:
        in_train = dataset.labels[dataset.split("train").indices]
        rare = [
            f"class {name!r} has {n} series in train and {(dataset.labels == k).sum()} in all"
            for k, name in enumerate(schema.classes)
            if (n := (in_train == k).sum()) < 5
        ]
    return [*_finding("units", "warning", no_unit), *_finding("classes", "warning", rare)]


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
            changes = np.count_nonzero((values[1:] != values[:-1]).any(axis=1))
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
        *_finding("group in two splits", severity, divided),
        *_finding("equal content in two splits", severity, apart),
        *_finding("equal short or flat series", "warning", by_chance),
        *_finding("equal content in one split", "warning", together),
    ]


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
    return _finding("near duplicates in two splits", "warning", sentences)


def _thinned(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return rows[:: -(-len(rows) // most)] if len(rows) else rows


def _sketches(dataset: StoredDataset) -> NDArray[np.float32]:
    """``(n_series, 16 * C)`` means of values in equal bins of time; of the series in empty bins."""
    n_channels = len(dataset.schema.channels)
    sketches = np.empty((len(dataset), _N_BINS, n_channels), dtype=np.float32)
    for i in range(len(dataset)):
        sample = dataset.sample(i)
        time, values = sample["positions"][0], sample["values"][:, :, 0, 0]  # (N,), (N, C)
        span = np.ptp(time) or 1.0
        bins = np.minimum(((time - time.min()) / span * _N_BINS).astype(np.int64), _N_BINS - 1)
        counts = np.bincount(bins, minlength=_N_BINS)
        filled = counts > 0
        sketches[i] = values.mean(axis=0)
        for c in range(n_channels):
            sums = np.bincount(bins, weights=values[:, c], minlength=_N_BINS)
            sketches[i, filled, c] = sums[filled] / counts[filled]
    return sketches.reshape(len(dataset), -1)


# -- version diff

_MAX_OBSERVATIONS = 1_000_000  # of train, per version
_DRIFT = 0.2  # of the stability index; below 0.1 is called stable


def previous_version(path: Path) -> Path | None:
    """The version of the same data set that was built last before the one in ``path``."""
    built = (path / MANIFEST).stat().st_mtime_ns
    others = [
        (manifest.stat().st_mtime_ns, manifest.parent)
        for manifest in path.parent.glob(f"*/{MANIFEST}")
        if manifest.parent != path and not manifest.parent.name.startswith(".")
    ]
    return max(((t, folder) for t, folder in others if t <= built), default=(0, None))[1]


def compare_versions(new: StoredDataset, old: StoredDataset) -> list[Finding]:
    """Differences of a new version to an old one; an object in another split is an error.

    Drift of every channel, of gaps, lengths and classes is measured on the train splits by the
    population stability index. Versions with different schemas are not compared further.
    """
    sentences = []
    for what in ("channels", "axes", "classes", "targets"):
        now, then = (
            [p if what == "classes" else (p.name, p.unit) for p in getattr(version.schema, what)]
            for version in (new, old)
        )
        if now != then:
            sentences.append(f"{what} were {then}, now they are {now}: earlier models do not fit")
    if sentences:
        return _finding("schema changed", "warning", sentences)
    return [*_object_changes(new, old), *_drift(new, old)]


def _object_changes(new: StoredDataset, old: StoredDataset) -> list[Finding]:
    row_of = {name: i for i, name in enumerate(new.ids)}
    moved, gone, changed = [], [], []
    for j, name in enumerate(old.ids):
        was = SPLITS[old.splits[j]]
        i = row_of.get(name)
        if i is None:
            gone.append(f"object {name!r} ({was}) is no longer there")
            continue
        if new.splits[i] != old.splits[j]:
            moved.append(
                f"object {name!r} was in {was}, now it is in {SPLITS[new.splits[i]]}: a model may have "
                f"been trained on its test data; restore the earlier split settings and fractions, or "
                f"give the data set a new name"
            )
        same_label = old.labels is None or new.labels is None or new.labels[i] == old.labels[j]
        if new.lengths[i] != old.lengths[j] or not same_label:
            changed.append(
                f"object {name!r} had {old.lengths[j]} observations, now it has {new.lengths[i]}"
                + ("" if same_label else ", and another label")
            )
    return [
        *_finding("moved to another split", "error", moved),
        *_finding("gone", "warning", gone),
        *_finding("changed", "warning", changed),
    ]


def _drift(new: StoredDataset, old: StoredDataset) -> list[Finding]:
    now, then = (_train_numbers(version, Normaliser(old.schema)) for version in (new, old))
    sentences = [
        f"{name} drifted: stability index {index:.2f} (above {_DRIFT} is much); median "
        f"{np.median(numbers):.3g} → {np.median(now[name]):.3g}"
        for name, numbers in then.items()
        if (index := stability_index(numbers, now[name])) > _DRIFT
    ]
    return _finding("drift", "warning", sentences)


def _train_numbers(
    dataset: StoredDataset, normaliser: Normaliser
) -> dict[str, NDArray[np.float64]]:
    """Transformed values, gaps, lengths and classes of train, by what they are."""
    train = dataset.split("train")
    total = int(train.lengths.sum())
    raw = [dataset.raw(int(i)) for i in train.indices[:: max(1, -(-total // _MAX_OBSERVATIONS))]]
    if not raw:
        return {}
    values = normaliser.transform(np.concatenate([v for _, v in raw]))
    gaps = np.concatenate([np.diff(p[:, 0]) for p, _ in raw])
    found = {f"channel {c.name!r}": values[:, k] for k, c in enumerate(dataset.schema.channels)}
    found["length of series"] = train.lengths.astype(np.float64)
    if len(gaps):
        found[f"gap in {dataset.schema.axes[0].name!r}"] = gaps
    if dataset.labels is not None:
        found["class"] = dataset.labels[train.indices].astype(np.float64)
    return found


def stability_index(old: NDArray[np.float64], new: NDArray[np.float64]) -> float:
    """Population stability index of new numbers over the bins of the old ones."""
    edges = bin_edges(old)
    return psi(
        *(np.bincount(np.searchsorted(edges, x), minlength=len(edges) + 1) for x in (old, new))
    )


def bin_edges(numbers: NDArray[np.float64], n_bins: int = 10) -> NDArray[np.float64]:
    """Inner edges of quantile bins; of bins between the distinct numbers if these are few."""
    distinct = np.unique(numbers)
    if len(distinct) <= 2 * n_bins:
        return (distinct[1:] + distinct[:-1]) / 2
    return np.unique(np.quantile(numbers, np.linspace(0, 1, n_bins + 1)[1:-1]))


def psi(old: NDArray[Any], new: NDArray[Any]) -> float:
    """Population stability index Σ (q − p)·ln(q / p) of counts ``(B,)`` in the same bins.

    Half an observation is added to every bin, so that an empty one gives no infinity.
    """
    p, q = ((counts + 0.5) / (counts + 0.5).sum() for counts in (old, new))
    return float(((q - p) * np.log(q / p)).sum())
