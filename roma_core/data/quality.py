"""What is looked for in a data set that is there.

``findings`` reads a whole folder and lists what is wrong with it, errors and warnings, each with a
count and examples. A set without errors can be trusted: its files are those that were written, its
columns fit each other, its numbers are finite, and no object, group or equal content is in two
splits.

What a check of a data set found: how bad, how often, and what it looks like.
Content that is in two splits, so that a test would ask what training has answered.
A version of a data set against the one before: what moved, went, changed or drifted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from roma_core.data.schema import SPLITS
from roma_core.data.store import (
    MANIFEST,
    StoredDataset,
    damage,
    read_manifest,
    shard_name,
    split_counts,
)
from roma_core.schema import DataError, Normaliser

_SHOWN = 5


class Finding(BaseModel):
    """One kind of trouble in one data set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    check: str = Field(description="Name of the check.")
    severity: Literal["error", "warning"]
    count: int = Field(gt=0, description="How many series, files or names it concerns.")
    examples: tuple[str, ...] = Field(description="A sentence each, for the first few of them.")

    def lines(self) -> list[str]:
        """The examples, and how many more there are."""
        more = self.count - len(self.examples)
        return [*self.examples, *([f"… and {more:,} more: {self.check}"] if more > 0 else [])]


def finding(
    check: str, severity: Literal["error", "warning"], examples: Sequence[str], count: int = 0
) -> list[Finding]:
    """A list with one finding, or with none if there is no example."""
    if not examples:
        return []
    return [
        Finding(
            check=check,
            severity=severity,
            count=count or len(examples),
            examples=tuple(examples[:_SHOWN]),
        )
    ]


def as_markdown(findings: Iterable[Finding]) -> str:
    """The findings as a table."""
    rows = [
        f"| {f.severity} | {f.check} | {f.count:,} | {f.examples[0].replace('|', '/')} |"
        for f in findings
    ]
    if not rows:
        return "nothing found"
    return "\n".join(["| severity | check | count | example |", "| --- | --- | --: | --- |", *rows])


_CONTENT_DECIMALS = 3  # of normalised values and of positions as the model sees them
_BINS = 16
_MOST_ASKED, _MOST_KNOWN = 5_000, 50_000  # series compared, evenly spaced among more
_MOST_NUMBERS = 64  # of a sketch; longer ones are projected
_NEAR = 0.1  # of the usual distance to the nearest series of train


def leaks(dataset: StoredDataset) -> list[Finding]:
    """Errors for what is in two splits, warnings for copies inside one and for near neighbours."""
    return [*_groups(dataset), *_equal(dataset), *_near(dataset)]


def _groups(dataset: StoredDataset) -> list[Finding]:
    if dataset.groups is None:
        return []
    first_of: dict[str, int] = {}
    words = []
    for i, group in enumerate(dataset.groups):
        other = first_of.setdefault(group, i)
        if dataset.splits[other] != dataset.splits[i]:
            words.append(
                f"group {group!r} is in two splits: series {_who(dataset, other)} and "
                f"{_who(dataset, i)}; set split.by to 'group'"
            )
    return finding("group in two splits", "error", words)


def _equal(dataset: StoredDataset) -> list[Finding]:
    """Series that are equal as the model sees them, rounded to 3 decimals.

    Content is compared as stored: two copies of an object with different observations dropped are
    not equal, but near.
    """
    apart: list[str] = []
    together: list[str] = []
    first_with: dict[bytes, int] = {}
    for i in range(len(dataset)):
        sample = dataset.sample(i)
        content = hashlib.sha256()
        for array in (sample["positions"], sample["values"]):
            content.update((np.round(array, _CONTENT_DECIMALS) + 0.0).tobytes())  # -0.0 becomes 0.0
        other = first_with.setdefault(content.digest(), i)
        if other == i:
            continue
        words = (
            f"series {_who(dataset, other)} and {_who(dataset, i)} have equal content: one of them "
            f"must go"
        )
        (together if dataset.splits[other] == dataset.splits[i] else apart).append(words)
    return [
        *finding("equal content in two splits", "error", apart),
        *finding("equal content in one split", "warning", together),
    ]


