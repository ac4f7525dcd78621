"""Pretraining and finetuning as a job: ``config.json`` in, weights and metrics out.

Imports torch only to train.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field

from roma_core.data.layout import Grid, grid_of
from roma_core.data.manifest import Manifest, read_manifest
from roma_core.data.store import StoredDataset, Subset
from roma_core.files import read_json, sha256_of
from roma_core.job import Attempt, JobFolder
from roma_core.model.config import (
    DROPOUTS,
    SHAPE,
    EncoderConfig,
    RoMAForClassificationConfig,
    RoMAForPreTrainingConfig,
    classifier_config,
    is_pretraining,
    read_config,
    stored_fields,
)
from roma_core.run_job import Work
from roma_core.schema import DataSchema
from roma_core.settings import Frozen
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.defaults import PrimaryMetric, primary_metric

if TYPE_CHECKING:
    from roma_core.model.prediction import RoMAForClassification
    from roma_core.model.pretraining import RoMAForPreTraining
    from roma_core.progress import Progress

MODEL_OUTPUT = "outputs/model"
"""Folder of the trained weights, relative to the job folder."""
log = logging.getLogger(__name__)


def data_fields(schema: DataSchema) -> dict[str, Any]:
    """Fields of a model that the data determine: channels, axes, and tokens of one observation."""
    categories = [axis.n_embedded for axis in schema.axes]
    return {
        "tubelet_size": [1, 1, 1],
        "n_channels": schema.n_values,
        "n_pos_dims": len(schema.axes),
        "position_axes": [],  # the data set applies its axes itself
        "axis_categories": categories if any(categories) else [],
        "missing_values": schema.missing_values,
        "covariates": [len(covariate.categories) for covariate in schema.covariates],
    }


class TrainingJobConfig(Frozen):
    """The frozen configuration of a training job: data, model, initial weights and trainer."""

    schema_version: Literal[1] = 1
    task: Literal["pretrain", "finetune"]
    dataset: str  # folder of the data set
    dataset_digest: str  # its version; the job fails if another one is at this path
    weights: str | None = None  # folder of the weights to start from; None: new weights
    weights_digest: str | None = None  # sha256 of their file
    model: dict[str, Any]  # every field of the model's configuration
    trainer: dict[str, Any]  # every field of the trainer's, but for the checkpoint folder
    train_fraction: float = Field(1.0, gt=0, le=1)  # of the training series of every class

    @classmethod
    def resolve(
        cls,
        task: Literal["pretrain", "finetune"],
        dataset: Path,
        model: dict[str, Any],
        trainer: TrainerConfig,
        *,
        weights: Path | None = None,
        train_fraction: float = 1.0,
    ) -> Self:
        """Determine every field of the model. Warns of an old data set, whose targets have no scale.

        Args:
            model: the fields that the data do not determine.
            weights: folder of the weights that the training starts from; None: new weights.

        Raises:
            ValueError: the data set does not have the classes or targets that the model predicts.
        """
        manifest = read_manifest(dataset)
        if weights is None:
            model = model | {"grid_step": 1.0}  # that of the data follows, if there are windows
        config: RoMAForPreTrainingConfig | RoMAForClassificationConfig
        if task == "pretrain":
            config = _pretraining_model(manifest, model, weights)
            series = StoredDataset(dataset, verify=False).split("train")
            if len(series) and not len(_maskable(series)):
                raise ValueError(
                    f"every training series of {manifest.name} has one observation, so nothing can be "
                    f"hidden and pretraining has nothing to learn; finetune new weights instead (an experiment: `pretraining: null`)"
                )
        else:
            config = _finetuning_model(manifest, model, weights)
            if config.problem_type == "regression" and not config.target_scales:
                warnings.warn(
                    f"{dataset} is of before targets were standardised, and is trained on them as they are: "
                    f"build it again, unless they are of about unit size",
                    stacklevel=2,
                )
        grid_step = None
        if config.window:
            given = None if weights is None else config.grid_step
            grid_step = _grid_step(StoredDataset(dataset, verify=False), given)
        config = config.model_copy(update={"grid_step": grid_step})
        return cls(
            task=task,
            dataset=str(dataset),
            dataset_digest=manifest.digest,
            weights=None if weights is None else str(weights),
            weights_digest=_digest_of_weights(weights),
            model=config.model_dump(mode="json"),
            trainer=trainer.model_dump(mode="json", exclude={"checkpoint_dir"}),
            train_fraction=train_fraction,
        )

    def completed(self) -> Self:
        """The same with the settings added since it was written, at their defaults."""
        kind = RoMAForPreTrainingConfig if self.task == "pretrain" else RoMAForClassificationConfig
        model = kind.from_values(self.model).model_dump(mode="json")
        trainer = TrainerConfig.from_values(self.trainer)
        fields = trainer.model_dump(mode="json", exclude={"checkpoint_dir"})
        digest = self.weights_digest or _digest_of_weights(self.weights)
        return self.model_copy(update={"model": model, "trainer": fields, "weights_digest": digest})


_MAX_RATIO_ERROR = 0.01  # of the steps of data and weights
_SAMPLE = 200  # series whose times are read to find a grid


def grid_of_split(series: Subset) -> Grid | None:
    """The grid that the observations of a split lie on, on the first axis."""
    return grid_of(series.dataset.raw(row)[0][:, 0] for row in _sample(series))


def observed_of_split(series: Subset) -> float:
    """Share of the numbers of a split's observations that is not missing."""
    values = (series.dataset.raw(row)[1] for row in _sample(series))
    return float(np.mean([np.isfinite(one).mean() for one in values]))


