"""Asset: the classifier in the registry, as candidate and, if the gate let it pass, as champion."""

from pathlib import Path

import dagster as dg

from roma_core.files import digest_of, read_json
from roma_core.job import JobFolder
from roma_pipelines.assets.evaluation_report import has_passed, read_decision
from roma_pipelines.experiment import Experiment
from roma_pipelines.provenance import code_version
from roma_pipelines.references import upstream
from roma_pipelines.registry.promotion import CHAMPION, promote
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.registry.versions import CANDIDATE, register, version_at
from roma_pipelines.storage import Storage


def registered_classifier_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """A version in the MLflow registry; consumers load ``models:/NAME@champion``."""

    @dg.asset(
        **experiment.asset_arguments(
            "registered_classifier",
            "dataset",
            "finetuned_classifier",
            "evaluation_report",
            settings={"dataset", "pretraining", "finetuning", "gate", "baselines"},
        ),
        kinds={"mlflow"},
        pool=f"registry_{experiment.name}",  # aliases of one model move one at a time
        description=f"The evaluated package in the MLflow registry. {experiment.description}",
    )
    def registered_classifier(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        evaluation = upstream(context, experiment.key("evaluation_report"))
        classifier = upstream(context, experiment.key("finetuned_classifier"))
        data = upstream(context, experiment.key("dataset"))
        folder = JobFolder(evaluation["job_folder"])
        result = folder.read_result()
        if result is None:
            raise dg.Failure(f"the evaluation in {folder.path} has no result; materialise it again")
        client = connect(MlflowSettings(), Storage.open().mlflow)
        trained = JobFolder(classifier["job_folder"])
        version = register(
            client,
            folder.path / result.outputs["package"],
            experiment.name,
            result.job_key,
            classifier["mlflow_run_id"],
            {
                "roma.dataset_digest": data["digest"],
                "roma.config_digest": digest_of(read_json(trained.config)),
                "roma.git_sha": code_version(),
                "roma.dagster_run_id": context.run_id,
            },
            {f"test/{name}": value for name, value in result.metrics.items()},
        )
        decision = read_decision(Path(evaluation["job_folder"]))
        passed = has_passed(folder.path)
        champion = version_at(client, experiment.name, CHAMPION)
        compared_with = read_json(folder.config)["champion_version"]
        if passed and champion not in (version, compared_with):
            raise dg.Failure(
                f"version {version} was compared with champion {compared_with}, but the champion is now "
                f"{champion}; materialise evaluation_report again to compare with that one"
            )
        if passed and champion != version:
            promote(
                client,
                experiment.name,
                version,
                why="; ".join(check.explanation for check in decision.checks)
                or "first version; no threshold is set",
                who="automatic gate",
                evidence={"evaluation_job": result.job_key, "dagster_run_id": context.run_id},
            )
        aliases = [
            alias
            for alias in (CHAMPION, CANDIDATE)
            if version_at(client, experiment.name, alias) == version
        ]
        context.log.info(f"registered {experiment.name} version {version} as {', '.join(aliases)}")
        return dg.MaterializeResult(
            metadata={
                "model": experiment.name,
                "version": version,
                "aliases": ", ".join(aliases) or "none",
                "uri": f"models:/{experiment.name}@{CHAMPION}",
                "gate": "passed" if passed else "not passed",
                "accuracy": result.metrics["accuracy"],
                "mlflow_run_id": classifier["mlflow_run_id"],
            }
        )

    return registered_classifier
