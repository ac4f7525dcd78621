"""Where test series lie among the features of the pretrained encoder, in two dimensions.

The figures of a report: what is drawn of an evaluation, with captions.
The figures of a report on reconstructions, with captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray

from roma_core.data.store import StoredDataset, Subset
from roma_core.evaluation import plots
from roma_core.evaluation.config import EvaluationJobConfig
from roma_core.evaluation.metrics import Estimate, Metrics
from roma_core.evaluation.plots import (
    BLUE,
    GREY,
    ORANGE,
    STYLE,
    legend_above,
    named,
    new_figure,
    png_of,
    short,
)
from roma_core.evaluation.reconstruction import (
    Float32,
    GroupErrors,
    HiddenTable,
    Ints,
    clean_columns,
)
from roma_core.evaluation.report import Plot
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.schema import Normaliser
from roma_core.trainer.dataloader import Collate
from roma_core.trainer.metrics import read_records

_N_RECONSTRUCTED = 3
_N_CHANNELS = 4  # drawn of each; more would be too small to read


def draw(
    config: EvaluationJobConfig,
    dataset: StoredDataset,
    metrics: Metrics,
    autoencoder: RoMAForPreTraining | None,
) -> dict[str, Plot]:
    """The report's figures by file name."""
    own = {
        "confusion": Plot(
            title="Confusion matrix",
            caption="Rows are true classes, columns predicted ones; numbers count test series.",
            alt="Confusion matrix of the test series.",
            png=plots.confusion_matrix(metrics),
        ),
        "reliability": Plot(
            title="Reliability",
            caption="How often predictions of a given confidence are right. On the diagonal, "
            "confidence can be taken at its word.",
            alt="Accuracy against confidence.",
            png=plots.reliability_curve(metrics),
        ),
    }
    return own | of_training(config, dataset, autoencoder)


def of_training(
    config: EvaluationJobConfig, dataset: StoredDataset, autoencoder: RoMAForPreTraining | None
) -> dict[str, Plot]:
    """Learning curves, and what the autoencoder makes of test series: figures of any report."""
    pictures = learning_curves(config.curves)
    if autoencoder is not None:
        pictures["reconstructions"] = Plot(
            title="Reconstructions",
            caption="Test series as the pretrained autoencoder saw them: visible observations, "
            "hidden ones, and what it made of the hidden ones.",
            alt="Visible, hidden and reconstructed observations of some test series.",
            png=plots.reconstruction_examples(reconstructions(autoencoder, dataset)),
            wide=True,
        )
    return pictures


def learning_curves(curves: Mapping[str, str]) -> dict[str, Plot]:
    """A figure for each metrics.jsonl, by title, that has any."""
    pictures = {}
    for title, path in curves.items():
        if records := [record for _, record in read_records(Path(path))]:
            pictures[f"curve_{title}"] = Plot(
                title=f"Learning curve: {title}",
                caption="Metrics by optimiser step; eval is the validation split.",
                alt=f"Learning curve of the {title}.",
                png=plots.learning_curve(records),
                wide=True,
            )
    return pictures


@torch.no_grad()
def reconstructions(
    model: RoMAForPreTraining, dataset: StoredDataset
) -> list[plots.Reconstruction]:
    """A few test series of middling length with a drawn mask, in the units of the data."""
    test = dataset.split("test")
    schema, normaliser = dataset.schema, Normaliser(dataset.schema)
    order = np.argsort(test.lengths, kind="stable")
    chosen = order[len(order) // 2 :][:_N_RECONSTRUCTED]
    collate = Collate(model.config, seed=0)
    names = [named(channel) for channel in schema.channels]
    examples = []
    for row in chosen:
        batch = collate([(0, int(row), test[int(row)])])
        masked = batch.masked
        assert masked is not None
        predicted = batch.tokens.clone()
        if masked.hidden.total:
            predicted[masked.hidden_rows] = model.reconstruct_hidden(batch, masked)
        positions, values = dataset.raw(int(test.indices[row]))
        visible = np.zeros(len(values), dtype=bool)
        visible[masked.visible_rows.numpy()] = True
        examples.append(
            plots.Reconstruction(
                title=dataset.ids[int(test.indices[row])],
                channels=names[:_N_CHANNELS],
                positions=positions[:, 0],
                values=values[:, :_N_CHANNELS],
                predicted=normaliser.denormalise(predicted.numpy())[:, :_N_CHANNELS],
                visible=visible,
                axis=named(schema.axes[0]),
            )
        )
    return examples


_N_SERIES = 4
# drawn of each; more would be too small to read
_GROUPS = range(2, 61)


def draw_reconstructions(
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


_MOST_POINTS = 2000  # more would hide each other
_LEGEND = 20  # classes; more have no colours of their own


def embedding_map(
    features: NDArray[np.float32], labels: NDArray[np.int64], classes: Sequence[str]
) -> Plot:
    """Two principal components of features ``(n, D)`` of series with labels ``(n,)``."""
    step = -(-len(features) // _MOST_POINTS)
    features, labels = features[::step], labels[::step]
    points, shares = principal_components(features)
    return Plot(
        title="Embedding map",
        caption="Test series among the features of the pretrained encoder, which has seen no label: "
        "the two directions in which they vary most. Classes that lie apart here are easily told.",
        alt="Test series on two principal components of their features, coloured by class.",
        png=_drawn(points, shares, labels, classes),
    )


def principal_components(
    features: NDArray[np.float32],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The first two of ``(n, D)``: places ``(n, 2)``, and their shares of all variance ``(2,)``.

    The larger side of each component is positive, so that equal features give equal maps.
    """
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    left, size, right = np.linalg.svd(centred, full_matrices=False)
    points, shares = np.zeros((len(features), 2)), np.zeros(2)
    for k in range(min(2, len(size))):
        sign = np.sign(right[k, np.abs(right[k]).argmax()]) or 1.0
        points[:, k] = sign * left[:, k] * size[k]
        shares[k] = size[k] ** 2 / max((size**2).sum(), np.finfo(np.float64).tiny)
    return points, shares


def _drawn(
    points: NDArray[np.float64],
    shares: NDArray[np.float64],
    labels: NDArray[np.int64],
    classes: Sequence[str],
) -> bytes:
    colours = mpl.colormaps["tab10" if len(classes) <= 10 else "tab20"]
    with mpl.rc_context(STYLE):
        figure = new_figure(6.4, 4.6)
        axes = figure.subplots()
        for k, name in enumerate(classes):
            mine = points[labels == k]
            if len(mine):
                axes.scatter(
                    mine[:, 0], mine[:, 1], s=14, color=colours(k % colours.N), alpha=0.75, linewidths=0,
                    label=short(name),
                )  # fmt: skip
        axes.set_xlabel(f"first component, {shares[0]:.0%} of the variance")
        axes.set_ylabel(f"second, {shares[1]:.0%}")
        if len(classes) <= _LEGEND:
            figure.legend(loc="outside right upper", markerscale=1.6)
        return png_of(figure)
