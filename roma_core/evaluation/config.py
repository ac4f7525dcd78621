"""Configuration of an evaluation job (``config.json``) and its serving checks. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from roma_core.files import read_json, write_json
from roma_core.serving.package import SmokeTest
from roma_core.settings import Frozen
from roma_core.trainer.defaults import PrimaryMetric


class Baseline(Frozen):
    """The accuracy of another method on the same series, and where the number comes from."""

    name: str
    accuracy: float = Field(ge=0, le=1)
    source: str


class Fact(Frozen):
    """One line of a table of facts; ``monospace`` for digests and other identifiers."""

    label: str
    value: str
    monospace: bool = False


class FactSheet(Frozen):
    """A titled table of facts: about the data, the model, the training, the job."""

    title: str
    facts: tuple[Fact, ...]


class ServingChecks(Frozen):
    """Measurements of a candidate's package and of the champion it was compared with."""

    schema_version: Literal[1] = 1
    serving_difference: float  # of a probability, the largest: trained model against package
    size_mb: float  # all files of the package
    smoke_test: SmokeTest | None = None  # None if it failed
    smoke_test_problem: str | None = None
    champion_smoke_test: SmokeTest | None = None
    champion_problem: str | None = None  # why the champion could not be evaluated on these series
    leaks: tuple[str, ...] = ()  # test series in the training data, which `leakage` refuses
    test_split: str = ""  # digest of the test objects; equal for equal splits

    def save(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls.model_validate(read_json(path, schema_version=1))


class EvaluationJobConfig(Frozen):
    """One evaluation on the test split of a data set.

    With ``classifier`` the job evaluates a classifier or a regressor, without it the reconstructions
    of ``autoencoder``.
    """

    schema_version: Literal[1] = 1
    name: str  # of the model, as it will be registered
    dataset: str  # folder of the data set; its test split is evaluated
    dataset_digest: str
    classifier: str | None = None  # folder of the weights of a classifier or a regressor
    # folder of pretrained weights; beside a classifier the report shows its reconstructions, and
    # its encoder is packaged, too
    autoencoder: str | None = None
    # evaluate reconstructions also with all but N observations of each series hidden; these
    # metrics end with _observed_N
    n_observed: tuple[Annotated[int, Field(gt=0)], ...] = ()
    seed: int = Field(0, ge=0)  # of masks: equal seeds hide the same observations from every model
    champion: str | None = None  # package folder of the present champion, also predicted
    champion_version: str | None = None
    champion_problem: str | None = None  # why there is a champion but no package folder of it
    trained_on: tuple[str, ...] = ()  # folders of the data that the weights were trained on
    decided_before: int | None = None  # earlier models that this test split has decided about
    lineage: dict[str, str] = Field({})  # identifiers that go into the package
    curves: dict[str, str] = Field({})  # title -> metrics.jsonl of a training
    primary_metric: PrimaryMetric | Literal["auto"] = "auto"
    baselines: tuple[Baseline, ...] = ()
    measure_baselines: bool = True  # train and evaluate other methods on the same series
    facts: tuple[FactSheet, ...] = ()  # tables of facts for the report
    batch_size: int = Field(64, gt=0)  # series

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if self.classifier is None and self.autoencoder is None:
            raise ValueError("set classifier, or autoencoder to evaluate its reconstructions")
        if self.classifier is not None and self.n_observed:
            raise ValueError("n_observed is for reconstructions; leave classifier out, or it")
        return self
