"""Profile of a data set: counts, lengths, classes, gaps, values; as JSON, Markdown and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from roma_core.data.manifest import SPLITS, Split
from roma_core.data.store import RaggedBatch, StoredDataset
from roma_core.figures import label_of, log_scale, png_of, short
from roma_core.settings import Frozen

_MAX_OBSERVATIONS = 2_000_000  # read for quantiles of gaps and values
_READ_AT_ONCE = 1 << 18
_COLOURS = {"train": "#2f6db3", "validation": "#e0a030", "test": "#b8433f"}
_N_EXAMPLES = 6
_N_CHANNELS = 16  # whose values are plotted
_MAX_CLASSES = 8  # in the table of fractions
_STYLE: Any = {
    "axes.titlelocation": "left", "axes.titlesize": 10, "axes.labelsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8,
    "text.parse_math": False, "legend.frameon": False, "xtick.labelsize": 8, "ytick.labelsize": 8,
}  # fmt: skip


class Quantiles(Frozen):
    """Quantiles of a set of numbers, in their own unit."""

    minimum: float
    q05: float
    q25: float
    median: float
    q75: float
    q95: float
    maximum: float

    @classmethod
    def of(cls, numbers: NDArray[Any]) -> Quantiles:
        levels = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
        names = cls.model_fields
        return cls(**dict(zip(names, np.quantile(numbers, levels).tolist(), strict=True)))


class SplitProfile(Frozen):
    n_series: int
    n_observations: int
    lengths: Quantiles | None = Field(description="Observations a series; None if empty.")
    classes: dict[str, int] = Field(description="Series of each class; empty without labels.")


class DataProfile(Frozen):
    """Statistics of one version of a data set."""

    schema_version: Literal[1] = 1
    name: str
    digest: str
    splits: dict[Split, SplitProfile]
    gaps: dict[str, Quantiles | None]
    """Axis name -> differences of consecutive positions, in stored order and in the axis's unit;
    None if no series has two observations."""
    values: dict[str, Quantiles | None]
    """Channel name -> values as delivered; None if none was profiled."""
    covariates: dict[str, Quantiles | None] = Field({}, description="Numbers as delivered.")
    observed: dict[str, dict[str, float]] = Field({})
    """Channel or covariate -> fraction of the observations, or objects, that have a value of it: of
    'all', and of each class unless it is all of them."""
    categories: dict[str, dict[str, int]] = Field({})
    """Axis or covariate -> category -> observations, or objects, of it."""
    targets: dict[str, Quantiles] = Field({}, description="Target name -> numbers as delivered.")
    fraction_dropped: float = Field(description="Fraction of the delivered observations dropped.")
    n_observations_profiled: int
    """Observations that gaps and values are taken from: whole series, evenly spaced."""

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, head and rows of every table; the first column holds names, the others numbers."""
        levels = list(Quantiles.model_fields)
        sizes = [
            [name, f"{s.n_series:,}", f"{s.n_observations:,}", *_numbers(s.lengths)]
            for name, s in self.splits.items()
        ]
        title = "Series and observations; quantiles of observations a series"
        found = [(title, ["split", "series", "observations", *levels], sizes)]
        if classes := self.splits["train"].classes:
            rows = [[c, *(f"{self.splits[s].classes[c]:,}" for s in SPLITS)] for c in classes]
            found.append(("Series of each class", ["class", *SPLITS], rows))
        groups: list[tuple[str, str, Mapping[str, Quantiles | None]]] = [
            ("Gaps between consecutive positions", "axis", self.gaps),
            ("Values as delivered", "channel", self.values),
            ("Targets as delivered", "target", self.targets),
            ("Covariates as delivered", "covariate", self.covariates),
        ]
        for title, what, quantiles in groups:
            rows = [[name, *_numbers(q)] for name, q in quantiles.items()]
            found += [(title, [what, *levels], rows)] if rows else []
        for name, counts in self.categories.items():
            rows = [[category, f"{n:,}"] for category, n in counts.items()]
            found.append((f"Observations, or objects, of each {name}", [name, "number"], rows))
        if any(of["all"] < 1 for of in self.observed.values()):
            head = ["of", "all", *list(classes)[:_MAX_CLASSES]]
            rows = [
                [name, *(f"{of.get(group, of['all']):.1%}" for group in head[1:])]
                for name, of in self.observed.items()
            ]
            title = "Fraction of the observations, or objects, that have a value; by class"
            found.append((title, head, rows))
        return found

    def to_markdown(self) -> str:
        """Tables that are readable as plain text too."""
        title = (
            f"**{self.name}**, version {self.digest[:12]}, {self.fraction_dropped:.1%} of the delivered "
            f"observations dropped"
        )
        tables = [f"{title}\n\n{_table(head, rows)}" for title, head, rows in self.tables()]
        return "\n\n".join([title, *tables]) + "\n"


