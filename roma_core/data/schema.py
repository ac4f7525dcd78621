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
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from roma_core.schema import DataSchema
from roma_core.settings import Frozen

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class FileRecord(Frozen):
    """Size and sha256 of one file of the folder."""

    n_bytes: int
    sha256: str


class SplitCounts(Frozen):
    n_series: int
    n_observations: int


class Irregularity(Frozen):
    """Observations taken out on purpose; counted, so that a drop that drops nothing is noticed."""

    drop_rate: float = 0.0
    seed: int = 0
    n_observations_before: int
    n_dropped: int


class Repairs(Frozen):
    """What was put right on the way in; see ``arriving.RepairOptions``."""

    series_sorted: int = Field(0, description="Series whose observations were out of order.")
    duplicate_observations: int = Field(0, description="Left out, or taken into a mean.")
    observations_not_finite: int = Field(0, description="Observations left out.")
    empty_series_left_out: int = 0


class Provenance(Frozen):
    """Where the data came from, down to the bytes."""

    source: str = Field(description="The source's registered name and its parameters, as text.")
    files: dict[str, str] = Field(description="sha256 of every input file, by name.")
    citation: str = ""
    licence: str = ""


class Manifest(Frozen):
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
