"""Drift as a picture: how far each quantity is from the training data, and how the furthest changed.

Where series lie among an encoder's features, and how far others are from there; needs no torch.
What the training data looked like, in a few numbers, and how far other series are from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from roma_core.data.quality import bin_edges, psi
from roma_core.data.store import StoredDataset
from roma_core.evaluation.plots import BLUE, GREY, ORANGE, STYLE, new_figure, png_of, short
from roma_core.schema import DataError, DataSchema

_QUARTILES_OF_NORMAL = 1.349  # their distance, in standard deviations
_CHANCE = np.pi / 2  # variance of the median of n normal numbers, times n


class EmbeddingProfile(BaseModel):
    """Features of the series that an encoder was trained on, D numbers each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_series: int = Field(gt=0)
    center: tuple[float, ...] = Field(description="Median of every feature.")
    spread: tuple[float, ...] = Field(
        description="Distance of its quartiles in those of a normal distribution of deviation 1."
    )


def embedding_profile(features: NDArray[Any]) -> EmbeddingProfile:
    """The profile of features ``(n, D)``."""
    low, center, high = np.quantile(features.astype(np.float64), (0.25, 0.5, 0.75), axis=0)
    spread = (high - low) / _QUARTILES_OF_NORMAL
    return EmbeddingProfile(
        n_series=len(features), center=tuple(center.tolist()), spread=tuple(spread.tolist())
    )


def embedding_distance(profile: EmbeddingProfile, center: Sequence[float], n: int) -> float:
    """How far the medians ``center`` of n other series are from the profile's, in spreads.

    A feature that hardly varies is measured by a thousandth of the largest spread at least.

    Raises:
        ValueError: there are as many medians as another encoder has features.
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
    chance = _CHANCE * (1 / profile.n_series + 1 / n)
    return float(np.sqrt(max(0.0, float((shift**2).mean()) - chance)))


Floats = NDArray[np.float64]
_LEVELS = np.linspace(0, 1, 101)
_MOST_SERIES = 20_000


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantity(_Document):
    """One distribution of the training data."""

    quantiles: tuple[float, ...] = Field(description="At 0, 0.01, …, 1.")
    std: float
    edges: tuple[float, ...] = Field(description="Inner edges of the bins.")
    shares: tuple[float, ...] = Field(description="Of the bins, one more than edges.")


class ReferenceProfile(_Document):
    schema_version: Literal[1] = 1
    dataset_digest: str
    n_series: int
    quantities: dict[str, Quantity] = Field(description="length, span.AXIS, gap.AXIS, value.NAME")
    missing: dict[str, float] = Field(description="Share of each channel that is missing.")
    classes: dict[str, float] = Field({}, description="Share of each class.")
    embedding: EmbeddingProfile | None = Field(
        None,
        description="Features of the encoder; a model from before they were measured has none.",
    )


class Effect(_Document):
    """How far one quantity is from the training data, by one measure."""

    quantity: str
    measure: Literal["psi", "wasserstein", "missing", "embedding"]
    size: float


@dataclass(frozen=True)
class Series:
    """Quantities of some series, all numbers of all series in one array each.

    Attributes:
        values: channel -> values; NaN is missing.
        classes: class -> number of series; empty if nobody said.
    """

    n: int
    quantities: Mapping[str, Floats]
    values: Mapping[str, Floats]
    classes: Mapping[str, int]


def reference_profile(
    dataset: StoredDataset, embedding: EmbeddingProfile | None = None
) -> ReferenceProfile:
    """Profile the train split; of a large one, evenly spaced series."""
    indices = dataset.split("train").indices
    indices = indices[:: max(1, -(-len(indices) // _MOST_SERIES))]
    pairs = [dataset.raw(int(i)) for i in indices]
    counts: dict[str, int] = {}
    if dataset.labels is not None:
        numbers = np.bincount(dataset.labels[indices], minlength=len(dataset.schema.classes))
        counts = dict(zip(dataset.schema.classes, numbers.tolist(), strict=True))
    axes, channels = _names(dataset.schema)
    series = _series(axes, channels, [p for p, _ in pairs], [v for _, v in pairs], counts)
    profile = profile_of_series(series, dataset.manifest.digest)
    return profile.model_copy(update={"embedding": embedding})


def profile_of_series(series: Series, dataset_digest: str) -> ReferenceProfile:
    """The profile of series that are at hand."""
    return ReferenceProfile(
        dataset_digest=dataset_digest,
        n_series=series.n,
        quantities={name: _quantity(numbers) for name, numbers in _numbers(series)},
        missing=_missing(series),
        classes=_shares(series.classes),
    )


def series_of_rows(
    rows: Iterable[Mapping[str, Any]], axes: Sequence[str], channels: Sequence[str]
) -> Series:
    """Series as consumers send them: ``positions`` and ``values``, each name → numbers."""
    positions, values = [], []
    for row in rows:
        positions.append(np.stack([np.asarray(row["positions"][a], np.float64) for a in axes], 1))
        values.append(np.stack([np.asarray(row["values"][c], np.float64) for c in channels], 1))
    return _series(axes, channels, positions, values, {})


def series_from_parquet(
    paths: Sequence[Path], schema: DataSchema, class_column: str | None = None
) -> Series:
    """Series as ``roma data export`` and requests have them: a row each, list columns by name.

    Args:
        class_column: column with the class of each series, such as the predicted one.

    Raises:
        DataError: a column is missing, or the lists of a row differ in length.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    axes, channels = _names(schema)
    positions: list[Floats] = []
    values: list[Floats] = []
    classes: dict[str, int] = {}
    for path in paths:
        wanted = [*axes, *channels, *([class_column] if class_column else [])]
        try:
            present = pq.read_schema(path).names
            if absent := [name for name in wanted if name not in present]:
                raise DataError(f"{path} has no column {absent[0]!r}; it has {', '.join(present)}")
            table = pq.read_table(path, columns=wanted).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error
        lists = {name: table.column(name).to_pylist() for name in (*axes, *channels)}
        for row in range(table.num_rows):
            columns = [np.array(lists[name][row] or [], np.float64) for name in (*axes, *channels)]
            if len({len(column) for column in columns}) > 1:
                lengths = dict(zip((*axes, *channels), map(len, columns), strict=True))
                raise DataError(f"{path}, row {row}: lists differ in length: {lengths}")
            positions.append(np.stack(columns[: len(axes)], axis=1))
            values.append(np.stack(columns[len(axes) :], axis=1))
        if class_column:
            for name in table.column(class_column).to_pylist():
                if name is not None:
                    classes[str(name)] = classes.get(str(name), 0) + 1
    return _series(axes, channels, positions, values, classes)


