"""What is known of each object beside its observations: class, group, recorded split.

They stand in the observations' own table or in a second one with a row per object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field

from roma_core.schema import DataError
from roma_core.sources.base import RecordedSplit
from roma_core.sources.columns import batches, words

_AT_ONCE = 1 << 16
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}


class FactColumns(BaseModel):
    """Columns with one value per object; each may be absent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str | None = Field(None, description="Column of the class.")
    group: str | None = Field(None, description="Column of what must not be split: patient, host.")
    split: str | None = Field(None, description="Column of the publisher's split: train or test.")
    classes: tuple[str, ...] | None = Field(
        None,
        description="All classes in the order of their indices; None takes those found, sorted. "
        "List them where a delivery may bring new ones.",
    )
    class_names: dict[str, str] = Field({}, description="Word in the column → name of the class.")

    def columns(self) -> list[str]:
        return [name for name in (self.label, self.group, self.split) if name is not None]


class ObjectTable(BaseModel):
    """A Parquet or CSV file with one row per object."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Path
    object: str = Field(description="Column of the object's id.")


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one object."""

    label: str | None = None
    group: str | None = None
    split: RecordedSplit | None = None


def facts_of(cells: Sequence[str | None], columns: FactColumns, who: str) -> Facts:
    """From cells in the order of ``columns.columns()``.

    Raises:
        DataError: a split is neither train nor test, or a cell is empty.
    """
    found: dict[str, Any] = {}
    remaining = iter(cells)
    for name in ("label", "group", "split"):
        column = getattr(columns, name)
        if column is None:
            continue
        cell = next(remaining)
        if not cell:
            raise DataError(f"{who} has nothing in column {column!r}; fill it, or leave it out")
        found[name] = cell
    if "label" in found:
        found["label"] = columns.class_names.get(found["label"], found["label"])
    if "split" in found:
        if found["split"].lower() not in _SPLITS:
            raise DataError(f"{who} has the split {found['split']!r}; expected train or test")
        found["split"] = _SPLITS[found["split"].lower()]
    return Facts(**found)


def classes_of(found: Sequence[str], columns: FactColumns) -> tuple[str, ...]:
    """The classes of a source: the declared ones, or those found, numbers in numeric order."""
    if columns.label is None:
        return ()
    if columns.classes is not None:
        return columns.classes
    names = {columns.class_names.get(word, word) for word in found}
    return tuple(sorted(names, key=lambda w: (0, int(w), w) if w.isdigit() else (1, 0, w)))


def read_objects(table: ObjectTable, columns: FactColumns) -> dict[str, Facts]:
    """The facts of every object of a second table, by id.

    Raises:
        DataError: an object stands there twice, or a fact is missing.
    """
    known: dict[str, Facts] = {}
    names = [table.object, *columns.columns()]
    for batch in batches(table.file, names, names, _AT_ONCE):
        cells = [words(cast(Any, column)) for column in batch.columns]
        for name, *row in zip(*cells, strict=True):
            if name is None or name in known:
                raise DataError(
                    f"{table.file}: the object {name!r} has two rows, or no id; one row per object"
                )
            known[name] = facts_of(row, columns, f"{table.file}: object {name!r}")
    return known
