"""Dagster components: what a ``defs.yaml`` may name.

``RomaExperiment``: one YAML file → five assets, their checks, their schedule and sensors.
``dg scaffold defs roma_pipelines.components.RomaExperiment NAME --source …``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import dagster as dg
from pydantic import BaseModel, Field, ValidationError

from roma_core.settings import validation_errors
from roma_pipelines.assets.batch_predictions import batch_predictions_asset
from roma_pipelines.assets.dataset import dataset_asset
from roma_pipelines.assets.evaluation_report import evaluation_report_asset
from roma_pipelines.assets.registered_model import registered_classifier_asset
from roma_pipelines.assets.training import finetuned_classifier_asset, pretrained_encoder_asset
from roma_pipelines.automation.definitions import automated_definitions
from roma_pipelines.experiment import Experiment

__all__ = ["RomaExperiment"]


class ExperimentParams(BaseModel):
    """What ``roma-pipeline new-experiment`` takes, too."""

    source: str = Field(
        description="A file, a pattern, a folder, a data set's YAML file or a source's name."
    )
    object: str | None = Field(None, description="Column of the object's id.")
    time: str | None = Field(None, description="Column of the time.")
    label: str | None = Field(None, description="Column of the class.")
    drop_rate: float = Field(0.0, description="Share of each series' observations to leave out.")


class ExperimentScaffolder(dg.Scaffolder[ExperimentParams]):
    """Writes a commented ``defs.yaml`` with settings that suit the data."""

    @classmethod
    def get_scaffold_params(cls) -> type[ExperimentParams]:
        return ExperimentParams

    def scaffold(self, request: dg.ScaffoldRequest[ExperimentParams]) -> None:
        """Look at the data and write the file into the folder that ``dg`` made.

        Raises:
            ValueError: the data cannot be used, or something else than YAML is asked for.
        """
        from roma_core.data.infer_schema import Roles
        from roma_core.files import write_bytes
        from roma_pipelines.scaffold import new_experiment, source_of
        from roma_pipelines.storage import Storage

        if request.scaffold_format != "yaml" or request.append:
            raise ValueError("an experiment is one YAML file of its own; leave --format out")
        wanted = request.params
        roles = Roles(object=wanted.object, time=wanted.time, label=wanted.label)
        guess, dataset = source_of([wanted.source], roles)
        if wanted.drop_rate:
            dataset["drop_rate"] = wanted.drop_rate
        name = Path(request.target_path).name
        made = new_experiment(name, guess, Storage.open().cache, dataset)
        write_bytes(Path(request.target_path) / "defs.yaml", made.text.encode())


# as written: Dagster's templates would turn the text "1" into a number
Section = Annotated[dict[str, Any], dg.Resolver.passthrough()]
Sections = Annotated[list[dict[str, Any]], dg.Resolver.passthrough()]


@dg.scaffold_with(ExperimentScaffolder)
class RomaExperiment(dg.Component, dg.Model, dg.Resolvable):
    """An experiment: data → pretrained encoder → classifier → report → registered model.

    Sections are those of ``roma_pipelines.experiment.Experiment``.
    """

    name: str = Field(description="Key prefix, group and registered name.")
    description: str = ""
    dataset: Section = Field(description="roma_core.data.DatasetConfig; name defaults to ours.")
    pretraining: Section = Field({}, description="model and trainer settings.")
    pretrained_from: str | None = Field(None, description="Experiment whose encoder is shared.")
    finetuning: Section = Field({}, description="model and trainer settings.")
    resources: Section = Field({}, description="Target and size of trainings.")
    gate: Section = Field({}, description="Thresholds and mode of promotion.")
    baselines: Sections = Field([], description="Other methods on the same test series.")
    predictions: Annotated[dict[str, Any] | None, dg.Resolver.passthrough()] = Field(
        None, description="File of series that the champion predicts; adds batch_predictions."
    )
    schedule: str | None = Field(None, description="Cron expression (UTC) of retraining.")
    automation: Section = Field({}, description="What it does by itself; starts switched off.")
    owners: list[str] = Field([], description="E-mail addresses or team:NAME.")
    tags: dict[str, str] = Field({}, description="Further tags of the assets.")

    def experiment(self) -> Experiment:
        """The checked experiment.

        Raises:
            ValueError: a setting is unknown or out of range; the text names it.
        """
        values = self.model_dump()
        values["dataset"] = {"name": self.name, **self.dataset}
        try:
            return Experiment.model_validate(values)
        except ValidationError as error:
            wrong = "\n".join(map(str, validation_errors(error, Experiment)))
            raise ValueError(f"experiment {self.name}: {wrong}") from None

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Its assets; its schedule and its sensors, which are switched off at first."""
        experiment = self.experiment()
        experiment.refuse_what_cannot_be_served()
        assets = [
            dataset_asset(experiment),
            *([] if experiment.pretrained_from else [pretrained_encoder_asset(experiment)]),
            finetuned_classifier_asset(experiment),
            evaluation_report_asset(experiment),
            registered_classifier_asset(experiment),
        ]
        if experiment.predictions is not None:
            assets.append(batch_predictions_asset(experiment))
        return automated_definitions(experiment, assets)