def _numbers(quantiles: Quantiles | None) -> list[str]:
    if quantiles is None:
        return ["–"] * len(Quantiles.model_fields)
    return [f"{number:.4g}" for number in quantiles.model_dump().values()]


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded: first column left-aligned, others right-aligned."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    first, *others = [max(map(len, column)) for column in zip(*escaped, strict=True)]
    padded = [
        [row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], others, strict=True))]
        for row in escaped
    ]
    padded.insert(1, [":" + "-" * (first - 1), *("-" * (w - 1) + ":" for w in others)])
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def profile_dataset(dataset: StoredDataset) -> DataProfile:
    """Profile a data set; of a large one, gaps and values are taken from some of the series."""
    schema, parts = dataset.schema.joint, _profiled(dataset)
    positions, values = (
        np.concatenate(c) for c in zip(*((p.positions, p.values) for p in parts), strict=True)
    )
    series = np.concatenate([part.ids[part.series] for part in parts])  # (n,)
    found = [part.targets for part in parts if part.targets is not None]
    targets = np.concatenate(found) if found else np.empty((0, 0))  # (n, K)
    targets = targets if dataset.series_targets is None else dataset.series_targets
    covariates = np.empty((0, 0)) if dataset.covariates is None else dataset.covariates
    dropped = dataset.manifest.irregularity
    return DataProfile(
        name=dataset.manifest.name,
        digest=dataset.manifest.digest,
        splits={name: _split_profile(dataset, name) for name in SPLITS},
        gaps=_quantiles(schema.axes, _gaps(parts)),
        values=_quantiles(schema.channels, values),
        targets=_quantiles(schema.targets, targets),
        covariates=_quantiles(schema.covariates, covariates),
        observed=_observed(dataset, schema.channels, values, series)
        | _observed(dataset, schema.covariates, covariates, np.arange(len(dataset))),
        categories=_categories(schema.axes, positions) | _categories(schema.covariates, covariates),
        fraction_dropped=dropped.n_dropped / dropped.n_observations_before if dropped else 0.0,
        n_observations_profiled=len(values),
    )


def _quantiles(parts: Sequence[Any], numbers: NDArray[Any]) -> dict[str, Any]:
    """Of the columns of ``(n, C)`` that are no categories; None of one without a number."""
    known = {
        part.name: column[~np.isnan(column)]
        for part, column in zip(parts, numbers.T, strict=False)
        if not getattr(part, "categories", ())
    }
    return {name: Quantiles.of(x) if len(x) else None for name, x in known.items()}


def _categories(parts: Sequence[Any], numbers: NDArray[Any]) -> dict[str, dict[str, int]]:
    """How often each category is in the columns of ``(n, C)``."""
    found = {}
    for part, column in zip(parts, numbers.T, strict=True):
        if part.categories:
            names = (*part.categories, *("unknown",) * getattr(part, "unknown", False))
            known = column[~np.isnan(column)].astype(np.int64)
            counts = np.bincount(known, minlength=len(names)).tolist()
            found[part.name] = dict(zip(names, counts, strict=True))
    return found


