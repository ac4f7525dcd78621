"""Evaluation as a job: predictions, metrics, report and the package that is served.

outputs/predictions.parquet             test series, by the classifier
outputs/champion_predictions.parquet    the same series, by the present champion
outputs/metrics.json
outputs/plots/*.png
outputs/report.html
outputs/package/                        what gets registered
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from roma_core.data.normalisation import denormalise
from roma_core.data.series import raw_series
from roma_core.data.store import StoredDataset, Subset
from roma_core.evaluation import plots
from roma_core.evaluation.job_config import EvaluationJobConfig
from roma_core.evaluation.metrics import Metrics, evaluate
from roma_core.evaluation.predictions import PredictionTable
from roma_core.evaluation.report import Plot, ReportContent, render_report
from roma_core.files import read_json, write_bytes, write_json
from roma_core.job import Attempt, JobFolder
from roma_core.job_runner import Work
from roma_core.model.classification import RoMAForClassification
from roma_core.model.export import export_classifier
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.serving.logged_model import Classifier
from roma_core.serving.logged_model import Series as LoggedSeries
from roma_core.serving.package import build_package
from roma_core.serving.schema import Series
from roma_core.trainer.batches import Collate
from roma_core.trainer.evaluating import classify
from roma_core.trainer.metrics_log import read_records
from roma_core.trainer.progress import Progress
from roma_core.trainer.training_job import open_dataset

_N_GOLDEN = 10
_N_RECONSTRUCTED = 3
_N_CHANNELS = 4  # drawn of each; more would be too small to read
_PARITY_SERIES = 1000  # compared between training and serving code, at most


def run_evaluation(folder: JobFolder, attempt: Attempt) -> Work:
    """Evaluate as ``config.json`` says."""
    config = EvaluationJobConfig.model_validate(read_json(folder.config, schema_version=1))
    torch.set_num_threads(1)
    dataset = open_dataset(config.dataset, config.dataset_digest, verify=True)
    test = dataset.split("test")
    if len(test) == 0 or dataset.labels is None:
        raise ValueError(f"{config.dataset} has no labelled test series to evaluate on")
    out = folder.outputs
    (out / "plots").mkdir(parents=True, exist_ok=True)
    with Progress("evaluate", total_steps=5, first_step=0) as progress:
        attempt.beat(0)
        model = RoMAForClassification.from_pretrained(config.classifier).eval()
        table = predict(model, test, config.batch_size)
        table.save(out / "predictions.parquet")
        metrics = evaluate(table)
        write_json(out / "metrics.json", metrics.model_dump(mode="json"))
        progress.update(1, {"accuracy": metrics.accuracy.value}, force=True)

        manifest_sha256 = package(config, model, test, out / "package")
        difference = serving_difference(out / "package", table, test)
        progress.update(2, {"serving_difference": difference}, force=True)

        if config.champion is not None:
            champion = predict_packaged(Path(config.champion), test)
            champion.save(out / "champion_predictions.parquet")
        progress.update(3, {}, force=True)

        pictures = draw(config, dataset, metrics)
        for name, plot in pictures.items():
            write_bytes(out / "plots" / f"{name}.png", plot.png)
        progress.update(4, {}, force=True)
        write_bytes(out / "report.html", report(config, metrics, list(pictures.values())).encode())
        progress.update(5, {}, force=True)
    outputs = {
        "predictions": "outputs/predictions.parquet",
        "metrics": "outputs/metrics.json",
        "plots": "outputs/plots",
        "report": "outputs/report.html",
        "package": "outputs/package",
    }
    if config.champion is not None:
        outputs["champion_predictions"] = "outputs/champion_predictions.parquet"
    return Work(
        "completed",
        metrics=metrics.flat() | {"serving_difference": difference},
        outputs=outputs,
        facts={"manifest_sha256": manifest_sha256, "n_series": len(test)},
    )


def predict(model: RoMAForClassification, test: Subset, batch_size: int) -> PredictionTable:
    """Probabilities of every series of a split, by the packed model."""
    dataset = test.dataset
    assert dataset.labels is not None
    outputs = classify(model, test, Collate(model.config, seed=0), batch_size)
    return PredictionTable(
        ids=[dataset.ids[i] for i in test.indices],
        classes=dataset.schema.classes,
        labels=dataset.labels[test.indices],
        probabilities=_softmax(outputs.logits),
        lengths=test.lengths,
        lineage={"dataset_digest": dataset.manifest.digest},
    )


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def package(
    config: EvaluationJobConfig, model: RoMAForClassification, test: Subset, folder: Path
) -> str:
    """Build the package folder; the sha256 of its manifest stands for it."""
    by_length = np.argsort(test.lengths, kind="stable")
    golden = by_length[np.linspace(0, len(test) - 1, min(_N_GOLDEN, len(test))).astype(int)]
    return build_package(
        folder,
        export_classifier(model),
        Path(config.classifier) / "model.safetensors",
        read_json(Path(config.classifier) / "model_config.json"),
        test.dataset.schema,
        [Series(**s) for s in raw_series(test, golden.tolist())],
        {"dataset_digest": config.dataset_digest},
        name=config.name,
    )


def predict_packaged(package_folder: Path, test: Subset) -> PredictionTable:
    """Probabilities of every series of a split, by a served package, from raw rows."""
    dataset = test.dataset
    assert dataset.labels is not None
    classes = dataset.schema.classes
    classifier = Classifier.open(package_folder)
    series = [LoggedSeries(**s) for s in raw_series(test, range(len(test)))]
    predictions = classifier.predict(series)
    return PredictionTable(
        ids=[dataset.ids[i] for i in test.indices],
        classes=classes,
        labels=dataset.labels[test.indices],
        probabilities=np.array([[p.probabilities[c] for c in classes] for p in predictions]),
        lengths=test.lengths,
        lineage={"package": str(package_folder)},
    )


def serving_difference(package_folder: Path, table: PredictionTable, test: Subset) -> float:
    """Largest difference of a probability between the packed model and the package."""
    rows = range(0, len(test), -(-len(test) // _PARITY_SERIES))
    classifier = Classifier.open(package_folder)
    predictions = classifier.predict([LoggedSeries(**s) for s in raw_series(test, rows)])
    served = np.array([[p.probabilities[c] for c in table.classes] for p in predictions])
    return float(np.abs(served - table.probabilities[list(rows)]).max())


def draw(config: EvaluationJobConfig, dataset: StoredDataset, metrics: Metrics) -> dict[str, Plot]:
    """The report's figures by file name."""
    pictures = {
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
    for title, path in config.curves.items():
        records = [record for _, record in read_records(Path(path))]
        if records:
            pictures[f"curve_{title}"] = Plot(
                title=f"Learning curve: {title}",
                caption="Metrics by optimiser step; eval is the validation split.",
                alt=f"Learning curve of the {title}.",
                png=plots.learning_curve(records),
                wide=True,
            )
    if config.autoencoder is not None:
        model = RoMAForPreTraining.from_pretrained(config.autoencoder).eval()
        pictures["reconstructions"] = Plot(
            title="Reconstructions",
            caption="Test series as the pretrained autoencoder saw them: visible observations, "
            "hidden ones, and what it made of the hidden ones.",
            alt="Visible, hidden and reconstructed observations of some test series.",
            png=plots.reconstruction_examples(reconstructions(model, dataset)),
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
    names = [c.name if c.unit == "1" else f"{c.name} ({c.unit})" for c in schema.channels]
    axis = schema.axes[0]
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
                axis=f"{axis.name} ({axis.unit})" if axis.unit != axis.name else axis.name,
            )
        )
    return examples


def report(config: EvaluationJobConfig, metrics: Metrics, pictures: Sequence[Plot]) -> str:
    """The HTML page."""
    return render_report(
        ReportContent(
            title=f"Evaluation of {config.name}",
            summary=f"RoMA, the Rotary Masked Autoencoder, as a classifier of {len(metrics.per_class)} "
            f"classes, judged on {metrics.n_series} test series it never saw.",
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            metrics=metrics,
            baselines=config.baselines,
            plots=tuple(pictures),
            facts=config.facts,
            limits=(
                "Intervals are percentile bootstraps over test series; they do not cover another "
                "training seed or another choice of test series.",
                "Baselines were measured elsewhere on the same protocol, not in this run.",
                "Probabilities are those of the model as trained; no calibration was fitted.",
            ),
        )
    )
