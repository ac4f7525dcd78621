"""Asset: the evaluation report, with the gate as blocking checks."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from roma_core.data.manifest import Manifest, read_manifest
from roma_core.evaluation.classification_metrics import LABELS, ClassificationMetrics
from roma_core.evaluation.config import EvaluationJobConfig, Fact, FactSheet, ServingChecks
from roma_core.files import read_json
from roma_core.job import JobFolder
from roma_core.serving.registry_client import FetchError, fetch, package_of, resolve
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.pipes import key_for
from roma_pipelines.registry.gate import (
    CHECKS,
    GATE_TAG,
    SPLIT_TAG,
    GateDecision,
    decide,
    decided_before,
)
from roma_pipelines.registry.promotion import CHAMPION
from roma_pipelines.registry.runs import code_version
from roma_pipelines.registry.store import MlflowSettings, answers
from roma_pipelines.registry.versions import version_at
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import (
    TrackedJob,
    picture,
    registry,
    run_tracked_job,
    upstream_metadata,
)


def evaluation_report_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The asset ``evaluation_report``; its checks block registration of a candidate that fails."""
    key = experiment.key("evaluation_report")

    @dg.asset(
        **experiment.asset_arguments("evaluation_report"),
        kinds={"python"},
        description=f"Metrics on the test split, report and gate. {experiment.description}",
        check_specs=[
            dg.AssetCheckSpec(name, asset=key, blocking=True, description=text)
            for name, text in CHECKS.items()
        ],
    )
    def evaluation_report(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        from roma_core.data.store import StoredDataset
        from roma_core.evaluation.leakage import split_digest

        data, encoder, classifier = upstream_metadata(
            context, experiment, "dataset", "pretrained_encoder", "finetuned_classifier"
        )
        key, storage = key_for(context), Storage.open()
        begun = JobFolder(storage.jobs / key).config
        if begun.exists():  # a retry adopts the job, and so the champion of that time
            config = EvaluationJobConfig.model_validate(read_json(begun))
        else:
            path = Path(data["path"])
            test_split = split_digest(StoredDataset(path, verify=False).split("test"))
            runs = f"{MlflowSettings().experiment_prefix}/{experiment.name}"
            with registry(context, encoder, classifier) as client:
                config = EvaluationJobConfig(
                    name=experiment.name,
                    dataset=str(path),
                    dataset_digest=data["digest"],
                    classifier=classifier["weights"],
                    autoencoder=encoder["weights"],
                    curves={"pretraining": encoder["metrics"], "finetuning": classifier["metrics"]},
                    primary_metric=experiment.primary_metric,
                    baselines=experiment.baselines,
                    facts=_report_facts(read_manifest(path), encoder, classifier, context.run_id),
                    trained_on=tuple(
                        read_json(Path(job["job_folder"]) / "config.json")["dataset"]
                        for job in (encoder, classifier)
                    ),
                    decided_before=decided_before(client, runs, test_split, key),
                    lineage=_lineage(client, encoder, classifier, context.run_id),
                    **_champion(client, experiment.name, storage.cache / "models"),
                )
        job = run_tracked_job(
            context, experiment, "evaluate", config, params={"dataset_digest": data["digest"][:36]}
        )
        decision = decide(job.folder, experiment.gate)
        evaluated_split = ServingChecks.load(job.output("serving_checks")).test_split
        outputs = ("report", "metrics", "serving_checks", "predictions")
        results = {
            "results": {f"test/{name}": value for name, value in job.result.metrics.items()},
            "final_tags": {
                SPLIT_TAG: evaluated_split,
                GATE_TAG: "passed" if decision.passed else "failed",
            },
            "artifacts": {job.result.outputs[name]: "" for name in outputs}
            | {"config.json": "", "result.json": "", "outputs/gate.json": ""}
            | {job.result.outputs["plots"]: "plots"},
        }
        job.run.update(lambda record: record.model_copy(update=results))
        return _materialised(job, decision, config.champion_version)

    return evaluation_report


def _champion(client: Any, name: str, cache: Path) -> dict[str, Any]:
    """Configuration of the comparison; a champion that cannot be fetched is recorded, not raised."""
    version = version_at(client, name, CHAMPION)
    if version is None:
        return {}
    try:
        found = resolve(client, f"models:/{name}/{version}")
        folder = package_of(fetch(client, found, cache))
    except FetchError as error:
        if not answers(MlflowSettings()):
            raise
        return {"champion_version": version, "champion_problem": str(error)}
    return {"champion_version": version, "champion": str(folder)}


def _lineage(
    client: Any, encoder: Mapping[str, Any], classifier: Mapping[str, Any], dagster_run: str
) -> dict[str, str]:
    """Lineage of the weights; the commit is that of the finetuning run."""
    from roma_core.serving.package import lock_hash

    trained = client.get_run(classifier["mlflow_run_id"]).data.tags
    return {
        "pretraining_job": encoder["job_key"],
        "finetuning_job": classifier["job_key"],
        "mlflow_run_id": classifier["mlflow_run_id"],
        "dagster_run_id": dagster_run,
        "git_sha": trained.get("roma.git_sha", code_version()),
        "lock_hash": lock_hash(),
    }


_PLOTS = {
    "confusion": "confusion matrix",
    "reliability": "reliability curve",
    "curves": "ROC and precision-recall curves",
    "reconstructions": "reconstructions of hidden tokens",
    "embedding_map": "test series in feature space",
}


def _materialised(
    job: TrackedJob, decision: GateDecision, champion_version: str | None
) -> dg.MaterializeResult:
    plots = job.output("plots")
    found = ClassificationMetrics.model_validate(read_json(job.output("metrics")))
    metrics = ["| test metric | value | 95 % interval |", "| --- | --- | --- |"]
    metrics += [
        f"| {LABELS[name]} | {m.value:.4f} | {m.low:.4f}–{m.high:.4f} |"
        for name, m in found.estimates().items()
    ]
    return dg.MaterializeResult(
        metadata={
            # no link: browsers do not follow links from a page to a file
            "report": dg.MetadataValue.path(str(job.output("report"))),
            "metrics": dg.MetadataValue.md("\n".join(metrics)),
            "primary_metric": f"{found.headline()}; {found.primary_reason}",
            **{
                name: picture((plots / f"{name}.png").read_bytes(), title)
                for name, title in _PLOTS.items()
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
                metadata=check.model_dump(include={"value", "threshold"}, exclude_none=True),
            )
            for check in decision.checks
        ],
    )


def _report_facts(
    manifest: Manifest, encoder: Mapping[str, Any], classifier: Mapping[str, Any], dagster_run: str
) -> tuple[FactSheet, ...]:
    model = read_json(Path(classifier["weights"]) / "model_config.json")
    stack, dropped = model["encoder_config"], manifest.irregularity
    splits = (f"{split} {count.n_series}" for split, count in manifest.counts.items())
    sheets: dict[str, dict[str, Any]] = {
        "Data": {
            "name": manifest.name,
            "version": manifest.digest[:16],
            "series": ", ".join(splits),
            "observations dropped": f"{dropped.n_dropped} of {dropped.n_observations_before}"
            if dropped
            else "none",
            "split": manifest.split_rule,
            "citation": manifest.provenance.citation,
            "licence": manifest.provenance.licence,
        },
        "Model": {
            "parameters": f"{classifier['parameters']:,}",
            "encoder": f"width {stack['d_model']}, {stack['depth']} layers, {stack['nhead']} heads",
            "positions": f"{model['n_pos_dims']} axis, p = {model['p_rope_val']}",
        },
        "Training": {
            stage: f"{job['training_s']:.1f} s, validation loss {job['eval/loss']:.4f}"
            for stage, job in (("pretraining", encoder), ("finetuning", classifier))
        }
        | {"processes": classifier["processes"], "device": classifier["device"]},
        "Lineage": {
            "code": code_version(),
            "Dagster run": dagster_run,
            "MLflow run": classifier["mlflow_run_id"],
        },
    }

    def fact(label: str, value: Any) -> Fact:
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        monospace = label in ("version", "code", "Dagster run", "MLflow run")
        return Fact(label=label, value=shown, monospace=monospace)

    return tuple(
        FactSheet(title=title, facts=tuple(itertools.starmap(fact, facts.items())))
        for title, facts in sheets.items()
    )
