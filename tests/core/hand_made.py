"""A source whose series a test writes out, and building it."""

from typing import Any

import numpy as np
from pydantic import Field

from roma_core.data import DatasetConfig, build_dataset
from roma_core.data.quality import check_dataset
from roma_core.schema import Channel, Covariate, PositionAxis
from roma_core.sources.base import RawSeries, SourceConfig


class HandMade(SourceConfig):
    """A source that is its own opened source."""

    kind: str = "hand_made"
    series: tuple[Any, ...] = Field((), exclude=True)
    classes: tuple[str, ...] = ("x", "y")
    channels: tuple[Channel, ...] = (Channel(name="a", unit="V"), Channel(name="b", unit="V"))
    axes: tuple[PositionAxis, ...] = (PositionAxis(name="t", unit="s"),)
    files: dict[str, str] = Field({})
    targets: tuple[Channel, ...] = Field((), exclude=True)
    target_level: str = Field("observation", exclude=True)
    covariates: tuple[Covariate, ...] = Field((), exclude=True)
    layout: str = Field("joint", exclude=True)

    def open(self, cache):
        return self

    def read(self):
        return iter(self.series)


def series(name="s", n=10, label="x", split="train", seed=0, **changes):
    values = np.random.default_rng(seed).normal(size=(n, 2)).astype(np.float32)
    fields = {"id": name, "positions": np.arange(n, dtype=float)[:, None], "values": values}
    return RawSeries(**{**fields, "label": label, "recorded_split": split, **changes})


SOME = (
    series("train-1", 10, "x", "train", 1),
    series("train-2", 7, "y", "train", 2),
    series("test-1", 12, "x", "test", 3),
    series("tëst-2", 1, "y", "test", 4),
)


def config_of(*all_series, source=None, **options):
    source = source or HandMade(series=all_series or SOME)
    return DatasetConfig(**{"name": "small", "source": source, "validation_fraction": 0, **options})


def built(folder, *all_series, **options):
    return build_dataset(config_of(*all_series, **options), folder, folder, progress=False)


def errors_in(path):
    """Every error of a data-set folder, a line each."""
    return [line for f in check_dataset(path) if f.severity == "error" for line in f.lines()]


def flip_a_byte(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def versions_in(root, name="small"):
    """The versions there are; a build that failed leaves not even the set's own folder."""
    home = root / name
    return [path.name for path in home.iterdir() if path.is_dir()] if home.exists() else []


def errors_but_leaks(path):
    return [line for line in errors_in(path) if "equal content" not in line]
