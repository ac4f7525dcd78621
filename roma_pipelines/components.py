"""``RomaExperiment``: the Dagster component that turns one YAML file into assets and sensors."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Self

import dagster as dg
from pydantic import BaseModel, Field

from roma_pipelines.assets.dataset import dataset_asset
from roma_pipelines.assets.evaluation_report import evaluation_report_asset
from roma_pipelines.assets.registered_model import batch_predictions_asset, registered_model_asset
from roma_pipelines.assets.training import finetuned_model_asset, pretrained_encoder_asset
from roma_pipelines.assets.tuning_study import tuning_study_asset
from roma_pipelines.automation.drift import recent_inputs_asset
from roma_pipelines.automation.sensors import retraining_schedule, sensors_of
from roma_pipelines.experiment import ENCODER, FINETUNED, Experiment


class ExperimentParams(BaseModel):
    """Parameters of ``dg scaffold defs``."""

    source: str = Field(
        description="File, pattern, folder, YAML file of a data set, or name of a source."
    )
    object: str | None = Field(None, description="Column of the object id.")
    time: str | None = Field(None, description="Column of the time.")
    label: str | None = Field(None, description="Column of the class.")
    drop_rate: float = Field(0.0, description="Fraction of each series' observations to drop.")


class ExperimentScaffolder(dg.Scaffolder[ExperimentParams]):
    """Writes a commented ``defs.yaml`` with settings chosen from the data."""

    @classmethod
    def get_scaffold_params(cls) -> type[ExperimentParams]:
        return ExperimentParams

    def scaffold(self, request: dg.ScaffoldRequest[ExperimentParams]) -> None:
        """Raises ValueError if the data cannot be used, or another format than YAML is requested."""
        from roma_core.data.infer_schema import ColumnRoles
        from roma_core.files import write_bytes
        from roma_pipelines.scaffold import new_experiment
        from roma_pipelines.storage import Storage

        if request.scaffold_format != "yaml" or request.append:
            raise ValueError("an experiment is one YAML file of its own; omit --format")
        params = request.params
        roles = ColumnRoles(object=params.object, time=params.time, label=params.label)
        folder, cache = Path(request.target_path), Storage.open().cache
        experiment = new_experiment(
            folder.name, [params.source], roles, cache=cache, drop_rate=params.drop_rate or None
        )
        write_bytes(folder / "defs.yaml", experiment.text.encode())


@dg.scaffold_with(ExperimentScaffolder)
class RomaExperiment(Experiment, dg.Component):
    """Data set → pretrained encoder → finetuned model → report → registered model."""

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        return cls  # the YAML file is validated against the experiment itself

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> Self:
        assert isinstance(attributes, cls)
        return attributes

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        assets = [
            dataset_asset(self),
            *([pretrained_encoder_asset(self)] if ENCODER in self.own_assets else []),
            *([finetuned_model_asset(self, name)] if (name := FINETUNED.get(self.task)) else []),
            evaluation_report_asset(self),
            registered_model_asset(self),
        ]
        if self.predictions is not None:
            assets.append(batch_predictions_asset(self))
        if self.automation.drift is not None:
            assets.append(recent_inputs_asset(self))
        if self.tuning is not None:
            assets.append(tuning_study_asset(self))
        return self.with_automation(assets)

    def with_automation(self, assets: Sequence[dg.AssetsDefinition]) -> dg.Definitions:
        """Adds freshness policies, schedule and sensors; ValueError if a setting names no asset."""
        names = {key.path[-1] for asset in assets for key in asset.keys}
        section, schedule = self.automation, self.schedule
        if unknown := sorted(set(section.freshness_h) - names):
            raise ValueError(
                f"automation.freshness_h.{unknown[0]}: no such asset; "
                f"expected one of {', '.join(sorted(names))}"
            )
        if section.predict_on_promotion and "batch_predictions" not in names:
            raise ValueError(
                "automation.predict_on_promotion: the experiment has no "
                "batch_predictions; add `predictions`"
            )
        return dg.Definitions(
            assets=[asset.map_asset_specs(self._with_freshness) for asset in assets],
            sensors=sensors_of(self),
            schedules=[] if schedule is None else [retraining_schedule(self, schedule)],
        )

    def _with_freshness(self, spec: dg.AssetSpec) -> dg.AssetSpec:
        if (hours := self.automation.freshness_h.get(spec.key.path[-1])) is None:
            return spec
        policy = dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=hours))
        return spec.replace_attributes(freshness_policy=policy)
