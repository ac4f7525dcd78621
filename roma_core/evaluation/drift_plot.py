"""Drift as a picture: how far each quantity is from the training data, and how the furthest changed."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from roma_core.evaluation.drawing import (
    BLUE,
    GREY,
    ORANGE,
    STYLE,
    new_figure,
    png_of,
    short,
)
from roma_core.evaluation.reference_profile import (
    Effect,
    Quantity,
    ReferenceProfile,
    Series,
    effects,
    shares_of_bins,
)

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
