"""What changed between two versions of a data set: schema, splits, objects and distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roma_core.data.manifest import MANIFEST, SPLITS
from roma_core.data.quality import MAX_OBSERVATIONS, Finding, findings_of, known_covariate
from roma_core.data.store import StoredDataset
from roma_core.schema import Normaliser

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

    Drift of every channel and what is observed of it, of categories, covariates, gaps, lengths and
    classes is measured on the train splits by the population stability index. Versions with
    different schemas are not compared further.
    """
    sentences = []
    for what in ("layout", "channels", "axes", "covariates", "classes", "targets", "target_level"):
        now, then = (
            found
            if isinstance(found := getattr(version.schema, what), str)
            else [p if isinstance(p, str) else (p.name, p.unit) for p in found]
            for version in (new, old)
        )
        if now != then:
            sentences.append(f"{what} were {then}, now they are {now}: earlier models do not fit")
    if sentences:
        return findings_of("schema changed", "warning", sentences)
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
        *findings_of("moved to another split", "error", moved),
        *findings_of("gone", "warning", gone),
        *findings_of("changed", "warning", changed),
    ]


def _drift(new: StoredDataset, old: StoredDataset) -> list[Finding]:
    now, then = (_train_numbers(version, Normaliser(old.schema.joint)) for version in (new, old))
    sentences = [
        f"{name} drifted: stability index {index:.2f} (above {_DRIFT} is much); median "
        f"{np.median(numbers):.3g} → {np.median(now[name]):.3g}"
        for name, numbers in then.items()
        if len(numbers) and len(now.get(name, ()))
        if (index := stability_index(numbers, now[name])) > _DRIFT
    ]
    return findings_of("drift", "warning", sentences)


def _train_numbers(
    dataset: StoredDataset, normaliser: Normaliser
) -> dict[str, NDArray[np.float64]]:
    """Transformed values, gaps, lengths, categories and classes of train, by what they are."""
    train = dataset.split("train")
    total = int(train.lengths.sum())
    schema = dataset.schema
    raw = [dataset.joint(int(i)) for i in train.indices[:: max(1, -(-total // MAX_OBSERVATIONS))]]
    if not raw:
        return {}
    positions = np.concatenate([p for p, _ in raw])
    values = normaliser.transform(np.concatenate([v for _, v in raw]), positions)
    found = {"length of series": np.array([len(p) for p, _ in raw], np.float64)}
    found[f"gap in {schema.axes[0].name!r}"] = np.concatenate([np.diff(p[:, 0]) for p, _ in raw])
    for k, channel in enumerate(schema.channels):
        known = ~np.isnan(values[:, k])
        found[f"channel {channel.name!r}"] = values[known, k]
        found[f"presence of channel {channel.name!r}"] = known.astype(np.float64)
    for k, axis in enumerate(schema.given_axes):
        if axis.categories:
            found[f"category of {axis.name!r}"] = positions[:, k]
    for k, covariate in enumerate(schema.covariates):
        known = known_covariate(dataset, k, "train")
        found[f"covariate {covariate.name!r}"] = known.astype(np.float64)
        there = np.arange(len(train)) < len(known)
        found[f"presence of covariate {covariate.name!r}"] = there.astype(np.float64)
    if dataset.labels is not None:
        found["class"] = dataset.labels[train.indices].astype(np.float64)
    if dataset.series_targets is not None:
        columns = dataset.series_targets[train.indices].astype(np.float64).T
        found |= {f"target {t.name!r}": x for t, x in zip(schema.targets, columns, strict=True)}
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
