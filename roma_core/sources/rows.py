"""Rows of a long table as numbers: Arrow batches in, structured NumPy arrays out.

What is text in the table (ids, classes, groups) becomes numbers in the array; ``name_of`` and
``facts_of_codes`` turn them back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from roma_core.schema import DataError
from roma_core.sources.columns import AxisColumn, ChannelColumn, numbers, positions_of, words
from roma_core.sources.facts import FactColumns, Facts, facts_of
from roma_core.sources.objects import keys_of

Block = NDArray[Any]
"""``key`` int64, ``positions`` (D,) float64, ``values`` (C,) and ``targets`` (K,) float32, ``facts``
(F,) int32."""


class TableColumns(BaseModel):
    """Which column is what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: str = Field(description="Column of the object's id.")
    axes: tuple[AxisColumn, ...] = Field(min_length=1, description="Position axes; time first.")
    channels: tuple[ChannelColumn, ...] = Field(min_length=1, description="Values, errors.")
    targets: tuple[ChannelColumn, ...] = Field(
        (), description="Numbers known of every observation that a model may be trained to tell."
    )
    facts: FactColumns = FactColumns()


class RowReader:
    """Turns the batches of one pass over a table into blocks.

    Args:
        columns: which column is what.
        facts: those that stand in the rows.
        forget: drop the ids of a batch when the next comes, but for the last: its object may go on.
    """

    def __init__(self, columns: TableColumns, facts: FactColumns, forget: bool) -> None:
        self._columns, self._facts, self._forget = columns, facts, forget
        self._names: dict[int, str] = {}  # key → id, where ids are text
        self._codes: dict[str | None, int] = {}  # word → code, over all columns of facts
        self._words: list[str | None] = []  # code → word
        self._kind = np.dtype(
            [
                ("key", np.int64),
                ("positions", np.float64, (len(columns.axes),)),
                ("values", np.float32, (len(columns.channels),)),
                ("targets", np.float32, (len(columns.targets),)),
                ("facts", np.int32, (len(facts.columns()),)),
            ]
        )

    def columns(self) -> list[str]:
        """Names of the columns that a batch must have."""
        names = [self._columns.object, *(axis.column for axis in self._columns.axes)]
        names += [c.column for c in (*self._columns.channels, *self._columns.targets)]
        names += self._facts.columns()
        return list(dict.fromkeys(names))

    def block(self, where: str, batch: Any) -> Block:
        """The rows of one Arrow record batch of the file ``where``.

        Raises:
            DataError: a column holds what it should not.
        """
        columns = self._columns
        block = np.empty(batch.num_rows, dtype=self._kind)
        names: dict[int, str] = {}
        block["key"] = keys_of(batch.column(columns.object), columns.object, where, names)
        if self._forget:
            self._names = dict([self._names.popitem()] if self._names else [])
        self._names |= names
        for k, axis in enumerate(columns.axes):
            block["positions"][:, k] = positions_of(batch.column(axis.column), axis, where)
        for into, those in (("values", columns.channels), ("targets", columns.targets)):
            for k, channel in enumerate(those):
                column = batch.column(channel.column)
                with np.errstate(over="ignore"):  # inf is refused, or left out, later
                    block[into][:, k] = numbers(column, channel.column, where)
        for k, fact in enumerate(self._facts.columns()):
            block["facts"][:, k] = self._coded(batch.column(fact))
        return block

    def _coded(self, column: Any) -> NDArray[np.int32]:
        coded = column.dictionary_encode()
        codes = [self._code(word) for word in [*words(coded.dictionary), None]]
        indices = coded.indices.fill_null(len(codes) - 1)
        return np.array(codes, dtype=np.int32)[indices.to_numpy(zero_copy_only=False)]

    def _code(self, word: str | None) -> int:
        if word not in self._codes:
            self._codes[word] = len(self._words)
            self._words.append(word)
        return self._codes[word]

    def name_of(self, key: int) -> str:
        """The id of an object in a block of this or the last batch."""
        return self._names.get(key) or str(key)

    def facts_of_codes(self, codes: NDArray[np.int32], name: str) -> Facts:
        """What ``(N, F)`` codes say of one object.

        Raises:
            DataError: its rows say different things.
        """
        if not codes.shape[1]:
            return Facts()
        if (codes != codes[0]).any():
            row, column = np.argwhere(codes != codes[0])[0]
            raise DataError(
                f"object {name!r} has {self._words[codes[0, column]]!r} and "
                f"{self._words[codes[row, column]]!r} in column {self._facts.columns()[column]!r}; "
                f"one of them per object"
            )
        cells = [self._words[code] for code in codes[0]]
        return facts_of(cells, self._facts, f"object {name!r}")
