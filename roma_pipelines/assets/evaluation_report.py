"""Asset: the evaluation report, with the gate as blocking checks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from roma_core.data.manifest import Manifest, read_manifest
from roma_core.evaluation.config import EvaluationJobConfig, Fact, FactSheet, ServingChecks
from roma_core.evaluation.metrics import ClassificationMetrics
from roma_core.files import read_json
from roma_core.serving.registry_client import FetchError, fetch, package_of, resolve
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.pipes import key_for
from roma_pipelines.provenance import code_version
from roma_pipelines.registry.gate import CHECKS, GateDecision, decide, decided_before, tag_decision
from roma_pipelines.registry.promotion import CHAMPION
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.registry.versions import version_at
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import TrackedJob, picture, run_tracked_job, upstream_metadata


def report_facts(
    manifest: Manifest, encoder: Mapping[str, Any], classifier: Mapping[str, Any], dagster_run: str
) -> tuple[FactSheet, ...]:
    """Tables of the report and the model card: data, model, training, lineage."""
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


def evaluation_report_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The asset ``evaluation_report``; its checks block registration of a candidate that fails."""
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
        description=f"Metrics on the test split, report and gate. {experiment.description}",
        check_specs=[
            dg.AssetCheckSpec(name, asset=key, blocking=True, description=text)
            for name, text in CHECKS.items()
        ],
    )
    def evaluation_report(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        data = upstream_metadata(context, experiment.key("dataset"))
        encoder = upstream_metadata(context, experiment.key("pretrained_encoder"))
        classifier = upstream_metadata(context, experiment.key("finetuned_classifier"))
        path = Path(data["path"])
        config = EvaluationJobConfig(
            name=experiment.name,
            dataset=str(path),
            dataset_digest=data["digest"],
            classifier=classifier["weights"],
            autoencoder=encoder["weights"],
            curves={"pretraining": encoder["metrics"], "finetuning": classifier["metrics"]},
            baselines=experiment.baselines,
            facts=report_facts(read_manifest(path), encoder, classifier, context.run_id),
            trained_on=tuple(
                read_json(Path(job["job_folder"]) / "config.json")["dataset"]
                for job in (encoder, classifier)
            ),
            decided_before=_decided_before(experiment, path, key_for(context)),
            lineage=_lineage(encoder, classifier, context.run_id),
            **_champion(experiment.name),
        )
        job = run_tracked_job(
            context, experiment, "evaluate", config, params={"dataset_digest": data["digest"][:36]}
        )
        decision = decide(job.folder, experiment.gate)
        tag_decision(
            job.client,
            job.run_id,
            decision,
            ServingChecks.load(job.output("serving_checks")).test_split,
        )
        _publish(job)
        # a retry adopts the job with its first configuration, and so the champion of that time
        return _materialised(job, decision, read_json(job.folder.config)["champion_version"])

    return evaluation_report


def _champion(name: str) -> dict[str, Any]:
    """Configuration of the comparison; a champion that cannot be fetched is recorded, not raised."""
    client = connect(MlflowSettings(), Storage.open().mlflow)
    version = version_at(client, name, CHAMPION)
    if version is None:
        return {}
    try:
        found = resolve(client, f"models:/{name}/{version}")
        folder = package_of(fetch(client, found, Storage.open().cache / "models"))
    except FetchError as error:
        return {"champion_version": version, "champion_problem": str(error)}
    return {"champion_version": version, "champion": str(folder)}


def _decided_before(experiment: Experiment, dataset: Path, job_key: str) -> int:
    from roma_core.data.store import StoredDataset
    from roma_core.evaluation.leakage import split_digest

    settings = MlflowSettings()
    client = connect(settings, Storage.open().mlflow)
    split = split_digest(StoredDataset(dataset, verify=False).split("test"))
    return decided_before(client, f"{settings.experiment_prefix}/{experiment.name}", split, job_key)


def _lineage(
    encoder: Mapping[str, Any], classifier: Mapping[str, Any], dagster_run: str
) -> dict[str, str]:
    """Lineage of the weights; the commit is that of the finetuning run."""
    from roma_core.serving.package import lock_hash

    client = connect(MlflowSettings(), Storage.open().mlflow)
    trained = client.get_run(classifier["mlflow_run_id"]).data.tags
    return {
        "pretraining_job": encoder["job_key"],
        "finetuning_job": classifier["job_key"],
        "mlflow_run_id": classifier["mlflow_run_id"],
        "dagster_run_id": dagster_run,
        "git_sha": trained.get("roma.git_sha", code_version()),
        "lock_hash": lock_hash(),
    }


def _publish(job: TrackedJob) -> None:
    """Log metrics, report and plots to the MLflow run."""
    from mlflow.entities import Metric

    time_ms = round(job.folder.result.stat().st_mtime * 1000)
    metrics = [Metric(f"test/{k}", v, time_ms, 0) for k, v in job.result.metrics.items()]
    job.client.log_batch(job.run_id, metrics=metrics)
    for name in ("report", "metrics", "serving_checks", "predictions"):
        job.client.log_artifact(job.run_id, str(job.output(name)))
    job.client.log_artifact(job.run_id, str(job.folder.outputs / "gate.json"))
    job.client.log_artifacts(job.run_id, str(job.output("plots")), "plots")


_ENCODER_PLOTS = {
    "reconstructions": "reconstructions of hidden tokens",
    "embedding_map": "test series in feature space",
}


def _materialised(
    job: TrackedJob, decision: GateDecision, champion_version: str | None
) -> dg.MaterializeResult:
    plots = job.output("plots")
    return dg.MaterializeResult(
        metadata={
            # no link: browsers do not follow links from a page to a file
            "report": dg.MetadataValue.path(str(job.output("report"))),
            "metrics": dg.MetadataValue.md(_metrics_table(job)),
            "confusion": picture((plots / "confusion.png").read_bytes(), "confusion matrix"),
            "reliability": picture((plots / "reliability.png").read_bytes(), "reliability curve"),
            **{
                name: picture((plots / f"{name}.png").read_bytes(), title)
                for name, title in _ENCODER_PLOTS.items()
                if (plots / f"{name}.png").exists()
            },
            "champion_version": champion_version or "none",
            "gate": "passed" if decision.passed else f"FAILED: {decision.reasons()}",
            **job.metadata(),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name=check.name,
                passed=check.passed,
                description=check.explanation,
                metadata={
                    name: number
                    for name, number in (("value", check.value), ("threshold", check.threshold))
                    if number is not None
                },
            )
            for check in decision.checks
        ],
    )


def _metrics_table(job: TrackedJob) -> str:
    metrics = ClassificationMetrics.model_validate(read_json(job.output("metrics")))
    rows = [
        f"| {name.replace('_', ' ')} | {m.value:.4f} | {m.low:.4f}–{m.high:.4f} |"
        for name, m in metrics.estimates().items()
    ]
    return "\n".join(["| test metric | value | 95 % interval |", "| --- | --- | --- |", *rows])
