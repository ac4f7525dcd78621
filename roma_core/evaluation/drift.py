"""Drift of inputs: profiles of the training data, and how far other series are from them.

A profile has distributions of lengths, spans, gaps and values, class frequencies, and the median and
spread of an encoder's features. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from roma_core.data.store import StoredDataset, Subset
from roma_core.data.versions import bin_edges, psi
from roma_core.evaluation.predictions import Floats
from roma_core.schema import DataError, DataSchema
from roma_core.settings import Frozen

MODERATE_PSI, LARGE_PSI = 0.1, 0.25  # conventional thresholds of the population stability index
_NORMAL_IQR = 1.349  # interquartile range of a normal distribution, in standard deviations
_MEDIAN_VARIANCE = np.pi / 2  # of n normal numbers, times n
_LEVELS = np.linspace(0, 1, 101)
_MAX_SERIES = 20_000


class EmbeddingProfile(Frozen):
    """Embedding profile: median and spread of an encoder's D features over its training series."""

    n_series: int = Field(gt=0)
    center: tuple[float, ...]  # median of every feature
    spread: tuple[float, ...]  # its interquartile range, over that of a standard normal


def embedding_profile(features: NDArray[Any]) -> EmbeddingProfile:
    """The profile of features ``(n, D)``."""
    low, center, high = np.quantile(features.astype(np.float64), (0.25, 0.5, 0.75), axis=0)
    spread = (high - low) / _NORMAL_IQR
    return EmbeddingProfile(
        n_series=len(features), center=tuple(center.tolist()), spread=tuple(spread.tolist())
    )


def embedding_distance(profile: EmbeddingProfile, center: Sequence[float], n: int) -> float:
    """Root mean square distance of the medians ``center`` of n other series, in spreads.

    What is expected by chance is subtracted. Spreads count as at least a thousandth of the largest.

    Raises:
        ValueError: the number of features differs, or a median is not finite.
    """
    if len(center) != len(profile.center):
        raise ValueError(
            f"the profile is of {len(profile.center)} features, these series have {len(center)}: "
            f"they were embedded by another encoder"
        )
    if n < 1 or not np.isfinite(center).all():
        raise ValueError(f"the features of {n} recent series have no finite medians")
    spread = np.array(profile.spread)
    spread = np.maximum(spread, max(spread.max() * 1e-3, np.finfo(np.float32).eps))
    shift = (np.array(center) - np.array(profile.center)) / spread
    chance = _MEDIAN_VARIANCE * (1 / profile.n_series + 1 / n)
    return float(np.sqrt(max(0.0, float((shift**2).mean()) - chance)))


class Quantity(Frozen):
    """Distribution of one quantity in the training data."""

    quantiles: tuple[float, ...]  # at 0, 0.01, …, 1
    std: float
    edges: tuple[float, ...]  # inner edges of the bins
    fractions: tuple[float, ...]  # of the bins, one more than edges

    @classmethod
    def of(cls, numbers: Floats) -> Quantity:
        edges = bin_edges(numbers)
        return cls(
            quantiles=np.quantile(numbers, _LEVELS).tolist() if len(numbers) else (0.0,) * 101,
            std=float(numbers.std()) if len(numbers) else 0.0,
            edges=edges.tolist(),
            fractions=_binned(numbers, edges).tolist(),
        )


class ReferenceProfile(Frozen):
    """Profile of the training data of a model, ``profile.json`` of its package."""

    schema_version: Literal[1] = 1
    dataset_digest: str
    n_series: int
    quantities: dict[str, Quantity]  # length, span.AXIS, gap.AXIS, value.NAME, covariate.NAME
    missing: dict[str, float]  # missing fraction of each channel, and of covariate.NAME
    classes: dict[str, float] = Field({})  # fraction of each class
    categories: dict[str, dict[str, float]] = Field({})  # category.AXIS, covariate.NAME: fractions
    embedding: EmbeddingProfile | None = None  # features of the encoder, if there is one


class Effect(Frozen):
    """Distance of one quantity from the training data, by one measure."""

    quantity: str
    measure: Literal["psi", "wasserstein", "missing", "embedding"]
    size: float

    @property
    def name(self) -> str:
        """Of the number that is shown over time, such as ``value.flux psi``."""
        return f"{self.quantity} {self.measure}"


@dataclass(frozen=True)
class InputSample:
    """Quantities of n series, all numbers of all series in one array each."""

    n: int
    quantities: Mapping[str, Floats]  # length, span.AXIS and gap.AXIS -> numbers
    values: Mapping[str, Floats]  # value.CHANNEL and covariate.NAME -> numbers; NaN is missing
    classes: Mapping[str, int]  # class -> number of series; empty if unknown
    categories: Mapping[str, Mapping[str, int]]  # of category.AXIS and covariate.NAME: how often


