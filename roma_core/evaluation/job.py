"""The evaluation job: predictions, metrics, figures, a report and, for a classifier, packages.

outputs/predictions.parquet   test series or observations: true and predicted values
outputs/metrics.json, plots/*.png, report.html
outputs/champion_predictions.parquet, serving_checks.json, package/, encoder_package/
                              of a classifier only
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import softmax

from roma_core.data.store import Subset, raw_series
from roma_core.evaluation import plots, report
from roma_core.evaluation.classification_metrics import (
    ClassificationMetrics,
    compare_predictions,
    evaluate,
)
from roma_core.evaluation.config import EvaluationJobConfig, Fact, FactSheet, ServingChecks
from roma_core.evaluation.drift import ReferenceProfile, embedding_profile, reference_profile
from roma_core.evaluation.leakage import check_leakage, split_digest
from roma_core.evaluation.metrics import Change
from roma_core.evaluation.predictions import (
    Float32,
    PredictionTable,
    ReconstructionTable,
    RegressionTable,
)
from roma_core.evaluation.reconstruction import (
    check_schema,
    evaluate_reconstruction,
    examples_of,
    mask_all_but,
    mask_as_trained,
    reconstruct,
    reconstruct_examples,
    reconstruction_errors,
    requests,
)
from roma_core.evaluation.regression_metrics import (
    ReconstructionMetrics,
    RegressionMetrics,
    evaluate_regression,
)
from roma_core.files import read_json, write_bytes, write_json
from roma_core.job import Attempt, JobFolder
from roma_core.model.config import EncoderConfig, is_pretraining, read_config
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.run_job import Work
from roma_core.serving.package import (
    MAX_LENGTH,
    SmokeTest,
    SmokeTestFailed,
    build_package,
    size_mb,
    smoke_test_package,
)
from roma_core.serving.pyfunc_model import Series, open_package
from roma_core.trainer.dataloader import Collate
from roma_core.trainer.evaluator import Outputs, classify
from roma_core.trainer.job import open_dataset
from roma_core.trainer.metrics import read_records
from roma_core.trainer.run_logger import Progress

_OUTPUTS = (
    "predictions.parquet", "champion_predictions.parquet", "metrics.json", "serving_checks.json",
    "plots", "report.html", "package", "encoder_package",
)  # fmt: skip
_MAX_EMBEDDED = 2000  # series of train and validation behind an embedding profile
_N_PARITY = 1000  # series compared between training and serving code, at most
_N_GOLDEN = 10
_DRAWN_QUANTILES = (0.1, 0.5, 1.0)  # of the series drawn of a regression, by error
_CLASSES_DRAWN = range(2, 61)  # classes that a figure of errors has room for
_LIMIT = (
    "Intervals are percentile bootstraps over test series; they do not cover another training seed or "
    "another choice of test series."
)
_SELECTION = "Weights and settings were selected on the validation split."
NOT_PACKAGED = (
    "No package was written: only classifiers of whole series are served; this model predicts values "
    "of every observation."
)


NO_QUERIES = (
    "No package was written: a model with pos_encoding='absolute' encodes the order of observations, "
    "so it cannot predict values at other positions."
)


class NotComparable(ValueError):
    """A package cannot predict these series; the text says why."""


def run_evaluation(folder: JobFolder, attempt: Attempt) -> Work:
    """Evaluate a model on the test split as ``config.json`` describes.

    Raises:
        ValueError: the data have no test series, or none that the model can predict.
    """
    config = EvaluationJobConfig.model_validate(read_json(folder.config, schema_version=1))
    if "OMP_NUM_THREADS" not in os.environ:  # which launchers set and torch reads
        torch.set_num_threads(1)
    with Progress("evaluate", total_steps=4, first_step=0) as progress:
        evaluator = _Evaluator(config, folder.outputs, attempt, progress)
        if evaluator.model is None:
            metrics: report.AnyMetrics = evaluator.reconstruction()
        elif evaluator.model.config.problem_type == "regression":
            metrics = evaluator.regression(evaluator.model)
            print(NOT_PACKAGED, flush=True)
        else:
            metrics = evaluator.classification(evaluator.model)
        evaluator.step()
    return Work(
        "completed",
        metrics=metrics.flat() | evaluator.tracked,
        outputs={
            name.split(".")[0]: f"outputs/{name}"
            for name in _OUTPUTS
            if (folder.outputs / name).exists()
        },
        facts={
            **evaluator.digests,
            "n_series": metrics.n_series,
            "device": str(evaluator.device),
            "threads": str(torch.get_num_threads()),  # a number would be drawn as a plot
        },
    )


class _Evaluator:
    """Evaluates a model on the test split; a method for each task writes its outputs."""

    def __init__(
        self, config: EvaluationJobConfig, out: Path, attempt: Attempt, progress: Progress
    ) -> None:
        self.config, self.out, self.attempt, self.progress = config, out, attempt, progress
        self.n_steps = 0
        self.device = torch.accelerator.current_accelerator(True) or torch.device("cpu")
        attempt.beat(0)
        self.tracked: dict[str, float] = {}  # measurements for a tracker beside the metrics
        self.digests: dict[str, str] = {}  # sha256 of the manifests of packages
        self.dataset = open_dataset(config.dataset, config.dataset_digest, verify=True)
        self.test = self.dataset.split("test")
        if len(self.test) == 0:
            raise ValueError(f"{config.dataset} has no test series to evaluate on")
        self.model: RoMAForClassification | None = None
        self.autoencoder: RoMAForPreTraining | None = None
        if (weights := config.classifier) is not None:
            if is_pretraining(read_config(Path(weights))):
                raise ValueError(
                    f"{weights} is a pretraining checkpoint without a classification head; pass it "
                    f"as --autoencoder to evaluate its reconstructions, or finetune it first"
                )
            self.model = RoMAForClassification.from_pretrained(weights).to(self.device).eval()
            check_schema(self.model, self.dataset.schema, "classes", "targets")
        if config.autoencoder is not None:
            autoencoder = RoMAForPreTraining.from_pretrained(config.autoencoder)
            self.autoencoder = autoencoder.to(self.device).eval()
        (out / "plots").mkdir(parents=True, exist_ok=True)
        self.leakage = check_leakage(self.dataset, [Path(path) for path in config.trained_on])
        self.leaks = (*self.leakage.refused, *self.leakage.allowed)
        for line in self.leaks:
            print(f"WARNING: possible leakage: {line}", flush=True)
        self.step()

    def step(self, **metrics: float) -> None:
        """Report a finished step: a heartbeat and a progress line."""
        self.n_steps += 1
        self.attempt.beat(self.n_steps)
        self.progress.update(self.n_steps, metrics, force=True)

    def _is_unseen(self) -> bool:
        """Whether it was checked, and true, that no test series was in the training data."""
        return not self.leaks and self.dataset.manifest.leakage != "ignore"

    def _predict(self, model: RoMAForClassification) -> Outputs:
        return classify(model, self.test, Collate(model.config, seed=0), self.config.batch_size)

    def _report(
        self,
        metrics: report.AnyMetrics,
        does: str,
        figures: dict[str, bytes],
        limits: Sequence[str],
        title: str = "Evaluation",
        **fields: Any,
    ) -> None:
        """Write metrics, figures and the report; ``does``: what the model does, for its summary."""
        config = self.config
        write_json(self.out / "metrics.json", metrics.document())
        for name, path in config.curves.items():
            if records := [record for _, record in read_records(Path(path))]:
                figures[f"curve_{name}"] = plots.learning_curve(records)
        encoder = None if self.model is None else self.autoencoder
        if encoder is not None and (examples := reconstruct_examples(encoder, self.test)):
            figures["reconstructions"] = plots.reconstruction_examples(examples)
        for name, png in figures.items():
            write_bytes(self.out / "plots" / f"{name}.png", png)
        content = report.ReportContent(
            title=f"{title} of {config.name}",
            summary=f"RoMA, the Rotary Masked Autoencoder, {does}, evaluated on {metrics.n_series} "
            f"test series{' not used in training' if self._is_unseen() else ''}.",
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            metrics=metrics,
            leaks=self.leaks,
            plots=tuple(report.plot_of(name, png) for name, png in figures.items()),
            limits=tuple(limits),
            n_observed=config.n_observed,
            **_shared(config) | fields,
        )
        write_bytes(self.out / "report.html", report.render_report(content).encode())

    def classification(self, model: RoMAForClassification) -> ClassificationMetrics:
        """Evaluate a classifier of series, compare it with the champion and package it."""
        config, test, dataset, out = self.config, self.test, self.dataset, self.out
        if dataset.labels is None:
            raise ValueError(f"{config.dataset} has no labelled test series to evaluate on")
        probabilities = softmax(self._predict(model).logits.astype(np.float64), axis=1)
        lineage = {"dataset_digest": dataset.manifest.digest}
        table = PredictionTable.of_split(test, probabilities, lineage)
        table.save(out / "predictions.parquet")
        train = dataset.split("train").class_counts
        metrics = evaluate(table).compared_by(config.primary_metric, train)
        self.step(**{metrics.primary_metric: metrics.primary.value})

        changes: tuple[Change, ...] = ()
        problem = config.champion_problem
        if config.champion is not None:
            try:
                champion = predict_packaged(Path(config.champion), test)
                champion.save(out / "champion_predictions.parquet")
                changes, problem = compare_predictions(table, champion), None
            except NotComparable as error:
                problem = f"champion version {config.champion_version}: {error}"

        figures = {
            "confusion": plots.confusion_matrix(metrics),
            "reliability": plots.reliability_curve(metrics),
        }
        if "auroc" in metrics.estimates():
            figures["curves"] = plots.ranking_curves(table)
        profile = None
        if (encoder := self.autoencoder) is not None:
            features = embed(encoder, test, config.batch_size)
            figures["embedding_map"] = plots.embedding_map(features, table.labels, table.classes)
            rows = np.concatenate([dataset.split(name).indices for name in ("train", "validation")])
            few = Subset(dataset, rows[:: -(-len(rows) // _MAX_EMBEDDED)])
            profile = embedding_profile(embed(encoder, few, config.batch_size))

        reference = reference_profile(dataset, profile)
        package = out / "package"
        self.digests["manifest_sha256"] = write_package(
            config,
            model,
            test,
            reference,
            package,
            metrics=metrics,
            changes=changes,
            champion_problem=problem,
        )
        if encoder is not None:
            self.digests["encoder_manifest_sha256"] = write_package(
                config, encoder, test, reference, out / "encoder_package"
            )
        compared = np.arange(0, len(test), -(-len(test) // _N_PARITY))
        served = open_package(package).outputs(raw_series(test, compared.tolist()))
        difference = float(np.abs(served - table.probabilities[compared]).max())
        checks = self._check_serving(package, difference, problem)
        self.step(serving_difference=difference)
        self._report(
            metrics,
            f"as a classifier of {len(table.classes)} classes",
            figures,
            [
                f"{_SELECTION} The test split is used only to decide about promotion; each such "
                f"decision reduces its independence.",
                _LIMIT,
                *["Baselines were measured elsewhere on the same protocol."]
                * bool(config.baselines),
                "Probabilities are those of the model as trained; no calibration was fitted.",
            ],
            changes=changes,
            champion_problem=checks.champion_problem,
            serving_checks=checks,
        )
        return metrics

    def _check_serving(
        self, package: Path, difference: float, champion_problem: str | None
    ) -> ServingChecks:
        """Test the package, and right after it the champion's, so that latencies are comparable."""
        smoke_test, problem = _smoke_test(package)
        champion = None
        if self.config.champion is not None and champion_problem is None:
            champion, champion_problem = _smoke_test(Path(self.config.champion))
        checks = ServingChecks(
            serving_difference=difference,
            size_mb=size_mb(package),
            smoke_test=smoke_test,
            smoke_test_problem=problem,
            champion_smoke_test=champion,
            champion_problem=champion_problem,
            leaks=self.leakage.refused,
            test_split=split_digest(self.test),
        )
        checks.save(self.out / "serving_checks.json")
        self.tracked = {"serving_difference": difference, "package_mb": checks.size_mb}
        if smoke_test is not None:
            self.tracked |= {"latency_ms": smoke_test.latency_ms, "load_s": smoke_test.load_s}
        return checks

    def regression(self, model: RoMAForClassification) -> RegressionMetrics:
        """Evaluate a regressor of the targets of every observation."""
        config, schema, test = self.config, self.dataset.schema, self.test
        if model.config.pools != "token":
            raise ValueError(
                f"{config.classifier} predicts one output per series (pooling={model.config.pools}), "
                f"but the targets of a data set belong to its observations; train with pooling=token"
            )
        if model.config.dim_output != len(schema.targets):
            raise ValueError(
                f"{config.classifier} predicts {model.config.dim_output} values per observation, but "
                f"{config.dataset} has {len(schema.targets)} targets; evaluate it on data like those "
                f"it was trained on"
            )
        outputs = self._predict(model)
        assert outputs.labels is not None
        table = RegressionTable(
            ids=[self.dataset.ids[i] for i in test.indices],
            series=np.repeat(np.arange(len(test)), test.lengths),
            channels=schema.targets,
            true=outputs.labels.astype(np.float64),
            predicted=outputs.logits.astype(np.float64),
            axes=schema.axes,
            positions=np.concatenate([self.dataset.raw(int(i))[0] for i in test.indices]),
            lineage={"dataset_digest": self.dataset.manifest.digest},
        )
        table.save(self.out / "predictions.parquet")
        metrics = evaluate_regression(table)
        self.step(mse=metrics.mse.value)

        scaled = (table.errors**2 / table.true.var(axis=0).clip(1e-300)).mean(axis=1)  # (T,)
        order = (np.bincount(table.series, scaled) / test.lengths).argsort()  # the best first
        drawn = [int(order[round(q * (len(order) - 1))]) for q in _DRAWN_QUANTILES]
        figures = {
            "series": plots.along_series(table, drawn),
            "against_true": plots.against_true(table),
            "by_position": plots.error_by_position(metrics, schema.axes[0]),
        }
        names = ", ".join(target.name for target in schema.targets)
        does, limits = f"as a regressor of {names} at every observation", [_SELECTION, _LIMIT]
        self._report(metrics, does, figures, limits, not_packaged=NOT_PACKAGED)
        return metrics

    def reconstruction(self) -> ReconstructionMetrics:
        """Evaluate the reconstructions of a pretraining model."""
        config, test, model = self.config, self.test, self.autoencoder
        assert model is not None  # the configuration has one of the two
        settings = model.config
        table = reconstruct(model, test, mask_as_trained(settings, config.seed), config.batch_size)
        table.save(self.out / "predictions.parquet")
        self.step()
        metrics = evaluate_reconstruction(table, test)
        checks = None
        if model.sinusoidal is None:
            checks = self._package_autoencoder(model, table)
        for n in config.n_observed:
            fewer = reconstruct(model, test, mask_all_but(n, config.seed), config.batch_size)
            errors = reconstruction_errors(fewer) | reconstruction_errors(fewer, "clean")
            metrics.overall.update({f"{key}_observed_{n}": e for key, e in errors.items()})
        self.step(mse=metrics.overall["mse"].value)

        figures = {"reconstructions": plots.reconstruction_examples(examples_of(table, test))}
        if len(metrics.groups) in _CLASSES_DRAWN:
            noise = metrics.overall.get("noise_mse")
            figures["groups"] = plots.errors_by_group(metrics.groups, noise)

        def size(stack: EncoderConfig) -> str:
            return f"width {stack.d_model}, {stack.depth} layers, {stack.nhead} heads"

        low, high = settings.mask_ratio, settings.mask_ratio_max
        facts = {
            "data": f"{self.dataset.manifest.name}, version {self.dataset.manifest.digest[:12]}",
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "encoder": size(settings.encoder_config),
            "decoder": size(settings.decoder_config),
            "hidden": f"{low:g} of each series" if high is None else f"{low:g} to {high:g}",
            "masks": f"{', '.join(settings.mask_strategies)}, seed {config.seed}",
            "position scales": ", ".join(f"{a.name} {a.scale:g}" for a in self.dataset.schema.axes),
        }
        sheet = FactSheet(
            title="Model and masks", facts=tuple(Fact(label=k, value=v) for k, v in facts.items())
        )
        self._report(
            metrics,
            "reconstructing hidden observations",
            figures,
            ["Hidden values were overwritten before the model was run.", _LIMIT],
            title="Reconstructions",
            facts=(sheet, *config.facts),
            serving_checks=checks,
            not_packaged="" if checks else NO_QUERIES,
        )
        return metrics

    def _package_autoencoder(
        self, model: RoMAForPreTraining, table: ReconstructionTable
    ) -> ServingChecks:
        """Write the package that answers queries, and compare its answers with the model's."""
        series = np.unique(table.series)
        few = table.select(np.isin(table.series, series[:: -(-len(series) // _N_PARITY)]))
        asked = list(requests(few, self.test))
        by_length = sorted(
            (request for _, request in asked),
            key=lambda one: len(next(iter(one["positions"].values()))),
        )
        package = self.out / "package"
        self.digests["manifest_sha256"] = write_package(
            self.config,
            model,
            self.test,
            reference_profile(self.dataset),
            package,
            golden=[Series(**one) for one in _spread(by_length)],
        )
        model.to(self.device)
        answers = open_package(package).predict(request for _, request in asked)
        served = np.concatenate(
            [np.array(list(answer.mean.values()), np.float64).T for answer in answers]
        )
        spread = np.nanstd(table.true.astype(np.float64), axis=0)
        differences = (served - few.predicted) / np.where(spread > 0, spread, 1)
        return self._check_serving(package, float(np.nanmax(np.abs(differences))), None)


def _shared(config: EvaluationJobConfig) -> dict[str, Any]:
    """The fields that report and model card take from the configuration as they are."""
    names = ("facts", "champion_version", "baselines", "decided_before")
    return {name: getattr(config, name) for name in names}


@torch.no_grad()
def embed(encoder: RoMAForPreTraining, series: Subset, batch_size: int) -> Float32:
    """``(len(series), d_model)`` features: the mean of every series' tokens, all of them visible."""
    collate = Collate(encoder.config, seed=0, masks=False)
    device = encoder.projection.weight.device
    features = np.empty((len(series), encoder.config.encoder_config.d_model), np.float32)
    for part in np.array_split(np.arange(len(series)), -(-len(series) // batch_size)):
        batch = collate.batch(series, part)
        assert batch.indices is not None  # set by Collate
        means = encoder.embed(batch.to(device), pooling="mean")
        features[batch.indices.numpy()] = means.float().cpu().numpy()
    return features


def predict_packaged(package: Path, test: Subset) -> PredictionTable:
    """Probabilities of every series of a split, by a served package, from raw rows.

    Raises:
        NotComparable: it is damaged, or was made for another schema.
    """
    try:
        classifier = open_package(package)
    except Exception as error:  # a damaged file may raise anything
        raise NotComparable(
            f"the package does not load: {type(error).__name__}: {error}"
        ) from error
    classes = list(test.dataset.schema.classes)
    if classifier.classes != classes:
        raise NotComparable(
            f"its classes are {classifier.classes}, those of the data are {classes}"
        )
    try:
        outputs = classifier.outputs(raw_series(test, range(len(test))))
    except Exception as error:
        raise NotComparable(f"it rejects these series: {error}") from error
    return PredictionTable.of_split(test, outputs, {"package": str(package)})


def write_package(
    config: EvaluationJobConfig,
    model: RoMAForClassification | RoMAForPreTraining,
    test: Subset,
    profile: ReferenceProfile,
    folder: Path,
    golden: Sequence[Series] = (),
    **card: Any,
) -> str:
    """Build the package of the classifier, or of the encoder, whose features are a mean of tokens.

    ``golden`` are series with queries, for the package of the whole autoencoder, which answers them;
    ``card`` further fields of the model card. Returns the sha256 of the package's manifest.
    """
    kind: Literal["classifier", "encoder", "autoencoder"] = "classifier"
    weights, program = config.classifier, model.cpu().export
    if isinstance(model, RoMAForPreTraining):
        kind, weights = "autoencoder" if golden else "encoder", config.autoencoder
        program = model.export_reconstruction if golden else program
    assert weights is not None
    content = report.CardContent(
        name=f"{config.name}_encoder" if kind == "encoder" else config.name,
        kind=kind,
        n_features=model.config.encoder_config.d_model if kind == "encoder" else None,
        data_schema=test.dataset.schema,
        # no series of its own data set is too long for the package
        max_length=max(MAX_LENGTH, int(test.dataset.lengths.max())),
        lineage={"dataset_digest": config.dataset_digest, **config.lineage},
        **_shared(config) | card,
    )
    if not golden:
        few = _spread(np.argsort(test.lengths, kind="stable").tolist())
        golden = [Series(**one) for one in raw_series(test, few)]
    return build_package(
        folder,
        program(),
        Path(weights, "model.safetensors"),
        read_config(Path(weights)),
        test.dataset.schema,
        golden,
        content.lineage,
        name=content.name,
        kind=content.kind,
        n_features=content.n_features,
        card=report.render_card(content),
        profile=profile.model_dump(mode="json"),
        max_length=content.max_length,
    )


def _spread(rows: list[Any]) -> list[Any]:
    """A few of them, evenly spaced, from the first to the last."""
    return [rows[k] for k in np.linspace(0, len(rows) - 1, min(_N_GOLDEN, len(rows))).astype(int)]


def _smoke_test(package: Path) -> tuple[SmokeTest | None, str | None]:
    try:
        return smoke_test_package(package), None
    except SmokeTestFailed as error:
        return None, str(error)