def _sample(series: Subset) -> list[int]:
    rows: list[int] = series.indices[:: -(-len(series) // _SAMPLE) or 1].tolist()
    return rows


def _grid_step(dataset: StoredDataset, given: float | None) -> float:
    """Distance of two steps of the data's grid, in the model's positions, or the ``given`` one of weights.

    Raises ValueError without a grid, or if its steps are no steps of the weights' grid.
    """
    name, grid = dataset.manifest.name, grid_of_split(dataset.split("train"))
    step = 0.0 if grid is None else float(f"{grid.step / dataset.schema.axes[0].scale:.7g}")
    if given is None and not step:
        raise ValueError(
            f"model.window needs series on a regular grid, and the observations of {name} are on none; "
            f"set window: 0"
        )
    if given is None:
        return step
    ratio = step / given
    if abs(ratio - max(1, round(ratio))) > _MAX_RATIO_ERROR * ratio:
        found = f"on steps of {step:g}" if step else "on no regular grid"
        raise ValueError(
            f"grid_step: the windows of the weights are on steps of {given:g} in the model's positions, but "
            f"the observations of {name} are {found}, between them; pretrain on this data set"
        )
    return given


def _digest_of_weights(folder: Path | str | None) -> str | None:
    file = None if folder is None else Path(folder, "model.safetensors")
    return sha256_of(file) if file and file.exists() else None


def _pretraining_model(
    manifest: Manifest, model: dict[str, Any], weights: Path | None
) -> RoMAForPreTrainingConfig:
    fields = data_fields(manifest.data_schema)
    if weights is None:
        return RoMAForPreTrainingConfig(**model | fields)
    document = read_config(weights)
    if not is_pretraining(document):
        raise ValueError(
            f"{weights} holds a classifier, which has no decoder; pretraining continues from the "
            f"outputs/model of a pretraining"
        )
    stored = stored_fields(document)
    fields["missing_values"] |= stored["missing_values"]
    _check_inputs(manifest, fields, document, weights)
    given = dict(model)
    for stack in ("encoder_config", "decoder_config"):
        if stack in given:
            given[stack] = stored[stack] | given[stack]
    config = RoMAForPreTrainingConfig.from_values(stored | given | fields)
    kept = RoMAForPreTrainingConfig.from_values(stored | fields)
    for name in model:
        now, then = getattr(config, name), getattr(kept, name)
        if isinstance(now, EncoderConfig):
            now, then = (x.model_dump(exclude=set(DROPOUTS)) for x in (now, then))
        elif name not in SHAPE:
            continue
        if now != then:
            raise ValueError(
                f"model.{name}: the weights in {weights} were trained with {then}, not {now}; leave it "
                f"out to continue from them, or pretrain new weights"
            )
    return config


def _finetuning_model(
    manifest: Manifest, model: dict[str, Any], weights: Path | None
) -> RoMAForClassificationConfig:
    schema = manifest.data_schema
    document = {} if weights is None else read_config(weights)
    if "problem_type" in model:
        problem_type = model["problem_type"]
    elif not document or is_pretraining(document):  # a new head
        problem_type = RoMAForClassificationConfig().problem_type  # of the environment
    else:  # published heads have no such field, and are classifiers
        problem_type = document.get("problem_type", "classification")
    is_regression = problem_type == "regression"
    scales = [(target.mean, target.std) for target in schema.targets if is_regression]
    fields = {"dim_output": len(scales if is_regression else schema.classes) or None, **model}
    fields |= data_fields(schema)
    fields["target_scales"] = [] if set(scales) == {(0, 1)} else scales  # empty of an old data set
    if weights is None:
        config = RoMAForClassificationConfig(**fields)
    else:
        # weights that may miss values take data without
        fields["missing_values"] |= stored_fields(document)["missing_values"]
        _check_inputs(manifest, fields, document, weights)
        config = classifier_config(document, fields, weights)
        _check_head(config, document, weights)
    per_token = config.pools == "token"
    if is_regression and not schema.targets:
        raise ValueError(
            f"problem_type=regression needs targets, and the data set {manifest.name} has none; name "
            f"their columns in `targets` of its source and build it again"
        )
    level = schema.target_level
    pooling = "token" if level == "observation" else "mean or cls"
    if is_regression and per_token != (level == "observation"):
        raise ValueError(
            f"the targets of {manifest.name} are of every {level}, but pooling={config.pools} predicts "
            f"{'every observation' if per_token else 'one output per series'}; set pooling={pooling}"
        )
    if not is_regression and per_token:
        raise ValueError(
            "classes belong to series, but pooling=token predicts an output for every observation; set "
            "problem_type=regression to learn the targets of a data set, or leave pooling out"
        )
    if not is_regression and not schema.classes:
        instead = f"; set pooling={pooling} and problem_type=regression to learn its targets"
        raise ValueError(
            f"a classifier needs classes, and the data set {manifest.name} has none: name the column of "
            f"the class in its source and build it again{instead if schema.targets else ''}"
        )
    return config


def _check_head(
    config: RoMAForClassificationConfig, document: dict[str, Any], weights: Path
) -> None:
    """Raise ValueError unless weights with a head have the head of this configuration."""
    if is_pretraining(document):
        return
    for name, default in {"problem_type": "classification", "predict_variance": False}.items():
        now, then = getattr(config, name), document.get(name, default)
        if now != then:
            raise ValueError(
                f"model.{name}: the head of the weights in {weights} was trained with {then}, not {now}; leave "
                f"it out to continue from them, or start from a pretraining"
            )


def _check_inputs(
    manifest: Manifest, fields: dict[str, Any], document: dict[str, Any], weights: Path
) -> None:
    """Raise ValueError unless weights take the channels, axes and covariates of a data set."""
    schemas, stored = [manifest.data_schema], stored_fields(document)
    names = ("n_channels", "n_pos_dims", "missing_values", "axis_categories", "covariates")
    compared = [(name, fields[name], stored[name]) for name in names]
    if (own := document.get("data_schema")) is not None:
        schemas.append(DataSchema.model_validate(own))
        words = [[list(axis.categories) for axis in s.axes if axis.n_embedded] for s in schemas]
        compared.append(("categories", words[0], words[-1]))
        covariates = [{c.name: list(c.categories) for c in s.covariates} for s in schemas]
        compared.append(("covariates", covariates[0], covariates[-1]))
        if not is_pretraining(document):  # its head is kept
            compared.append(("classes", schemas[0].classes, schemas[-1].classes))
            if document.get("problem_type") == "regression":
                targets = [[target.name for target in s.targets] for s in schemas]
                compared.append(("targets", targets[0], targets[-1]))
    for name, now, then in compared:
        if now != then:
            raise ValueError(
                f"{name}: the data set {manifest.name} has {now}, but the weights in {weights} were trained "
                f"with {then}; finetune on data with the same channels, axes, categories and covariates "
                f"in the same order, or pretrain on this data set"
            )


def validation_metric(
    folder: Path, task: str, wanted: PrimaryMetric | Literal["auto"] = "auto"
) -> tuple[str, str, bool]:
    """The primary metric, the reason for it, and whether it is defined on the validation split."""
    dataset = StoredDataset(folder, verify=False)
    validation = dataset.split("validation")
    if task != "classification":
        return "r2", f"the task is {task}", len(validation) > 1
    metric, reason = primary_metric(wanted, dataset.split("train").class_counts)
    return metric, reason, sum(n > 0 for n in validation.class_counts.values()) > 1


def _maskable(series: Subset) -> Subset:
    """Those of two or more observations: of a single one nothing can be hidden."""
    return Subset(series.dataset, series.indices[series.lengths > 1])


def open_dataset(path: str, digest: str, *, verify: bool) -> StoredDataset:
    """The data set a job was planned for; ValueError if ``path`` is another version now."""
    dataset = StoredDataset(path, verify=verify)
    if dataset.manifest.digest != digest:
        raise ValueError(
            f"the job was planned for version {digest[:12]} of the data set, but {path} is version "
            f"{dataset.manifest.digest[:12]}; plan the job again"
        )
    return dataset


def model_of(
    config: TrainingJobConfig, seed: int, resumes: bool
) -> RoMAForPreTraining | RoMAForClassification:
    """The model of a job: with the weights it starts from, or new ones if a checkpoint follows."""
    import torch

    from roma_core.model.prediction import RoMAForClassification
    from roma_core.model.pretraining import RoMAForPreTraining

    torch.manual_seed(seed)  # the same initial weights in every process and every attempt
    if config.task == "pretrain":
        autoencoder = RoMAForPreTrainingConfig.from_values(config.model)
        if config.weights is None or resumes:  # a checkpoint has all weights
            return RoMAForPreTraining(autoencoder)
        return RoMAForPreTraining.from_pretrained(config.weights, autoencoder)
    classifier = RoMAForClassificationConfig.from_values(config.model)
    if config.weights is None or resumes:
        return RoMAForClassification(classifier)
    return RoMAForClassification.from_pretrained(config.weights, classifier)


def train(
    folder: JobFolder, attempt: Attempt, progress: Callable[[str, int, int], Progress] | None = None
) -> Work:
    """Run or resume the training that ``config.json`` describes; ``progress`` shows its steps."""
    from roma_core.trainer.checkpoint import committed
    from roma_core.trainer.distributed import init_group
    from roma_core.trainer.trainer import Trainer

    group = init_group()
    # rank 0 may have just written it, and another process may see it late
    document = group.call(lambda: read_json(folder.config, schema_version=1), group.is_main)[0]
    config = TrainingJobConfig.model_validate(document)
    trainer = TrainerConfig.from_values(config.trainer | {"checkpoint_dir": folder.checkpoints})
    version = config.dataset, config.dataset_digest
    group.call(lambda: open_dataset(*version, verify=True).path, group.is_first_of_node)
    dataset = open_dataset(*version, verify=False)
    model = model_of(config, trainer.random_seed, bool(committed(folder.checkpoints)))
    model.data_schema = dataset.schema.model_dump(mode="json")
    series = dataset.split("train").subsample(config.train_fraction, trainer.random_seed)
    validation = dataset.split("validation")
    facts: dict[str, Any] = {}
    if config.task == "pretrain":
        n_series = len(series)
        series, validation = _maskable(series), _maskable(validation)
        if left_out := n_series - len(series):
            facts["series_left_out"] = left_out
            if group.is_main:
                log.warning(
                    f"{left_out:,} of {n_series:,} training series have one observation, of which nothing "
                    f"can be hidden; pretraining leaves them out"
                )
    end = Trainer(trainer, progress).train(
        series, validation, model, folder=folder.path, attempt=attempt, what=config.task
    )
    if end.status == "continue":
        return Work("continue", end.world_size, end.step, end.reason)
    if group.is_main:
        model.save_pretrained(folder.path / MODEL_OUTPUT)
    return Work(
        "completed",
        end.world_size,
        end.step,
        metrics=end.metrics,
        outputs={"model": MODEL_OUTPUT},
        facts=facts
        | {
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights_step": end.weights_step,
            "training_s": round(end.elapsed_s, 3),
            "device": str(next(model.parameters()).device),
        },
    )
