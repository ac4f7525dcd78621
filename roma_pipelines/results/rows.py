"""Rows of the results: an experiment under a protocol, beside the figures of others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

ROWS = Path(__file__).parent / "rows.yaml"


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Anchor(_Document):
    """Somebody else's figures."""

    name: str
    source: str = Field(description="Where they come from: a paper, or measured on which protocol.")
    like_for_like: bool = Field(description="Same objects, same observations left out, same split.")
    values: dict[str, dict[float, float]] = Field(
        description="Metric, as in metrics.json → share left out → figure."
    )


class Row(_Document):
    """An experiment at several shares of observations left out, some seeds each."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    experiment: str = Field(description="Name of an experiment, or the path of its file.")
    protocol: str
    drop_rates: tuple[float, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    metrics: tuple[str, ...] = ("accuracy", "macro_f1", "log_loss")
    anchors: tuple[Anchor, ...] = ()

    def cells(self) -> list[Cell]:
        """All cells; a seed after the other, so that every share has a figure early."""
        return [
            Cell(row=self.name, drop_rate=rate, seed=seed)
            for seed in self.seeds
            for rate in self.drop_rates
        ]


class Cell(_Document):
    """One training from the data to the test metrics.

    ``seed`` chooses the initial weights, the order, the masks and the observations left out.
    """

    row: str
    drop_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row}/{self.drop_rate:g}/{self.seed}"


def read_rows(path: Path = ROWS) -> dict[str, Row]:
    """All rows by name.

    Raises:
        ValueError: the file cannot be used; the text says why.
    """
    try:
        rows = [Row.model_validate(entry) for entry in yaml.safe_load(path.read_text("utf-8"))]
    except (OSError, yaml.YAMLError, ValidationError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return {row.name: row for row in rows}


def chosen(
    rows: dict[str, Row], names: Sequence[str], rates: Sequence[float], seeds: Sequence[int]
) -> list[Cell]:
    """The cells of some rows, shares and seeds; empty means all.

    Raises:
        ValueError: there is no such row.
    """
    if unknown := [name for name in names if name not in rows]:
        raise ValueError(f"there is no row {unknown[0]!r}; there are {', '.join(rows)}")
    return [
        cell
        for name in names or rows
        for cell in rows[name].cells()
        if (not rates or cell.drop_rate in rates) and (not seeds or cell.seed in seeds)
    ]
