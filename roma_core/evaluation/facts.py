"""What a report is told about the world around its numbers: baselines and tables of facts."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


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
