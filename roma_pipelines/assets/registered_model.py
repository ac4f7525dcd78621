"""Asset: classifier and encoder in the registry, as candidates or, if the gate passes, champions."""

import dagster as dg

from roma_core.files import digest_of, read_json
from roma_core.job import JobFolder
from roma_core.trainer.trackers import WandbConfig
from roma_pipelines.experiment import Experiment
from roma_pipelines.registry import versions
from roma_pipelines.registry.gate import GATE_TAG, read_decision
from roma_pipelines.registry.promotion import CHAMPION, NO_CHAMPION, promote
from roma_pipelines.registry.runs import link_wandb
from roma_pipelines.tracked_job import registry, upstream_metadata


def registered_classifier_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The asset ``registered_classifier``; consumers load ``models:/NAME@champion``."""

    @dg.asset(
        **experiment.asset_arguments("registered_classifier"),
        kinds={"mlflow"},
        pool=f"registry_{experiment.name}",  # one promotion per model at a time
        description=f"The evaluated package in the MLflow registry. {experiment.description}",
    )
    def registered_classifier(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        evaluation, classifier, encoder = upstream_metadata(
            context, experiment, "evaluation_report", "finetuned_classifier", "pretrained_encoder"
        )
        folder = JobFolder(evaluation["job_folder"])
        result = folder.read_result()
        if result is None:
            raise dg.Failure(f"the evaluation in {folder.path} has no result; materialise it again")
        config = read_json(folder.config)
        decision = read_decision(folder.path)
        metrics = {f"test/{name}": value for name, value in result.metrics.items()}
        trained, pretrained = (
            read_json(JobFolder(job["job_folder"]).config) for job in (classifier, encoder)
        )
        inherited = ("git_sha", "lock_hash", "finetuning_job", "pretraining_job")
        tags = {f"roma.{name}": config["lineage"][name] for name in inherited} | {
            "roma.dataset_digest": config["dataset_digest"],
            "roma.config_digest": digest_of(trained),
            "roma.dagster_run_id": context.run_id,
            "roma.evaluation_job": result.job_key,
            GATE_TAG: "passed" if decision.passed else "failed",
            versions.COMPARED_TAG: config["champion_version"] or NO_CHAMPION,
        }
        with registry(context, evaluation, classifier, encoder) as client:
            encoder_version = versions.register(
                client,
                folder.path / result.outputs["encoder_package"],
                versions.encoder_name(experiment.name),
                result.job_key,
                encoder["mlflow_run_id"],
                tags | {"roma.config_digest": digest_of(pretrained)},
                {},
            )
            version = versions.register(
                client,
                folder.path / result.outputs["package"],
                experiment.name,
                result.job_key,
                classifier["mlflow_run_id"],
                tags | {versions.ENCODER_TAG: encoder_version},
                metrics,
            )
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
                trained["trainer"],
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
                "encoder": f"models:/{versions.encoder_name(experiment.name)}/{encoder_version}",
                "gate": "passed" if decision.passed else "not passed",
                "approval": f"needed: {command}" if waits else "not needed",
                "accuracy": result.metrics["accuracy"],
                "manifest_sha256": result.facts["manifest_sha256"],
                "mlflow_run_id": classifier["mlflow_run_id"],
            }
        )

    return registered_classifier
