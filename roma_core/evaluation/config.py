"""The frozen configuration of a job that judges reconstructions, ``config.json``. Imports no torch.

What a report is told about the world around its numbers: baselines and tables of facts.
What an evaluation measures beside predictions: ``measured.json``. Imports no torch.
The frozen configuration of an evaluation job, ``config.json``. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from roma_core.files import read_json, write_json
from roma_core.serving.smoke_test import SmokeTest


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Baseline(_Document):
    """The accuracy of another method on the same series, and where the number comes from."""

    name: str
    accuracy: float = Field(ge=0, le=1)
    source: str


class Fact(_Document):
    """One line of a table of facts; ``monospace`` for digests and other identifiers."""

    label: str
    value: str
    monospace: bool = False


class FactSheet(_Document):
    """A titled table of facts: about the data, the model, the training, the job."""

    title: str
    facts: tuple[Fact, ...]


class ServingChecks(BaseModel):
    """Facts of a candidate and of the champion it was evaluated beside."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    serving_difference: float = Field(
        description="Largest difference of a probability between trained model and package."
    )
    size_mb: float = Field(description="All files of the package.")
    trial: SmokeTest | None = Field(None, description="None if it failed.")
    trial_problem: str | None = None
    champion_trial: SmokeTest | None = None
    champion_problem: str | None = Field(
        None, description="Why the champion could not be evaluated on these series."
    )
    leaks: tuple[str, ...] = Field((), description="Test series that training may have seen.")
    test_split: str = Field("", description="Digest of the test objects: equal splits, equal text.")

    def save(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls.model_validate(read_json(path, schema_version=1))


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
