"""Columns of tables: the roles they may have, and what all their rows, more than fit in memory, hold."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from roma_core.sources import table_files

USUAL_NAMES = {  # by role, the most specific first; as ``key_of`` leaves them
    "object": "object objectid series seriesid stayid icustayid hadmid encounterid admissionid episodeid "
    "recordid caseid starid sourceid id uid oid patient patientid subject subjectid participantid pid "
    "unitid unitnumber device deviceid machine machineid engine engineid",
    "time": "time t mjd jd bjd hjd timestamp datetime charttime obstime date seconds minutes hours hour days "
    "day step frame cycle weeks week months month",
    "label": "label class target y labelid classid outcome diagnosis died death mortality inhospitaldeath",
    "group": "group groupid",
    "split": "split subset partition",
    "band": "band passband filter filt fid",
    "quantity": "variable parameter quantity measurement test analyte itemid item feature channel sensor "
    "signal metric indicator concept param attribute testname vital lab",
    "code": "variable parameter param itemid channel sensor analyte attribute",  # also as numbers
    "value": "value valuenum val result numericvalue resultvalue reading measurement amount y",
    "unit": "unit units uom valueuom",
    "person": "patient patientid subject subjectid person personid participant participantid",
    "together": "host hostid hospital hospitalid site siteid center centre clinic ward family household "
    "donor animal user userid",
}  # fmt: skip
DATES = "dates as numbers"
MAX_QUANTITIES = 256
_NINES = re.compile(r"-?(99+|99+\.9+|99+\.25)(\.0)?$")
_ORDER = 10.0  # quotient of the spreads of two words, beyond which they name quantities
_MEMORY_MB, _SAMPLE = 512, 5_000_000  # numbers of a sample


@dataclass(frozen=True)
class ColumnRoles:
    """Columns that the user named; None and empty are inferred."""

    object: str | None = None
    time: str | None = None
    axes: tuple[str, ...] = ()  # besides time
    channels: tuple[str, ...] = ()
    label: str | None = None
    group: str | None = None
    split: str | None = None
    quantity: str | None = None  # names the quantity of a row's value
    covariates: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()  # numbers to predict
    missing_values: tuple[float | str, ...] = ()


def key_of(name: str) -> str:
    """A name without case, blanks and signs."""
    return re.sub(r"[\W_]", "", name.lower())


def all_like(columns: Iterable[str], *roles: str) -> list[str]:
    """The columns with usual names of the roles, the most specific name first."""
    usual = [name for role in roles for name in USUAL_NAMES[role].split()]
    return sorted((c for c in columns if key_of(c) in usual), key=lambda c: usual.index(key_of(c)))


class ColumnContents(NamedTuple):
    """Of a column: objects with cells, with several, with different ones; whether there is one word."""

    n_objects: int
    n_repeated: int
    n_varying: int
    is_one_word: bool

    @property
    def never_varies(self) -> bool:
        """Whether it never changes within an object, where that can be known of most objects."""
        return not self.n_varying and 2 * self.n_repeated >= max(2, self.n_objects)


class _Word(NamedTuple):
    """Of a column of names: a name and the numbers beside it."""

    word: str
    n_objects: int
    n: int
    low: float | None
    high: float | None
    quartiles: list[float] | None


class TableContents:
    """The rows of several files, for queries."""

    def __init__(self, paths: Sequence[Path], missing_values: Sequence[float | str] = ()) -> None:
        self._database = table_files.connect(Path(tempfile.gettempdir()), _MEMORY_MB)
        self.tables = table_files.open_tables(paths, self._database, missing_values)
        first = self.tables[0]
        self.marks = first.marks  # of our own exports
        self.names = [n for n in first.names if all(n in table.names for table in self.tables)]
        self.kinds = {name: first.kinds[name] for name in (*self.names, table_files.FILE_NAME)}
        for name in self.names:  # a later file may hold words
            if any(table.kinds[name] == "text" for table in self.tables):
                self.kinds[name] = "text"
        self.missing = table_files.literal(first.missing_words)

    def query(self, sql: str, text: Sequence[str], numbers: Sequence[str] = ()) -> list[Any]:
        """Rows of a query in which ``ROWS`` has the columns ``t*`` and ``n*``; see ``select``."""
        with table_files.read_errors(self.tables):
            return self._execute(sql, text, numbers).fetchall()

    def _execute(self, sql: str, text: Sequence[str], numbers: Sequence[str]) -> Any:
        columns = [table_files.Number(name, "1") for name in numbers]
        rows = " UNION ALL ".join(t.select(text, columns, strict=False) for t in self.tables)
        words = ", ".join(f"nullif(CAST(t{k} AS VARCHAR), '') AS t{k}" for k in range(len(text)))
        rows = f"(SELECT * REPLACE ({words}) FROM ({rows}))" if words else f"({rows})"
        return self._database.execute(sql.replace("ROWS", rows))

    def _numbers(self, sql: str, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """The numbers of columns that a query leaves, without those that are missing."""
        if not names:
            return {}
        with table_files.read_errors(self.tables):
            found = self._execute(sql, [], names).fetchnumpy()
        columns = (
            np.ma.filled(found[f"n{k}"].astype(np.float64), np.nan) for k in range(len(names))
        )
        return {name: x[np.isfinite(x)] for name, x in zip(names, columns, strict=True)}

    def first(self, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """The numbers of columns in the first rows."""
        return self._numbers("SELECT * FROM ROWS LIMIT 10000", names)

    def sample(self, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Numbers of columns in rows that are chosen at random, but always the same."""
        n = _SAMPLE // max(1, len(names))
        return self._numbers(f"FROM ROWS USING SAMPLE reservoir({n} rows) REPEATABLE (0)", names)

    def words(self, name: str, most: int) -> list[str]:
        """Different words of a column, but those for a missing one: sorted, at most so many."""
        query = f"SELECT DISTINCT t0 FROM ROWS WHERE t0 NOT IN {self.missing} LIMIT {most}"
        return sorted(word for (word,) in self.query(query, [name]))

    def contents(self, object_: str, names: Sequence[str]) -> dict[str, ColumnContents]:
        of_object, of_all = ["t0"], []
        for k, name in enumerate(names):
            word = f"CASE WHEN t{k + 1} NOT IN {self.missing} THEN hash(t{k + 1}) END"
            x = f"n{k}" if self.kinds[name] in ("number", "date") else word
            of_object.append(f"min({x}) AS low{k}, max({x}) AS high{k}, count({x}) AS n{k}")
            of_all.append(
                f"count(*) FILTER (n{k} > 0), count(*) FILTER (n{k} > 1), "
                f"count(*) FILTER (low{k} <> high{k}), coalesce(min(low{k}) = max(high{k}), true)"
            )
        query = (
            f"SELECT {', '.join(of_all)} FROM (SELECT {', '.join(of_object)} FROM ROWS GROUP BY t0)"
        )
        (row,) = self.query(query, [object_, *names], names) if names else [()]
        return {name: ColumnContents(*row[4 * k : 4 * k + 4]) for k, name in enumerate(names)}

    def named(self, object_: str, name: str, value: str) -> list[_Word]:
        """The words of a column with the numbers of another: sorted, at most ``MAX_QUANTITIES`` + 1."""
        query = (
            f"SELECT t1, approx_count_distinct(t0), count(n0), min(n0), max(n0), "
            f"approx_quantile(n0, [0.25, 0.5, 0.75]) FROM ROWS WHERE t1 NOT IN {self.missing} "
            f"GROUP BY t1 ORDER BY t1 LIMIT {MAX_QUANTITIES + 1}"
        )
        return [_Word(*row) for row in self.query(query, [object_, name], [value])]

    def differ(self, object_: str, name: str, value: str) -> bool:
        """Whether the values beside the words of a column are of different orders of magnitude."""
        words = [w for w in self.named(object_, name, value) if w.quartiles and w.n >= 8]
        if not 2 <= len(words) <= MAX_QUANTITIES:
            return False
        low, middle, high = np.array([w.quartiles for w in words]).T
        widths = high - low
        differ = widths.max() > _ORDER * widths.min() or np.ptp(middle) > _ORDER * np.median(widths)
        return bool(differ)

    def is_coded(self, name: str) -> bool:
        """Whether a column holds words, or whole numbers that may stand for words."""
        query = "SELECT bool_and(n0 = floor(n0)) AND approx_count_distinct(n0) <= 512 FROM ROWS"
        return self.kinds[name] == "text" or bool(self.query(query, [], [name])[0][0])


