"""The figures of reports and Dagster pages, as PNG bytes of at most 64 KiB."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from roma_core.evaluation.drift import (
    LARGE_PSI,
    MODERATE_PSI,
    Effect,
    InputSample,
    Quantity,
    ReferenceProfile,
    bin_fractions,
    drift_effects,
)
from roma_core.evaluation.metrics import (
    ClassificationMetrics,
    Estimate,
    GroupErrors,
    RegressionMetrics,
)
from roma_core.evaluation.predictions import Floats, Ints, RegressionTable
from roma_core.schema import Channel, PositionAxis

MAX_BYTES = 64 * 1024
BLUE, ORANGE, GREEN, GREY, INK = "#2f6db3", "#d9652b", "#3f8f5b", "#8a929c", "#22272e"
STYLE: Any = {
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
}


def short(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _tick_classes(axes: Axes, names: Sequence[str]) -> None:
    turned = max(map(len, names)) > 3
    rotation, alignment = (45, "right") if turned else (0, "center")
    axes.set_xticks(range(len(names)), names, rotation=rotation, ha=alignment)


def label_of(part: Channel | PositionAxis) -> str:
    """``depth (m)``; without the unit of a pure number."""
    return part.name if part.unit in ("1", part.name) else f"{part.name} ({part.unit})"


def new_figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> Figure:
    """A figure of the given size in inches, on the Agg canvas."""
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def legend_above(figure: Figure, columns: int = 4) -> None:
    """One legend of all panels, above them."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(columns, len(handles)),
    )


def png_of(figure: Figure) -> bytes:
    """The figure as PNG with a palette, at the highest resolution that stays below MAX_BYTES."""
    for dots_per_inch in (160, 120, 90, 60):
        raw = io.BytesIO()
        figure.savefig(raw, format="png", dpi=dots_per_inch)
        small = io.BytesIO()
        Image.open(raw).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
            small, format="png", optimize=True
        )
        if small.tell() <= MAX_BYTES:
            return small.getvalue()
    raise ValueError(
        f"the plot takes {small.tell()} bytes even at {dots_per_inch} dpi, more than {MAX_BYTES}; "
        f"show fewer series or channels"
    )


_SPLIT_COLOURS = {"train": BLUE, "eval": ORANGE}


@dataclass(frozen=True, eq=False)
class ReconstructionExample:
    """A reconstructed series of N observations and C channels.

    Attributes:
        title: id of the series.
        channels: C names, with their units.
        positions: ``(N,)`` on the axis that is drawn.
        values: ``(N, C)`` true values.
        predicted: ``(N, C)`` reconstructed values; only those of hidden observations are drawn.
        visible: ``(N,)`` bool, True where the encoder saw the observation, False where it was hidden.
        axis: name of the axis, with the unit.
        std: ``(N, C)`` predicted standard deviations; None: not drawn.
        clean: ``(N, C)`` values without noise, drawn as the line; None: the observed ones are drawn.
    """

    title: str
    channels: Sequence[str]
    positions: NDArray[np.floating]
    values: NDArray[np.floating]
    predicted: NDArray[np.floating]
    visible: NDArray[np.bool_]
    axis: str = "position"
    std: NDArray[np.floating] | None = None
    clean: NDArray[np.floating] | None = None

    def __post_init__(self) -> None:
        n, c = len(self.positions), len(self.channels)
        for name, shape in (("values", (n, c)), ("predicted", (n, c)), ("visible", (n,))):
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(
                    f"{self.title}: {name} should have shape {shape} for {n} positions and "
                    f"{c} channels, got {found}"
                )


def confusion_matrix(metrics: ClassificationMetrics) -> bytes:
    """Counts per true and predicted class; colour is the fraction of the true class."""
    counts = np.array(metrics.confusion)
    k = len(counts)
    fraction = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(1.6 + 0.42 * k, 3.6, 9))
    with mpl.rc_context(STYLE):
        figure = new_figure(side + 1.0, side, layout="compressed")
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
            for row, column in zip(*np.nonzero(counts), strict=True):
                dark = fraction[row, column] > 0.55
                axes.text(
                    column, row, f"{counts[row, column]}", ha="center", va="center",
                    fontsize=9 if counts.max() < 1000 else 7, color="white" if dark else INK,
                )  # fmt: skip
        bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03)
        bar.set_label("fraction of the true class")
        bar.outline.set_visible(False)
        return png_of(figure)


