"""What an experiment does by itself: the section ``automation`` of its file. All of it starts off."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NewData(_Section):
    """A look at the source's files; a data set is built if they changed, and trained on if it did."""

    every_min: float = Field(10, ge=0.5, description="Minutes between two looks.")
    settle_s: float = Field(
        60, ge=0, description="A file younger than this is still being delivered: wait."
    )


class DriftThresholds(_Section):
    """Effect sizes from which on inputs have drifted; see roma_core.evaluation.drift."""

    psi: float = Field(0.25, gt=0, description="Population stability index, chance taken off.")
    wasserstein: float = Field(0.5, gt=0, description="In standard deviations of training data.")
    missing: float = Field(0.1, gt=0, le=1, description="Difference of shares of missing values.")
    embedding: float = Field(
        0.5, gt=0, description="Shift of the encoder's features, in spreads of training series."
    )


class Drift(_Section):
    """Recent inputs against the data the present model was trained on."""

    files: tuple[Path, ...] = Field(
        min_length=1,
        description="Parquet files of recent inputs or patterns, a row per series, list columns "
        "named as the data set's axes and channels (as `roma data export` writes them).",
    )
    newest: int = Field(10, gt=0, description="Files looked at, the newest ones.")
    class_column: str | None = Field(None, description="Column of the predicted class.")
    min_series: int = Field(100, gt=0, description="Fewer say nothing.")
    every_min: float = Field(60, ge=0.5, description="Minutes between two looks.")
    thresholds: DriftThresholds = DriftThresholds()
    cooldown_h: float = Field(168, ge=0, description="Hours to the next training for drift.")
    only_if_new: bool = Field(
        True, description="Train only if there are new data or settings to train on."
    )
    dry_run: bool = Field(False, description="Only say what would be done.")


class Automation(_Section):
    """Sensors of an experiment. Each starts switched off on Dagster's page."""

    new_data: NewData | None = None
    drift: Drift | None = None
    budget_hours_per_week: float | None = Field(
        None,
        gt=0,
        description="No training is begun by itself when jobs of the last 7 days took so many "
        "GPU-hours, or CPU-hours where there is no GPU.",
    )
    predict_on_promotion: bool = Field(
        False, description="Materialise batch_predictions when another version becomes champion."
    )
    freshness_h: dict[str, float] = Field(
        {}, description="Asset -> hours after which it is stale, shown on Dagster's page."
    )

    @model_validator(mode="before")
    @classmethod
    def _an_empty_section_takes_its_defaults(cls, values: Any) -> Any:
        """``new_data:`` with nothing behind it switches it on, as people write it."""
        if isinstance(values, dict) and "new_data" in values and values["new_data"] is None:
            return {**values, "new_data": {}}
        return values

    @model_validator(mode="after")
    def _hours_are_positive(self) -> Self:
        if bad := {k: v for k, v in self.freshness_h.items() if v <= 0}:
            raise ValueError(f"freshness_h: expected hours greater than 0, got {bad}")
        return self
