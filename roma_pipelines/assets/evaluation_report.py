"""Asset: the evaluation report, and the gate as blocking checks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from roma_core.data.columns import read_manifest
from roma_core.data.schema import Manifest
from roma_core.evaluation.facts import Fact, FactSheet
from roma_core.evaluation.job_config import EvaluationJobConfig
from roma_core.evaluation.metrics import Metrics
from roma_core.files import read_json, write_json
from roma_core.job import JobFolder
from roma_pipelines.experiment import Experiment
from roma_pipelines.provenance import code_version
from roma_pipelines.references import upstream
from roma_pipelines.registry.promotion import CHAMPION, GateDecision, gate
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.registry.versions import version_at
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import TrackedJob, picture, run_tracked_job

MAX_SERVING_DIFFERENCE = 1e-5
"""Largest difference of a probability between the trained model and the package that is served."""


def evaluation_report_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """Test metrics, plots and the report; blocks promotion of a candidate that does not pass."""
    key = experiment.key("evaluation_report")

    @dg.asset(
        **experiment.asset_arguments(
            "evaluation_report",
            "dataset",
            "pretrained_encoder",
            "finetuned_classifier",
            settings={"dataset", "pretraining", "finetuning", "gate", "baselines"},
        ),
        kinds={"python"},
        description=f"What the classifier is worth on the test split. {experiment.description}",
        check_specs=[
            dg.AssetCheckSpec(
                "gate",
                asset=key,
                blocking=True,
                description="The candidate against the present champion on the same series, and "
                "against the thresholds of the experiment.",
            ),
            dg.AssetCheckSpec(
                "serving_parity",
                asset=key,
                blocking=True,
                description="The package that will be served gives the probabilities of the report.",
            ),
        ],
    )
    def evaluation_report(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        data = upstream(context, experiment.key("dataset"))
        encoder = upstream(context, experiment.key("pretrained_encoder"))
        classifier = upstream(context, experiment.key("finetuned_classifier"))
        champion = _champion_package(experiment.name)
        path = Path(data["path"])
        config = EvaluationJobConfig(
            name=experiment.name,
            dataset=str(path),
            dataset_digest=data["digest"],
            classifier=classifier["weights"],
            autoencoder=encoder["weights"],
            champion=champion[1] if champion else None,
            champion_version=champion[0] if champion else None,
            curves={"pretraining": encoder["metrics"], "finetuning": classifier["metrics"]},
            baselines=experiment.baselines,
            facts=_facts(read_manifest(path), encoder, classifier, context.run_id),
        )
        job = run_tracked_job(
            context, experiment, "evaluate", config, params={"dataset_digest": data["digest"][:36]}
        )
        decision = _decide(experiment, job)
        write_json(job.folder.outputs / "gate.json", decision.model_dump(mode="json"))
        _publish(job)
        return _materialised(job, decision, config)

    return evaluation_report


def _champion_package(name: str) -> tuple[str, str] | None:
    """Version and package folder of the present champion, if there is one."""
    client = connect(MlflowSettings(), Storage.open().mlflow)
    version = version_at(client, name, CHAMPION)
    if version is None:
        return None
    import mlflow

    model = mlflow.artifacts.download_artifacts(f"models:/{name}/{version}")
    return version, str(Path(model) / "artifacts" / "package")


def _decide(experiment: Experiment, job: TrackedJob) -> GateDecision:
    from roma_core.evaluation.predictions import PredictionTable

    champion = (
        PredictionTable.load(job.output("champion_predictions"))
        if "champion_predictions" in job.result.outputs
        else None
    )
    return gate(PredictionTable.load(job.output("predictions")), champion, experiment.gate)


def _publish(job: TrackedJob) -> None:
    """Metrics, report and plots to the MLflow run."""
    from mlflow.entities import Metric

    time_ms = round(job.folder.result.stat().st_mtime * 1000)
    metrics = [Metric(f"test/{k}", v, time_ms, 0) for k, v in job.result.metrics.items()]
    job.client.log_batch(job.run_id, metrics=metrics)
    for name in ("report", "metrics", "predictions"):
        job.client.log_artifact(job.run_id, str(job.output(name)))
    job.client.log_artifact(job.run_id, str(job.folder.outputs / "gate.json"))
    job.client.log_artifacts(job.run_id, str(job.output("plots")), "plots")


def _materialised(
    job: TrackedJob, decision: GateDecision, config: EvaluationJobConfig
) -> dg.MaterializeResult:
    difference = job.result.metrics["serving_difference"]
    plots = job.output("plots")
    return dg.MaterializeResult(
        metadata={
            # no link: a browser does not follow one from a page to a file
            "report": dg.MetadataValue.path(str(job.output("report"))),
            "metrics": dg.MetadataValue.md(_metrics_table(job)),
            "confusion": picture((plots / "confusion.png").read_bytes(), "confusion matrix"),
            "reliability": picture((plots / "reliability.png").read_bytes(), "reliability curve"),
            "champion_version": config.champion_version or "none",
            **job.metadata(),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="gate",
                passed=decision.passed,
                metadata={
                    check.name: f"{'passed' if check.passed else 'FAILED'}: {check.explanation}"
                    for check in decision.checks
                }
                or {"checks": "no champion and no threshold: nothing to compare with"},
            ),
            dg.AssetCheckResult(
                check_name="serving_parity",
                passed=difference <= MAX_SERVING_DIFFERENCE,
                metadata={"largest_difference": difference, "allowed": MAX_SERVING_DIFFERENCE},
            ),
        ],
    )


def _metrics_table(job: TrackedJob) -> str:
    metrics = Metrics.model_validate(read_json(job.output("metrics")))
    rows = [
        f"| {name.replace('_', ' ')} | {m.value:.4f} | {m.low:.4f}–{m.high:.4f} |"
        for name, m in metrics.estimates().items()
    ]
    return "\n".join(["| test metric | value | 95 % interval |", "| --- | --- | --- |", *rows])


def _facts(
    manifest: Manifest, encoder: Mapping[str, Any], classifier: Mapping[str, Any], dagster_run: str
) -> tuple[FactSheet, ...]:
    """Tables of the report: data, model, training, lineage."""
    model = read_json(Path(classifier["weights"]) / "model_config.json")
    stack = model["encoder_config"]
    counts = manifest.counts
    dropped = manifest.irregularity

    def sheet(title: str, **facts: Any) -> FactSheet:
        return FactSheet(
            title=title,
            facts=tuple(
                Fact(
                    label=label.replace("_", " "),
                    value=f"{value:.4g}" if isinstance(value, float) else str(value),
                    monospace=label in ("version", "code", "Dagster_run", "MLflow_run"),
                )
                for label, value in facts.items()
            ),
        )

    return (
        sheet(
            "Data",
            name=manifest.name,
            version=manifest.digest[:16],
            series=", ".join(f"{split} {counts[split].n_series}" for split in counts),
            observations_dropped=f"{dropped.n_dropped} of {dropped.n_observations_before}"
            if dropped
            else "none",
            split=manifest.split_rule,
            citation=manifest.provenance.citation,
            licence=manifest.provenance.licence,
        ),
        sheet(
            "Model",
            parameters=f"{classifier['parameters']:,}",
            encoder=f"width {stack['d_model']}, {stack['depth']} layers, {stack['nhead']} heads",
            positions=f"{model['n_pos_dims']} axis, p = {model['p_rope_val']}",
        ),
        sheet(
            "Training",
            pretraining=f"{encoder['training_s']:.1f} s, validation loss {encoder['eval/loss']:.4f}",
            finetuning=f"{classifier['training_s']:.1f} s, validation loss {classifier['eval/loss']:.4f}",
            processes=classifier["processes"],
            device=classifier["device"],
        ),
        sheet(
            "Lineage",
            code=code_version(),
            Dagster_run=dagster_run,
            MLflow_run=classifier["mlflow_run_id"],
        ),
    )


def has_passed(job_folder: Path) -> bool:
    """Whether an evaluation passed its gate and its package serves what was judged.

    Blocking checks block inside their own run only; whoever comes later asks here.
    """
    result = JobFolder(job_folder).read_result()
    if result is None or result.metrics["serving_difference"] > MAX_SERVING_DIFFERENCE:
        return False
    return read_decision(job_folder).passed


def read_decision(job_folder: Path) -> GateDecision:
    """The gate's decision about an evaluation."""
    text = (job_folder / "outputs" / "gate.json").read_text(encoding="utf-8")
    return GateDecision.model_validate(json.loads(text))
