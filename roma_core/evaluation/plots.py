"""The figures of reports and Dagster pages, as PNG bytes of at most 40 KiB."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from roma_core.evaluation import drift
from roma_core.evaluation.classification_metrics import ClassificationMetrics, ranked_classes
from roma_core.evaluation.metrics import Estimate, GroupErrors, RegressionMetrics
from roma_core.evaluation.predictions import Floats, Ints, PredictionTable, RegressionTable
from roma_core.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    STYLE,
    as_png,
    label_of,
    log_scale,
    short,
)
from roma_core.schema import PositionAxis
from roma_core.trainer.defaults import PrimaryMetric

_COLOURS = (BLUE, ORANGE, GREEN, INK)
_CLASS_COLOURS = (  # Petroff's ten, which differ for every kind of colour vision
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
_DASHED: Any = (0, (4, 3))
_CURVES = ("loss", "r2", *get_args(PrimaryMetric))  # last parts of metric names
_SPLIT_COLOURS = {"train": BLUE, "eval": ORANGE}
_N_TARGETS = len(_COLOURS)  # drawn; more would be too small to read
_MAX_POINTS = 2000  # of an embedding map; more would hide each other
_MAX_CURVES = 10  # classes; more would hide each other
_MAX_LEGEND = 20  # classes; more have no distinct colours
_N_BARS, _N_HISTOGRAMS = 14, 4  # of drift
_N_PANELS = 6  # channels of an explanation


def _legend_above(figure: Figure, columns: int = 4) -> None:
    """One legend of all panels, above them."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = min(columns, len(handles))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns)


def _series_grid(
    figure: Figure, series: Sequence[str], columns: Sequence[str], axis: str
) -> NDArray[Any]:
    """``(series, columns)`` panels of values over position, with their titles."""
    grid = figure.subplots(len(series), len(columns), squeeze=False, sharex="row")
    for axes in grid.flat:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title)
    for axes, title in zip(grid[:, 0], series, strict=True):
        axes.set_ylabel(short(title, 22))
    for axes in grid[-1]:
        axes.set_xlabel(axis)
    return grid


def _tick_classes(axes: Axes, names: Sequence[str]) -> None:
    rotation, alignment = (45, "right") if max(map(len, names)) > 3 else (0, "center")
    axes.set_xticks(range(len(names)), names, rotation=rotation, ha=alignment)


