"""What is looked for in a data set that is there.

``findings`` reads a whole folder and lists what is wrong with it, errors and warnings, each with a
count and examples. A set without errors can be trusted: its files are those that were written, its
columns fit each other, its numbers are finite, and no object, group or equal content is in two
splits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roma_core.data.columns import (
    MANIFEST,
    damage,
    read_manifest,
    shard_name,
    split_counts,
)
from roma_core.data.errors import DataError
from roma_core.data.findings import Finding, finding
from roma_core.data.leaks import leaks
from roma_core.data.normalisation import Normaliser
from roma_core.data.schema import SPLITS
from roma_core.data.store import StoredDataset

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
            n_rows = int(dataset.offsets[part.last] - dataset.offsets[part.first])
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
    for first, last, positions, values, targets in dataset.parts(_AT_ONCE):
        whole = np.isfinite(positions).all(1) & np.isfinite(values).all(1)
        if targets is not None:
            whole &= np.isfinite(targets).all(1)
        starts = dataset.offsets[first:last] - dataset.offsets[first]
        per_series = np.logical_and.reduceat(whole, starts)
        bad += (first + np.flatnonzero(~per_series)).tolist()
    names = [f"series {dataset.ids[i]!r} holds numbers that are not finite" for i in bad[:5]]
    return finding("finite", "error", names, len(bad))


def _positions(dataset: StoredDataset) -> list[Finding]:
    """Order, copies, and how far positions reach as the model sees them."""
    unsorted: list[int] = []
    copies: list[int] = []
    reach = np.zeros(len(dataset.schema.axes))
    normaliser = Normaliser(dataset.schema)
    for first, last, positions, *_ in dataset.parts(_AT_ONCE):
        starts = dataset.offsets[first:last] - dataset.offsets[first]
        step = np.diff(positions[:, 0], prepend=positions[:1, 0])
        step[starts] = 1.0  # the first of a series follows none
        unsorted += (first + np.flatnonzero(np.minimum.reduceat(step, starts) < 0)).tolist()
        for k in np.flatnonzero(np.minimum.reduceat(step, starts) <= 0):
            own = dataset.raw(int(first + k))[0]
            if len(np.unique(own, axis=0)) < len(own):
                copies.append(int(first + k))
        for i in range(first, last):
            reach = np.maximum(reach, np.abs(normaliser.anchored(dataset.raw(i)[0])).max(axis=0))
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
    for first, _, _, values, _ in dataset.parts(_AT_ONCE):
        size = np.abs(normaliser.normalise(values))  # (n, C)
        far += (size > _FAR).sum(axis=0)
        for k in np.flatnonzero((size > _FAR).any(axis=0)):
            row = int(size[:, k].argmax())
            example[int(k)] = max(
                example.get(int(k), (0.0, 0)), (float(size[row, k]), dataset.offsets[first] + row)
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
