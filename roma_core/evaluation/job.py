"""The evaluation job: predictions, metrics, figures, a report and, for a classifier, packages.

outputs/predictions.parquet   test series or observations: true and predicted values
outputs/metrics.json
outputs/plots/*.png
outputs/report.html
outputs/champion_predictions.parquet, serving_checks.json, package/, encoder_package/
                              of a classifier only
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax

from roma_core.data.store import StoredDataset, Subset
from roma_core.evaluation import plots
from roma_core.evaluation.compare import Change, compare_predictions
from roma_core.evaluation.config import EvaluationJobConfig, Fact, FactSheet, ServingChecks
from roma_core.evaluation.drift import embedding_profile, reference_profile
from roma_core.evaluation.leakage import check_leakage, split_digest
from roma_core.evaluation.metrics import (
    ClassificationMetrics,
    ReconstructionMetrics,
    RegressionMetrics,
    evaluate,
    evaluate_regression,
    reconstruction_errors,
)
from roma_core.evaluation.packaging import (
    NotComparable,
    check_serving,
    package_classifier,
    package_encoder,
    predict_packaged,
    prediction_table,
)
from roma_core.evaluation.predictions import Float32, PredictionTable, RegressionTable
from roma_core.evaluation.reconstruction import (
    evaluate_reconstruction,
    examples_of,
    mask_all_but,
    mask_as_trained,
    reconstruct,
    reconstruct_examples,
)
from roma_core.evaluation.report import Plot, ReportContent, render_report
from roma_core.files import read_json, write_bytes, write_json
from roma_core.job import Attempt, JobFolder
from roma_core.model.config import is_pretraining
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.run_job import Work
from roma_core.trainer.dataloader import Collate
from roma_core.trainer.evaluator import classify
from roma_core.trainer.job import open_dataset
from roma_core.trainer.metrics import read_records
from roma_core.trainer.run_logger import Progress

_OUTPUTS = {
    "predictions": "predictions.parquet",
    "champion_predictions": "champion_predictions.parquet",
    "metrics": "metrics.json",
    "serving_checks": "serving_checks.json",
    "plots": "plots",
    "report": "report.html",
    "package": "package",
    "encoder_package": "encoder_package",
}
_MAX_EMBEDDED = 2000  # series of train and validation behind an embedding profile
_DRAWN_QUANTILES = (0.1, 0.5, 1.0)  # of the series drawn of a regression, by error
_CLASSES_DRAWN = range(2, 61)  # classes that a figure of errors has room for


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the evaluation of one task found; the fields of :class:`ReportContent` but for the data's.

    Attributes:
        model: what the model does, for the summary of the report.
        tracked: measurements for a tracker beside the metrics.
        digests: sha256 of the manifests of packages.
    """

    metrics: ClassificationMetrics | RegressionMetrics | ReconstructionMetrics
    model: str
    figures: dict[str, Plot]
    limits: tuple[str, ...]
    title: str = "Evaluation"
    facts: tuple[FactSheet, ...] = ()
    changes: tuple[Change, ...] = ()
    serving_checks: ServingChecks | None = None
    not_packaged: str = ""
    tracked: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


class _Steps:
    """Reports the steps of a job: a heartbeat and a progress line each."""

    def __init__(self, attempt: Attempt, progress: Progress) -> None:
        self.attempt, self.progress, self.n = attempt, progress, 0
        attempt.beat(0)

    def __call__(self, **metrics: float) -> None:
        self.n += 1
        self.attempt.beat(self.n)
        self.progress.update(self.n, metrics, force=True)


