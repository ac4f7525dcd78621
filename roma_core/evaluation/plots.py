"""Plots of a classifier's report, of reconstructions and of learning curves, as PNG bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from roma_core.evaluation.drawing import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    STYLE,
    legend_above,
    new_figure,
    png_of,
    short,
)
from roma_core.evaluation.metrics import Metrics

_SPLIT_COLOURS = {"train": BLUE, "eval": ORANGE}


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What a masked autoencoder made of one series of N tokens and C channels.

    Attributes:
        title: names the series.
        channels: C names, with units where there are any.
        positions: ``(N,)`` places of the tokens on the axis that is drawn.
        values: ``(N, C)`` true values.
        predicted: ``(N, C)`` reconstructed values; only those of hidden tokens are drawn.
        visible: ``(N,)`` bool, True where the encoder saw the token, False where it was hidden.
        axis: what the positions are, with the unit.
        std: ``(N, C)`` predicted standard deviations; None: none are drawn.
        clean: ``(N, C)`` values without noise, drawn as the line; None: the observed ones are.
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


def confusion_matrix(metrics: Metrics) -> bytes:
    """Counts per true and predicted class; colour is the share of the true class."""
    counts = np.array(metrics.confusion)
    k = len(counts)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(1.6 + 0.42 * k, 3.6, 9))
    with mpl.rc_context(STYLE):
        figure = new_figure(side + 1.0, side, layout="compressed")
        axes = figure.subplots()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        names = [short(c.name) for c in metrics.per_class]
        turned = max(map(len, names)) > 3
        axes.set_xticks(
            range(k), names, rotation=45 if turned else 0, ha="right" if turned else "center"
        )
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
                dark = share[row, column] > 0.55
                axes.text(
                    column, row, f"{counts[row, column]}", ha="center", va="center",
                    fontsize=9 if counts.max() < 1000 else 7, color="white" if dark else INK,
                )  # fmt: skip
        bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03)
        bar.set_label("share of the true class")
        bar.outline.set_visible(False)
        return png_of(figure)


def reliability_curve(metrics: Metrics) -> bytes:
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


def reconstruction_examples(examples: Sequence[Reconstruction]) -> bytes:
    """A row per series, a column per channel: what was seen, what was hidden, what was guessed.

    Raises:
        ValueError: no examples, or examples of different channels.
    """
    if not examples:
        raise ValueError("no reconstructions to draw: pass at least one")
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


def _draw_reconstruction(axes: Axes, example: Reconstruction, channel: int) -> None:
    order = np.argsort(example.positions, kind="stable")
    x, seen = example.positions[order], example.visible[order]
    true, guess = example.values[order, channel], example.predicted[order, channel]
    line = true if example.clean is None else example.clean[order, channel]
    axes.plot(x, line, color="#c9ced4", linewidth=1, zorder=1,
              label=None if example.clean is None else "without noise")  # fmt: skip
    if example.std is not None:
        axes.errorbar(
            x[~seen], guess[~seen], example.std[order, channel][~seen], fmt="none",
            ecolor=ORANGE, elinewidth=2.5, alpha=0.3, label="± one predicted deviation", zorder=2,
        )  # fmt: skip
    axes.vlines(
        x[~seen], true[~seen], guess[~seen], color=ORANGE, linewidth=0.9, alpha=0.6, zorder=2
    )
    axes.plot(x[seen], true[seen], "o", color=INK, markersize=4, label="visible", zorder=3)
    axes.plot(
        x[~seen], true[~seen], "o", color=GREY, markerfacecolor="white", markersize=4.5,
        label="hidden, true value", zorder=3,
    )  # fmt: skip
    axes.plot(x[~seen], guess[~seen], "X", color=ORANGE, markeredgecolor="white", markeredgewidth=0.5,
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
