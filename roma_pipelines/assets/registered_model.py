"""Assets: model and encoder in the registry, as candidates or, if the gate passes, champions; and
predictions of the champion for a file of series.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from roma_core.files import digest_of, read_json
from roma_core.job import JobFolder
from roma_core.trainer.trackers import WandbConfig
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.pipes import job_folder
from roma_pipelines.pictures import bars, picture
from roma_pipelines.registry import versions
from roma_pipelines.registry.gate import GATE_TAG, read_decision
from roma_pipelines.registry.promotion import CHAMPION, NO_CHAMPION, promote
from roma_pipelines.registry.runs import link_wandb
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import (
    TrackedJob,
    of_this_run,
    registry,
    run_tracked_job,
    upstream_metadata,
)


def registered_model_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The asset ``registered_classifier`` or its like; consumers load ``models:/NAME@champion``."""

    @dg.asset(
        **experiment.asset_arguments(experiment.registered),
        kinds={"mlflow"},
        pool=f"registry_{experiment.name}",  # one promotion per model at a time
        description=f"The evaluated package in the MLflow registry. {experiment.description}",
    )
    def registered_model(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        upstream = upstream_metadata(context, experiment, *experiment.asset_names[1:-1])
        *trained, evaluation = upstream
        encoder, model = trained[0], trained[-1]  # the same of one training
        folder = JobFolder(evaluation["job_folder"])
        result = folder.read_result()
        if result is None:
            raise dg.Failure(f"the evaluation in {folder.path} has no result; materialise it again")
        config = read_json(folder.config)
        decision = read_decision(folder.path)
        primary = read_json(folder.path / result.outputs["metrics"]).get(
            "primary_metric", "accuracy"
        )
        metrics = {f"test/{name}": value for name, value in result.metrics.items()}
        pretraining, training = (
            read_json(JobFolder(job["job_folder"]).config) for job in (encoder, model)
        )
        inherited = {"git_sha", "lock_hash", "finetuning_job", "pretraining_job", "started_from"}
        inherited.add("run_config")
        known = {name: text for name, text in config["lineage"].items() if name in inherited}
        tags = {f"roma.{name}": text for name, text in known.items()} | {
            "roma.dataset_digest": config["dataset_digest"],
            "roma.config_digest": digest_of(training),
            "roma.dagster_run_id": context.run_id,
            "roma.evaluation_job": result.job_key,
            GATE_TAG: "passed" if decision.passed else "failed",
            versions.COMPARED_TAG: config["champion_version"] or NO_CHAMPION,
        }
        encoder_uri = {}  # of a model with a head, whose encoder is packaged beside it
        with registry(context, *upstream) as client:

            def register(name: str, package: str, job: Any, tags: Any, metrics: Any) -> str:
                path, run_id = folder.path / result.outputs[package], job["mlflow_run_id"]
                return versions.register(client, path, name, result.job_key, run_id, tags, metrics)

            if "encoder_package" in result.outputs:
                name = versions.encoder_name(experiment.name)
                of_encoder = tags | {"roma.config_digest": digest_of(pretraining)}
                encoder_version = register(name, "encoder_package", encoder, of_encoder, {})
                tags[versions.ENCODER_TAG] = encoder_version
                encoder_uri["encoder"] = f"models:/{name}/{encoder_version}"
            version = register(experiment.name, "package", model, tags, metrics)
            waits = experiment.gate.mode == "needs_approval" and decision.passed
            if decision.passed and not waits:
                promote(
                    client,
                    experiment.name,
                    version,
                    reason=decision.reasons(),
                    actor="automatic gate",
                    evidence={"evaluation_job": result.job_key, "dagster_run_id": context.run_id},
                )
            aliases = [
                alias
                for alias in (CHAMPION, versions.CANDIDATE)
                if versions.version_at(client, experiment.name, alias) == version
            ]
            context.log.info(
                f"registered {experiment.name} version {version} as {', '.join(aliases)}"
            )
            command = f"roma-pipeline promote {experiment.name} {version} --reason …"
            if waits and CHAMPION not in aliases:
                context.log.info(f"the gate passed; waiting for approval: {command}")
            linked = link_wandb(
                client,
                WandbConfig(),
                training["trainer"],
                experiment.name,
                version,
                tags,
                folder.path,
            )
        return dg.MaterializeResult(
            metadata={
                "weights_and_biases": linked,
                "model": experiment.name,
                "version": version,
                "aliases": ", ".join(aliases) or "none",
                "uri": f"models:/{experiment.name}@{CHAMPION}",
                **encoder_uri,
                "gate": "passed" if decision.passed else "not passed",
                "approval": f"needed: {command}" if waits else "not needed",
                **{n: result.metrics[n] for n in ("accuracy", primary) if n in result.metrics},
                "manifest_sha256": result.facts["manifest_sha256"],
                "mlflow_run_id": model["mlflow_run_id"],
            }
        )

    return registered_model


def batch_predictions_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The asset ``batch_predictions``; a retry resumes, and nothing is made without a champion."""
    section = experiment.predictions
    assert section is not None

    @dg.asset(
        **experiment.asset_arguments("batch_predictions"),
        kinds={"parquet"},
        output_required=False,
        pool=f"predictions_{experiment.name}",  # concurrent runs would delete each other's parts
        description=f"Predictions of the champion for {section.input}. {experiment.description}",
    )
    def batch_predictions(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
        import pyarrow.parquet as pq

        from roma_core.serving.job import PredictionJobConfig
        from roma_core.serving.registry_client import fetch, resolve

        storage, is_bucket = Storage.open(), "://" in section.input
        resources = of_this_run(context, experiment).resources.of("predictions")
        is_one = resources.world_size == 1
        source = section.input if is_bucket else str(Path(section.input).absolute())
        if not (is_bucket or Path(source).exists()):
            raise dg.Failure(f"predictions.input: {source} does not exist")
        begun = job_folder(context).config
        if begun.exists():  # a retry adopts the job, and so the champion of that time
            config = PredictionJobConfig.model_validate(read_json(begun))
        else:
            with registry(context) as client:
                champion = versions.version_at(client, experiment.name, CHAMPION)
                if champion is None:
                    context.log.warning(
                        f"{experiment.name} has no champion; promote a version, then materialise this "
                        f"asset again"
                    )
                    return
                version = resolve(client, f"models:/{experiment.name}/{champion}")
                folder = fetch(client, version, storage.cache / "models")
            file = storage.root / "predictions" / experiment.name / f"{Path(source).stem}.parquet"
            config = PredictionJobConfig(
                model=str(folder),
                lineage={
                    "model": version.name,
                    "model_version": version.version,
                    "model_sha256": version.manifest_sha256 or "",
                    "dagster_run_id": context.run.root_run_id or context.run_id,
                },
                source=source,
                split=section.split,
                output=str(file) if is_one else None,
            )
        model = {name: config.lineage[name] for name in ("model_version", "model_sha256")}
        job = run_tracked_job(context, experiment, "predict", config, resources, params=model)
        output = job.output("predictions")
        counts: dict[str, int] = {}
        if experiment.task == "classification":
            labels = pq.read_table(output, columns=["label"])["label"].value_counts()
            counts = {str(one["values"]): one["counts"].as_py() for one in labels}
        context.log.info(f"{experiment.name} version {model['model_version']}: {output}")
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(
                digest_of([model["model_sha256"], job.result.facts["source_digest"]])
            ),
            metadata={
                "path": dg.MetadataValue.path(str(output)),
                **model,
                **(
                    {"classes": dg.MetadataValue.json(dict(sorted(counts.items())))}
                    if counts
                    else {}
                ),
                **drift_metadata(job),
                **job.metadata(),
            },
        )

    return batch_predictions


def drift_metadata(job: TrackedJob) -> dict[str, Any]:
    """How far the inputs of a job are from the training data, by every measure."""
    from roma_core.evaluation.drift import LARGE_PSI, MODERATE_PSI

    effects: dict[str, float] = job.result.facts.get("effects", {})
    ascending = sorted(effects.items(), key=lambda effect: effect[1])
    shown: dict[str, Any] = {f"largest {name.rpartition(' ')[2]}": x for name, x in ascending}
    if "drift" in job.result.outputs:
        figure = job.output("drift").read_bytes()
        alt = "drift against the training data"
        psi = {n.removesuffix(" psi"): x for n, x in effects.items() if n.endswith(" psi")}
        limits = (MODERATE_PSI, LARGE_PSI)
        unit = f"population stability index; dashed: {MODERATE_PSI}, {LARGE_PSI}"
        shown |= bars(alt, psi, limits, unit) | {"drift": picture(figure, alt)}
    return {"drift_sizes": dg.MetadataValue.json(effects), **shown}
