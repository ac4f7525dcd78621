"""The frozen configuration of a job that judges reconstructions, ``config.json``. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class ReconstructionJobConfig(BaseModel):
    """One evaluation of a pretraining model: on which data, with how much hidden."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    task: Literal["reconstruction"] = "reconstruction"
    name: str = Field(description="Name of the model, for the report.")
    dataset: str = Field(description="Folder of the data set; its test split is judged.")
    dataset_digest: str
    autoencoder: str = Field(description="Folder of the pretrained weights.")
    seen: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (),
        description="Judge once more with all observations of each series hidden but so many; the "
        "metrics get `_seen_N` after their names.",
    )
    seed: int = Field(
        0, ge=0, description="Chooses the hidden observations; the same for all models."
    )
    trained_on: tuple[str, ...] = Field(
        (), description="Folders of the data that the weights were trained on."
    )
    curves: dict[str, str] = Field({}, description="Title -> metrics.jsonl of a training.")
    batch_size: int = Field(64, gt=0, description="Series at once.")