def _near(dataset: StoredDataset) -> list[Finding]:
    """Series of validation and test that are ten times nearer to one of train than is usual.

    And ten times nearer than they vary: flat series are all alike.
    """
    from sklearn.neighbors import NearestNeighbors

    train = _thinned(dataset.split("train").indices, _MOST_KNOWN)
    asked = _thinned(np.flatnonzero(dataset.splits != SPLITS.index("train")), _MOST_ASKED)
    if len(train) < 2 or len(asked) < 10:  # too few to say what is usual
        return []
    sketches = _sketches(dataset)
    short = _projected(sketches)
    nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(short[train])
    partner = train[nearest.kneighbors(short[asked])[1][:, 0]]
    distance = np.sqrt(((sketches[asked] - sketches[partner]) ** 2).mean(axis=1))
    usual = float(np.median(distance))
    own = sketches[asked].reshape(len(asked), _BINS, -1)
    variation = np.sqrt(((own - own.mean(axis=1, keepdims=True)) ** 2).mean(axis=(1, 2)))
    close = np.flatnonzero(distance < _NEAR * np.minimum(usual, variation))
    words = [
        f"series {_who(dataset, int(asked[k]))} is {distance[k]:.2g} standard deviations from "
        f"{_who(dataset, int(partner[k]))}, where {usual:.2g} is usual: a near copy?"
        for k in close[np.argsort(distance[close])]
    ]
    return finding("near copies in two splits", "warning", words)


def _sketches(dataset: StoredDataset) -> NDArray[np.float32]:
    """Means of the normalised values in 16 equal parts of each series' time: ``(n_series, 16 * C)``.

    A part without observations takes the mean of the series.
    """
    n_channels = len(dataset.schema.channels)
    sketches = np.empty((len(dataset), _BINS, n_channels), dtype=np.float32)
    for i in range(len(dataset)):
        sample = dataset.sample(i)
        time, values = sample["positions"][0], sample["values"][:, :, 0, 0]  # (N,), (N, C)
        low, span = time.min(), np.ptp(time) or 1.0
        part = np.minimum(((time - low) / span * _BINS).astype(np.int64), _BINS - 1)
        counts = np.bincount(part, minlength=_BINS)
        sketches[i] = values.mean(axis=0)
        filled = counts > 0
        for c in range(n_channels):
            sums = np.bincount(part, weights=values[:, c], minlength=_BINS)
            sketches[i, filled, c] = sums[filled] / counts[filled]
    return sketches.reshape(len(dataset), -1)


