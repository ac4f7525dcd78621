"""The section ``automation`` of an experiment; all but one sensor start stopped."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from roma_core.files import digest_of
from roma_core.settings import Frozen


class NewData(Frozen):
    """Builds the data set when files of its source changed, and retrains when the data set changed."""

    every_min: float = Field(10, ge=0.5, description="Minutes between two checks.")
    settle_s: float = Field(60, ge=0)
    """Wait until the newest file is this old (seconds): it may be incomplete."""


class DriftThresholds(Frozen):
    """Effect sizes that count as drift; see ``roma_core.evaluation.drift``."""

    psi: float = Field(0.25, gt=0)
    """Population stability index, minus its expectation by chance."""
    wasserstein: float = Field(0.5, gt=0, description="In standard deviations of training data.")
    missing: float = Field(0.1, gt=0, le=1)
    """Difference of the fractions of missing values."""
    embedding: float = Field(0.5, gt=0)
    """Shift of encoder features, in spreads of the training series."""

    def ratios(self, effects: Mapping[str, float]) -> dict[str, float]:
        """Effect sizes in units of their thresholds, the largest first; from 1 on they are drift.

        ``effects`` are named as in ``value.flux psi``: the measure is the last word.
        """
        found = {name: x / getattr(self, name.rpartition(" ")[2]) for name, x in effects.items()}
        return dict(sorted(found.items(), key=lambda one: -one[1]))


class Drift(Frozen):
    """Compares recent inputs with the training data of the current model."""

    files: tuple[Path, ...] = Field(min_length=1)
    """Parquet files of recent inputs or patterns, a row per series, list columns named as the data
    set's axes and channels (as `roma data export` writes them)."""
    newest: int = Field(10, gt=0, description="Number of newest files to compare.")
    class_column: str | None = Field(None, description="Column of the predicted class.")
    min_series: int = Field(100, gt=0, description="Minimum number of series to compare.")
    every_min: float = Field(60, ge=0.5, description="Minutes between two looks for new files.")
    thresholds: DriftThresholds = DriftThresholds()
    cooldown_h: float = Field(168, ge=0)
    """Minimum hours between two trainings for drift."""
    only_if_new: bool = Field(True, description="Train only if the data or the settings changed.")
    dry_run: bool = Field(False, description="Report the action without taking it.")

    def newest_files(self) -> tuple[list[Path], str]:
        """The newest files, the newest last, and the digest of their names, sizes and times."""
        found = []
        for path in {Path(p) for pattern in self.files for p in glob.glob(str(pattern))}:  # noqa: PTH207
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                status = path.stat()
                found.append((status.st_mtime_ns, str(path), status.st_size))
        found = sorted(found)[-self.newest :]
        return [Path(path) for _, path, _ in found], digest_of(found)[:32]


class Automation(Frozen):
    """Sensors of an experiment; all but ``NAME_train_on_new_data`` start stopped."""

    new_data: NewData | None = None
    drift: Drift | None = None
    budget_hours_per_week: float | None = Field(None, gt=0)
    """Automation starts no training once jobs of the last 7 days used this many GPU-hours, or
    CPU-hours without GPUs. Those of tuning_study do not count."""
    predict_on_promotion: bool = False
    """Materialise batch_predictions when the champion changes."""
    freshness_h: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Asset name -> hours after which its freshness check fails."""

    run_config: dict[str, dict[str, Any]] = Field({})
    """Asset name -> run config, as on the Launchpad, of runs that the schedule and sensors
    start."""

    @model_validator(mode="before")
    @classmethod
    def _empty_section_means_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("new_data", 0) is None:
            return {**values, "new_data": {}}
        return values
