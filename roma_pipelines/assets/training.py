"""Assets: the pretrained encoder and the finetuned model, each from a training job."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import dagster as dg

from roma_core.data.manifest import read_manifest
from roma_core.files import read_json
from roma_core.schema import DataSchema
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.job import MODEL_OUTPUT, TrainingJobConfig, validation_metric
from roma_core.trainer.metrics import read_records
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.pipes import job_folder
from roma_pipelines.pictures import curves, picture
from roma_pipelines.registry.promotion import CHAMPION
from roma_pipelines.registry.versions import version_at
from roma_pipelines.run_config import StageName
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import (
    TrackedJob,
    of_this_run,
    registry,
    run_tracked_job,
    upstream_metadata,
)


def pretrained_encoder_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The asset ``pretrained_encoder``: weights of the masked autoencoder."""

    @dg.asset(
        **experiment.asset_arguments("pretrained_encoder"),
        kinds={"pytorch"},
        description=f"Masked autoencoder, pretrained without labels. {experiment.description}",
    )
    def pretrained_encoder(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        (data,) = upstream_metadata(context, experiment, "dataset")
        return _materialised(_trained(context, experiment, "pretrain", Path(data["path"])))

    return pretrained_encoder


def finetuned_model_asset(experiment: Experiment, name: str) -> dg.AssetsDefinition:
    """The asset ``finetuned_classifier`` or its like, from the pretrained encoder if there is one."""
    is_new = experiment.pretraining is None
    trained = "trained from new weights" if is_new else "finetuned from the pretrained encoder"

    @dg.asset(
        **experiment.asset_arguments(name),
        kinds={"pytorch"},
        description=f"Model of {experiment.task}, {trained}. {experiment.description}",
    )
    def finetuned_model(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        upstream = experiment.asset_names[: experiment.asset_names.index(name)]
        data, *encoders = upstream_metadata(context, experiment, *upstream)
        path = Path(data["path"])
        encoder: Any = encoders[0]["weights"] if encoders else None
        if experiment.pretrained_from is not None:
            for line in _differences(Path(encoder), read_manifest(path).data_schema):
                context.log.warning(f"encoder of {experiment.pretrained_from}: {line}")
        job, weights = job_folder(context).config, encoder
        if job.exists():  # a retry adopts the job, and so the champion of that time
            weights = read_json(job)["weights"]
        elif experiment.start_from == "champion":
            weights = _champion_weights(context, experiment, encoders) or weights
        start = None if weights is None else Path(weights)
        is_further = experiment.start_from == "champion" and weights != encoder
        lineage = {"started_from": Path(weights).parts[-3]} if is_further else {}
        return _materialised(_trained(context, experiment, "finetune", path, start), lineage)

    return finetuned_model


def _champion_weights(
    context: dg.AssetExecutionContext, experiment: Experiment, encoders: Sequence[dict[str, Any]]
) -> str | None:
    """Folder of the weights of the training behind the champion; None if there is no champion."""
    name = experiment.name
    with registry(context, *encoders) as client:
        version = version_at(client, name, CHAMPION)
        if version is None:
            instead = "the pretrained encoder" if encoders else "new weights"
            context.log.info(f"{name} has no champion yet; starting from {instead}")
            return None
        job = client.get_model_version(name, version).tags.get("roma.finetuning_job", "")
    weights = Storage.open().jobs / job / MODEL_OUTPUT
    if not job or not weights.exists():
        reason = f"are not in {weights}" if job else "come from no finetuning"
        raise dg.Failure(
            f"start_from: champion: the weights of version {version} of {name} {reason}; remove "
            f"start_from to train without it, or promote a version that was trained here",
            allow_retries=False,
        )
    context.log.info(f"starting from version {version} of {name}, the champion")
    return str(weights)


def _differences(weights: Path, ours: DataSchema) -> list[str]:
    """How the data set of a shared encoder is described otherwise; Failure if it cannot be used."""
    document = read_json(weights / "model_config.json").get("data_schema")
    if document is None:
        return ["its weights do not record the schema of their data"]
    theirs = DataSchema.model_validate(document)
    for what in ("channels", "axes"):
        here, there = ([(e.name, e.unit) for e in getattr(s, what)] for s in (ours, theirs))
        if here != there:
            raise dg.Failure(
                f"the shared encoder was pretrained on the {what} {there}, but this data set has {here}; "
                f"choose an encoder of matching data, or remove pretrained_from",
                allow_retries=False,
            )
    return [
        f"axis {axis.name} had the scale {other.scale:g} there and has {axis.scale:g} here; set "
        f"dataset.axes.{axis.name}.scale to {other.scale:g} if they have the same meaning"
        for axis, other in zip(ours.axes, theirs.axes, strict=True)
        if axis.scale != other.scale
    ]


def training_config(
    experiment: Experiment,
    command: Literal["pretrain", "finetune"],
    dataset: Path,
    weights: Path | None = None,
) -> TrainingJobConfig:
    """The configuration of a training; ValueError if the data set does not fit."""
    stage = experiment.pretraining if command == "pretrain" else experiment.finetuning
    assert stage is not None  # else there is no such asset
    trainer = TrainerConfig(**stage.trainer)
    if command == "finetune" and "best_metric" not in trainer.model_fields_set:
        metric, _, is_defined = validation_metric(
            dataset, experiment.task, experiment.primary_metric
        )
        if is_defined:
            best = {"best_metric": f"eval/{metric}", "best_metric_mode": "max"}
            trainer = trainer.model_copy(update=best)
    fixed = {"problem_type": experiment.task} if command == "finetune" else {}
    # served with an honest spread, at no measurable loss of R²
    defaults = {"predict_variance": True} if experiment.task == "interpolation" else {}
    return TrainingJobConfig.resolve(
        command,
        dataset,
        defaults | stage.model | fixed,
        trainer,
        weights=weights,
        train_fraction=stage.train_fraction,
    )


def run_params(config: TrainingJobConfig) -> dict[str, Any]:
    """Parameters of the MLflow run of a training."""
    params: dict[str, Any] = {"dataset_digest": config.dataset_digest[:36]}
    for section in ("model", "trainer"):
        params |= {f"{section}.{k}": v for k, v in getattr(config, section).items()}
    return params


def _trained(
    context: dg.AssetExecutionContext,
    experiment: Experiment,
    command: Literal["pretrain", "finetune"],
    dataset: Path,
    weights: Path | None = None,
) -> TrackedJob:
    experiment = of_this_run(context, experiment)
    if command == "finetune":
        metric, reason, _ = validation_metric(dataset, experiment.task, experiment.primary_metric)
        context.log.info(f"primary metric: {metric}; {reason}")
    name: StageName = "pretraining" if command == "pretrain" else "finetuning"
    return run_tracked_job(
        context,
        experiment,
        command,
        config := training_config(experiment, command, dataset, weights),
        experiment.resources.of(name),
        params=run_params(config),
    )


def _materialised(job: TrackedJob, lineage: Mapping[str, str] = {}) -> dg.MaterializeResult:
    from roma_core.evaluation.plots import learning_curve

    weights = job.output("model")
    records = [record for _, record in read_records(job.folder.metrics)]
    kept = job.result.facts.get("weights_step")
    others = [name for name in job.result.metrics if name != "eval/loss"]
    changed = {"model", "trainer"} & job.run_config.keys()
    return dg.MaterializeResult(
        # by default Dagster's is that of all models of the same code version
        data_version=dg.DataVersion(job.folder.path.name) if changed else None,
        metadata={
            **curves(records, others[0] if others else None, kept),
            "learning_curve": picture(learning_curve(records, kept), "learning curve"),
            **job.metadata(),
            **lineage,
            "weights": dg.MetadataValue.path(str(weights)),
            "metrics": dg.MetadataValue.path(str(job.folder.metrics)),
        },
    )
