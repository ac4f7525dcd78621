"""Asset: the evaluation report, with the gate as blocking checks."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from roma_core.data.manifest import Manifest, read_manifest
from roma_core.evaluation.config import EvaluationJobConfig, Fact, FactSheet, ServingChecks
from roma_core.evaluation.metrics import LABELS, headline
from roma_core.files import read_json
from roma_core.serving.registry_client import FetchError, fetch, package_of, resolve
from roma_pipelines import tracked_job
from roma_pipelines.automation.state import TRAINED_WITH
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.pipes import job_folder
from roma_pipelines.pictures import Metadata, against_true, confusion, picture
from roma_pipelines.registry import gate
from roma_pipelines.registry.promotion import CHAMPION
from roma_pipelines.registry.runs import code_version
from roma_pipelines.registry.store import MlflowSettings, answers
from roma_pipelines.registry.versions import version_at
from roma_pipelines.run_config import STAGES
from roma_pipelines.storage import Storage


def evaluation_report_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The asset ``evaluation_report``; its checks block registration of a candidate that fails."""
    key, names = experiment.key("evaluation_report"), experiment.training_names

    @dg.asset(
        **experiment.asset_arguments("evaluation_report"),
        kinds={"python"},
        description=f"Metrics on the test split, report and gate. {experiment.description}",
        check_specs=[
            dg.AssetCheckSpec(name, asset=key, blocking=True, description=text)
            for name, text in gate.checks_of(experiment.task).items()
        ],
    )
    def evaluation_report(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        from roma_core.data.store import StoredDataset
        from roma_core.evaluation.leakage import split_digest, training_datasets

        resources = tracked_job.of_this_run(context, experiment).resources.of("evaluation")
        data, *jobs = tracked_job.upstream_metadata(context, experiment, "dataset", *names)
        trained = dict(zip(names, jobs, strict=True))
        weights = {STAGES[name]: job["weights"] for name, job in trained.items()}
        folder = job_folder(context)
        if folder.config.exists():  # a retry adopts the job, and so the champion of that time
            config = EvaluationJobConfig.model_validate(read_json(folder.config))
        else:
            path = Path(data["path"])
            test_split = split_digest(StoredDataset(path, verify=False).split("test"))
            runs = f"{MlflowSettings().experiment_prefix}/{experiment.name}"
            with tracked_job.registry(context, *jobs) as client:
                config = EvaluationJobConfig(
                    name=experiment.name,
                    dataset=str(path),
                    dataset_digest=data["digest"],
                    classifier=weights.get("finetuning"),
                    autoencoder=weights.get("pretraining"),
                    curves={STAGES[name]: job["metrics"] for name, job in trained.items()},
                    primary_metric=experiment.primary_metric,
                    baselines=experiment.baselines,
                    measure_baselines=experiment.measure_baselines,
                    facts=_report_facts(read_manifest(path), trained, context.run_id),
                    trained_on=tuple(
                        dict.fromkeys(
                            str(found)
                            for folder_of_weights in weights.values()
                            for found in training_datasets(Path(folder_of_weights))
                        )
                    ),
                    decided_before=gate.decided_before(client, runs, test_split, folder.path.name),
                    lineage=_lineage(client, trained, context.run_id),
                    **_champion(client, experiment.name, Storage.open().cache / "models"),
                )
        params = {"dataset_digest": data["digest"][:36]}
        job = tracked_job.run_tracked_job(
            context, experiment, "evaluate", config, resources, params=params
        )
        decision = gate.decide(job.folder, experiment.gate)
        evaluated_split = ServingChecks.load(job.output("serving_checks")).test_split
        outputs = ("report", "metrics", "baselines", "serving_checks", "predictions")
        results = {
            "results": {f"test/{name}": value for name, value in job.result.metrics.items()},
            "final_tags": {
                gate.SPLIT_TAG: evaluated_split,
                gate.GATE_TAG: "passed" if decision.passed else "failed",
            },
            "artifacts": {job.result.outputs[name]: "" for name in outputs}
            | {"config.json": "", "result.json": "", "outputs/gate.json": ""}
            | {job.result.outputs["plots"]: "plots"},
        }
        job.run.update(lambda record: record.model_copy(update=results))
        return _materialised(job, decision, config)

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
    client: Any, trained: Mapping[str, Mapping[str, Any]], dagster_run: str
) -> dict[str, str]:
    """Lineage of the weights, ``trained`` by asset; the commit is that of the last training's run.

    ``run_config`` is what the runs of the trainings changed, as JSON, by the names of their assets.
    """
    from roma_core.serving.package import lock_hash

    *_, last = trained.values()
    run = last["mlflow_run_id"]
    start = last.get("started_from")  # the job of the champion that was trained further
    changes = {name: found for name, job in trained.items() if (found := job.get("run_config"))}
    return {
        **{f"{STAGES[name]}_job": job["job_key"] for name, job in trained.items()},
        **({"started_from": start} if start else {}),
        **({"run_config": json.dumps(changes, sort_keys=True)} if changes else {}),
        "mlflow_run_id": run,
        "dagster_run_id": dagster_run,
        "git_sha": client.get_run(run).data.tags.get("roma.git_sha", code_version()),
        "lock_hash": lock_hash(),
    }


