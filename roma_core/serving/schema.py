"""What goes into a served model and what comes out: ``list[Series] -> list[Prediction]``.

``LOGGED_MODEL`` (``logged_model.py``) must run where this package is not installed and therefore
repeats these two classes; a test keeps both in step.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Series(BaseModel):
    """One irregular series: positions and values of its observations, by name.

    Every list of one series has the same length, its number of observations (at least 1). Names
    and units are those of the model's schema. Series of one request may differ in length.
    """

    model_config = ConfigDict(extra="forbid")

    id: str | None = Field(None, description="Returned with the prediction; free text.")
    positions: dict[str, list[float]] = Field(
        description="Axis name -> one number per observation."
    )
    values: dict[str, list[float]] = Field(
        description="Channel name -> one number per observation."
    )
    units: dict[str, str] | None = Field(
        None, description="Axis or channel name -> unit; if given, checked against the model's."
    )


class Prediction(BaseModel):
    """The class of one series, with the probability of every class."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    label: str = Field(description="The most probable class.")
    probabilities: dict[str, float] = Field(description="Class name -> probability; they sum to 1.")