def sentinels_of(numbers: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Numbers of nines that stand for missing ones, and other numbers that may, of a column.

    They are the smallest or largest, recur, and are farther from the rest than the rest is wide.
    """
    values, counts = np.unique(numbers, return_counts=True)
    ends = [*range(len(values))[:4], *range(len(values))[:3:-1][:4]]
    is_nines = np.zeros(len(values), bool)
    is_nines[ends] = [bool(_NINES.match(f"{value:.10g}")) for value in values[ends]]
    found: list[float] = []
    odd: list[float] = []
    left = np.ones(len(values), bool)
    for k in ends:
        rest = values[left & ~(is_nines & (np.abs(values) >= abs(values[k])))]
        rest = rest[rest != values[k]]
        if not len(rest) or rest.min() < values[k] < rest.max():
            continue
        gap, width = np.abs(rest - values[k]).min(), np.ptp(rest)
        is_below = values[k] < 0 <= rest.min()
        if is_nines[k] and ((counts[k] > 1 and is_below) or (counts[k] > 2 and gap > width)):
            found.append(float(values[k]))
            left[k] = False
        elif counts[k] > 2 and len(rest) > 8 and gap > (2 if is_below else 10) * width:
            odd.append(float(values[k]))
    return found, odd


def is_usual(value: float, numbers: NDArray[np.float64]) -> bool:
    """Whether a number is among those of a column, and not farther from the rest than it is wide."""
    rest = numbers[numbers != value]
    return 0 < len(rest) < len(numbers) and bool(np.abs(rest - value).min() <= np.ptp(rest))


def oddity(numbers: NDArray[np.float64]) -> str:
    """What numbers are if no measurements: row numbers from 0 or 1, dates like 20240331."""
    if len(numbers) == 0:
        return ""
    first = numbers - np.arange(len(numbers))
    if len(numbers) >= 10 and first[0] in (0, 1) and (first == first[0]).all():
        return "row numbers"
    year, month, day = numbers // 10_000, numbers // 100 % 100, numbers % 100
    is_month = (year >= 1900) & (year < 2100) & (month >= 1) & (month <= 12)
    return DATES if (is_month & np.isin(day, range(1, 32))).all() else ""