def _materialised(
    job: tracked_job.TrackedJob, decision: gate.GateDecision, config: EvaluationJobConfig
) -> dg.MaterializeResult:
    from roma_core.evaluation.report import FIGURES

    plots, found = job.output("plots"), read_json(job.output("metrics"))
    metrics = ["| test metric | value | 95 % interval |", "| --- | --- | --- |"]
    metrics += [
        f"| {label} | {m['value']:.4f} | {m['low']:.4f}–{m['high']:.4f} |"
        for name, label in LABELS.items()
        if (m := found.get(name)) is not None
    ]
    return dg.MaterializeResult(
        metadata={
            # no link: browsers do not follow links from a page to a file
            "report": dg.MetadataValue.path(str(job.output("report"))),
            "metrics": dg.MetadataValue.md("\n".join(metrics)),
            "primary_metric": "; ".join(
                filter(None, (headline(found), found.get("primary_reason")))
            ),
            **_summary_plot(job, found),
            **{
                name: picture((plots / f"{name}.png").read_bytes(), alt)
                for name, (_, _, alt) in FIGURES.items()
                if (plots / f"{name}.png").exists()
            },
            "champion_version": config.champion_version or "none",
            **({TRAINED_WITH: text} if (text := config.lineage.get("run_config")) else {}),
            "gate": "passed" if decision.passed else f"FAILED: {decision.reasons()}",
            # bounds of intervals are in the table above
            **{k: v for k, v in job.metadata().items() if not k.endswith(("_low", "_high"))},
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


def _summary_plot(job: tracked_job.TrackedJob, metrics: Mapping[str, Any]) -> Metadata:
    """The confusion matrix, or predicted against true values of the first channel or target."""
    import numpy as np
    import pyarrow.parquet as pq

    if "confusion" in metrics:
        return confusion(metrics["confusion"], [one["name"] for one in metrics["per_class"]])
    file = pq.ParquetFile(job.output("predictions"))
    name = next(n for n in file.schema.names if n.startswith("true_")).removeprefix("true_")
    table = file.read([f"true_{name}", f"predicted_{name}"])
    both = np.column_stack([column.to_numpy() for column in table.columns])
    both = both[np.isfinite(both).all(axis=1)]
    return against_true(name, both[:: -(-len(both) // 500) or 1].tolist())


def _report_facts(
    manifest: Manifest, trained: Mapping[str, Mapping[str, Any]], dagster_run: str
) -> tuple[FactSheet, ...]:
    *_, last = trained.values()
    model = read_json(Path(last["weights"]) / "model_config.json")
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
            "parameters": f"{last['parameters']:,}",
            "encoder": f"width {stack['d_model']}, {stack['depth']} layers, {stack['nhead']} heads",
            "positions": f"{model['n_pos_dims']} axis, p = {model['p_rope_val']}",
        },
        "Training": {
            STAGES[name]: f"{job['training_s']:.1f} s, validation loss {job['eval/loss']:.4f}"
            for name, job in trained.items()
        }
        | {"processes": last["processes"], "device": last["device"]},
        "Lineage": {
            "code": code_version(),
            "Dagster run": dagster_run,
            "MLflow run": last["mlflow_run_id"],
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
