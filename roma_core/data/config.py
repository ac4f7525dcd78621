"""Configuration of a data set: its source, splits, axes and channels. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    WithJsonSchema,
)

from roma_core.data.cleaning import RepairOptions
from roma_core.data.manifest import Leakage
from roma_core.data.splits import SplitOptions
from roma_core.files import Fingerprint, digest_of, fingerprint_of
from roma_core.schema import ChannelTransform, DataError
from roma_core.settings import Frozen, validation_errors
from roma_core.sources.base import SourceConfig, source_config

Rate = Annotated[float, Field(ge=0, lt=1)]


class AxisOptions(Frozen):
    """Normalisation of positions on one axis; see ``roma_core.schema.PositionAxis``."""

    anchor: Literal["none", "first"] = "none"
    offset: float = Field(0.0, allow_inf_nan=False, description="Subtracted after anchoring.")
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = 1.0
    """Axis units per radian; 'auto' derives it from the gaps and spans of the train split (see
    schema.AxisScaleFit)."""
    encoding: Literal["auto", "rotary", "embedding"] = "auto"
    """'embedding': a learned vector per category; 'auto' takes it for an axis of words."""


class DatasetConfig(Frozen):
    """A data set: its source, repairs and drops, splits, axes and channels."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Name of the data set; part of the split rule, so a new name splits anew."""
    source: Annotated[
        SerializeAsAny[SourceConfig],
        BeforeValidator(source_config),
        WithJsonSchema({"type": "object", "required": ["kind"]}),  # each kind has fields of its own
    ]
    drop_rate: Rate = 0.0
    """Fraction of each series' observations to drop, in every split."""
    drop_by: Literal["observation", "value"] = "observation"
    """What drop_rate drops: whole observations, or the values of every channel independently of the
    other channels."""
    drop_seed: int = Field(0, ge=0, description="Seed of the choice of dropped observations.")
    validation_fraction: Rate = 0.1
    """Fraction of the objects *outside test* that goes to validation, not of all objects: 0.1
    beside a test_fraction of 0.2 is 8 % of all. Recorded validation comes on top."""
    test_fraction: Rate = 0.2
    """Fraction of objects that go to test if the source records no split."""
    split: SplitOptions = SplitOptions()
    leakage: Leakage = Field("error", exclude_if=lambda leakage: leakage == "error")
    """What the checks make of a group or equal content in two splits."""
    repair: RepairOptions = RepairOptions()
    layout: Literal["auto", "joint", "per_channel"] = "auto"
    """'joint': an observation has all channels, some of which may be missing; 'per_channel': it has
    the value of one; 'auto' decides by the source's first series."""
    normalise_by: str | None = None
    """Axis with categories that have a normalisation each, such as bands. The per_channel layout
    always has one per channel."""
    axes: dict[str, AxisOptions] = Field({}, description="Options by axis name.")
    channels: dict[str, ChannelTransform] = Field({}, description="Options by channel name.")

    @classmethod
    def from_yaml(cls, path: Path | str) -> Self:
        """Read a configuration file.

        Raises:
            DataError: the file is not a YAML mapping, or values are missing, unknown or out of range.
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
            problems = "; ".join(map(str, validation_errors(error, cls)))
            raise DataError(f"{path}: {problems}") from error


def source_fingerprint(config: DatasetConfig) -> Fingerprint:
    """Fingerprint of the configuration and of every local file it names, without reading the files."""
    files = fingerprint_of(_paths(config.source))
    document = [config.model_dump(mode="json"), files.digest]
    return files._replace(digest=digest_of(document)[:32])


def _paths(value: Any) -> Iterator[Path]:
    """Every path in a configuration, whatever its field is called."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel | dict):
        for _, item in value if isinstance(value, BaseModel) else value.items():
            yield from _paths(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths(item)
