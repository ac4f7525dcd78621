"""What an evaluation measures beside predictions: ``measured.json``. Imports no torch.

Whoever decides about a model reads it together with the two tables of predictions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from roma_core.files import read_json, write_json
from roma_core.serving.trial import Trial


class Measured(BaseModel):
    """Facts of a candidate and of the champion it was evaluated beside."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    serving_difference: float = Field(
        description="Largest difference of a probability between trained model and package."
    )
    size_mb: float = Field(description="All files of the package.")
    trial: Trial | None = Field(None, description="None if it failed.")
    trial_problem: str | None = None
    champion_trial: Trial | None = None
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
