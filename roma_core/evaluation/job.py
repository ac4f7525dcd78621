"""The evaluation job: predictions, metrics, figures, a report and packages.

outputs/predictions.parquet   test series or observations: true and predicted values
outputs/metrics.json, plots/*.png, report.html, serving_checks.json, package/
outputs/champion_predictions.parquet, encoder_package/    of a classifier or a regressor only
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from roma_core.data.store import StoredDataset, Subset
from roma_core.evaluation import packaging, plots, report
from roma_core.evaluation.baselines import measure_baselines
from roma_core.evaluation.classification_metrics import (
    ClassificationMetrics,
    compare_predictions,
    evaluate,
    metric_samples,
)
from roma_core.evaluation.config import EvaluationJobConfig, ServingChecks
from roma_core.evaluation.drift import embedding_profile, reference_profile
from roma_core.evaluation.leakage import check_leakage, split_digest
from roma_core.evaluation.metrics import (
    Change,
    MeasuredBaseline,
    ReconstructionMetrics,
    RegressionMetrics,
    compare_regressions,
    evaluate_regression,
    r2_samples,
    regression_samples,
)
from roma_core.evaluation.predictions import (
    Floats,
    PredictionTable,
    ReconstructionTable,
    RegressionTable,
)
from roma_core.evaluation.reconstruction import (
    check_schema,
    embed,
    evaluate_reconstruction,
    examples_of,
    facts_of,
    mask_all_but,
    mask_as_trained,
    reconstruct,
    reconstruct_examples,
    reconstruction_errors,
    requests,
)
from roma_core.files import read_json, write_bytes, write_json
from roma_core.job import Attempt, JobFolder
from roma_core.model.config import is_pretraining, read_config
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.progress import Progress
from roma_core.run_job import Work
from roma_core.serving.package import size_mb
from roma_core.serving.pyfunc_model import Series
from roma_core.trainer.dataloader import Collate
from roma_core.trainer.evaluator import classify
from roma_core.trainer.job import open_dataset
from roma_core.trainer.metrics import read_records

_OUTPUTS = (
    "predictions.parquet", "champion_predictions.parquet", "metrics.json", "baselines.json",
    "serving_checks.json",
    "plots", "report.html", "package", "encoder_package",
)  # fmt: skip
_MAX_EMBEDDED = 2000  # series of train and validation behind an embedding profile
_DRAWN_QUANTILES = (0.1, 0.5, 1.0)  # of the series drawn of a regression, by error
_CLASSES_DRAWN = range(2, 61)  # classes that a figure of errors has room for
_LIMIT = (
    "Intervals are percentile bootstraps over test series; they do not cover another training seed or "
    "another choice of test series."
)
_SELECTION = "Weights and settings were selected on the validation split."
NO_QUERIES = (
    "No package was written: a model with pos_encoding='absolute' encodes the order of observations, "
    "so it cannot predict values at other positions."
)


def run_evaluation(folder: JobFolder, attempt: Attempt) -> Work:
    """Evaluate a model on the test split as ``config.json`` describes.

    Raises:
        ValueError: the data have no test series, or none that the model can predict.
    """
    config = EvaluationJobConfig.model_validate(read_json(folder.config, schema_version=1))
    if "OMP_NUM_THREADS" not in os.environ:  # which launchers set and torch reads
        torch.set_num_threads(1)
    with attempt.beating(), Progress("evaluate", total_steps=5) as progress:
        evaluator = _Evaluator(config, folder.outputs, progress)
        model = evaluator.model
        metrics = evaluator.reconstruction() if model is None else evaluator.finetuned(model)
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

    def __init__(self, config: EvaluationJobConfig, out: Path, progress: Progress) -> None:
        self.config, self.out, self.progress = config, out, progress
        self.n_steps = 0
        self.device = torch.accelerator.current_accelerator(True) or torch.device("cpu")
        self.tracked: dict[str, float] = {}  # measurements for a tracker beside the metrics
        self.svgs: dict[str, str] = {}  # figures of the report with tooltips
        self.digests: dict[str, str] = {}  # sha256 of the manifests of packages
        self.dataset = open_dataset(config.dataset, config.dataset_digest, verify=True)
        self.test = self.dataset.split("test")
        if len(self.test) == 0:
            raise ValueError(f"{config.dataset} has no test series; set its `split` and build it")
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
        """Report a finished step."""
        self.n_steps += 1
        self.progress.update(self.n_steps, metrics, force=True)

    def _outputs(self, model: RoMAForClassification) -> Floats:
        """``(n, K)`` outputs for the test split as a package of the model gives them."""
        collate = Collate(model.config, seed=0)
        found = classify(model, self.test, collate, self.config.batch_size).logits
        outputs = found.astype(np.float64)
        return outputs if model.config.problem_type == "regression" else softmax(outputs, axis=1)

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
        is_unseen = not self.leaks and self.dataset.manifest.leakage != "ignore"  # it was checked
        write_json(self.out / "metrics.json", metrics.document())
        for name, path in config.curves.items():
            if records := [record for _, record in read_records(Path(path))]:
                training = JobFolder(Path(path).parent).read_result()
                kept = training.facts.get("weights_step") if training else None
                figures[f"curve_{name}"] = plots.learning_curve(records, kept)
        encoder = None if self.model is None else self.autoencoder
        if encoder is not None and (examples := reconstruct_examples(encoder, self.test)):
            figures["reconstructions"] = plots.reconstruction_examples(examples)
        for name, png in figures.items():
            write_bytes(self.out / "plots" / f"{name}.png", png)
        content = report.ReportContent(
            title=f"{title} of {config.name}",
            summary=f"RoMA, the Rotary Masked Autoencoder, {does}, evaluated on {metrics.n_series} "
            f"test series{' not used in training' * is_unseen}.",
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            metrics=metrics,
            leaks=self.leaks,
            plots=tuple(report.plot_of(n, png, self.svgs.get(n, "")) for n, png in figures.items()),
            limits=tuple(limits),
            n_observed=config.n_observed,
            **packaging.shared_fields(config) | fields,
        )
        write_bytes(self.out / "report.html", report.render_report(content).encode())

    def finetuned(self, model: RoMAForClassification) -> report.AnyMetrics:
        """Evaluate a classifier or a regressor, compare it with the champion and package it."""
        config, test, dataset, out = self.config, self.test, self.dataset, self.out
        is_regression = model.config.problem_type == "regression"
        _check_outputs(model, dataset)
        outputs = self._outputs(model)
        lineage = {"dataset_digest": dataset.manifest.digest}
        table_class = RegressionTable if is_regression else PredictionTable
        compare: Any = compare_regressions if is_regression else compare_predictions
        table = table_class.of_split(test, outputs, lineage)
        table.save(out / "predictions.parquet")
        metrics = self._metrics(table)
        self.step(**{metrics.primary_metric: metrics.primary.value})
        baselines = self._baselines(table, metrics.primary_metric)
        write_json(out / "baselines.json", [one.model_dump(mode="json") for one in baselines])
        self.step()

        changes, problem = self._against_champion(
            lambda folder: packaging.predict_packaged(folder, test, table_class),
            lambda found: compare(table, found),
        )
        figures, profile = self._figures(table, metrics), None
        if isinstance(table, PredictionTable):
            features = embed(self.autoencoder or model, test, config.batch_size)
            points = features, table.labels, table.classes
            figures["embedding_map"] = plots.embedding_map(*points)
            self.svgs["embedding_map"] = plots.embedding_svg(features, table)
        if (encoder := self.autoencoder) is not None:
            rows = np.concatenate([dataset.split(name).indices for name in ("train", "validation")])
            few = Subset(dataset, rows[:: -(-len(rows) // _MAX_EMBEDDED)])
            profile = embedding_profile(embed(encoder, few, config.batch_size))

        reference = reference_profile(dataset, profile)
        package = out / "package"
        self.digests["manifest_sha256"] = packaging.write_package(
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
            self.digests["encoder_manifest_sha256"] = packaging.write_package(
                config, encoder, test, reference, out / "encoder_package"
            )
        difference = packaging.serving_difference(package, test, outputs)
        checks = self._check_serving(package, difference, problem)
        self.step(serving_difference=difference)
        self.tracked |= {f"baseline_{one.slug}": one.value.value for one in baselines}
        names = ", ".join(target.name for target in dataset.schema.targets)
        places = " at every observation" if dataset.schema.target_level == "observation" else ""
        n_classes = len(dataset.schema.classes)
        self._report(
            metrics,
            f"as a regressor of {names}{places}"
            if is_regression
            else f"as a classifier of {n_classes} classes",
            figures,
            [
                f"{_SELECTION} The test split is used only to decide about promotion; each such "
                f"decision reduces its independence.",
                _LIMIT,
                *["Published baselines were measured elsewhere on the same protocol."]
                * bool(config.baselines),
                *["Probabilities are those of the model as trained; no calibration was fitted."]
                * (not is_regression),
            ],
            changes=changes,
            measured_baselines=baselines,
            champion_problem=checks.champion_problem,
            serving_checks=checks,
        )
        return metrics

    def _against_champion(
        self, predict: Callable[[Path], Any], compare: Callable[[Any], tuple[Change, ...]]
    ) -> tuple[tuple[Change, ...], str | None]:
        """Save the champion's predictions; changes of the metrics, or why there are none."""
        config = self.config
        if config.champion is None:
            return (), config.champion_problem
        try:
            found = predict(Path(config.champion))
        except packaging.NotComparable as error:
            return (), f"champion version {config.champion_version}: {error}"
        found.save(self.out / "champion_predictions.parquet")
        return compare(found), None

    def _baselines(
        self, table: PredictionTable | RegressionTable, primary: str
    ) -> tuple[MeasuredBaseline, ...]:
        """Other methods, trained on the same data; of classes and of targets of series."""
        dataset, config = self.dataset, self.config
        is_regression = isinstance(table, RegressionTable)
        targets = dataset.series_targets if is_regression else dataset.labels
        if targets is None or not config.measure_baselines:
            return ()

        def samples(table: PredictionTable | RegressionTable) -> Floats:
            if isinstance(table, RegressionTable):
                return regression_samples(table).r2
            return metric_samples(table)[primary]

        def samples_of(predicted: Floats) -> Floats:
            return samples(type(table).of_split(self.test, predicted, {}))

        theirs = targets, primary, samples_of, samples(table)
        fraction, seed = self._training_series()
        return measure_baselines(self.test, *theirs, train_fraction=fraction, fraction_seed=seed)

    def _training_series(self) -> tuple[float, int]:
        """The fraction of train that the model was trained on, and the seed that drew it."""
        weights = Path(self.config.classifier or "")
        run = weights.parent.parent / "config.json"
        if weights.parent.name != "outputs" or not run.exists():  # weights of another program
            return 1.0, 0
        training = read_json(run)
        seed = training.get("trainer", {}).get("random_seed", 0)
        return training.get("train_fraction", 1.0), seed

    def _metrics(self, table: PredictionTable | RegressionTable) -> report.AnyMetrics:
        """Metrics of the test split; ValueError if the primary one is undefined."""
        if isinstance(table, PredictionTable):
            train = self.dataset.split("train").class_counts
            return evaluate(table).compared_by(self.config.primary_metric, train)
        metrics = evaluate_regression(table)
        if metrics.r2 is None:
            raise ValueError(
                f"R² is undefined: no target of {self.config.dataset} differs in its test split of "
                f"{len(table.ids)} series; choose a larger test split"
            )
        return metrics

    def _figures(
        self, table: PredictionTable | RegressionTable, metrics: report.AnyMetrics
    ) -> dict[str, bytes]:
        if isinstance(metrics, ClassificationMetrics):
            assert isinstance(table, PredictionTable)
            figures = {
                "confusion": plots.confusion_matrix(metrics),
                "reliability": plots.reliability_curve(metrics),
            }
            if "auroc" in metrics.estimates():
                figures["curves"] = plots.ranking_curves(table)
            return figures
        assert isinstance(table, RegressionTable) and isinstance(metrics, RegressionMetrics)
        figures = {"against_true": plots.against_true(table)}
        if table.positions is not None:
            scaled = ((table.errors / table.scale) ** 2).mean(axis=1)  # (T,)
            order = (np.bincount(table.series, scaled) / table.lengths).argsort()  # the best first
            drawn = [int(order[round(q * (len(order) - 1))]) for q in _DRAWN_QUANTILES]
            figures["series"] = plots.along_series(table, drawn)
            figures["by_position"] = plots.error_by_position(metrics, table.axes[0])
        return figures

    def _check_serving(
        self, package: Path, difference: float, champion_problem: str | None
    ) -> ServingChecks:
        """Test the package, and right after it the champion's, so that latencies are comparable."""
        smoke_test, problem = packaging.try_smoke_test(package)
        champion = None
        if self.config.champion is not None and champion_problem is None:
            champion, champion_problem = packaging.try_smoke_test(Path(self.config.champion))
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

    def reconstruction(self) -> ReconstructionMetrics:
        """Evaluate the reconstructions of a pretraining model."""
        config, test, model = self.config, self.test, self.autoencoder
        assert model is not None  # the configuration has one of the two
        mask = mask_as_trained(model.config, config.seed)
        table = reconstruct(model, test, mask, config.batch_size)
        table.save(self.out / "predictions.parquet")
        self.step()
        metrics = evaluate_reconstruction(table, test)
        ours, n_series = r2_samples(table), metrics.n_series
        changes, problem = self._against_champion(
            lambda folder: packaging.interpolate_packaged(folder, table, test),
            lambda found: (Change.of("R²", ours, r2_samples(found), n_series),),
        )
        checks = None
        if model.sinusoidal is None:
            checks = self._package_autoencoder(model, table, metrics, changes, problem)
        for n in config.n_observed:
            fewer = reconstruct(model, test, mask_all_but(n, config.seed), config.batch_size)
            errors = reconstruction_errors(fewer) | reconstruction_errors(fewer, "clean")
            metrics.overall.update({f"{key}_observed_{n}": e for key, e in errors.items()})
        self.step(r2=metrics.primary.value)
        if (gain := metrics.overall.get("gain_r2")) is not None:
            lines = MeasuredBaseline(
                name="straight lines",
                metric="r2",
                value=metrics.overall["linear_r2"],
                difference=gain,
                n_train=0,
                seconds=0,
            )
            write_json(self.out / "baselines.json", [lines.model_dump(mode="json")])

        figures = {"reconstructions": plots.reconstruction_examples(examples_of(table, test))}
        if len(metrics.groups) in _CLASSES_DRAWN:
            noise = metrics.overall.get("noise_mse")
            figures["groups"] = plots.errors_by_group(metrics.groups, noise)

        self._report(
            metrics,
            "reconstructing hidden observations",
            figures,
            ["Hidden values were overwritten before the model was run.", _LIMIT],
            title="Reconstructions",
            facts=(facts_of(model, self.dataset, config.seed), *config.facts),
            serving_checks=checks,
            not_packaged="" if checks else NO_QUERIES,
            changes=changes,
            champion_problem=problem if checks is None else checks.champion_problem,
        )
        return metrics

    def _package_autoencoder(
        self,
        model: RoMAForPreTraining,
        table: ReconstructionTable,
        metrics: ReconstructionMetrics,
        changes: tuple[Change, ...],
        champion_problem: str | None,
    ) -> ServingChecks:
        """Write the package that answers queries, and compare its answers with the model's."""
        series = np.unique(table.series)
        few = table.select(np.isin(table.series, series[:: -(-len(series) // packaging.N_PARITY)]))
        by_length = sorted(
            (request for _, request in requests(few, self.test)),
            key=lambda one: len(next(iter(one["positions"].values()))),
        )
        package = self.out / "package"
        self.digests["manifest_sha256"] = packaging.write_package(
            self.config,
            model,
            self.test,
            reference_profile(self.dataset),
            package,
            golden=[Series(**one) for one in packaging.evenly_spaced(by_length)],
            metrics=metrics,
            changes=changes,
            champion_problem=champion_problem,
        )
        model.to(self.device)
        served = packaging.interpolate_packaged(package, few, self.test).predicted
        spread = np.nanstd(table.true.astype(np.float64), axis=0)
        differences = np.abs(served - few.predicted) / np.where(spread > 0, spread, 1)
        return self._check_serving(package, float(np.nanmax(differences)), champion_problem)


def _check_outputs(model: RoMAForClassification, dataset: StoredDataset) -> None:
    """Raise ValueError unless the model predicts what the data set has."""
    schema, config = dataset.schema, model.config
    if config.problem_type == "classification":
        if dataset.labels is None:
            raise ValueError(f"{dataset.path} has no labels; a classifier is evaluated on labels")
        return
    k, level = len(schema.targets), "observation" if config.pools == "token" else "series"
    if level != schema.target_level or config.dim_output != k:
        raise ValueError(
            f"the model predicts {config.dim_output} values of every {level} (pooling={config.pools}), but "
            f"{dataset.path} has {k} targets of every {schema.target_level}; evaluate it on data like "
            f"those it was trained on"
        )
