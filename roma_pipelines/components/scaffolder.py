"""``dg scaffold defs roma_pipelines.components.RomaExperiment NAME --source …``."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
from pydantic import BaseModel, Field


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
        from roma_core.data.guessing import Roles
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