def run_evaluation(folder: JobFolder, attempt: Attempt) -> Work:
    """Evaluate a model on the test split as ``config.json`` describes.

    Raises:
        ValueError: the data have no test series, or none that the model can predict.
    """
    config = EvaluationJobConfig.model_validate(read_json(folder.config, schema_version=1))
    torch.set_num_threads(1)
    dataset = open_dataset(config.dataset, config.dataset_digest, verify=True)
    if len(dataset.split("test")) == 0:
        raise ValueError(f"{config.dataset} has no test series to evaluate on")
    model = None if config.classifier is None else _classifier(config.classifier)
    autoencoder = None
    if config.autoencoder is not None:
        autoencoder = RoMAForPreTraining.from_pretrained(config.autoencoder).eval()
    out = folder.outputs
    (out / "plots").mkdir(parents=True, exist_ok=True)
    with Progress("evaluate", total_steps=4, first_step=0) as progress:
        step = _Steps(attempt, progress)
        leaks = check_leakage(dataset, [Path(path) for path in config.trained_on])
        for line in leaks:
            print(f"WARNING: possible leakage: {line}", flush=True)
        step()
        if model is None:
            assert autoencoder is not None  # the configuration has one of the two
            found = _evaluate_reconstruction(config, dataset, autoencoder, out, step)
        elif model.config.problem_type == "regression":
            found = _evaluate_regression(config, dataset, model, out, step)
        else:
            found = _evaluate_classification(config, dataset, model, autoencoder, leaks, out, step)
        write_json(out / "metrics.json", found.metrics.document())

        figures = found.figures | learning_curves(config.curves)
        if model is not None and autoencoder is not None:
            figures |= _examples(reconstruct_examples(autoencoder, dataset.split("test")))
        for name, plot in figures.items():
            write_bytes(out / "plots" / f"{name}.png", plot.png)
        checks = found.serving_checks
        content = ReportContent(
            title=f"{found.title} of {config.name}",
            summary=f"RoMA, the Rotary Masked Autoencoder, {found.model}, evaluated on "
            f"{found.metrics.n_series} test series{'' if leaks else ' not used in training'}.",
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            metrics=found.metrics,
            leaks=leaks,
            plots=tuple(figures.values()),
            facts=(*found.facts, *config.facts),
            limits=found.limits,
            champion_version=config.champion_version,
            champion_problem=None if checks is None else checks.champion_problem,
            changes=found.changes,
            serving_checks=checks,
            not_packaged=found.not_packaged,
            decided_before=config.decided_before,
            baselines=config.baselines,
            n_observed=config.n_observed,
        )
        write_bytes(out / "report.html", render_report(content).encode())
        step()
    if found.not_packaged:
        print(found.not_packaged, flush=True)
    return Work(
        "completed",
        metrics=found.metrics.flat() | found.tracked,
        outputs={
            name: f"outputs/{path}" for name, path in _OUTPUTS.items() if (out / path).exists()
        },
        facts=found.digests | {"n_series": found.metrics.n_series},
    )


def _classifier(weights: str) -> RoMAForClassification:
    if is_pretraining(read_json(Path(weights) / "model_config.json")):
        raise ValueError(
            f"{weights} is a pretraining checkpoint without a classification head; pass it as "
            f"--autoencoder to evaluate its reconstructions, or finetune it first"
        )
    return RoMAForClassification.from_pretrained(weights).eval()


_LIMITS = (
    "Intervals are percentile bootstraps over test series; they do not cover another training seed or "
    "another choice of test series.",
)
_SELECTION = "Weights and settings were selected on the validation split."