def reliability_curve(metrics: ClassificationMetrics) -> bytes:
    """Accuracy against confidence, bins of equal mass, and how many series each bin holds."""
    confidence = np.array([b.confidence for b in metrics.reliability])
    accuracy = np.array([b.accuracy for b in metrics.reliability])
    count = np.array([b.count for b in metrics.reliability])
    error = np.sqrt((accuracy * (1 - accuracy)).clip(1e-9) / count)
    low = min(0.95, float(min(confidence.min(), accuracy.min())))
    low = max(0.0, np.floor(low * 10 - 0.5) / 10)
    with mpl.rc_context(STYLE):
        figure = new_figure(4.8, 4.8)
        curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
        curve.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (4, 3)), label="perfectly calibrated")
        curve.errorbar(
            confidence, accuracy, yerr=error, color=BLUE, marker="o", markersize=5,
            elinewidth=1, label="bins, ± standard error",
        )  # fmt: skip
        margin = 0.02 * (1 - low)
        curve.set(xlim=(low - margin, 1 + margin), ylim=(low - margin, 1 + margin))
        curve.set_ylabel("accuracy")
        found = metrics.calibration_error
        curve.set_title(f"calibration error {found.value:.3f} ({found.low:.3f}–{found.high:.3f})")
        curve.legend(loc="lower right")
        counts.bar(confidence, count, width=0.012 * (1 - low), color=BLUE)
        counts.set(xlabel="confidence", ylabel="series", ylim=(0, count.max() * 1.15))
        counts.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        return png_of(figure)


def reconstruction_examples(examples: Sequence[ReconstructionExample]) -> bytes:
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
    rows, columns = len(examples), len(channels)
    with mpl.rc_context(STYLE):
        width = max(6.5, min(11.0, 3.1 * columns))  # the legend takes 6.5
        figure = new_figure(width, 0.9 + 1.75 * rows)
        grid = figure.subplots(rows, columns, squeeze=False, sharex="row")
        for row, example in enumerate(examples):
            for column, channel in enumerate(channels):
                axes = grid[row, column]
                _draw_reconstruction(axes, example, column)
                if row == 0:
                    axes.set_title(channel)
                if column == 0:
                    axes.set_ylabel(short(example.title, 22))
                if row == rows - 1:
                    axes.set_xlabel(example.axis)
        legend_above(figure, columns=3)
        return png_of(figure)


def _draw_reconstruction(axes: Axes, example: ReconstructionExample, channel: int) -> None:
    order = np.argsort(example.positions, kind="stable")
    x, visible = example.positions[order], example.visible[order]
    true, predicted = example.values[order, channel], example.predicted[order, channel]
    line = true if example.clean is None else example.clean[order, channel]
    axes.plot(x, line, color="#c9ced4", linewidth=1, zorder=1,
              label=None if example.clean is None else "without noise")  # fmt: skip
    if example.std is not None:
        axes.errorbar(
            x[~visible], predicted[~visible], example.std[order, channel][~visible], fmt="none",
            ecolor=ORANGE, elinewidth=2.5, alpha=0.3, label="± predicted deviation", zorder=2,
        )  # fmt: skip
    axes.vlines(
        x[~visible],
        true[~visible],
        predicted[~visible],
        color=ORANGE,
        linewidth=0.9,
        alpha=0.6,
        zorder=2,
    )
    axes.plot(x[visible], true[visible], "o", color=INK, markersize=4, label="visible", zorder=3)
    axes.plot(
        x[~visible], true[~visible], "o", color=GREY, markerfacecolor="white", markersize=4.5,
        label="hidden, true value", zorder=3,
    )  # fmt: skip
    axes.plot(x[~visible], predicted[~visible], "X", color=ORANGE, markeredgecolor="white", markeredgewidth=0.5,
              markersize=6.5, label="hidden, reconstructed", zorder=4)  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(4))


def learning_curve(
    records: Iterable[Mapping[str, Any]], quantities: Sequence[str] = ("loss", "accuracy")
) -> bytes:
    """Metrics against the step: one panel per quantity, one line per ``<split>/<quantity>``.

    Args:
        records: lines of ``metrics.jsonl``: ``{"step": 10, "time": …, "metrics": {"train/loss": …}}``.
        quantities: last parts of metric names; those that never occur get no panel.

    Raises:
        ValueError: none of the quantities occurs.
    """
    lines: dict[str, dict[str, tuple[list[int], list[float]]]] = {q: {} for q in quantities}
    seen = set()
    for record in records:
        for name, value in record["metrics"].items():
            seen.add(name)
            quantity = name.rsplit("/", 1)[-1]
            if quantity in lines:
                steps, values = lines[quantity].setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    drawn = [q for q in quantities if lines[q]]
    if not drawn:
        raise ValueError(
            f"no metric ends with one of {list(quantities)}; the records hold {sorted(seen)}"
        )
    with mpl.rc_context(STYLE):
        figure = new_figure(4.4 * len(drawn) + 0.4, 3.3)
        for axes, quantity in zip(
            figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True
        ):
            for name, (steps, values) in sorted(lines[quantity].items()):
                split = name.rsplit("/", 1)[0]
                axes.plot(
                    steps, values, color=_SPLIT_COLOURS.get(split), label=split,
                    linewidth=1.6, marker="o" if len(steps) < 40 else None, markersize=3,
                )  # fmt: skip
            axes.set(xlabel="step", title=quantity)
            positive = all(v > 0 for _, values in lines[quantity].values() for v in values)
            if "loss" in quantity and positive:
                axes.set_yscale("log")
        legend_above(figure)
        return png_of(figure)


