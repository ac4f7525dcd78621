"""The frozen configuration of an evaluation job, ``config.json``. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from roma_core.evaluation.facts import Baseline, FactSheet


class EvaluationJobConfig(BaseModel):
    """One evaluation: of which classifier, on which data, beside whom."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str = Field(description="Name of the model, as it will be registered.")
    dataset: str = Field(description="Folder of the data set; its test split is evaluated.")
    dataset_digest: str
    classifier: str = Field(description="Folder of the classifier's weights.")
    autoencoder: str | None = Field(
        None, description="Folder of pretrained weights; its reconstructions are shown."
    )
    champion: str | None = Field(
        None, description="Package folder of the present champion, predicted on the same series."
    )
    champion_version: str | None = None
    champion_problem: str | None = Field(
        None, description="Why there is a champion but no package folder of it."
    )
    trained_on: tuple[str, ...] = Field(
        (), description="Folders of the data that the weights were trained on."
    )
    decided_before: int | None = Field(
        None, description="How often this test split has decided about a model before."
    )
    lineage: dict[str, str] = Field({}, description="Identifiers that go into the package.")
    curves: dict[str, str] = Field({}, description="Title -> metrics.jsonl of a training.")
    baselines: tuple[Baseline, ...] = ()
    facts: tuple[FactSheet, ...] = Field((), description="Tables of facts for the report.")
    batch_size: int = Field(64, gt=0, description="Series at once.")
