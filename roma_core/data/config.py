"""Configuration of a data set: what it is built from and how. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
)

from roma_core.data.arriving import RepairOptions
from roma_core.data.errors import DataError
from roma_core.data.mistakes import mistakes
from roma_core.data.sources import SourceConfig, source_config
from roma_core.data.splits import SplitOptions


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AxisOptions(_Section):
    """How positions on one axis reach the model; see ``schema.PositionAxis``."""

    anchor: Literal["none", "first"] = "none"
    offset: float = Field(0.0, allow_inf_nan=False, description="Subtracted after anchoring.")
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        1.0,
        description="Axis units per radian; 'auto' takes it from the gaps and spans of the train "
        "split (see scales.py).",
    )


class ChannelOptions(_Section):
    """How values of one channel are transformed before mean and std are taken."""

    transform: Literal["identity", "arcsinh"] = "identity"
    transform_scale: float = Field(1.0, gt=0, allow_inf_nan=False)


class DatasetConfig(_Section):
    """A data set: its source, what is left out, its splits, its axes and channels."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$",
        description="Name of the data set; part of the split rule, so a new name splits anew.",
    )
    source: Annotated[SerializeAsAny[SourceConfig], BeforeValidator(source_config)]
    drop_rate: float = Field(
        0.0, ge=0, lt=1, description="Share of each series' observations left out, in every split."
    )
    drop_seed: int = Field(0, ge=0, description="Chooses which observations are left out.")
    validation_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of *the rest* that goes to validation: of the objects that are not test, not "
        "of all. 0.1 beside a test_share of 0.2 is 8 % of all objects.",
    )
    test_share: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Share of objects that go to test if the source records no split.",
    )
    split: SplitOptions = SplitOptions()
    repair: RepairOptions = RepairOptions()
    axes: dict[str, AxisOptions] = Field({}, description="Options by axis name.")
    channels: dict[str, ChannelOptions] = Field({}, description="Options by channel name.")

    @classmethod
    def from_yaml(cls, path: Path | str) -> Self:
        """Read a configuration file.

        Raises:
            DataError: the file is no YAML mapping, or a value is missing, unknown or out of range; a
                sentence for each, that names field, what is allowed and what came.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise DataError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise DataError(f"{path}: {'; '.join(mistakes(error, cls))}") from error
