"""An experiment: the content of one ``defs.yaml``, validated. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import pkgutil
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import dagster as dg
import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from roma_core.data.config import DatasetConfig
from roma_core.evaluation.config import Baseline
from roma_core.files import digest_of
from roma_core.model.config import (
    DROPOUTS,
    HEAD,
    OF_PRETRAINING,
    SHAPE,
    RoMAForClassificationConfig,
    RoMAForPreTrainingConfig,
    merged,
)
from roma_core.settings import Frozen, RomaSettings, SettingsError, validation_errors
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.defaults import PrimaryMetric
from roma_pipelines.automation.settings import Automation
from roma_pipelines.registry.gate import CLASS_THRESHOLDS, GateThresholds
from roma_pipelines.resources import JOB_CLIENTS
from roma_pipelines.run_config import ENCODER, FINETUNED, RUN_CONFIGS, STAGES, Resources, overrides
from roma_pipelines.search_space import Tuning
from roma_pipelines.storage import DEFS, defs_files, project_folder

COMPONENT = "roma_pipelines.components.RomaExperiment"
_KEYS = ("type", "attributes", "template_vars_module", "requirements", "post_processing")
_REGISTERED = {
    "classification": "registered_classifier",
    "regression": "registered_regressor",
    "interpolation": "registered_autoencoder",
}
_TRAINING_SECTIONS = {
    "dataset",
    "pretraining",
    "finetuning",
    "primary_metric",
    "task",
    "start_from",
}
_SECTIONS = {  # that determine the content of an asset; of the others, all of these
    "dataset": {"dataset"},
    ENCODER: {"dataset", "pretraining"},
    **dict.fromkeys(FINETUNED.values(), _TRAINING_SECTIONS),
    "batch_predictions": {"predictions"},
    "recent_inputs": {"automation"},
    "tuning_study": {*_TRAINING_SECTIONS, "tuning"},
}
_ALL_SECTIONS = {*_TRAINING_SECTIONS, "gate", "baselines"}


class Stage(Frozen):
    """One training: fields of the model's and the trainer's configuration."""

    model: dict[str, Any] = Field({}, description="Fields that the data set does not determine.")
    trainer: dict[str, Any] = Field({}, description="Fields of TrainerConfig.")
    train_fraction: float = Field(1.0, gt=0, le=1)
    """Fraction of the training series to use, stratified by class."""


class Predictions(Frozen):
    """Input of the asset ``batch_predictions``, made by the champion."""

    input: str
    """Parquet file, folder or bucket of such files, .jsonl file, or data set."""
    split: Literal["train", "validation", "test"] = "test"
    """Split to predict if the input is a data set."""


def checked_name(name: str) -> str:
    """The name; ValueError if it cannot be part of asset keys, folders and model names."""
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"expected lower-case letters, digits and _, starting with a letter, such as "
            f"japanese_vowels; got {name!r}"
        )
    return name


Name = Annotated[str, AfterValidator(checked_name)]


class DagsterSettings(RomaSettings):
    """How Dagster runs the assets."""

    model_config = SettingsConfigDict(env_prefix="ROMA_DAGSTER_")

    executor: Literal["in_process", "k8s_job"] = "in_process"
    """k8s_job, for Dagster on Kubernetes: each step in a pod that outlives the run's pod."""


def retry_policy() -> dg.RetryPolicy | None:
    """Retries of a step whose pod died; the retry adopts the job.

    A failed training raises ``dagster.Failure`` with ``allow_retries=False`` and is not repeated.
    """
    if DagsterSettings().executor == "in_process":
        return None
    return dg.RetryPolicy(max_retries=3, delay=10)


class ExperimentDataset(DatasetConfig):
    """The data set of an experiment; its name defaults to that of the experiment."""

    name: str = Field("", description="Name of the data set; the experiment's by default.")