def _projected(sketches: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shorter vectors with about the same distances, so that many channels cost no more than few."""
    width = sketches.shape[1]
    if width <= _MOST_NUMBERS:
        return sketches
    directions = np.random.default_rng(0).normal(size=(width, _MOST_NUMBERS)).astype(np.float32)
    return sketches @ directions / np.float32(np.sqrt(_MOST_NUMBERS))


def _thinned(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return rows[:: -(-len(rows) // most)] if len(rows) else rows


def _who(dataset: StoredDataset, i: int) -> str:
    return f"{dataset.ids[i]!r} ({SPLITS[dataset.splits[i]]})"


_MOST_OBSERVATIONS = 1_000_000
_DRIFT = 0.2  # of the stability index; below 0.1 is called stable
_PARTS = 10


def previous_version(path: Path) -> Path | None:
    """The version of the same data set that was built last before the one in ``path``."""
    built = (path / MANIFEST).stat().st_mtime_ns
    older = [
        (manifest.stat().st_mtime_ns, manifest.parent)
        for manifest in path.parent.glob(f"*/{MANIFEST}")
        if manifest.parent != path and not manifest.parent.name.startswith(".")
    ]
    return max(((t, folder) for t, folder in older if t <= built), default=(0, None))[1]


def changes(new: StoredDataset, old: StoredDataset) -> list[Finding]:
    """What is different in a new version; an object in another split is an error.

    Drift is measured on the train splits by the population stability index over ten parts of the
    old distribution: of every channel, of gaps, lengths and classes.
    """
    schema = _schema(new, old)
    if schema:
        return schema
    return [*_objects(new, old), *_drift(new, old)]


def _schema(new: StoredDataset, old: StoredDataset) -> list[Finding]:
    words = []
    for what in ("channels", "axes", "classes", "targets"):
        now, then = getattr(new.schema, what), getattr(old.schema, what)
        names = [[(p.name, p.unit) if what != "classes" else p for p in v] for v in (now, then)]
        if names[0] != names[1]:
            words.append(
                f"{what} were {names[1]}, now they are {names[0]}: models do not carry over"
            )
    return finding("schema changed", "warning", words)


def _objects(new: StoredDataset, old: StoredDataset) -> list[Finding]:
    row_of = {name: i for i, name in enumerate(new.ids)}
    moved, gone, changed = [], [], []
    for j, name in enumerate(old.ids):
        i = row_of.get(name)
        if i is None:
            gone.append(f"object {name!r} ({SPLITS[old.splits[j]]}) is no longer there")
            continue
        if new.splits[i] != old.splits[j]:
            moved.append(
                f"object {name!r} was in {SPLITS[old.splits[j]]}, now it is in "
                f"{SPLITS[new.splits[i]]}: a model may have learnt what it is tested on; go "
                f"back to the split and shares of before, or give the data set a new name"
            )
        same_label = old.labels is None or new.labels is None or new.labels[i] == old.labels[j]
        if new.lengths[i] != old.lengths[j] or not same_label:
            changed.append(
                f"object {name!r} had {old.lengths[j]} observations, now it has {new.lengths[i]}"
                + ("" if same_label else ", and another label")
            )
    return [
        *finding("moved to another split", "error", moved),
        *finding("gone", "warning", gone),
        *finding("changed", "warning", changed),
    ]


def _drift(new: StoredDataset, old: StoredDataset) -> list[Finding]:
    samples = [_train_sample(dataset, old) for dataset in (new, old)]
    words = []
    for name in samples[1]:
        index = stability_index(samples[1][name], samples[0][name])
        if index > _DRIFT:
            words.append(
                f"{name} drifted: stability index {index:.2f} (above {_DRIFT} is much); median "
                f"{np.median(samples[1][name]):.3g} → {np.median(samples[0][name]):.3g}"
            )
    return finding("drift", "warning", words)


def _train_sample(dataset: StoredDataset, scale: StoredDataset) -> dict[str, NDArray[np.float64]]:
    """Numbers of some train series, by what they are; values as ``scale``'s transform gives them."""
    train = dataset.split("train")
    total = int(train.lengths.sum())
    rows = train.indices[:: max(1, -(-total // _MOST_OBSERVATIONS))]
    raw = [dataset.raw(int(i)) for i in rows]
    if not raw:
        return {}
    values = Normaliser(scale.schema).transform(np.concatenate([v for _, v in raw]))
    gaps = np.concatenate([np.diff(p[:, 0]) for p, _ in raw])
    found = {f"channel {c.name!r}": values[:, k] for k, c in enumerate(dataset.schema.channels)}
    found["length of series"] = train.lengths.astype(np.float64)
    if len(gaps):
        found[f"gap in {dataset.schema.axes[0].name!r}"] = gaps
    if dataset.labels is not None:
        found["class"] = dataset.labels[train.indices].astype(np.float64)
    return found


def stability_index(old: NDArray[np.float64], new: NDArray[np.float64]) -> float:
    """Population stability index: Σ (q − p)·ln(q / p) over parts of the old distribution.

    The parts are tenths, or the distinct numbers if there are few. Empty parts count as half an
    observation, so that small samples give no infinities.
    """
    distinct = np.unique(old)
    if len(distinct) <= 2 * _PARTS:
        edges = (distinct[1:] + distinct[:-1]) / 2
    else:
        edges = np.unique(np.quantile(old, np.linspace(0, 1, _PARTS + 1)[1:-1]))
    p, q = (
        (counts := np.bincount(np.searchsorted(edges, x), minlength=len(edges) + 1) + 0.5)
        / counts.sum()
        for x in (old, new)
    )
    return float(((q - p) * np.log(q / p)).sum())


_LARGE = ("values", "positions", "targets")  # columns with a row per observation
_AT_ONCE = 1 << 18  # observations
_LONG = 10_000  # observations of a series; attention needs time for their square
_FAR = 50.0  # standard deviations
_FEW = 5  # series of a class in train


def problems(path: Path) -> list[str]:
    """Every error of a data-set folder, a line each; empty if it can be trusted."""
    return [line for f in findings(path) if f.severity == "error" for line in f.lines()]


def findings(path: Path) -> list[Finding]:
    """Everything that is wrong with, or odd about, a data-set folder."""
    try:
        manifest = read_manifest(path)
    except DataError as error:
        return finding("manifest", "error", [str(error)])
    if found := damage(path, manifest):
        return finding("files", "error", found)
    dataset = StoredDataset(path, verify=False)
    if found := _broken_layout(dataset):
        return finding("layout", "error", found)
    if bad := _not_finite(dataset):
        return bad
    return [
        *leaks(dataset),
        *_positions(dataset),
        *_lengths(dataset),
        *_values(dataset),
        *_names(dataset),
    ]


def _broken_layout(dataset: StoredDataset) -> list[str]:
    schema, n = dataset.schema, len(dataset.splits)
    columns: dict[str, tuple[NDArray[Any], tuple[int, ...], Any]] = {
        "offsets.npy": (dataset.offsets, (n + 1,), np.int64),
        "splits.npy": (dataset.splits, (n,), np.int8),
    }
    if dataset.offsets.shape == (n + 1,):
        for k, part in enumerate(dataset.shards()):
            n_rows = int(part.lengths.sum())
            widths = (len(schema.channels), len(schema.axes), len(schema.targets))
            dtypes = (np.float32, np.float64, np.float32)
            for column, width, dtype in zip(_LARGE, widths, dtypes, strict=True):
                if (array := getattr(part, column)) is not None:
                    columns[shard_name(column, k)] = (array, (n_rows, width), dtype)
    if dataset.labels is not None:
        columns["labels.npy"] = (dataset.labels, (n,), np.int64)
    found = [
        f"{name}: {array.dtype} of shape {array.shape}, expected {np.dtype(dtype)} of {shape}"
        for name, (array, shape, dtype) in columns.items()
        if array.shape != shape or array.dtype != dtype
    ]
    if found:
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


def _not_finite(dataset: StoredDataset) -> list[Finding]:
    bad: list[int] = []
    for part in dataset.parts(_AT_ONCE):
        whole = np.isfinite(part.positions).all(1) & np.isfinite(part.values).all(1)
        if part.targets is not None:
            whole &= np.isfinite(part.targets).all(1)
        bad += part.ids[~np.logical_and.reduceat(whole, part.starts)].tolist()
    names = [f"series {dataset.ids[i]!r} holds numbers that are not finite" for i in bad[:5]]
    return finding("finite", "error", names, len(bad))


def _positions(dataset: StoredDataset) -> list[Finding]:
    """Order, copies, and how far positions reach as the model sees them."""
    unsorted: list[int] = []
    copies: list[int] = []
    reach = np.zeros(len(dataset.schema.axes))
    normaliser = Normaliser(dataset.schema)
    for part in dataset.parts(_AT_ONCE):
        starts, first_axis = part.starts, part.positions[:, 0]
        step = np.diff(first_axis, prepend=first_axis[:1])
        step[starts] = 1.0  # the first of a series follows none
        smallest = np.minimum.reduceat(step, starts)
        unsorted += part.ids[smallest < 0].tolist()
        for i in part.ids[smallest <= 0].tolist():
            own = dataset.raw(i)[0]
            if len(np.unique(own, axis=0)) < len(own):
                copies.append(i)
        for i in part.ids.tolist():
            reach = np.maximum(
                reach, np.abs(normaliser.normalise_positions(dataset.raw(i)[0])).max(axis=0)
            )
    far = [
        f"axis {axis.name!r} reaches {number:.3g} radians of the fastest rotation; set its anchor "
        f"to 'first', an offset, or a larger scale (or 'auto')"
        for axis, number in zip(dataset.schema.axes, reach, strict=True)
        if number > 1e5
    ]
    return [
        *finding(
            "order",
            "warning",
            _named(dataset, unsorted, "is not in order of the first axis"),
            len(unsorted),
        ),
        *finding(
            "copies",
            "warning",
            _named(
                dataset,
                copies,
                "has observations at equal positions: a copy gives a hidden number away",
            ),
            len(copies),
        ),
        *finding("reach", "warning", far),
    ]


def _lengths(dataset: StoredDataset) -> list[Finding]:
    single = np.flatnonzero(dataset.lengths == 1).tolist()
    long = np.flatnonzero(dataset.lengths > _LONG).tolist()
    words = [
        f"series {dataset.ids[i]!r} has {dataset.lengths[i]:,} observations; attention needs time "
        f"for their square: consider trainer.augment_crop_tokens or a shorter window"
        for i in long[:5]
    ]
    return [
        *finding(
            "single",
            "warning",
            _named(dataset, single, "has one observation: nothing can be hidden and shown"),
            len(single),
        ),
        *finding("long", "warning", words, len(long)),
    ]


def _values(dataset: StoredDataset) -> list[Finding]:
    """Numbers so far out that a few of them rule the loss."""
    normaliser = Normaliser(dataset.schema)
    far: NDArray[np.int64] = np.zeros(len(dataset.schema.channels), dtype=np.int64)
    example: dict[int, tuple[float, int]] = {}
    for part in dataset.parts(_AT_ONCE):
        size = np.abs(normaliser.normalise(part.values))  # (n, C)
        far += (size > _FAR).sum(axis=0)
        for k in np.flatnonzero((size > _FAR).any(axis=0)):
            row = int(size[:, k].argmax())
            example[int(k)] = max(
                example.get(int(k), (0.0, 0)),
                (float(size[row, k]), dataset.offsets[part.ids[0]] + row),
            )
    words = []
    for channel, (most, row) in example.items():
        owner = int(np.searchsorted(dataset.offsets, row, side="right")) - 1
        words.append(
            f"channel {dataset.schema.channels[channel].name!r} is {most:,.0f} standard deviations from "
            f"its mean in series {dataset.ids[owner]!r}; a transform such as arcsinh may help"
        )
    return finding("far", "warning", words, int(far.sum()))


def _names(dataset: StoredDataset) -> list[Finding]:
    """Units that are not said, and classes with few or no series to learn from."""
    schema = dataset.schema
    no_unit = [
        f"{what} {part.name!r} has no unit; write '1' for a pure number"
        for what, parts in (
            ("channel", schema.channels),
            ("axis", schema.axes),
            ("target", schema.targets),
        )
        for part in parts
        if not part.unit.strip()
    ]
    if dataset.labels is None:
        return finding("units", "warning", no_unit)
    n_classes = len(schema.classes)
    in_train = np.bincount(dataset.labels[dataset.split("train").indices], minlength=n_classes)
    overall = np.bincount(dataset.labels, minlength=n_classes)
    words = [
        f"class {name!r} has {in_train[k]} series in train and {overall[k]} in all"
        for k, name in enumerate(schema.classes)
        if in_train[k] < _FEW
    ]
    return [*finding("units", "warning", no_unit), *finding("classes", "warning", words)]


def _named(dataset: StoredDataset, rows: list[int], what: str) -> list[str]:
    return [f"series {dataset.ids[i]!r} {what}" for i in rows[:5]]