def effects(profile: ReferenceProfile, series: Series) -> list[Effect]:
    """Every measure of every quantity, the largest first within each measure."""
    if series.n == 0:
        return []
    found = []
    shares = shares_of_bins(profile, series)
    for name, numbers in _numbers(series):
        if name not in shares:
            continue
        reference = profile.quantities[name]
        size = _corrected_psi(np.array(reference.shares), profile.n_series, shares[name], series.n)
        found.append(Effect(quantity=name, measure="psi", size=size))
        distance = np.abs(np.quantile(numbers, _LEVELS) - reference.quantiles).mean()
        scale = reference.std or max(abs(reference.quantiles[50]), 1.0) * 1e-6
        found.append(Effect(quantity=name, measure="wasserstein", size=float(distance / scale)))
    for name, share in _missing(series).items():
        size = abs(share - profile.missing.get(name, 0.0))
        found.append(Effect(quantity=f"value.{name}", measure="missing", size=size))
    if series.classes and profile.classes:
        names = sorted({*profile.classes, *series.classes})
        now = _shares(series.classes)
        p = np.array([profile.classes.get(name, 0.0) for name in names])
        q = np.array([now.get(name, 0.0) for name in names])
        found.append(
            Effect(
                quantity="class",
                measure="psi",
                size=_corrected_psi(p, profile.n_series, q, series.n),
            )
        )
    return sorted(found, key=lambda effect: (effect.measure, -effect.size))


def shares_of_bins(profile: ReferenceProfile, series: Series) -> dict[str, Floats]:
    """Shares of the series' numbers in the profile's bins, ``(B,)``, of every quantity both have."""
    found = {}
    for name, numbers in _numbers(series):
        reference = profile.quantities.get(name)
        if reference is not None and len(numbers):
            bins = np.searchsorted(reference.edges, numbers, side="left")
            found[name] = np.bincount(bins, minlength=len(reference.shares)) / len(numbers)
    return found


def _names(schema: DataSchema) -> tuple[list[str], list[str]]:
    return [axis.name for axis in schema.axes], [channel.name for channel in schema.channels]


def _series(
    axes: Sequence[str],
    channels: Sequence[str],
    positions: Sequence[Floats],
    values: Sequence[NDArray[Any]],
    classes: Mapping[str, int],
) -> Series:
    """``positions``: of every series ``(N, D)``; ``values``: ``(N, C)``."""
    quantities: dict[str, Floats] = {"length": np.array([len(v) for v in values], np.float64)}
    full = [p for p in positions if len(p)]
    for k, axis in enumerate(axes):
        spans = [p[:, k].max() - p[:, k].min() for p in full]
        gaps = [np.diff(np.sort(p[:, k])) for p in full]
        quantities[f"span.{axis}"] = np.array(spans, np.float64)
        quantities[f"gap.{axis}"] = np.concatenate([*gaps, np.empty(0)])
    whole = np.concatenate([*values, np.empty((0, len(channels)))])
    by_channel = {name: whole[:, k].astype(np.float64) for k, name in enumerate(channels)}
    return Series(len(values), quantities, by_channel, classes)