def _evaluate_classification(
    config: EvaluationJobConfig,
    dataset: StoredDataset,
    model: RoMAForClassification,
    autoencoder: RoMAForPreTraining | None,
    leaks: tuple[str, ...],
    out: Path,
    step: _Steps,
) -> Evaluation:
    if dataset.labels is None:
        raise ValueError(f"{config.dataset} has no labelled test series to evaluate on")
    test = dataset.split("test")
    logits = classify(model, test, Collate(model.config, seed=0), config.batch_size).logits
    lineage = {"dataset_digest": dataset.manifest.digest}
    table = prediction_table(test, softmax(logits.astype(np.float64), axis=1), lineage)
    table.save(out / "predictions.parquet")
    metrics = evaluate(table)
    step(accuracy=metrics.accuracy.value)

    changes, problem = _compare_with_champion(config, table, test, out)
    profile, features = None, None
    if autoencoder is not None:
        features = embed(autoencoder, test, config.batch_size)
        rows = np.concatenate([dataset.split(name).indices for name in ("train", "validation")])
        few = Subset(dataset, rows[:: -(-len(rows) // _MAX_EMBEDDED)])
        profile = embedding_profile(embed(autoencoder, few, config.batch_size))
    reference = reference_profile(dataset, profile)
    card = {
        "metrics": metrics,
        "changes": changes,
        "champion_version": config.champion_version,
        "champion_problem": problem,
        "baselines": config.baselines,
        "decided_before": config.decided_before,
    }
    package = out / "package"
    digests = {
        "manifest_sha256": package_classifier(config, model, test, reference, package, **card)
    }
    if autoencoder is not None:
        digests["encoder_manifest_sha256"] = package_encoder(
            config, autoencoder, test, reference, out / "encoder_package"
        )
    checks = check_serving(config, package, table, test, problem).model_copy(
        update={"leaks": leaks, "test_split": split_digest(test)}
    )
    checks.save(out / "serving_checks.json")
    tracked = {"serving_difference": checks.serving_difference, "package_mb": checks.size_mb}
    if (smoke_test := checks.smoke_test) is not None:
        tracked |= {"latency_ms": smoke_test.latency_ms, "load_s": smoke_test.load_s}
    step(serving_difference=checks.serving_difference)

    figures = {
        "confusion": Plot(
            title="Confusion matrix",
            caption="Rows are true classes, columns predicted ones; numbers count test series.",
            alt="Confusion matrix of the test series.",
            png=plots.confusion_matrix(metrics),
        ),
        "reliability": Plot(
            title="Reliability",
            caption="Accuracy of predictions by confidence. A calibrated model is on the diagonal.",
            alt="Accuracy against confidence.",
            png=plots.reliability_curve(metrics),
        ),
    }
    if features is not None:
        figures["embedding_map"] = Plot(
            title="Embedding map",
            caption="The first two principal components of the pretrained encoder's features of test "
            "series. The encoder was trained without labels.",
            alt="Test series on two principal components of their features, coloured by class.",
            png=plots.embedding_map(features, table.labels, table.classes),
        )
    return Evaluation(
        metrics=metrics,
        model=f"as a classifier of {len(table.classes)} classes",
        figures=figures,
        limits=(
            f"{_SELECTION} The test split is used only to decide about promotion; each such decision "
            f"reduces its independence.",
            *_LIMITS,
            *["Baselines were measured elsewhere on the same protocol."] * bool(config.baselines),
            "Probabilities are those of the model as trained; no calibration was fitted.",
        ),
        changes=changes,
        serving_checks=checks,
        tracked=tracked,
        digests=digests,
    )


def _compare_with_champion(
    config: EvaluationJobConfig, table: PredictionTable, test: Subset, out: Path
) -> tuple[tuple[Change, ...], str | None]:
    """Changes against the champion, and why it could not be evaluated; none without a champion."""
    if config.champion is None:
        return (), config.champion_problem
    try:
        champion = predict_packaged(Path(config.champion), test)
    except NotComparable as error:
        return (), f"champion version {config.champion_version}: {error}"
    champion.save(out / "champion_predictions.parquet")
    return compare_predictions(table, champion), None


@torch.no_grad()
def embed(encoder: RoMAForPreTraining, series: Subset, batch_size: int) -> Float32:
    """``(len(series), d_model)`` features: the mean of every series' tokens, all of them visible."""
    parts = np.array_split(np.arange(len(series)), -(-len(series) // batch_size))
    collate = Collate(encoder.config, seed=0)
    features = np.empty((len(series), encoder.config.encoder_config.d_model), np.float32)
    for part in parts:
        batch = collate.batch(series, part)
        assert batch.indices is not None  # set by Collate
        features[batch.indices.numpy()] = encoder.embed(batch, pooling="mean").float().numpy()
    return features


def _evaluate_regression(
    config: EvaluationJobConfig,
    dataset: StoredDataset,
    model: RoMAForClassification,
    out: Path,
    step: _Steps,
) -> Evaluation:
    if model.config.pools != "token":
        raise ValueError(
            f"{config.classifier} predicts one output per series (pooling={model.config.pools}), but "
            f"the targets of a data set belong to its observations; train with pooling=token"
        )
    schema = dataset.schema
    if model.config.dim_output != len(schema.targets):
        raise ValueError(
            f"{config.classifier} predicts {model.config.dim_output} values per observation, but "
            f"{config.dataset} has {len(schema.targets)} targets; evaluate it on data like those it "
            f"was trained on"
        )
    test = dataset.split("test")
    outputs = classify(model, test, Collate(model.config, seed=0), config.batch_size)
    assert outputs.labels is not None
    table = RegressionTable(
        ids=[dataset.ids[i] for i in test.indices],
        lengths=test.lengths,
        axes=schema.axes,
        positions=np.concatenate([dataset.raw(int(i))[0] for i in test.indices]),
        targets=schema.targets,
        true=outputs.labels.astype(np.float64),
        predicted=outputs.logits.astype(np.float64),
        lineage={"dataset_digest": dataset.manifest.digest},
    )
    table.save(out / "predictions.parquet")
    metrics = evaluate_regression(table)
    step(mse=metrics.mse.value)

    scaled = (table.errors**2 / table.true.var(axis=0).clip(1e-300)).mean(axis=1)  # (T,)
    order = (np.add.reduceat(scaled, table.starts) / table.lengths).argsort()  # the best first
    drawn = [int(order[round(q * (len(order) - 1))]) for q in _DRAWN_QUANTILES]
    figures = {
        "series": Plot(
            title="Three series",
            caption="Test series at the 10th, 50th and 100th percentile of the error.",
            alt="True and predicted targets over position, of three test series.",
            png=plots.along_series(table, drawn),
            wide=True,
        ),
        "against_true": Plot(
            title="Predicted against true",
            caption="Observations of the test split; exact predictions are on the line.",
            alt="Predicted against true targets.",
            png=plots.against_true(table),
        ),
        "by_position": Plot(
            title="Error against position",
            caption="Each point is over observations at neighbouring positions, about equally many.",
            alt="Root mean squared error against position.",
            png=plots.error_by_position(metrics, table.axes[0]),
        ),
    }
    names = ", ".join(target.name for target in table.targets)
    return Evaluation(
        metrics=metrics,
        model=f"as a regressor of {names} at every observation",
        figures=figures,
        limits=(_SELECTION, *_LIMITS),
        not_packaged=NOT_PACKAGED,
    )


NOT_PACKAGED = (
    "No package was written: only classifiers of whole series are served; this model predicts values "
    "of every observation."
)


def _evaluate_reconstruction(
    config: EvaluationJobConfig,
    dataset: StoredDataset,
    model: RoMAForPreTraining,
    out: Path,
    step: _Steps,
) -> Evaluation:
    test, settings = dataset.split("test"), model.config
    mask = mask_as_trained(settings, config.seed)
    table = reconstruct(model, test, mask, config.batch_size)
    table.save(out / "predictions.parquet", test)
    step()
    metrics = evaluate_reconstruction(table, test)
    for n in config.n_observed:
        fewer = reconstruct(model, test, mask_all_but(n, config.seed), config.batch_size)
        for errors in (reconstruction_errors(fewer), reconstruction_errors(fewer, "clean")):
            metrics.overall.update({f"{key}_observed_{n}": e for key, e in errors.items()})
    step(mse=metrics.overall["mse"].value)

    figures = _examples(examples_of(table, test))
    if len(metrics.groups) in _CLASSES_DRAWN:
        figures["groups"] = Plot(
            title="Error by class",
            caption="Mean squared error of the hidden observations of each class, with 95 % intervals.",
            alt="Mean squared error by class of the series.",
            png=plots.errors_by_group(metrics.groups, metrics.overall.get("noise_mse")),
            wide=True,
        )
    stacks = {"encoder": settings.encoder_config, "decoder": settings.decoder_config}
    low, high = settings.mask_ratio, settings.mask_ratio_max
    facts = {
        "data": f"{dataset.manifest.name}, version {dataset.manifest.digest[:12]}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        **{k: f"width {s.d_model}, {s.depth} layers, {s.nhead} heads" for k, s in stacks.items()},
        "hidden": f"{low:g} of each series" if high is None else f"{low:g} to {high:g}",
        "masks": f"{settings.mask_strategy}, seed {config.seed}",
        "position scales": ", ".join(f"{a.name} {a.scale:g}" for a in dataset.schema.axes),
    }
    sheet = FactSheet(
        title="Model and masks", facts=tuple(Fact(label=k, value=v) for k, v in facts.items())
    )
    return Evaluation(
        metrics=metrics,
        model="reconstructing hidden observations",
        figures=figures,
        limits=("Hidden values were overwritten before the model was run.", *_LIMITS),
        title="Reconstructions",
        facts=(sheet,),
    )


def _examples(examples: Sequence[plots.ReconstructionExample]) -> dict[str, Plot]:
    if not examples:
        return {}
    return {
        "reconstructions": Plot(
            title="Reconstructions",
            caption="Test series with the observations that were visible to the pretrained model, the "
            "hidden ones and its reconstructions of these.",
            alt="Visible, hidden and reconstructed observations of some test series.",
            png=plots.reconstruction_examples(examples),
            wide=True,
        )
    }


def learning_curves(curves: Mapping[str, str]) -> dict[str, Plot]:
    """A figure for each metrics.jsonl, by title, that has any records."""
    figures = {}
    for title, path in curves.items():
        if records := [record for _, record in read_records(Path(path))]:
            figures[f"curve_{title}"] = Plot(
                title=f"Learning curve: {title}",
                caption="Metrics by optimiser step; eval is the validation split.",
                alt=f"Learning curve of the {title}.",
                png=plots.learning_curve(records),
                wide=True,
            )
    return figures
