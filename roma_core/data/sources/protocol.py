"""What a source of series is.

A ``SourceConfig`` is the part of a configuration file that names the data. Opening it fetches and
checks whatever has to be there and gives a ``Source``, which knows its schema and reads its series
one after the other. A new kind of source is one such pair, registered in ``sources/__init__.py`` or,
from another package, by an entry point.

A source may also have ``targets`` (channels: numbers known of every observation that a model may be
trained to tell) and ``__length_hint__``, the number of its series, for the progress bar.

Shapes, here and in the rest of ``roma_core.data``:
    N observations of one series   C channels   D position axes   K targets
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from roma_core.data.schema import Channel, PositionAxis

RecordedSplit = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class RawSeries:
    """One object as delivered: nothing dropped, nothing normalised."""

    id: str
    positions: NDArray[np.float64]  # (N, D)
    values: NDArray[np.float32]  # (N, C)
    label: str | None = None
    recorded_split: RecordedSplit | None = None  # the publisher's assignment, where there is one
    group: str | None = (
        None  # what objects of one patient, host or device share; all or none have it
    )
    targets: NDArray[np.float32] | None = None  # (N, K), if the source has targets


class Source(Protocol):
    """An opened source. ``read`` may be called again and then gives the same series again."""

    @property
    def channels(self) -> tuple[Channel, ...]: ...

    @property
    def axes(self) -> tuple[PositionAxis, ...]:
        """Names and units; anchor, offset and scale are set by the data set's configuration."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """All labels that may come, in the order of their indices; empty without labels."""
        ...

    @property
    def files(self) -> Mapping[str, str]:
        """sha256 of every input file, by a name that does not depend on this computer."""
        ...

    @property
    def citation(self) -> str: ...

    @property
    def licence(self) -> str: ...

    def read(self) -> Iterator[RawSeries]:
        """Give every series, in an order that depends on the files alone."""
        ...


def targets_of(source: Source) -> tuple[Channel, ...]:
    """The targets of a source; empty if it knows of none."""
    return tuple(getattr(source, "targets", ()))


class SourceConfig(BaseModel):
    """Base of all source configurations; ``kind`` is the registered name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    citation: str = Field("", description="How to cite the data.")
    licence: str = Field("", description="Licence of the data.")

    def open(self, cache: Path) -> Source:
        """Make the data available and check it.

        Args:
            cache: folder for what has to be fetched; created when needed.

        Raises:
            DataError: the data is missing, damaged or not what the configuration says.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it is opened")