def _numbers(series: Series) -> Iterator[tuple[str, Floats]]:
    yield from series.quantities.items()
    for name, values in series.values.items():
        yield f"value.{name}", values[np.isfinite(values)]


def _quantity(numbers: Floats) -> Quantity:
    edges = bin_edges(numbers)
    counts = np.bincount(np.searchsorted(edges, numbers, side="left"), minlength=len(edges) + 1)
    return Quantity(
        quantiles=tuple(np.quantile(numbers, _LEVELS).tolist()) if len(numbers) else (0.0,) * 101,
        std=float(numbers.std()) if len(numbers) else 0.0,
        edges=tuple(edges.tolist()),
        shares=tuple((counts / max(1, len(numbers))).tolist()),
    )


def _corrected_psi(p: Floats, n_p: int, q: Floats, n_q: int) -> float:
    """Population stability index, less its expectation where nothing changed; at least 0.

    ``p`` and ``q`` are fractions ``(B,)`` of ``n_p`` and ``n_q`` series.
    """
    chance = (len(p) - 1) * (1 / n_p + 1 / n_q)
    return max(0.0, psi(p * n_p, q * n_q) - chance)


def _missing(series: Series) -> dict[str, float]:
    return {
        name: float(1 - np.isfinite(values).mean()) if len(values) else 0.0
        for name, values in series.values.items()
    }


def _shares(classes: Mapping[str, int]) -> dict[str, float]:
    total = sum(classes.values())
    return {name: n / total for name, n in classes.items()} if total else {}


MUCH = 0.25  # of the population stability index, by its users' convention; from SOME on they look
SOME = 0.1
_BARS, _CLOSER = 14, 4


def drift_picture(profile: ReferenceProfile, series: Series) -> bytes:
    """PNG: the stability index of each quantity as a bar; shares of the bins of those furthest away.

    Raises:
        ValueError: the series and the profile have no quantity in common.
    """
    found = [e for e in effects(profile, series) if e.measure == "psi"]
    if not found:
        raise ValueError(
            "no quantity of the series is in the profile, so there is no drift to draw"
        )
    shares = shares_of_bins(profile, series)
    closer = [e.quantity for e in found if e.quantity in shares][:_CLOSER]
    with mpl.rc_context(STYLE):
        figure = new_figure(10.5, max(3.6, 0.9 + 0.28 * min(len(found), _BARS)))
        bars, panels = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.5])[0]
        _draw_bars(bars.subplots(), found[:_BARS])
        columns = 2 if len(closer) > 1 else 1
        grid = panels.subplots(-(-len(closer) // columns), columns, squeeze=False).ravel()
        for axes, name in zip(grid, closer, strict=False):
            _draw_shares(axes, name, profile.quantities[name], shares)
        for axes in grid[len(closer) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        panels.legend(handles, labels, loc="outside upper right", ncols=2)
        return png_of(figure)


def _draw_bars(axes: Axes, found: list[Effect]) -> None:
    names = [short(e.quantity, 22) for e in found][::-1]
    sizes = [e.size for e in found][::-1]
    colours = [ORANGE if size > MUCH else BLUE for size in sizes]
    axes.barh(range(len(sizes)), sizes, color=colours, height=0.7)
    axes.set_yticks(range(len(sizes)), names)
    for limit in (SOME, MUCH):
        axes.axvline(limit, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, max(1.15 * max(sizes), 1.4 * MUCH))
    axes.set_xlabel(f"population stability index\n(dashed: {SOME} is some drift, {MUCH} much)")
    axes.grid(axis="y", visible=False)


def _draw_shares(
    axes: Axes, name: str, quantity: Quantity, shares: Mapping[str, np.ndarray]
) -> None:
    """Side by side in every bin; what is written below stands at an edge of two bins."""
    places = np.arange(len(quantity.shares))
    axes.bar(places - 0.2, quantity.shares, 0.4, color=GREY, label="training")
    axes.bar(places + 0.2, shares[name], 0.4, color=ORANGE, label="recent")
    every = max(1, round(len(quantity.edges) / 3))
    shown = [n for n in range(len(quantity.edges)) if n % every == 0]
    axes.set_xticks([n + 0.5 for n in shown], [f"{quantity.edges[n]:.3g}" for n in shown])
    axes.set_title(short(name, 26))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(axis="x", visible=False)