class Experiment(Frozen):
    """Data set → pretrained encoder → finetuned model → report → registered model."""

    name: Name = Field(description="Asset key prefix, group and registered model name.")
    description: str = Field("", description="Purpose, shown on the assets.")
    task: Literal["classification", "regression", "interpolation"] = Field(
        "classification", exclude_if=lambda task: task == "classification"
    )
    """What the model predicts: a class, the targets of the data set, or hidden observations. An
    interpolation registers the pretrained autoencoder and finetunes nothing; its pretraining has
    predict_variance unless it is set to false."""
    dataset: ExperimentDataset = Field(description="Source and preparation of the data.")
    pretraining: Stage | None = Stage()
    """Pretraining of the encoder. null: none; finetuning starts from new weights, and its ``model`` has the
    fields of the input and the encoder, too."""
    pretrained_from: Name | None = None
    """Experiment whose encoder is finetuned here instead of pretraining one."""
    finetuning: Stage = Field(Stage(), description="Finetuning of the classifier or regressor.")
    start_from: Literal["encoder", "champion"] = Field(
        "encoder", exclude_if=lambda start: start == "encoder"
    )
    """Weights that the finetuning starts from. champion: those of the registered champion, to train it
    further on new data; while there is none, of the encoder, or new ones."""
    resources: Resources = Field(Resources(), description="Target and size of jobs.")
    primary_metric: PrimaryMetric | Literal["auto"] = "auto"
    """Metric for the best checkpoint, the gate and the comparison with the champion. auto: auroc where the
    rarer of two classes has less than 35 % of train, else accuracy or, if imbalanced, macro_f1; r2 of
    a regression or an interpolation."""
    gate: GateThresholds = Field(GateThresholds(), description="Conditions of promotion.")
    baselines: tuple[Baseline, ...] = Field((), description="Published results of other methods.")
    measure_baselines: bool = True
    """Train and evaluate other methods beside the model, in its evaluation."""
    predictions: Predictions | None = None
    """Adds the asset batch_predictions; null: none."""
    tuning: Tuning | None = Field(None, exclude_if=lambda tuning: tuning is None)
    """Hyperparameter search; adds the asset tuning_study. null: `roma-pipeline tune` has defaults."""
    schedule: str | None = None
    """Cron expression (UTC) of retraining; the schedule starts stopped."""
    automation: Automation = Field(Automation(), description="Sensors and budget.")
    owners: tuple[str, ...] = Field((), description="E-mail addresses or team:NAME.")
    tags: dict[str, str] = Field({}, description="Further tags of the assets.")

    @classmethod
    def parse(cls, attributes: Mapping[str, Any]) -> Self:
        """From the ``attributes`` of a ``defs.yaml``; ValueError has a line per invalid setting."""
        try:
            return cls.model_validate(dict(attributes))
        except ValidationError as error:
            lines = "\n".join(map(str, validation_errors(error, cls)))
            raise ValueError(f"experiment {attributes.get('name')}: {lines}") from None

    @field_validator("schedule")
    @classmethod
    def _is_cron(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                dg.ScheduleDefinition(job_name="any", cron_schedule=value)
            except dg.DagsterInvalidDefinitionError:
                raise ValueError(
                    f"{value!r} is no cron expression; expected five fields (minute, hour, day of "
                    f"month, month, day of week), such as '0 3 * * *', or a word such as '@daily'"
                ) from None
        return value

    @model_validator(mode="before")
    @classmethod
    def _dataset_has_our_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("dataset"), dict):
            return {**values, "dataset": {"name": values.get("name"), **values["dataset"]}}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (found := next(self._contradictions(), None)) is not None:
            raise ValueError(found)
        return self

    def _contradictions(self) -> Iterator[str]:
        """A sentence for each setting that contradicts another one, or the task."""
        shared, task, pretraining = self.pretrained_from, self.task, self.pretraining
        if shared is not None and pretraining is None:
            yield "pretraining: null means new weights, and pretrained_from those of an encoder; remove one of the two"
        if shared is not None and pretraining != Stage():
            yield f"pretrained_from: {shared}: the encoder comes from that experiment, so `pretraining` has no effect; remove one of the two"
        if shared == self.name:
            yield f"pretrained_from: {shared} is this experiment; remove it"
        if pretraining is None and self.resources.pretraining is not None:
            yield "resources.pretraining: has no effect, since pretraining is null; remove it"
        if task == "interpolation":
            if self.finetuning != Stage():
                yield "finetuning: an interpolation registers the pretrained autoencoder and finetunes nothing; remove it, or set another task"
            if self.start_from == "champion":
                yield "start_from: an interpolation finetunes nothing; remove it"
            if shared or pretraining is None:
                what = "pretrained_from" if shared else "pretraining: null"
                yield f"{what}: an interpolation registers the model that it pretrains; remove it"
            for name, wrong in {"normalize_targets": True, "pos_encoding": "absolute"}.items():
                if self.shape.get(name) == wrong:
                    why = "such a model cannot predict values at other positions in the units of the data"
                    yield f"pretraining.model.{name}: {wrong}: {why}, which an interpolation serves; remove it"
        elif self.gate.min_baseline_gain is not None and not self.measure_baselines:
            yield "gate.min_baseline_gain: no baseline is measured with measure_baselines: false; remove one of the two"
        if (found := self.finetuning.model.get("problem_type", task)) != task:
            yield f"finetuning.model.problem_type: {found} contradicts task: {task}; remove it, the task determines it"
        if task != "classification":
            if self.primary_metric != "auto":
                yield f"primary_metric: {self.primary_metric} is a metric of classes, and models of {task} are compared by r2; remove it"
            given = [f"gate.{n}" for n in CLASS_THRESHOLDS if getattr(self.gate, n) is not None]
            for name in [*given, *(["baselines"] if self.baselines else [])]:
                yield f"{name}: is for classes, and the task is {task}; remove it"

    @model_validator(mode="after")
    def _trainings_are_valid(self) -> Self:
        """Those of the file, with the run config of automation, and in a search."""
        if errors := training_errors(self.pretraining, self.finetuning, self.task):
            raise ValueError("\n".join(errors))
        try:
            if self.automation.run_config:
                self.with_run_config(self.automation.run_config)
        except ValueError as error:
            lines = str(error).removeprefix(f"experiment {self.name}: ").splitlines()
            raise ValueError("\n".join(f"automation.run_config: {ln}" for ln in lines)) from None
        if self.tuning is not None:
            plain = self.model_copy(update={"tuning": None})
            if errors := self.tuning.problems(plain, plain.with_settings):
                raise ValueError("\n".join(errors))
        return self

    def with_settings(
        self,
        *,
        pretraining: Mapping[str, Any] = {},
        finetuning: Mapping[str, Any] = {},
        resources: Mapping[str, Any] = {},
    ) -> Self:
        """The experiment with these settings over those of its file, as if the file had them.

        Args:
            pretraining, finetuning: ``{"model": {...}, "trainer": {...}}``.
            resources: fields and sections of stages. A new target drops the profile.

        Raises:
            ValueError: with the sentences of the file.
        """
        changed: dict[str, Any] = {}
        for name, values in (("pretraining", pretraining), ("finetuning", finetuning)):
            if (stage := getattr(self, name)) is not None:
                changed[name] = merged(dict(stage), values, ("model", "trainer"))
            elif values:
                raise ValueError(f"experiment {self.name}: {name}: null: there is no such training")
        given = self.resources.model_dump(exclude_unset=True)
        if resources.get("target", self.resources.target) != self.resources.target:
            given.pop("profile", None)
        for stage in STAGES.values():
            target = self.resources.of(stage).target
            if stage in resources and resources[stage].get("target", target) != target:
                (given.get(stage) or {}).pop("profile", None)
        changed["resources"] = merged(given, resources, STAGES.values())
        # what automation passes to other runs is not over these settings
        found = self.parse({**dict(self), **changed, "automation": Automation()})
        return found.model_copy(update={"automation": self.automation})

    def with_run_config(self, given: Mapping[str, Mapping[str, Any]]) -> Self:
        """The experiment as run configs change it: asset name → fields of its JobConfig.

        Raises ValueError with the sentences of the file.
        """
        known = [name for name in self.own_assets if name in STAGES]
        stages: dict[str, dict[str, Any]] = {"pretraining": {}, "finetuning": {}, "resources": {}}
        for name, values in given.items():
            if name not in known:
                raise ValueError(f"{name}: no such asset; expected one of {', '.join(known)}")
            stage = STAGES[name]
            fields = RUN_CONFIGS[name].model_fields
            if unknown := sorted(values.keys() - fields):
                raise ValueError(
                    f"{name}.{unknown[0]}: not a setting of a run; there are {', '.join(fields)}"
                )
            size = overrides(values)
            for section in {"model", "trainer"} & size.keys():
                stages[stage][section] = size.pop(section)
            if size:
                stages["resources"][stage] = size
        try:
            return self.with_settings(**stages)
        except ValueError as error:
            text = str(error)
            for name in given:
                text = text.replace(f"resources.{STAGES[name]}.", f"{name}.")
            raise ValueError(text) from None

    def run_config(self, names: Collection[str]) -> dict[str, Any]:
        """The run config of a run of these assets that automation starts."""
        given = {n: config for n, config in self.automation.run_config.items() if n in names}
        ops = {self.key(n).to_python_identifier(): {"config": overrides(given[n])} for n in given}
        return {"ops": ops}

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of input and encoder, among others: ``model`` of the first training."""
        return (self.pretraining or self.finetuning).model

    @property
    def training_names(self) -> tuple[str, ...]:
        """Assets of the trainings, in their order: an encoder, a finetuned model, or both."""
        encoder = [] if self.pretraining is None else [ENCODER]
        return (*encoder, *([name] if (name := FINETUNED.get(self.task)) else []))

    @property
    def asset_names(self) -> tuple[str, ...]:
        """In the order in which they are materialised; all before an asset are upstream of it."""
        return ("dataset", *self.training_names, "evaluation_report", self.registered)

    @property
    def own_assets(self) -> tuple[str, ...]:
        """Without the encoder of another experiment, and with the predictions, if there are any."""
        own = (name for name in self.asset_names if self.key(name).path[0] == self.name)
        return (*own, *(("batch_predictions",) if self.predictions else ()))

    @property
    def registered(self) -> str:
        """Name of the asset that registers the model."""
        return _REGISTERED[self.task]

    def key(self, asset_name: str) -> dg.AssetKey:
        """Key of one of its assets, or of the encoder it shares."""
        owner = self.pretrained_from if asset_name == ENCODER else None
        return dg.AssetKey([owner or self.name, asset_name])

    def code_version(self, asset_name: str) -> str:
        """Digest of the release and the sections that determine an asset: a change makes it stale."""
        sections = _SECTIONS.get(asset_name, _ALL_SECTIONS)
        content = self.model_dump(mode="json", include=sections)
        if "pretraining" in sections and self.pretrained_from is not None:
            content["pretrained_from"] = self.pretrained_from
        return digest_of([importlib.metadata.version("roma-pipeline"), content])[:12]

    def asset_arguments(self, asset_name: str) -> dict[str, Any]:
        """Arguments of ``dg.asset`` that all assets of the experiment share."""
        config = RUN_CONFIGS.get(asset_name)
        upstream: tuple[str, ...] = (self.registered,)  # of batch_predictions, recent_inputs
        if asset_name in (names := self.asset_names):
            upstream = names[: names.index(asset_name)]
        elif asset_name == "tuning_study":
            upstream = ("dataset",)
        return {
            "code_version": self.code_version(asset_name),
            "config_schema": config.to_config_schema() if config else None,
            "key": self.key(asset_name),
            "group_name": self.name,
            "owners": list(self.owners) or None,
            "tags": {"experiment": self.name, **self.tags},
            "deps": [self.key(name) for name in upstream],
            "retry_policy": retry_policy(),
            "required_resource_keys": set() if asset_name == self.registered else set(JOB_CLIENTS),
        }


_FROM_DATA = (
    "tubelet_size", "n_channels", "n_pos_dims", "position_axes", "axis_categories", "missing_values",
    "covariates", "grid_step",
)  # fmt: skip


def training_errors(
    pretraining: Stage | None, finetuning: Stage, task: str = "classification"
) -> list[str]:
    """A sentence for each wrong setting of the trainings, whatever the environment, by its path."""
    found = []
    trainings = {} if pretraining is None else {"pretraining": pretraining}
    trainings["finetuning"] = finetuning
    for where, stage in trainings.items():
        if "checkpoint_dir" in stage.trainer:
            found.append(
                f"{where}.trainer.checkpoint_dir: every job has a folder of its own; remove it"
            )
        found += _errors(TrainerConfig, stage.trainer, f"{where}.trainer")
    first, stage = next(iter(trainings.items()))
    refused = dict.fromkeys(_FROM_DATA, "determined by the data set")
    if pretraining is None:
        refused |= dict.fromkeys(OF_PRETRAINING, "of pretraining, which is null")
    found += [f"{first}.model.{n}: {refused[n]}; remove it" for n in stage.model if n in refused]
    # the data are unknown here: assume axes, channels and missing values that the settings refer to
    channel_axis = stage.model.get("channel_axis")
    n_axes = max(1, 1 + channel_axis) if isinstance(channel_axis, int) else 1
    shape: dict[str, Any] = {"tubelet_size": [1, 1, 1], "n_channels": 2, "n_pos_dims": n_axes}
    shape |= {"grid_step": 1.0}
    if pretraining is None:
        model = {n: x for n, x in finetuning.model.items() if n not in refused} | shape
        model |= {"missing_values": True, "problem_type": task}
        stack = model.get("encoder_config")
        given = stack if isinstance(stack, Mapping) else ()
        if missing := {"d_model", "nhead", "depth"}.difference(given):
            expected = f"expected {', '.join(sorted(missing))} of the new weights, since pretraining is null"
            way_out = "add them, or `pretraining: {}` for one with default settings"
            return [*found, f"finetuning.model.encoder_config: {expected}; {way_out}"]
        return found + _errors(RoMAForClassificationConfig, model, "finetuning.model")
    shape["missing_values"] = not pretraining.model.get("normalize_targets")
    encoder = {**pretraining.model, **shape}
    wrong = _errors(RoMAForPreTrainingConfig, encoder, "pretraining.model")
    stack = finetuning.model.get("encoder_config", {})
    if not isinstance(stack, Mapping):
        text = f"finetuning.model.encoder_config: expected a mapping, got {stack!r}"
        return [*found, *wrong, text]
    known = type(RoMAForPreTrainingConfig.model_fields["encoder_config"].default).model_fields
    fixed = [name for name in finetuning.model if name in SHAPE]
    fixed += [f"encoder_config.{name}" for name in stack if name in known and name not in DROPOUTS]
    free = f"{', '.join(HEAD)} and, in encoder_config, {', '.join(DROPOUTS)}"
    wrong += [
        f"finetuning.model.{name}: determined by the pretrained encoder; settable are {free}"
        for name in fixed
    ]
    if wrong:
        return found + wrong
    config = RoMAForPreTrainingConfig.from_values(encoder)
    classifier = {name: getattr(config, name) for name in SHAPE} | dict(finetuning.model)
    classifier |= {"problem_type": task} if task == "regression" else {}
    classifier["encoder_config"] = config.encoder_config.model_dump() | dict(stack)
    return found + _errors(RoMAForClassificationConfig, classifier, "finetuning.model")


def _errors(settings: type[RomaSettings], values: Mapping[str, Any], where: str) -> list[str]:
    try:
        settings.from_values(values)
    except SettingsError as error:
        return [
            ": ".join(filter(None, (f"{where}.{name}".strip("."), text)))
            for name, text in error.problems
        ]
    return []


def load_experiment(name: str) -> Experiment:
    """The experiment in this folder of ``defs/``, or YAML file; ValueError if it is invalid."""
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name))
    paths = defs_files()
    if name not in paths:
        raise ValueError(
            f"no experiment {name!r}; available: {', '.join(paths)}, or the path of a defs.yaml; yours "
            f"are read from {project_folder() / 'defs'} (ROMA_PROJECT)"
        )
    return _read(not_shipped(name, paths[name]))


def all_experiments() -> dict[str, Experiment | str]:
    """Experiments by the path of their folder in ``defs/``, or the error of their file.

    One beside a shipped one is an error. Without components of other types, which Dagster loads.
    """
    found: dict[str, Experiment | str] = {}
    for name, path in defs_files().items():
        try:
            document = read_yaml(path)
            if not isinstance(document, dict) or not _other_type(path, document.get("type")):
                found[name] = _read(not_shipped(name, path))
        except ValueError as error:
            found[name] = str(error)
    return found


def not_shipped(name: str, path: Path) -> Path:
    """The file of this folder of ``defs/``; ValueError if there is a shipped one beside it."""
    shipped = DEFS / name / "defs.yaml"
    if shipped.exists() and path.resolve() != shipped.resolve():
        raise ValueError(f"{path}: {name} is a shipped experiment; choose another folder and name")
    return path


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; ValueError with line and column if it is missing or invalid."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{path} is not valid YAML: {place}{error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None


def _other_type(path: Path, kind: Any) -> type | None:
    """The component of another type that a file names; ValueError if there is none of that name."""
    if kind in (None, COMPONENT):
        return None
    try:
        # Dagster resolves what begins with a dot
        found = dg.Component if str(kind).startswith(".") else pkgutil.resolve_name(kind)
        if issubclass(found, dg.Component):
            return found
        reason = "it is no component"
    except Exception as error:  # also of the module that is imported
        reason = str(error)
    raise ValueError(f"{path}: type: expected {COMPONENT}, got {kind!r}: {reason}")


def _read(path: Path) -> Experiment:
    document = read_yaml(path)
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or "type" not in document:
        raise ValueError(
            f"{path}: expected `type` and `attributes` of an experiment; its type is {COMPONENT}"
        )
    if (found := _other_type(path, document["type"])) and not issubclass(found, Experiment):
        raise ValueError(f"{path}: type: expected {COMPONENT}, got {document['type']}")
    if unknown := [str(key) for key in document if key not in _KEYS]:
        raise ValueError(f"{path}: {unknown[0]}: no such key; expected one of {', '.join(_KEYS)}")
    try:
        return Experiment.parse(attributes)
    except ValueError as error:
        lines = str(error).removeprefix(f"experiment {attributes.get('name')}: ").splitlines()
        raise ValueError("\n".join(f"{path}: {line}" for line in lines)) from None
