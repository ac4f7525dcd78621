"""Evaluation of a regression of every observation, as a job.

outputs/predictions.parquet     test observations: what was true, what the model said
outputs/metrics.json
outputs/plots/*.png
outputs/report.html

There is no package: what is served tells the class of a whole series.

Features of a data set's series, by the encoder as it was trained.
Evaluation as a job: predictions, metrics, report and the packages that are served.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from roma_core.data.store import StoredDataset, Subset
from roma_core.evaluation.compare import Change, changes
from roma_core.evaluation.config import EvaluationJobConfig, ServingChecks
from roma_core.evaluation.drift import embedding_profile, reference_profile
from roma_core.evaluation.figures import draw, embedding_map, of_training
from roma_core.evaluation.leakage import seen_in_training, split_digest, tell, unseen
from roma_core.evaluation.metrics import Metrics, RegressionMetrics, evaluate, evaluate_regression
from roma_core.evaluation.packaging import (
    NotComparable,
    measure,
    package_classifier,
    package_encoder,
    predict,
    predict_packaged,
)
from roma_core.evaluation.plots import against_true, along_series, error_by_position
from roma_core.evaluation.predictions import PredictionTable, RegressionTable
from roma_core.evaluation.report import (
    Plot,
    RegressionReport,
    ReportContent,
    render_regression_report,
    render_report,
)
from roma_core.files import read_json, write_bytes, write_json
from roma_core.job import Attempt, JobFolder
from roma_core.model.config import is_pretraining
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.run_job import Work
from roma_core.trainer.dataloader import Collate
from roma_core.trainer.evaluator import classify
from roma_core.trainer.job import open_dataset
from roma_core.trainer.run_logger import Progress

_MOST_SERIES = 2000  # of the splits that were trained on; more move no median


@torch.no_grad()
def features_of(
    encoder: RoMAForPreTraining, series: Subset, batch_size: int
) -> NDArray[np.float32]:
    """The mean of every series' tokens, all of them visible: ``(len(series), d)``."""
    parts = np.array_split(np.arange(len(series)), -(-len(series) // batch_size))
    collate = Collate(encoder.config, seed=0)
    found = np.empty((len(series), encoder.config.encoder_config.d_model), np.float32)
    for part in parts:
        batch = collate.batch(series, part)
        assert batch.indices is not None  # collate gave them
        found[batch.indices.numpy()] = encoder.embed(batch, pooling="mean").float().numpy()
    return found


def trained_on_features(
    encoder: RoMAForPreTraining, dataset: StoredDataset, batch_size: int
) -> NDArray[np.float32]:
    """Those of training and validation series, evenly spaced ones of many."""
    rows = np.concatenate([dataset.split(name).indices for name in ("train", "validation")])
    rows = rows[:: -(-len(rows) // _MOST_SERIES)]
    return features_of(encoder, Subset(dataset, rows), batch_size)


def run_evaluation(folder: JobFolder, attempt: Attempt) -> Work:
    """Evaluate as ``config.json`` says."""
    config = EvaluationJobConfig.model_validate(read_json(folder.config, schema_version=1))
    torch.set_num_threads(1)
    dataset = open_dataset(config.dataset, config.dataset_digest, verify=True)
    if is_pretraining(read_json(Path(config.classifier) / "model_config.json")):
        raise ValueError(
            f"{config.classifier} holds an autoencoder, which tells no class: give it as --autoencoder "
            f"to judge its reconstructions, or finetune it first"
        )
    model = RoMAForClassification.from_pretrained(config.classifier).eval()
    if model.config.problem_type == "regression":
        return run_regression(config, dataset, model, folder, attempt)
    test = dataset.split("test")
    if len(test) == 0 or dataset.labels is None:
        raise ValueError(f"{config.dataset} has no labelled test series to evaluate on")
    out = folder.outputs
    (out / "plots").mkdir(parents=True, exist_ok=True)
    facts = {}
    with Progress("evaluate", total_steps=6, first_step=0) as progress:
        attempt.beat(0)
        table = predict(model, test, config.batch_size)
        table.save(out / "predictions.parquet")
        metrics = evaluate(table)
        write_json(out / "metrics.json", metrics.model_dump(mode="json"))
        progress.update(1, {"accuracy": metrics.accuracy.value}, force=True)

        changed, problem = beside_champion(config, table, test, out)
        progress.update(2, {}, force=True)

        encoder = features = None
        if config.autoencoder is not None:
            encoder = RoMAForPreTraining.from_pretrained(config.autoencoder).eval()
            features = embedding_profile(trained_on_features(encoder, dataset, config.batch_size))
        profile = reference_profile(dataset, features)
        facts["manifest_sha256"] = package_classifier(
            config, model, test, metrics, changed, problem, profile, out / "package"
        )
        if encoder is not None:
            facts["encoder_manifest_sha256"] = package_encoder(
                config, encoder, test, profile, out / "encoder_package"
            )
        progress.update(3, {}, force=True)

        leaks = seen_in_training(dataset, [Path(path) for path in config.trained_on])
        tell(leaks)
        measured = measure(config, out / "package", table, test, leaks, split_digest(test), problem)
        measured.save(out / "measured.json")
        difference = measured.serving_difference
        progress.update(4, {"serving_difference": difference}, force=True)

        pictures = draw(config, dataset, metrics, encoder)
        if encoder is not None:
            found = features_of(encoder, test, config.batch_size)
            labels = dataset.labels[test.indices]
            pictures["embedding_map"] = embedding_map(found, labels, dataset.schema.classes)
        for name, plot in pictures.items():
            write_bytes(out / "plots" / f"{name}.png", plot.png)
        progress.update(5, {}, force=True)
        page = report(config, metrics, changed, measured, list(pictures.values()))
        write_bytes(out / "report.html", page.encode())
        progress.update(6, {}, force=True)
    return Work(
        "completed",
        metrics=metrics.flat() | numbers(measured),
        outputs=outputs_of(out),
        facts=facts | {"n_series": len(test)},
    )


def beside_champion(
    config: EvaluationJobConfig, table: PredictionTable, test: Subset, out: Path
) -> tuple[tuple[Change, ...], str | None]:
    """Evaluate the champion on the same series.

    Returns:
        What changed against it, and why it could not be evaluated: nothing and None without one.
    """
    if config.champion is None:
        return (), config.champion_problem
    try:
        champion = predict_packaged(Path(config.champion), test)
    except NotComparable as error:
        return (), f"champion version {config.champion_version}: {error}"
    champion.save(out / "champion_predictions.parquet")
    return changes(table, champion), None


def numbers(measured: ServingChecks) -> dict[str, float]:
    """What a tracker is told of the package."""
    found = {"serving_difference": measured.serving_difference, "package_mb": measured.size_mb}
    if measured.trial is not None:
        found |= {"latency_ms": measured.trial.latency_ms, "load_s": measured.trial.load_s}
    return found


def outputs_of(out: Path) -> dict[str, str]:
    """Name -> path in the job folder, of what is there."""
    places = {
        "predictions": "predictions.parquet",
        "champion_predictions": "champion_predictions.parquet",
        "metrics": "metrics.json",
        "measured": "measured.json",
        "plots": "plots",
        "report": "report.html",
        "package": "package",
        "encoder_package": "encoder_package",
    }
    return {name: f"outputs/{place}" for name, place in places.items() if (out / place).exists()}


def report(
    config: EvaluationJobConfig,
    metrics: Metrics,
    changed: tuple[Change, ...],
    measured: ServingChecks,
    pictures: Sequence[Plot],
) -> str:
    """The HTML page."""
    return render_report(
        ReportContent(
            title=f"Evaluation of {config.name}",
            summary=f"RoMA, the Rotary Masked Autoencoder, as a classifier of {len(metrics.per_class)} "
            f"classes, judged on {metrics.n_series} test series{unseen(measured.leaks)}.",
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            metrics=metrics,
            champion_version=config.champion_version,
            champion_problem=measured.champion_problem,
            changes=changed,
            measured=measured,
            decided_before=config.decided_before,
            baselines=config.baselines,
            plots=tuple(pictures),
            facts=config.facts,
            limits=(
                "Weights and settings were selected on the validation split. The test split decides "
                "only whether a model is promoted; each such decision uses up some of its "
                "independence.",
                "Intervals are percentile bootstraps over test series; they do not cover another "
                "training seed or another choice of test series.",
                *(
                    ("Baselines were measured elsewhere on the same protocol, not in this run.",)
                    if config.baselines
                    else ()
                ),
                "Probabilities are those of the model as trained; no calibration was fitted.",
            ),
        )
    )


NOT_SERVED = (
    "No package was written: a served model tells the class of a whole series, and this one tells "
    "numbers of every observation."
)
_PLACES = (0.1, 0.5, 1.0)  # of the series that are drawn, among all from the best to the worst


def run_regression(
    config: EvaluationJobConfig,
    dataset: StoredDataset,
    model: RoMAForClassification,
    folder: JobFolder,
    attempt: Attempt,
) -> Work:
    """Evaluate a regressor on the test split.

    Raises:
        ValueError: it tells one output a series, or the data have no such targets, or no test series.
    """
    test = dataset.split("test")
    _refuse_others(config, dataset, model)
    out = folder.outputs
    (out / "plots").mkdir(parents=True, exist_ok=True)
    with Progress("evaluate", total_steps=3, first_step=0) as progress:
        attempt.beat(0)
        table = predict_targets(model, test, config.batch_size)
        table.save(out / "predictions.parquet")
        metrics = evaluate_regression(table)
        write_json(out / "metrics.json", metrics.model_dump(mode="json"))
        progress.update(1, {"mse": metrics.mse.value}, force=True)

        pictures = _pictures(config, dataset, table, metrics)
        for name, plot in pictures.items():
            write_bytes(out / "plots" / f"{name}.png", plot.png)
        progress.update(2, {}, force=True)

        leaks = seen_in_training(dataset, [Path(path) for path in config.trained_on])
        tell(leaks)
        page = _report(config, metrics, leaks, tuple(pictures.values()))
        write_bytes(out / "report.html", page.encode())
        progress.update(3, {}, force=True)
    print(NOT_SERVED, flush=True)
    places = {
        "predictions": "predictions.parquet",
        "metrics": "metrics.json",
        "plots": "plots",
        "report": "report.html",
    }
    return Work(
        "completed",
        metrics=metrics.flat(),
        outputs={name: f"outputs/{place}" for name, place in places.items()},
        facts={"n_series": len(test)},
    )


def _refuse_others(
    config: EvaluationJobConfig, dataset: StoredDataset, model: RoMAForClassification
) -> None:
    if model.config.pools != "token":
        raise ValueError(
            f"{config.classifier} tells one output a series (pooling={model.config.pools}), but the "
            f"targets of a data set belong to its observations; train with pooling=token"
        )
    if model.config.dim_output != len(dataset.schema.targets):
        raise ValueError(
            f"{config.classifier} tells {model.config.dim_output} numbers of every observation, and "
            f"{config.dataset} has {len(dataset.schema.targets)} targets; evaluate it on data like "
            f"those it was trained on"
        )
    if len(dataset.split("test")) == 0:
        raise ValueError(f"{config.dataset} has no test series to evaluate on")


def predict_targets(model: RoMAForClassification, test: Subset, batch_size: int) -> RegressionTable:
    """What a per-token regressor says of every observation of a split, beside what is true."""
    outputs = classify(model, test, Collate(model.config, seed=0), batch_size)
    assert outputs.labels is not None
    dataset = test.dataset
    return RegressionTable(
        ids=[dataset.ids[i] for i in test.indices],
        lengths=test.lengths,
        axes=dataset.schema.axes,
        positions=np.concatenate([dataset.raw(int(i))[0] for i in test.indices]),
        targets=dataset.schema.targets,
        true=outputs.labels.astype(np.float64),
        predicted=outputs.logits.astype(np.float64),
        lineage={"dataset_digest": dataset.manifest.digest},
    )


def _pictures(
    config: EvaluationJobConfig,
    dataset: StoredDataset,
    table: RegressionTable,
    metrics: RegressionMetrics,
) -> dict[str, Plot]:
    scaled = (table.errors**2 / table.true.var(axis=0).clip(1e-300)).mean(axis=1)  # (T,)
    order = (np.add.reduceat(scaled, table.starts) / table.lengths).argsort()  # the best first
    chosen = [int(order[round(place * (len(order) - 1))]) for place in _PLACES]
    encoder = None
    if config.autoencoder is not None:
        encoder = RoMAForPreTraining.from_pretrained(config.autoencoder).eval()
    return {
        "series": Plot(
            title="Along three series",
            caption="A test series that is predicted well (one in ten is better), one in the middle, "
            "and the worst of all.",
            alt="True and predicted targets over position, of three test series.",
            png=along_series(table, chosen),
            wide=True,
        ),
        "against_true": Plot(
            title="Predicted against true",
            caption="Observations of the test split; on the line a prediction is right.",
            alt="Predicted against true targets.",
            png=against_true(table),
        ),
        "by_position": Plot(
            title="Error against position",
            caption="Over observations at neighbouring positions, about equally many each.",
            alt="Root mean squared error against position.",
            png=error_by_position(metrics, table.axes[0]),
        ),
        **of_training(config, dataset, encoder),
    }


def _report(
    config: EvaluationJobConfig,
    metrics: RegressionMetrics,
    leaks: tuple[str, ...],
    pictures: tuple[Plot, ...],
) -> str:
    names = ", ".join(target.name for target in metrics.per_target)
    return render_regression_report(
        RegressionReport(
            title=f"Evaluation of {config.name}",
            summary=f"RoMA, the Rotary Masked Autoencoder, as a regressor of {names} at every "
            f"observation, judged on {metrics.n_series} test series{unseen(leaks)}.",
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            metrics=metrics,
            leaks=leaks,
            not_served=NOT_SERVED,
            plots=pictures,
            facts=config.facts,
            limits=(
                "Weights and settings were selected on the validation split.",
                "Intervals are percentile bootstraps over test series; they do not cover another "
                "training seed or another choice of test series.",
            ),
        )
    )
