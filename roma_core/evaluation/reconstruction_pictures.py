"""The figures of a report on reconstructions, with captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np

from roma_core.data.store import Subset
from roma_core.evaluation import plots
from roma_core.evaluation.drawing import (
    BLUE,
    GREY,
    ORANGE,
    STYLE,
    legend_above,
    new_figure,
    png_of,
    short,
)
from roma_core.evaluation.metrics import Estimate
from roma_core.evaluation.page import Plot
from roma_core.evaluation.pictures import learning_curves
from roma_core.evaluation.reconstructing import Float32, HiddenTable, Ints, clean_columns
from roma_core.evaluation.reconstruction_metrics import GroupErrors
from roma_core.evaluation.regression_plots import named

_N_SERIES = 4
_N_CHANNELS = 4  # drawn of each; more would be too small to read
_GROUPS = range(2, 61)


def draw(
    table: HiddenTable,
    split: Subset,
    groups: Sequence[GroupErrors],
    floor: Estimate | None,
    curves: Mapping[str, str],
) -> dict[str, Plot]:
    """The report's figures by file name; ``floor`` is the error of the clean values, if known."""
    pictures = {
        "reconstructions": Plot(
            title="Reconstructions",
            caption="Test series as the model saw them: seen observations, hidden ones, and what it "
            "made of the hidden ones.",
            alt="Seen, hidden and reconstructed observations of some test series.",
            png=plots.reconstruction_examples(examples(table, split)),
            wide=True,
        )
    }
    if len(groups) in _GROUPS:
        pictures["groups"] = Plot(
            title="Error by class",
            caption="Mean squared error of the hidden observations of each class, with 95 % intervals.",
            alt="Mean squared error by class of the series.",
            png=errors_by_group(groups, floor),
            wide=True,
        )
    return pictures | learning_curves(curves)


def examples(table: HiddenTable, split: Subset) -> list[plots.Reconstruction]:
    """A few series, spread over the split, in the units of the data."""
    schema, dataset = split.dataset.schema, split.dataset
    names = [named(channel) for channel in schema.channels]
    columns = clean_columns(schema)
    has_hidden = np.unique(table.series)
    chosen = has_hidden[np.linspace(0, len(has_hidden) - 1, _N_SERIES).astype(int)]
    drawn = []
    for k in dict.fromkeys(chosen.tolist()):
        row = int(split.indices[k])
        positions, values = dataset.raw(row)
        rows = table.series == k
        places = table.places[rows]
        targets = dataset.targets(row)
        clean = None if targets is None or columns is None else targets[:, columns]

        def spread(numbers: Float32, of: Float32 = values, at: Ints = places) -> Float32:
            """``(hidden, C)`` to their places in ``(N, drawn)``; only hidden ones are drawn."""
            full = np.full_like(of, np.nan)
            full[at] = numbers
            return full[:, :_N_CHANNELS]

        drawn.append(
            plots.Reconstruction(
                title=dataset.ids[row],
                channels=names[:_N_CHANNELS],
                positions=positions[:, 0],
                values=values[:, :_N_CHANNELS],
                predicted=spread(table.predicted[rows]),
                visible=~np.isin(np.arange(len(values)), places),
                axis=named(schema.axes[0]),
                std=None if table.std is None else spread(table.std[rows]),
                clean=None if clean is None else clean[:, :_N_CHANNELS],
            )
        )
    return drawn


def errors_by_group(groups: Sequence[GroupErrors], floor: Estimate | None) -> bytes:
    """Mean squared error of each class as a point with its interval, and what noise alone costs."""
    names = [short(group.name) for group in groups]
    values = np.array([group.mse.value for group in groups])
    ends = np.array([(group.mse.low, group.mse.high) for group in groups], dtype=np.float64)
    below, above = (
        values - ends[:, 0],
        ends[:, 1] - values,
    )  # nan, which is not drawn, of one series
    with mpl.rc_context(STYLE):
        figure = new_figure(max(5.0, min(11.0, 1.5 + 0.32 * len(groups))), 3.3)
        axes = figure.subplots()
        places = np.arange(len(groups))
        axes.errorbar(places, values, [below.clip(0), above.clip(0)], fmt="o", color=BLUE,
                      elinewidth=1.2, markersize=5)  # fmt: skip
        if floor is not None:
            axes.axhline(floor.value, color=ORANGE, linestyle=(0, (4, 3)), label="noise alone")
            legend_above(figure)
        turned = max(map(len, names)) > 3
        axes.set_xticks(
            places, names, rotation=45 if turned else 0, ha="right" if turned else "center"
        )
        axes.set(ylabel="mean squared error", ylim=(0, None))
        axes.axhline(0, color=GREY, linewidth=0.8)
        return png_of(figure)