def _observed(
    dataset: StoredDataset, parts: Sequence[Any], numbers: NDArray[Any], rows: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """Known fractions of the columns of ``(n, C)``, which are of the ``(n,)`` series."""
    found = {}
    for part, known in zip(parts, ~np.isnan(numbers.T), strict=True):
        found[part.name] = {"all": float(known.mean())}
        if dataset.labels is not None and not known.all():
            labels, classes = dataset.labels[rows], dataset.schema.classes
            total = np.bincount(labels, minlength=len(classes))
            fractions = np.bincount(labels, known, len(classes)) / np.maximum(total, 1)
            by_class = dict(zip(classes, fractions.tolist(), strict=True))
            found[part.name] |= {c: x for c, x in by_class.items() if total[classes.index(c)]}
    return found


def _profiled(dataset: StoredDataset) -> list[RaggedBatch]:
    """Series that gaps and values are taken from, evenly spaced, in the joint layout."""
    n = int(dataset.offsets[-1]) * len(dataset.schema.channels) // dataset.schema.n_values
    return list(dataset.joint_parts(_READ_AT_ONCE, math.ceil(n / _MAX_OBSERVATIONS)))


def _gaps(parts: Sequence[RaggedBatch]) -> NDArray[np.float64]:
    """``(n, D)`` differences of consecutive positions of a series."""
    return np.concatenate([np.diff(p.positions, axis=0)[p.index[1:] > 0] for p in parts])


def _split_profile(dataset: StoredDataset, name: Split) -> SplitProfile:
    subset = dataset.split(name)
    return SplitProfile(
        n_series=len(subset),
        n_observations=int(subset.lengths.sum()),
        lengths=Quantiles.of(subset.lengths) if len(subset) else None,
        classes=subset.class_counts,
    )


def plot_profile(profile: DataProfile, dataset: StoredDataset) -> bytes:
    """One PNG of at most 40 KiB: lengths, classes, gaps, and a few series with their holes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    figure.suptitle(
        f"{profile.name}   ·   {len(dataset):,} series   ·   {int(dataset.offsets[-1]):,} observations"
        f"   ·   {profile.fraction_dropped:.0%} dropped",
        fontsize=12,
    )
    with rc_context(_STYLE):
        panels = figure.subplots(2, 2).flatten()
        _plot_lengths(panels[0], dataset)
        _plot_classes(panels[1], profile, dataset)
        _plot_gaps(panels[2], dataset)
        _plot_examples(panels[3], profile, dataset)
        return png_of(figure)


def plot_values(dataset: StoredDataset) -> bytes:
    """One PNG: a histogram of the values as delivered of each of the first channels."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    channels = dataset.schema.joint.channels[:_N_CHANNELS]
    values = np.concatenate([part.values for part in _profiled(dataset)]).T.astype(float)
    n_rows = math.ceil(len(channels) / 4)
    figure = Figure(figsize=(10, 0.3 + 1.9 * n_rows), layout="constrained")
    with rc_context(_STYLE):
        panels = figure.subplots(n_rows, 4, squeeze=False).flatten()
        for panel, channel, known in zip(panels, channels, values, strict=False):
            panel.hist(known[~np.isnan(known)], bins=60, color=_COLOURS["train"])
            panel.set_title(label_of(channel))
            log_scale(panel)
        for panel in panels[len(channels) :]:
            panel.set_axis_off()
        figure.supylabel("observations", fontsize=8)
        return png_of(figure)


def _plot_lengths(panel: Any, dataset: StoredDataset) -> None:
    names = [name for name in SPLITS if len(dataset.split(name))]
    low, high = int(dataset.lengths.min()), int(dataset.lengths.max())
    width = math.ceil((high - low + 1) / 40)
    panel.hist(
        [dataset.split(name).lengths for name in names],
        bins=np.arange(low, high + 1 + width, width) - 0.5,
        stacked=True,
        color=[_COLOURS[name] for name in names],
        label=names,
    )
    panel.set(title="Lengths", xlabel="observations a series", ylabel="series")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend()


def _plot_classes(panel: Any, profile: DataProfile, dataset: StoredDataset) -> None:
    panel.set(title="Classes", ylabel="series")
    labels, targets = list(profile.splits["train"].classes), dataset.series_targets
    if not labels and targets is not None:
        of_splits = [targets[dataset.split(name).indices, 0] for name in SPLITS]
        panel.hist(of_splits, bins=40, stacked=True, color=[_COLOURS[name] for name in SPLITS])
        panel.set(title="Targets", xlabel=label_of(dataset.schema.targets[0]))
        return
    if not labels:
        panel.text(0.5, 0.5, "no labels", ha="center", transform=panel.transAxes, color="0.5")
        panel.set_axis_off()
        return
    x, bottom = np.arange(len(labels)), np.zeros(len(labels))
    for name in SPLITS:
        heights = np.array(list(profile.splits[name].classes.values()), dtype=float)
        panel.bar(x, heights, bottom=bottom, color=_COLOURS[name])
        bottom += heights
    shown = x[:: math.ceil(len(labels) / 20)]
    long = max(map(len, labels)) > 4
    panel.set_xticks(shown, [short(labels[k], 22) for k in shown], rotation=60 if long else 0)


def _plot_gaps(panel: Any, dataset: StoredDataset) -> None:
    axis = dataset.schema.axes[0]
    panel.set(title="Gaps between consecutive positions", xlabel=label_of(axis), ylabel="count")
    gaps = _gaps(_profiled(dataset))[:, 0]  # of the first axis
    if len(gaps) == 0:
        return
    if (gaps == np.round(gaps)).all() and np.ptp(gaps) <= 40:
        panel.hist(gaps, np.arange(gaps.min(), gaps.max() + 2) - 0.5, color="0.45", rwidth=0.85)
    else:
        panel.hist(gaps, bins=60, color="0.45")
        log_scale(panel)


def _plot_examples(panel: Any, profile: DataProfile, dataset: StoredDataset) -> None:
    """A row per series: its values of the most observed channel, as a line broken at holes."""
    names = [channel.name for channel in dataset.schema.channels]
    channel = max(range(len(names)), key=lambda k: profile.observed[names[k]]["all"])
    rows = np.linspace(0, len(dataset) - 1, min(_N_EXAMPLES, len(dataset))).astype(int)
    lines = []
    for i in rows[::-1].tolist():  # the first on top
        positions, values = dataset.joint(i)
        known = np.flatnonzero(~np.isnan(values[:, channel]))
        order = known[np.argsort(positions[known, 0], kind="stable")]
        lines.append((positions[order, 0], values[order, channel].astype(float)))
    gaps = np.concatenate([np.diff(x) for x, _ in lines])
    step = float(np.median(gaps) if len(gaps) else 0.0) or 1.0
    on_a_grid = np.allclose(gaps / step, np.round(gaps / step))
    wide = (1.5 if on_a_grid else 5) * step
    for level, (i, (x, y)) in enumerate(zip(rows[::-1], lines, strict=True)):
        if not len(y):
            continue
        y = level + 0.7 * ((y - y.min()) / (np.ptp(y) or 1.0) - 0.5)
        holes = np.flatnonzero(np.diff(x) > wide)
        for k in holes:
            span = (x[k] + step / 2, x[k + 1] - step / 2)
            panel.fill_betweenx([level - 0.42, level + 0.42], *span, color="0.88", lw=0)
        colour = _COLOURS[SPLITS[dataset.splits[i]]]
        for part in np.split(np.arange(len(x)), holes + 1):
            panel.plot(x[part], y[part], ".-", color=colour, lw=1, ms=4)
    panel.set_yticks(range(len(rows)), [short(dataset.ids[i], 22) for i in rows[::-1]])
    title = f"Examples: {names[channel]}, grey where a gap is wide"
    panel.set(title=title, xlabel=label_of(dataset.schema.axes[0]))
