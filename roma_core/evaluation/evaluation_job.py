"""Evaluation as a job: predictions, metrics, report and the packages that are served.

outputs/predictions.parquet             test series, by the classifier
outputs/champion_predictions.parquet    the same series, by the present champion if it can
outputs/metrics.json
outputs/measured.json                   latency, size, golden rows, leaks, trouble with the champion
outputs/plots/*.png
outputs/report.html
outputs/package/, encoder_package/      what gets registered
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from roma_core.data.store import Subset
from roma_core.evaluation.comparison import Change, changes
from roma_core.evaluation.embedding_map import embedding_map
from roma_core.evaluation.embedding_series import features_of, trained_on_features
from roma_core.evaluation.embeddings import embedding_profile
from roma_core.evaluation.held_out import seen_in_training, split_digest, tell, unseen
from roma_core.evaluation.job_config import EvaluationJobConfig
from roma_core.evaluation.measured import Measured
from roma_core.evaluation.metrics import Metrics, evaluate
from roma_core.evaluation.packaging import measure, package_classifier, package_encoder
from roma_core.evaluation.page import Plot
from roma_core.evaluation.pictures import draw
from roma_core.evaluation.predicting import NotComparable, predict, predict_packaged
from roma_core.evaluation.predictions import PredictionTable
from roma_core.evaluation.reference_profile import reference_profile
from roma_core.evaluation.regression_job import run_regression
from roma_core.evaluation.report import ReportContent, render_report
from roma_core.files import read_json, write_bytes, write_json
from roma_core.job import Attempt, JobFolder
from roma_core.job_runner import Work
from roma_core.model.classification import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.model.transfer import is_pretraining
from roma_core.trainer.progress import Progress
from roma_core.trainer.training_job import open_dataset


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


def numbers(measured: Measured) -> dict[str, float]:
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
    measured: Measured,
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
