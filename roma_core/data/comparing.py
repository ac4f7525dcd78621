"""A version of a data set against the one before: what moved, went, changed or drifted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roma_core.data.columns import MANIFEST
from roma_core.data.findings import Finding, finding
from roma_core.data.normalisation import Normaliser
from roma_core.data.schema import SPLITS
from roma_core.data.store import StoredDataset

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
