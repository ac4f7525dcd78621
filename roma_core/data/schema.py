"""What a data set says of itself: ``manifest.json``, as pydantic models.

A data set is a folder of flat columns. Row i of ``values.npy`` and ``positions.npy`` is one
observation; series k owns rows ``offsets[k]:offsets[k + 1]``. Where there are more than 67 million
observations, these columns go on in ``values-1.npy``, ``values-2.npy`` and so on, each with whole
series, so that files stay of a size that is copied, verified and kept in parallel.

Version 2 of the format added targets. A set without them is written, and has the digest, as in
version 1; both versions are read.

    manifest.json      this module's ``Manifest``
    values.npy         (n_observations, n_channels) float32, as delivered: not normalised
    positions.npy      (n_observations, n_axes) float64, as delivered: not re-anchored
    offsets.npy        (n_series + 1,) int64
    targets.npy        (n_observations, n_targets) float32, as delivered; absent without targets
    labels.npy         (n_series,) int64 index into ``classes``; absent without labels
    splits.npy         (n_series,) int8 index into ``SPLITS``
    ids.json           list of n_series strings
    groups.json        list of n_series strings; absent without groups

Normalisation and the anchoring of positions are applied when a sample is read, by the same code
as at serving time, so what is on disk stays what came in.

The one error of this package.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DataError(ValueError):
    """Data, or a description of data, that cannot be used; the text names the object or the file,
    what was expected, what came, and what to do."""


Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def _is_empty(value: Sized) -> bool:
    return len(value) == 0


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Channel(_Document):
    """One measured quantity of an observation."""

    name: str
    unit: str = Field(description="Unit of the values as delivered; '1' for a pure number.")


class PositionAxis(_Document):
    """One coordinate of an observation: time, a band's index, a place.

    The model sees ``(position - anchor - offset) / scale`` in float32, computed in float64.
    """

    name: str
    unit: str = Field(description="Unit of the positions as delivered.")
    anchor: Literal["none", "first"] = Field(
        "none",
        description="'first' subtracts each series' smallest position, so that dates such as "
        "MJD 60000.001 keep their fraction in float32.",
    )
    offset: float = Field(0.0, description="Subtracted after anchoring, in `unit`.")
    scale: float = Field(
        1.0, gt=0, description="Units of the axis per radian of the fastest rotation."
    )


class ChannelNormalisation(_Document):
    """``(transform(value) - mean) / std``; mean and std are those of the train split."""

    transform: Literal["identity", "arcsinh"] = "identity"
    transform_scale: float = Field(1.0, gt=0, description="arcsinh(value / transform_scale).")
    mean: float
    std: float = Field(gt=0)


class DataSchema(_Document):
    """What a model must agree with its data about; it travels with the weights."""

    channels: tuple[Channel, ...]
    axes: tuple[PositionAxis, ...]
    classes: tuple[str, ...] = ()
    targets: tuple[Channel, ...] = Field(
        (),
        exclude_if=_is_empty,
        description="Numbers known of every observation that a model may be trained to tell; it never "
        "sees them.",
    )
    normalisation: tuple[ChannelNormalisation, ...] = Field(
        description="One entry per channel, in the order of `channels`."
    )

    @property
    def units(self) -> dict[str, str]:
        """Axis or channel name → unit."""
        axes = {axis.name: axis.unit for axis in self.axes}
        return axes | {channel.name: channel.unit for channel in self.channels}


class FileRecord(_Document):
    """Size and sha256 of one file of the folder."""

    n_bytes: int
    sha256: str


class SplitCounts(_Document):
    n_series: int
    n_observations: int


class Irregularity(_Document):
    """Observations taken out on purpose; counted, so that a drop that drops nothing is noticed."""

    drop_rate: float = 0.0
    seed: int = 0
    n_observations_before: int
    n_dropped: int


class Repairs(_Document):
    """What was put right on the way in; see ``arriving.RepairOptions``."""

    series_sorted: int = Field(0, description="Series whose observations were out of order.")
    duplicate_observations: int = Field(0, description="Left out, or taken into a mean.")
    observations_not_finite: int = Field(0, description="Observations left out.")
    empty_series_left_out: int = 0


class Provenance(_Document):
    """Where the data came from, down to the bytes."""

    source: str = Field(description="The source's registered name and its parameters, as text.")
    files: dict[str, str] = Field(description="sha256 of every input file, by name.")
    citation: str = ""
    licence: str = ""


class Manifest(_Document):
    """Everything about a data set but its numbers."""

    schema_version: Literal[1, 2] = Field(1, description="2 for a set with targets, 1 without.")
    name: str
    data_schema: DataSchema
    counts: dict[Split, SplitCounts]
    shards: tuple[int, ...] = Field(
        (), description="First series of every further file of values, positions and targets."
    )
    split_rule: str
    irregularity: Irregularity | None = None
    repairs: Repairs | None = None
    provenance: Provenance
    files: dict[str, FileRecord]
    digest: str = Field(
        description="sha256 over every other field but `provenance.source`: the version of the data. "
        "Equal input gives an equal digest."
    )