def reference_profile(
    dataset: StoredDataset, embedding: EmbeddingProfile | None = None
) -> ReferenceProfile:
    """Profile the train split; of a large one, evenly spaced series."""
    indices = dataset.split("train").indices
    indices = indices[:: max(1, -(-len(indices) // _MAX_SERIES))]
    pairs = [dataset.joint(int(i)) for i in indices]
    covariates = np.empty((len(pairs), 0))
    if dataset.covariates is not None:
        covariates = dataset.covariates[indices].astype(np.float64)
    arrays = [p for p, _ in pairs], [v for _, v in pairs], covariates
    sample = _sample(_parts(dataset.schema), *arrays, Subset(dataset, indices).class_counts)
    profile = profile_of_sample(sample, dataset.manifest.digest)
    return profile.model_copy(update={"embedding": embedding})


def profile_of_sample(sample: InputSample, dataset_digest: str) -> ReferenceProfile:
    """The profile of a sample, without an embedding profile."""
    return ReferenceProfile(
        dataset_digest=dataset_digest,
        n_series=sample.n,
        quantities={name: Quantity.of(numbers) for name, numbers in _numbers(sample).items()},
        missing={name.removeprefix("value."): x for name, x in _missing(sample).items()},
        classes=_fractions(sample.classes),
        categories={name: _fractions(counts) for name, counts in sample.categories.items()},
    )


Part = Mapping[str, Any]
"""An axis, channel or covariate: its ``name``, and ``categories`` if it has some."""


def _parts(schema: DataSchema) -> tuple[list[Part], list[Part], list[Part]]:
    """Axes, channels and covariates as in the joint layout."""
    axes, channels, covariates = schema.given_axes, schema.channels, schema.covariates
    return [*map(dict, axes)], [*map(dict, channels)], [*map(dict, covariates)]


def sample_from_rows(
    rows: Iterable[Mapping[str, Any]],
    axes: Sequence[Part],
    channels: Sequence[Part],
    covariates: Sequence[Part] = (),
    classes: Mapping[str, int] | None = None,
) -> InputSample:
    """From series in the form of requests, and the number of series of each class."""
    positions, values, of_objects = [], [], []
    for row in rows:
        positions.append(_columns(axes, row["positions"], 0))
        values.append(_columns(channels, row["values"], len(positions[-1])))
        given = row.get("covariates") or {}
        of_objects.append([_number(one, given.get(one["name"])) for one in covariates])
    numbers = np.array(of_objects, np.float64).reshape(len(positions), len(covariates))
    return _sample((axes, channels, covariates), positions, values, numbers, classes or {})


def _columns(parts: Sequence[Part], given: Mapping[str, Any], n: int) -> Floats:
    """``(N, K)`` numbers of lists by name; NaN where an entry, or one of n long, is missing."""
    lists = [given.get(part["name"], [None] * n) for part in parts]
    columns = [[_number(part, x) for x in one] for part, one in zip(parts, lists, strict=True)]
    return np.array(columns, np.float64).reshape(len(parts), -1).T


def _number(part: Part, entry: Any) -> float:
    """A number, or the index of a category, that after the last for an unknown one; NaN for None."""
    if entry is None:
        return np.nan
    if names := part.get("categories"):
        word = entry if isinstance(entry, str) else f"{entry:g}"
        has_numbers = any(name.replace(".", "", 1).isdigit() for name in names)
        is_index = not has_numbers and entry in range(len(names))  # as the served model takes it
        return float(entry if is_index else [*names, word].index(word))
    return float(entry)


def sample_from_parquet(
    paths: Sequence[Path], schema: DataSchema, class_column: str | None = None
) -> InputSample:
    """From files as ``roma data export`` writes them: a row per series, list columns by name.

    Args:
        class_column: column with the class of each series, such as the predicted one.

    Raises:
        DataError: a column is missing, or the lists of a row differ in length.
        OSError: a file is gone, or the file system fails.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    axes, channels, covariates = parts = _parts(schema)
    rows, classes = [], Counter[str]()
    for path in paths:
        lists = [one["name"] for one in (*axes, *channels)]
        wanted = [*lists, *([class_column] if class_column else [])]
        try:
            present = pq.read_schema(path).names
            if absent := [name for name in wanted if name not in present]:
                raise DataError(f"{path} has no column {absent[0]!r}; it has {', '.join(present)}")
            wanted += [one["name"] for one in covariates if one["name"] in present]
            found = pq.read_table(path, columns=wanted).to_pylist()
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, FileNotFoundError) or getattr(error, "errno", None):
                raise  # of the file system, not of the content
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error
        for k, row in enumerate(found):
            row |= {name: row[name] or [] for name in lists}
            lengths = {name: len(row[name]) for name in lists}
            if len(set(lengths.values())) > 1:
                raise DataError(f"{path}, row {k}: lists differ in length: {lengths}")
            if class_column and row[class_column] is not None:
                classes[str(row[class_column])] += 1
            rows.append({"positions": row, "values": row, "covariates": row})
    return sample_from_rows(rows, *parts, classes)


def drift_effects(profile: ReferenceProfile, sample: InputSample) -> list[Effect]:
    """Every measure of every quantity, the largest first within each measure."""
    if sample.n == 0:
        return []
    found, numbers = [], _numbers(sample)
    for name, recent in bin_fractions(profile, sample).items():
        reference = profile.quantities[name]
        size = _psi(np.array(reference.fractions), profile.n_series, recent, sample.n)
        distance = np.abs(np.quantile(numbers[name], _LEVELS) - reference.quantiles).mean()
        scale = reference.std or max(abs(reference.quantiles[50]), 1.0) * 1e-6
        found.append(Effect(quantity=name, measure="psi", size=size))
        found.append(Effect(quantity=name, measure="wasserstein", size=float(distance / scale)))
    for name, fraction in _missing(sample).items():
        before = profile.missing.get(name.removeprefix("value."), 0.0)
        # three standard errors, if a series has either all or no values of a channel
        chance = 9 * before * (1 - before) * (1 / profile.n_series + 1 / sample.n)
        size = max(0.0, (fraction - before) ** 2 - chance) ** 0.5
        found.append(Effect(quantity=name, measure="missing", size=size))
    references = {"class": profile.classes, **profile.categories}
    for quantity, counts in {"class": sample.classes, **sample.categories}.items():
        if counts and (expected := references.get(quantity)):
            names, both = sorted({*expected, *counts}), (expected, _fractions(counts))
            p, q = (np.array([fractions.get(name, 0.0) for name in names]) for fractions in both)
            size = _psi(p, profile.n_series, q, sample.n)
            found.append(Effect(quantity=quantity, measure="psi", size=size))
    return sorted(found, key=lambda effect: (effect.measure, -effect.size))


def bin_fractions(profile: ReferenceProfile, sample: InputSample) -> dict[str, Floats]:
    """Fractions ``(B,)`` of the sample in the profile's bins, of every quantity that both have."""
    return {
        name: _binned(numbers, np.array(profile.quantities[name].edges))
        for name, numbers in _numbers(sample).items()
        if name in profile.quantities and len(numbers)
    }


def _binned(numbers: Floats, edges: Floats) -> Floats:
    """Fractions of the numbers between the inner edges of bins."""
    counts = np.bincount(np.searchsorted(edges, numbers, side="left"), minlength=len(edges) + 1)
    return counts / max(1, len(numbers))


def _sample(
    parts: Sequence[Sequence[Part]],
    positions: Sequence[Floats],
    values: Sequence[NDArray[Any]],
    covariates: Floats,
    classes: Mapping[str, int],
) -> InputSample:
    """``positions``: of every series ``(N, D)``; ``values``: ``(N, C)``; ``covariates``: ``(n, K)``."""
    axes, channels, of_objects = parts
    quantities: dict[str, Floats] = {"length": np.array([len(v) for v in values], np.float64)}
    categories: dict[str, Mapping[str, int]] = {}
    full = [p for p in positions if len(p)]
    for k, axis in enumerate(axes):
        if axis.get("categories"):
            of_axis = np.concatenate([*(p[:, k] for p in full), np.empty(0)])
            categories[f"category.{axis['name']}"] = _counts(axis, of_axis)
            continue
        spans = [np.ptp(p[:, k]) for p in full]
        gaps = [np.diff(np.sort(p[:, k])) for p in full]
        quantities[f"span.{axis['name']}"] = np.array(spans, np.float64)
        quantities[f"gap.{axis['name']}"] = np.concatenate([*gaps, np.empty(0)])
    whole = np.concatenate([*values, np.empty((0, len(channels)))])
    whole = whole.astype(np.float64)
    numbers = {f"value.{one['name']}": whole[:, k] for k, one in enumerate(channels)}
    for k, one in enumerate(of_objects):
        numbers[f"covariate.{one['name']}"] = covariates[:, k]
        if one.get("categories"):
            categories[f"covariate.{one['name']}"] = _counts(one, covariates[:, k])
    return InputSample(len(values), quantities, numbers, classes, categories)


def _counts(part: Part, indices: Floats) -> dict[str, int]:
    """How often each category is among indices; NaN is left out."""
    names = (*part["categories"], "unknown")
    found = np.bincount(indices[~np.isnan(indices)].astype(np.int64), minlength=len(names))
    return {name: int(n) for name, n in zip(names, found, strict=True) if n}


def _numbers(sample: InputSample) -> dict[str, Floats]:
    finite = {
        name: values[np.isfinite(values)]
        for name, values in sample.values.items()
        if name not in sample.categories
    }
    return {**sample.quantities, **finite}


def _psi(p: Floats, n_p: int, q: Floats, n_q: int) -> float:
    """Population stability index of fractions, less its expectation without drift; at least 0.

    Counts are those of series, which are independent, not of the numbers in them.
    """
    chance = (len(p) - 1) * (1 / n_p + 1 / n_q)
    return max(0.0, psi(p * n_p, q * n_q) - chance)


def _missing(sample: InputSample) -> dict[str, float]:
    return {
        name: float(1 - np.isfinite(values).mean()) if len(values) else 0.0
        for name, values in sample.values.items()
    }


def _fractions(classes: Mapping[str, int]) -> dict[str, float]:
    total = sum(classes.values())
    return {name: n / total for name, n in classes.items()} if total else {}