_COLOURS = (BLUE, ORANGE, GREEN, INK)
_N_TARGETS = len(_COLOURS)  # drawn; more would be too small to read
_N_POINTS = 3000


def along_series(table: RegressionTable, chosen: Sequence[int]) -> bytes:
    """True and predicted over position: a row per chosen series, a column per target."""
    targets = table.targets[:_N_TARGETS]
    rows, columns = len(chosen), len(targets)
    with mpl.rc_context(STYLE):
        figure = new_figure(max(5.5, min(11.0, 4.2 * columns)), 0.7 + 1.75 * rows)
        grid = figure.subplots(rows, columns, squeeze=False, sharex="row")
        for row, k in enumerate(chosen):
            at = table.rows_of(k)
            order = np.argsort(table.positions[at, 0], kind="stable")
            position = table.positions[at, 0][order]
            for column, target in enumerate(targets):
                axes = grid[row, column]
                axes.plot(
                    position, table.true[at, column][order], color=GREY, linewidth=1.2, label="true"
                )
                axes.plot(
                    position, table.predicted[at, column][order], "o", color=ORANGE, markersize=3,
                    label="predicted",
                )  # fmt: skip
                axes.yaxis.set_major_locator(MaxNLocator(4))
                if row == 0:
                    axes.set_title(label_of(target))
                if column == 0:
                    axes.set_ylabel(short(table.ids[k], 22))
                if row == rows - 1:
                    axes.set_xlabel(label_of(table.axes[0]))
        legend_above(figure)
        return png_of(figure)


def against_true(table: RegressionTable) -> bytes:
    """Predicted against true, a panel per target; at most 3000 observations, evenly taken."""
    targets = table.targets[:_N_TARGETS]
    rows = np.linspace(0, len(table.true) - 1, min(_N_POINTS, len(table.true))).astype(int)
    with mpl.rc_context(STYLE):
        figure = new_figure(max(4.2, min(11.0, 3.6 * len(targets))), 3.8)
        panels = figure.subplots(1, len(targets), squeeze=False)[0]
        for k, (axes, target) in enumerate(zip(panels, targets, strict=True)):
            true, predicted = table.true[rows, k], table.predicted[rows, k]
            ends = [true.min(), true.max()]
            axes.plot(ends, ends, color=GREY, linewidth=1, zorder=3)
            axes.plot(true, predicted, ".", color=ORANGE, markersize=2, alpha=0.5)
            axes.set(xlabel="true", title=label_of(target))
        panels[0].set_ylabel("predicted")
        return png_of(figure)


def error_by_position(metrics: RegressionMetrics, axis: PositionAxis) -> bytes:
    """Root mean squared error of every target against position."""
    middle = [(one.first + one.last) / 2 for one in metrics.by_position]
    with mpl.rc_context(STYLE):
        figure = new_figure(5.2, 3.8)
        axes = figure.subplots()
        targets = metrics.per_target[:_N_TARGETS]
        for k, (target, colour) in enumerate(zip(targets, _COLOURS, strict=False)):
            rmse = [one.rmse[k] for one in metrics.by_position]
            axes.plot(
                middle, rmse, "o-", color=colour, markersize=3.5, linewidth=1.3,
                label=short(target.name),
            )  # fmt: skip
        axes.set(xlabel=label_of(axis), ylabel="root mean squared error")
        axes.set_ylim(bottom=0)
        if len(targets) > 1:
            legend_above(figure, columns=3)
        return png_of(figure)


def errors_by_group(groups: Sequence[GroupErrors], noise: Estimate | None) -> bytes:
    """Mean squared error of each class with its interval; ``noise``: of the values without noise."""
    names = [short(group.name) for group in groups]
    values = np.array([group.mse.value for group in groups])
    ends = np.array([(group.mse.low, group.mse.high) for group in groups], dtype=np.float64)
    low, high = ends.T  # NaN, which is not drawn, of a single series
    with mpl.rc_context(STYLE):
        figure = new_figure(max(5.0, min(11.0, 1.5 + 0.32 * len(groups))), 3.3)
        axes = figure.subplots()
        bars = [(values - low).clip(0), (high - values).clip(0)]
        axes.errorbar(
            range(len(groups)), values, bars, fmt="o", color=BLUE, elinewidth=1.2, markersize=5
        )
        if noise is not None:
            axes.axhline(noise.value, color=ORANGE, linestyle=(0, (4, 3)), label="noise alone")
            legend_above(figure)
        _tick_classes(axes, names)
        axes.set(ylabel="mean squared error", ylim=(0, None))
        axes.axhline(0, color=GREY, linewidth=0.8)
        return png_of(figure)


