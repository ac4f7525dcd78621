"""Assets: the pretrained encoder and the finetuned classifier, each made by a training job."""

from pathlib import Path
from typing import Any

import dagster as dg

from roma_core.data.columns import read_manifest
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.job_config import TrainingJobConfig
from roma_core.trainer.metrics_log import read_records
from roma_pipelines.experiment import Experiment
from roma_pipelines.references import upstream
from roma_pipelines.tracked_job import TrackedJob, picture, run_tracked_job


def pretrained_encoder_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """Masked-autoencoder weights, pretrained on the data set."""

    @dg.asset(
        **experiment.asset_arguments(
            "pretrained_encoder", "dataset", settings={"dataset", "pretraining"}
        ),
        kinds={"pytorch"},
        description=f"Masked autoencoder, pretrained without labels. {experiment.description}",
    )
    def pretrained_encoder(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        data = upstream(context, experiment.key("dataset"))
        path = Path(data["path"])
        config = TrainingJobConfig.pretraining(
            path,
            read_manifest(path),
            experiment.pretraining.model,
            TrainerConfig(**experiment.pretraining.trainer),
        )
        return _materialised(_trained(context, experiment, "pretrain", config))

    return pretrained_encoder


def finetuned_classifier_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """A classifier, started from the pretrained encoder."""

    @dg.asset(
        **experiment.asset_arguments(
            "finetuned_classifier",
            "dataset",
            "pretrained_encoder",
            settings={"dataset", "pretraining", "finetuning"},
        ),
        kinds={"pytorch"},
        description=f"Classifier, finetuned from the pretrained encoder. {experiment.description}",
    )
    def finetuned_classifier(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        data = upstream(context, experiment.key("dataset"))
        encoder = upstream(context, experiment.key("pretrained_encoder"))
        path = Path(data["path"])
        config = TrainingJobConfig.finetuning(
            path,
            read_manifest(path),
            Path(encoder["weights"]),
            experiment.finetuning.model,
            TrainerConfig(**experiment.finetuning.trainer),
        )
        return _materialised(_trained(context, experiment, "finetune", config))

    return finetuned_classifier


def _trained(
    context: dg.AssetExecutionContext,
    experiment: Experiment,
    command: str,
    config: TrainingJobConfig,
) -> TrackedJob:
    params: dict[str, Any] = {"dataset_digest": config.dataset_digest[:36]}
    for section in ("model", "trainer"):
        params |= {f"{section}.{k}": v for k, v in getattr(config, section).items()}
    return run_tracked_job(
        context,
        experiment,
        command,
        config,
        starter="torchrun",
        params=params,
    )


def _materialised(job: TrackedJob) -> dg.MaterializeResult:
    from roma_core.evaluation.plots import learning_curve

    weights = job.output("model")
    records = [record for _, record in read_records(job.folder.metrics)]
    return dg.MaterializeResult(
        metadata={
            "learning_curve": picture(learning_curve(records), "learning curve"),
            **job.metadata(),
            "weights": dg.MetadataValue.path(str(weights)),
            "metrics": dg.MetadataValue.path(str(job.folder.metrics)),
        }
    )
