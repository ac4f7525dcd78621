"""The figures of a report: what is drawn of an evaluation, with captions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from roma_core.data.normalisation import denormalise
from roma_core.data.store import StoredDataset
from roma_core.evaluation import plots
from roma_core.evaluation.job_config import EvaluationJobConfig
from roma_core.evaluation.metrics import Metrics
from roma_core.evaluation.page import Plot
from roma_core.evaluation.regression_plots import named
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.batches import Collate
from roma_core.trainer.metrics_log import read_records

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
    schema = dataset.schema
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
            predicted[masked.hidden_rows] = model.reconstruct_rows(batch, masked)
        positions, values = dataset.raw(int(test.indices[row]))
        visible = np.zeros(len(values), dtype=bool)
        visible[masked.visible_rows.numpy()] = True
        examples.append(
            plots.Reconstruction(
                title=dataset.ids[int(test.indices[row])],
                channels=names[:_N_CHANNELS],
                positions=positions[:, 0],
                values=values[:, :_N_CHANNELS],
                predicted=denormalise(predicted.numpy(), schema)[:, :_N_CHANNELS],
                visible=visible,
                axis=named(schema.axes[0]),
            )
        )
    return examples
