"""Configuration of a data set: what it is built from and how. Imports no torch.

Whether a source may have changed, without reading it: names, sizes and times of its files.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    WithJsonSchema,
)

from roma_core.data.cleaning import RepairOptions
from roma_core.data.splits import SplitOptions
from roma_core.files import digest_of
from roma_core.schema import DataError
from roma_core.settings import validation_errors
from roma_core.sources.base import SourceConfig, source_config


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
    source: Annotated[
        SerializeAsAny[SourceConfig],
        BeforeValidator(source_config),
        WithJsonSchema({"type": "object", "required": ["kind"]}),  # each kind has fields of its own
    ]
    drop_rate: float = Field(
        0.0, ge=0, lt=1, description="Share of each series' observations left out, in every split."
    )
    drop_seed: int = Field(0, ge=0, description="Chooses which observations are left out.")
    validation_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of *the rest* that goes to validation: of the objects that are not test, not "
        "of all. 0.1 beside a test_fraction of 0.2 is 8 % of all objects.",
    )
    test_fraction: float = Field(
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
            raise DataError(
                f"{path}: {'; '.join(map(str, validation_errors(error, cls)))}"
            ) from error


class Fingerprint(NamedTuple):
    """``newest`` is the time of the newest file, seconds since the epoch; 0 without files."""

    digest: str
    n_files: int
    newest: float


def source_fingerprint(config: DatasetConfig) -> Fingerprint:
    """Of every local file that the configuration names, and of the configuration itself.

    A source without local files (a pinned package, generated data) changes with its settings alone.
    """
    files = fingerprint_of(_paths(config.source))
    document = [config.model_dump(mode="json"), files.digest]
    return files._replace(digest=digest_of(document)[:32])


def fingerprint_of(patterns: Iterable[Path]) -> Fingerprint:
    """Of files, of those that match patterns, and of all files below folders.

    Links to nothing, and files that go meanwhile, are passed over.
    """
    found = sorted(
        {(str(path), status.st_size, status.st_mtime_ns) for path, status in _files(patterns)}
    )
    newest = max((mtime for _, _, mtime in found), default=0) / 1e9
    return Fingerprint(digest_of(found)[:32], len(found), newest)


def _paths(value: Any) -> Iterator[Path]:
    """Every path in a configuration, whatever its kind of source calls it."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name))
    elif isinstance(value, dict):
        for one in value.values():
            yield from _paths(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _paths(one)


def _files(patterns: Iterable[Path]) -> Iterator[tuple[Path, os.stat_result]]:
    for pattern in patterns:
        for name in glob.glob(str(pattern)):  # noqa: PTH207 - may be absolute
            for path in _below(Path(name)):
                with contextlib.suppress(FileNotFoundError):  # a dangling link, or it went since
                    yield path, path.stat()


def _below(path: Path) -> Iterator[Path]:
    """A file itself, or all files below a folder."""
    if not path.is_dir():
        yield path
    for where, _, names in os.walk(path):
        yield from (Path(where) / name for name in names)
