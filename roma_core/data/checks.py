"""What is looked for in a data set that is there: ``problems`` lists everything that is wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from roma_core.data.columns import MANIFEST, damage, read_manifest, split_counts
from roma_core.data.errors import DataError
from roma_core.data.schema import SPLITS
from roma_core.data.store import StoredDataset

_CONTENT_DECIMALS = 3  # of normalised values and of positions as the model sees them


def problems(path: Path) -> list[str]:
    """Everything that is wrong with a data-set folder, one line each; empty if it can be trusted.

    Looked at: manifest and sha256 of all files, shapes and offsets, labels and splits, finite
    numbers, unique ids, and equal content in two splits. Content is compared as the model sees it,
    rounded to 3 decimals, and as stored: two copies of an object with different observations
    dropped are not equal.
    """
    try:
        manifest = read_manifest(path)
    except DataError as error:
        return [str(error)]
    if found := damage(path, manifest):
        return found
    dataset = StoredDataset(path, verify=False)
    if found := _broken_layout(dataset):
        return found
    return [*_not_finite(dataset), *_leaks(dataset)]


def _broken_layout(dataset: StoredDataset) -> list[str]:
    schema, n = dataset.schema, len(dataset.splits)
    n_observations = int(dataset.offsets[-1]) if dataset.offsets.size else 0
    columns = {
        "values.npy": (dataset.values, (n_observations, len(schema.channels)), np.float32),
        "positions.npy": (dataset.positions, (n_observations, len(schema.axes)), np.float64),
        "offsets.npy": (dataset.offsets, (n + 1,), np.int64),
        "splits.npy": (dataset.splits, (n,), np.int8),
    }
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


def _not_finite(dataset: StoredDataset) -> list[str]:
    found = []
    for i, name in enumerate(dataset.ids):
        positions, values = dataset.raw(i)
        if not (np.isfinite(positions).all() and np.isfinite(values).all()):
            found.append(f"series {name!r} holds numbers that are not finite")
    return found


def _leaks(dataset: StoredDataset) -> list[str]:
    found = []
    first_with: dict[bytes, int] = {}
    for i, name in enumerate(dataset.ids):
        sample = dataset.sample(i)
        content = hashlib.sha256()
        for array in (sample["positions"], sample["values"]):
            content.update((np.round(array, _CONTENT_DECIMALS) + 0.0).tobytes())  # -0.0 becomes 0.0
        other = first_with.setdefault(content.digest(), i)
        if dataset.splits[other] != dataset.splits[i]:
            found.append(
                f"series {dataset.ids[other]!r} ({SPLITS[dataset.splits[other]]}) and {name!r} "
                f"({SPLITS[dataset.splits[i]]}) have equal content: one of them must go"
            )
    return found