_MAX_POINTS = 2000  # more would hide each other
_MAX_LEGEND = 20  # classes; more have no distinct colours


def embedding_map(features: NDArray[np.floating], labels: Ints, classes: Sequence[str]) -> bytes:
    """Two principal components of features ``(n, D)`` of series with labels ``(n,)``."""
    step = -(-len(features) // _MAX_POINTS)
    features, labels = features[::step], labels[::step]
    points, fractions = principal_components(features)
    colours = mpl.colormaps["tab10" if len(classes) <= 10 else "tab20"]
    with mpl.rc_context(STYLE):
        figure = new_figure(6.4, 4.6)
        axes = figure.subplots()
        for k, name in enumerate(classes):
            mine = points[labels == k]
            if len(mine):
                axes.scatter(
                    mine[:, 0], mine[:, 1], s=14, color=colours(k % colours.N), alpha=0.75,
                    linewidths=0, label=short(name),
                )  # fmt: skip
        axes.set_xlabel(f"first principal component, {fractions[0]:.0%} of the variance")
        axes.set_ylabel(f"second, {fractions[1]:.0%}")
        if len(classes) <= _MAX_LEGEND:
            figure.legend(loc="outside right upper", markerscale=1.6)
        return png_of(figure)


def principal_components(features: NDArray[np.floating]) -> tuple[Floats, Floats]:
    """The first two of ``(n, D)``: scores ``(n, 2)``, and explained fractions of the variance ``(2,)``.

    The larger side of each component is positive, so that equal features give equal maps.
    """
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    left, size, right = np.linalg.svd(centred, full_matrices=False)
    scores, fractions = np.zeros((len(features), 2)), np.zeros(2)
    for k in range(min(2, len(size))):
        sign = np.sign(right[k, np.abs(right[k]).argmax()]) or 1.0
        scores[:, k] = sign * left[:, k] * size[k]
        fractions[k] = size[k] ** 2 / max((size**2).sum(), np.finfo(np.float64).tiny)
    return scores, fractions


_N_BARS, _N_HISTOGRAMS = 14, 4


def drift_figure(profile: ReferenceProfile, sample: InputSample) -> bytes:
    """The stability index of each quantity as a bar, and histograms of the most drifted ones.

    Raises:
        ValueError: the sample and the profile have no quantity in common.
    """
    found = [e for e in drift_effects(profile, sample) if e.measure == "psi"]
    if not found:
        raise ValueError(
            "no quantity of the series is in the profile, so there is no drift to draw"
        )
    fractions = bin_fractions(profile, sample)
    drawn = [e.quantity for e in found if e.quantity in fractions][:_N_HISTOGRAMS]
    with mpl.rc_context(STYLE):
        figure = new_figure(10.5, max(3.6, 0.9 + 0.28 * min(len(found), _N_BARS)))
        bars, panels = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.5])[0]
        _draw_bars(bars.subplots(), found[:_N_BARS])
        columns = 2 if len(drawn) > 1 else 1
        grid = panels.subplots(-(-len(drawn) // columns), columns, squeeze=False).ravel()
        for axes, name in zip(grid, drawn, strict=False):
            _draw_histograms(axes, name, profile.quantities[name], fractions[name])
        for axes in grid[len(drawn) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        panels.legend(handles, labels, loc="outside upper right", ncols=2)
        return png_of(figure)


def _draw_bars(axes: Axes, found: list[Effect]) -> None:
    sizes = [e.size for e in found][::-1]
    colours = [ORANGE if size > LARGE_PSI else BLUE for size in sizes]
    axes.barh(range(len(sizes)), sizes, color=colours, height=0.7)
    axes.set_yticks(range(len(sizes)), [short(e.quantity, 22) for e in found][::-1])
    for limit in (MODERATE_PSI, LARGE_PSI):
        axes.axvline(limit, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, max(1.15 * max(sizes), 1.4 * LARGE_PSI))
    axes.set_xlabel(
        f"population stability index\n(dashed: {MODERATE_PSI} moderate, {LARGE_PSI} large drift)"
    )
    axes.grid(axis="y", visible=False)


def _draw_histograms(axes: Axes, name: str, quantity: Quantity, recent: Floats) -> None:
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