@as_png
def confusion_matrix(metrics: ClassificationMetrics) -> Figure:
    """Counts per true and predicted class; colour is the fraction of the true class."""
    counts = np.array(metrics.confusion)
    k = len(counts)
    fraction = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(1.6 + 0.42 * k, 3.6, 9))
    figure = Figure((side + 1.0, side), layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
    names = [short(c.name) for c in metrics.per_class]
    _tick_classes(axes, names)
    axes.set_yticks(range(k), names)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(k - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(k - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    if k <= 25:
        style: Any = {"ha": "center", "va": "center", "fontsize": 9 if counts.max() < 1000 else 7}
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if fraction[row, column] > 0.55 else INK
            axes.text(column, row, f"{counts[row, column]}", color=colour, **style)
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03)
    bar.set_label("fraction of the true class")
    bar.outline.set_visible(False)
    return figure


@as_png
def reliability_curve(metrics: ClassificationMetrics) -> Figure:
    """Accuracy against confidence, bins of equal mass, and how many series each bin holds."""
    bins = [(b.confidence, b.accuracy, b.count) for b in metrics.reliability]
    confidence, accuracy, count = np.array(bins).T
    error = np.sqrt((accuracy * (1 - accuracy)).clip(1e-9) / count)
    low = min(0.95, float(min(confidence.min(), accuracy.min())))
    low = max(0.0, np.floor(low * 10 - 0.5) / 10)
    figure = Figure((4.8, 4.8))
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
    curve.plot([0, 1], [0, 1], color=GREY, linestyle=_DASHED, label="perfectly calibrated")
    style: Any = {"color": BLUE, "markersize": 5, "elinewidth": 1}
    label = "bins, ± standard error"
    curve.errorbar(confidence, accuracy, error, fmt="o-", label=label, **style)
    margin = 0.02 * (1 - low)
    curve.set(xlim=(low - margin, 1 + margin), ylim=(low - margin, 1 + margin))
    curve.set_ylabel("accuracy")
    found = metrics.calibration_error
    curve.set_title(f"calibration error {found.value:.3f} ({found.low:.3f}–{found.high:.3f})")
    curve.legend(loc="lower right")
    counts.bar(confidence, count, width=0.012 * (1 - low), color=BLUE)
    counts.set(xlabel="confidence", ylabel="series", ylim=(0, count.max() * 1.15))
    counts.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


@as_png
def ranking_curves(table: PredictionTable) -> Figure:
    """ROC and precision-recall curve of the second of two classes, or of each class against the rest.

    Of many classes, the ten with the smallest AUROC are drawn.
    """
    from sklearn.metrics import auc, precision_recall_curve, roc_curve

    found = []  # per class: AUROC, name, and both curves
    for c in ranked_classes(table):
        of_class = table.labels == c, table.probabilities[:, c]
        fall_out, sensitivity, _ = roc_curve(*of_class)
        curves = (fall_out, sensitivity, *precision_recall_curve(*of_class)[:2])
        found.append((float(auc(fall_out, sensitivity)), table.classes[c], *curves))
    is_binary = len(table.classes) == 2
    drawn = found[-1:] if is_binary else sorted(found, key=lambda one: one[0])[:_MAX_CURVES]
    figure = Figure((9.2, 4.4))
    roc, recall = figure.subplots(1, 2)
    roc.plot([0, 1], [0, 1], color=GREY, linestyle=_DASHED, linewidth=1)
    for k, (auroc, name, fall_out, sensitivity, precision, recalled) in enumerate(drawn):
        style: Any = {"color": BLUE if is_binary else _CLASS_COLOURS[k], "linewidth": 1.5}
        roc.plot(fall_out, sensitivity, label=f"{short(name)}, AUROC {auroc:.3f}", **style)
        recall.step(recalled, precision, where="post", **style)
    if is_binary:
        recall.axhline(table.labels.mean(), color=GREY, linestyle=_DASHED, linewidth=1)
    roc.set(xlabel="false-positive rate", ylabel="sensitivity", title="ROC")
    recall.set(xlabel="sensitivity", ylabel="precision", title="precision-recall", ylim=(0, 1.03))
    _legend_above(figure, columns=3)
    return figure


@dataclass(frozen=True, eq=False)
class ReconstructionExample:
    """A reconstructed series of N observations and C channels."""

    title: str  # id of the series
    channels: Sequence[str]  # C names, with their units
    positions: NDArray[np.floating]  # (N,) on the axis that is drawn
    values: NDArray[np.floating]  # (N, C) true values
    predicted: NDArray[np.floating]  # (N, C); only those of hidden observations are drawn
    visible: NDArray[np.bool_]  # (N, C) True where the encoder saw the value
    axis: str = "position"  # its name, with the unit
    std: NDArray[np.floating] | None = None  # (N, C) predicted standard deviations
    clean: NDArray[np.floating] | None = None  # (N, C) without noise: the line, if not None

    def __post_init__(self) -> None:
        n, c = len(self.positions), len(self.channels)
        for name, shape in (("values", (n, c)), ("predicted", (n, c)), ("visible", (n, c))):
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(
                    f"{self.title}: {name} should have shape {shape} for {n} positions and "
                    f"{c} channels, got {found}"
                )


@as_png
def reconstruction_examples(examples: Sequence[ReconstructionExample]) -> Figure:
    """A row per series, a column per channel: visible, hidden and reconstructed values.

    Raises:
        ValueError: no examples, or examples of different channels.
    """
    if not examples:
        raise ValueError("no reconstructions to draw; pass at least one")
    channels = list(examples[0].channels)
    for example in examples:
        if list(example.channels) != channels:
            raise ValueError(
                f"{example.title} has channels {list(example.channels)}, the first has {channels}; "
                f"one figure shows series of the same channels"
            )
    width = max(6.5, min(11.0, 3.1 * len(channels)))  # the legend takes 6.5
    figure = Figure((width, 0.9 + 1.75 * len(examples)))
    titles = [example.title for example in examples]
    grid = _series_grid(figure, titles, channels, examples[-1].axis)
    for row, example in zip(grid, examples, strict=True):
        for channel, axes in enumerate(row):
            _draw_reconstruction(axes, example, channel)
    _legend_above(figure, columns=3)
    return figure


def _draw_reconstruction(axes: Axes, example: ReconstructionExample, channel: int) -> None:
    order = np.argsort(example.positions, kind="stable")
    order = order[np.isfinite(example.values[order, channel])]
    is_visible = example.visible[order, channel]
    hidden, seen = order[~is_visible], order[is_visible]
    x, true = example.positions, example.values[:, channel]
    predicted = example.predicted[:, channel]
    line, label = true, None
    if example.clean is not None:
        line, label = example.clean[:, channel], "without noise"
    axes.plot(x[order], line[order], color="#c9ced4", linewidth=1, zorder=1, label=label)
    if example.std is not None:
        bars: Any = {"ecolor": ORANGE, "elinewidth": 2.5, "alpha": 0.3, "zorder": 2}
        std, label = example.std[hidden, channel], "± predicted deviation"
        axes.errorbar(x[hidden], predicted[hidden], std, fmt="none", label=label, **bars)
    lines: Any = {"color": ORANGE, "linewidth": 0.9, "alpha": 0.6, "zorder": 2}
    axes.vlines(x[hidden], true[hidden], predicted[hidden], **lines)
    hollow: Any = {"color": GREY, "mfc": "white", "ms": 4.5, "zorder": 3}
    cross: Any = {"color": ORANGE, "mec": "white", "mew": 0.5, "ms": 6.5, "zorder": 4}
    axes.plot(x[seen], true[seen], "o", color=INK, ms=4, zorder=3, label="visible")
    axes.plot(x[hidden], true[hidden], "o", label="hidden, true value", **hollow)
    axes.plot(x[hidden], predicted[hidden], "X", label="hidden, reconstructed", **cross)


@as_png
def learning_curve(records: Iterable[Mapping[str, Any]], weights_step: int | None = None) -> Figure:
    """Metrics by epoch: a panel for each quantity, a line per ``<split>/<quantity>``.

    Args:
        records: lines of ``metrics.jsonl``: ``{"step": 10, "epoch": …, "metrics": {"train/loss": …}}``.
        weights_step: step of the weights that were kept, which is marked.

    Raises:
        ValueError: they hold neither a loss nor a primary metric.
    """
    lines: dict[str, list[tuple[float, float]]] = {}  # name of the metric -> epochs and values
    kept = None  # epoch
    for record in records:
        kept = record["epoch"] if record["step"] == weights_step else kept
        for name, value in record["metrics"].items():
            lines.setdefault(name, []).append((record["epoch"], value))
    panels = {q: [name for name in sorted(lines) if name.split("/")[-1] == q] for q in _CURVES}
    panels = {quantity: names for quantity, names in panels.items() if names}
    if not panels:
        raise ValueError(f"no metric ends with one of {list(_CURVES)}; there are {sorted(lines)}")
    figure = Figure((4.4 * len(panels) + 0.4, 3.3))
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (quantity, names) in zip(row, panels.items(), strict=True):
        for name in names:
            split, style = name.rsplit("/", 1)[0], "o-" if len(lines[name]) < 40 else "-"
            epochs, values = zip(*lines[name], strict=True)
            colour = _SPLIT_COLOURS.get(split)
            axes.plot(epochs, values, style, color=colour, label=split, linewidth=1.6, markersize=3)
        if kept is not None:
            axes.axvline(kept, color=GREY, linestyle=_DASHED, label="weights kept")
        axes.set(xlabel="epoch", title=quantity)
        if "loss" in quantity and all(value > 0 for name in names for _, value in lines[name]):
            log_scale(axes)
    _legend_above(figure)
    return figure


@as_png
def along_series(table: RegressionTable, chosen: Sequence[int]) -> Figure:
    """True and predicted over position: a row per chosen series, a column per target."""
    assert table.positions is not None
    targets = [label_of(target) for target in table.channels[:_N_TARGETS]]
    figure = Figure((max(5.5, min(11.0, 4.2 * len(targets))), 0.7 + 1.75 * len(chosen)))
    grid = _series_grid(figure, [table.ids[k] for k in chosen], targets, label_of(table.axes[0]))
    for row, k in zip(grid, chosen, strict=True):
        at = np.flatnonzero(table.series == k)
        at = at[np.argsort(table.positions[at, 0], kind="stable")]
        x = table.positions[at, 0]
        for axes, true, predicted in zip(
            row, table.true[at].T, table.predicted[at].T, strict=False
        ):
            axes.plot(x, true, color=GREY, linewidth=1.2, label="true")
            axes.plot(x, predicted, "o", color=ORANGE, markersize=3, label="predicted")
    _legend_above(figure)
    return figure


@as_png
def against_true(table: RegressionTable) -> Figure:
    """A row per target: predicted against true, residuals against true and length; of 3000 rows."""
    targets = table.channels[:_N_TARGETS]
    rows = np.linspace(0, len(table.true) - 1, min(3000, len(table.true))).astype(int)
    lengths = table.lengths[table.series[rows]]
    figure = Figure((10.5, 0.5 + 2.9 * len(targets)))
    grid = figure.subplots(len(targets), 3, squeeze=False)
    for k, (panels, target) in enumerate(zip(grid, targets, strict=True)):
        true, residual = table.true[rows, k], table.errors[rows, k]
        ends = np.array([true.min(), true.max()])
        for axes, x, y, what, line in (
            (panels[0], true, table.predicted[rows, k], "predicted", ends),
            (panels[1], true, residual, "predicted − true", 0 * ends),
            (panels[2], lengths, residual, "predicted − true", 0 * ends),
        ):
            axes.plot(x, y, ".", color=ORANGE, markersize=2.5 if len(x) > 500 else 5, alpha=0.5)
            axes.plot([x.min(), x.max()], line, color=GREY, linewidth=1, zorder=3)
            axes.set(xlabel="observations per series" if x is lengths else "true", ylabel=what)
        panels[0].set_title(label_of(target))
    return figure


@as_png
def error_by_position(metrics: RegressionMetrics, axis: PositionAxis) -> Figure:
    """Root mean squared error of every target against position."""
    middle = [(one.first + one.last) / 2 for one in metrics.by_position]
    figure = Figure((5.2, 3.8))
    axes = figure.subplots()
    targets = metrics.per_target[:_N_TARGETS]
    for k, (target, colour) in enumerate(zip(targets, _COLOURS, strict=False)):
        rmse, label = [one.rmse[k] for one in metrics.by_position], short(target.name)
        axes.plot(middle, rmse, "o-", color=colour, markersize=3.5, linewidth=1.3, label=label)
    axes.set(xlabel=label_of(axis), ylabel="root mean squared error")
    axes.set_ylim(bottom=0)
    if len(targets) > 1:
        _legend_above(figure, columns=3)
    return figure


@as_png
def importance_figure(
    series: Mapping[str, Any],
    axis: str,
    windows: Sequence[tuple[float, float, float]],
    channels: Mapping[str, float],
) -> Figure:
    """Values of the most important channels over position, shaded by the importance of windows.

    ``windows``: (start, end, importance) on the axis; ``channels``: name -> importance. The darkest
    window is the most important one, if it reaches a twentieth of the most important channel.
    """
    shown = sorted(series["values"], key=lambda name: -abs(channels.get(name, 0.0)))[:_N_PANELS]
    figure = Figure((9.2, 0.9 + 1.5 * len(shown)))
    sizes = [*(x for *_, x in windows), *(x / 20 for x in channels.values())]
    most = max(map(abs, sizes)) or 1.0
    for axes, name in zip(
        figure.subplots(len(shown), sharex=True, squeeze=False).flat, shown, strict=True
    ):
        for start, end, importance in windows:
            style: Any = {"color": BLUE if importance > 0 else ORANGE, "linewidth": 0}
            axes.axvspan(start, end, alpha=0.5 * abs(importance) / most, **style)
        values = np.array(series["values"][name], dtype=float)  # NaN where there is none
        axes.plot(series["positions"][axis], values, "o", color=INK, markersize=3)
        axes.set_title(f"{name}: {channels[name]:+.3g}" if name in channels else name)
        axes.grid(False)
    axes.set_xlabel(axis)
    return figure


@as_png
def errors_by_group(groups: Sequence[GroupErrors], noise: Estimate | None) -> Figure:
    """Mean squared error of each class with its interval; ``noise``: of the values without noise."""
    values = np.array([group.mse.value for group in groups])
    ends = np.array([(group.mse.low, group.mse.high) for group in groups], dtype=np.float64)
    low, high = ends.T  # NaN, which is not drawn, of a single series
    figure = Figure((max(5.0, min(11.0, 1.5 + 0.32 * len(groups))), 3.3))
    axes = figure.subplots()
    bars = [(values - low).clip(0), (high - values).clip(0)]
    axes.errorbar(
        range(len(groups)), values, bars, fmt="o", color=BLUE, elinewidth=1.2, markersize=5
    )
    if noise is not None:
        axes.axhline(noise.value, color=ORANGE, linestyle=_DASHED, label="noise alone")
        _legend_above(figure)
    _tick_classes(axes, [short(group.name) for group in groups])
    axes.set(ylabel="mean squared error", ylim=(0, None))
    axes.axhline(0, color=GREY, linewidth=0.8)
    return figure


def _embedding_map(features: NDArray[np.floating], labels: Ints, classes: Sequence[str]) -> Figure:
    """Two principal components; the link of a point is the row of its series."""
    rows = np.arange(0, len(features), -(-len(features) // _MAX_POINTS))
    points, fractions = principal_components(features[rows])
    figure = Figure((6.4, 4.6))
    axes = figure.subplots()
    colours = _CLASS_COLOURS if len(classes) <= 10 else mpl.color_sequences["tab20"]
    for k in np.unique(labels):
        here, style = labels[rows] == k, dict[str, Any](s=14, alpha=0.75, linewidths=0)
        x, y = points[here].T
        style |= {"label": short(classes[k]), "urls": rows[here].astype(str)}
        axes.scatter(x, y, color=colours[k % len(colours)], **style)
    axes.set_xlabel(f"first principal component, {fractions[0]:.0%} of the variance")
    axes.set_ylabel(f"second, {fractions[1]:.0%}")
    if len(classes) <= _MAX_LEGEND:
        figure.legend(loc="outside right upper", markerscale=1.6)
    return figure


embedding_map = as_png(_embedding_map)
"""Two principal components of features ``(n, D)`` of series with labels ``(n,)``."""


def embedding_svg(features: NDArray[np.floating], table: PredictionTable) -> str:
    """The map as SVG for a page, where pointing at a series shows its id, class and prediction."""
    image = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": "roma"}):
        figure = _embedding_map(features, table.labels, table.classes)
        figure.savefig(image, format="svg", metadata=dict.fromkeys(("Date", "Creator"), None))

    def titled(link: re.Match[str]) -> str:
        k, predicted = int(link[1]), table.predicted[int(link[1])]
        text = (
            f"{table.ids[k]}\nclass {table.classes[table.labels[k]]}\npredicted "
            f"{table.classes[predicted]} ({table.probabilities[k, predicted]:.0%})"
        )
        return f"<a><title>{html.escape(text)}</title>"

    svg = image.getvalue()
    return re.sub(r'<a xlink:href="(\d+)"[^>]*>', titled, svg[svg.index("<svg") :])


def principal_components(features: NDArray[np.floating]) -> tuple[Floats, Floats]:
    """The first two of ``(n, D)``: scores ``(n, 2)``, and explained fractions of the variance ``(2,)``.

    The larger side of each component is positive, so that equal features give equal maps.
    """
    from sklearn.decomposition import PCA

    pca, scores, fractions = PCA(min(2, *features.shape)), np.zeros((len(features), 2)), np.zeros(2)
    with np.errstate(divide="ignore", invalid="ignore"):  # of equal features
        found = pca.fit_transform(features.astype(np.float64))
    scores[:, : found.shape[1]] = found
    fractions[: found.shape[1]] = np.nan_to_num(pca.explained_variance_ratio_)
    return scores, fractions


@as_png
def drift_figure(profile: drift.ReferenceProfile, sample: drift.InputSample) -> Figure:
    """The stability index of each quantity as a bar, and histograms of the most drifted ones.

    Raises:
        ValueError: the sample and the profile have no quantity in common.
    """
    found = [e for e in drift.drift_effects(profile, sample) if e.measure == "psi"]
    if not found:
        raise ValueError("no quantity of the series is in the profile, so no drift can be drawn")
    fractions = drift.bin_fractions(profile, sample)
    drawn = [e.quantity for e in found if e.quantity in fractions][:_N_HISTOGRAMS]
    figure = Figure((10.5, max(3.6, 0.9 + 0.28 * min(len(found), _N_BARS))))
    bars, panels = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.5])[0]
    axes, shown = bars.subplots(), found[:_N_BARS][::-1]
    sizes = [e.size for e in shown]
    colours = [ORANGE if size > drift.LARGE_PSI else BLUE for size in sizes]
    axes.barh(range(len(sizes)), sizes, color=colours, height=0.7)
    axes.set_yticks(range(len(sizes)), [short(e.quantity, 22) for e in shown])
    for limit in (drift.MODERATE_PSI, drift.LARGE_PSI):
        axes.axvline(limit, color=GREY, linewidth=1, linestyle=_DASHED)
    axes.set_xlim(0, max(1.15 * max(sizes), 1.4 * drift.LARGE_PSI))
    axes.set_xlabel(
        f"population stability index\n(dashed: {drift.MODERATE_PSI} moderate, {drift.LARGE_PSI} large drift)"
    )
    axes.grid(axis="y", visible=False)
    columns = 2 if len(drawn) > 1 else 1
    grid = panels.subplots(-(-len(drawn) // columns), columns, squeeze=False).ravel()
    for axes, name in zip(grid, drawn, strict=False):
        _draw_histograms(axes, name, profile.quantities[name], fractions[name])
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    panels.legend(handles, labels, loc="outside upper right", ncols=2)
    return figure


def _draw_histograms(axes: Axes, name: str, quantity: drift.Quantity, recent: Floats) -> None:
    """Two bars per bin; tick labels are edges between bins."""
    x = np.arange(len(quantity.fractions))
    axes.bar(x - 0.2, quantity.fractions, 0.4, color=GREY, label="training")
    axes.bar(x + 0.2, recent, 0.4, color=ORANGE, label="recent")
    every = max(1, round(len(quantity.edges) / 3))
    shown = [n for n in range(len(quantity.edges)) if n % every == 0]
    axes.set_xticks([n + 0.5 for n in shown], [f"{quantity.edges[n]:.3g}" for n in shown])
    axes.set_title(short(name, 26))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(axis="x", visible=False)
