"""Plots of a regression's report, as PNG bytes."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import MaxNLocator

from roma_core.data.schema import Channel, PositionAxis
from roma_core.evaluation.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    STYLE,
    legend_above,
    new_figure,
    png_of,
    short,
)
from roma_core.evaluation.regression_metrics import RegressionMetrics
from roma_core.evaluation.regression_table import RegressionTable

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
            places = table.positions[at, 0][order]
            for column, target in enumerate(targets):
                axes = grid[row, column]
                axes.plot(
                    places, table.true[at, column][order], color=GREY, linewidth=1.2, label="true"
                )
                axes.plot(
                    places, table.predicted[at, column][order], "o", color=ORANGE, markersize=3,
                    label="predicted",
                )  # fmt: skip
                axes.yaxis.set_major_locator(MaxNLocator(4))
                if row == 0:
                    axes.set_title(named(target))
                if column == 0:
                    axes.set_ylabel(short(table.ids[k], 22))
                if row == rows - 1:
                    axes.set_xlabel(named(table.axes[0]))
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
            axes.set(xlabel="true", title=named(target))
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
        axes.set(xlabel=named(axis), ylabel="root mean squared error")
        axes.set_ylim(bottom=0)
        if len(targets) > 1:
            legend_above(figure, columns=3)
        return png_of(figure)


def named(part: Channel | PositionAxis) -> str:
    """``depth (m)``; without the unit of a pure number."""
    return part.name if part.unit in ("1", part.name) else f"{part.name} ({part.unit})"
