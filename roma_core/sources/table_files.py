"""CSV and Parquet files as DuckDB scans them; DuckDB and Arrow are imported when one is opened."""

from __future__ import annotations

import copy
import csv
import glob
import itertools
import os
import re
import uuid
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from roma_core.schema import DataError
from roma_core.sources.base import text_encoding

if TYPE_CHECKING:
    import duckdb

_UNITS = (  # that a column of dates or durations can be converted to
    (1e-9, "ns"), (1e-6, "us µs"), (1e-3, "ms"), (1.0, "s sec second seconds"),
    (60.0, "min minute minutes"), (3600.0, "h hour hours"), (86400.0, "d day days"),
)  # fmt: skip
_SECONDS_PER_UNIT = {name: seconds for seconds, names in _UNITS for name in names.split()}
_MISSING = (  # cells of a CSV file's number columns that mean a missing number, as in pandas, and ?
    "", "?", "#N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "NaT", "None", "n/a",
    "nan", "null",
)  # fmt: skip
_DATES = ("%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M:%S.%f")  # besides ISO
_NUMBER_OR_DATE = re.compile(r"[-+.]?\d[-+.,:\d TZeE]*")
_OFFSET = r":\d\d.*([zZ]|[-+]\d\d(:?\d\d)?)$"  # from UTC, after a time of day
_SEPARATORS = ",;\t|"
_HEADER_BYTES = 1 << 20
_INTEGERS = {f"{sign}{size}INT" for sign in ("", "U") for size in ("TINY", "SMALL", "BIG", "HUGE")}
_INTEGERS |= {"INTEGER", "UINTEGER"}
FILE_NAME = "filename"
"""Column that every table has besides its own: the name of a row's file without its endings."""
_STEM = r"([^/]*?)(\.(csv|tsv|txt|parquet|gz|zst))+$"
_HIVE = re.compile(r"([^/=]+)=[^/]*")  # a folder that names a column and its value
_EXACT = {"FLOAT": 1 << 24, "DOUBLE": 1 << 53}  # largest of the whole numbers without gaps


def connect(temp: Path, memory_limit_mb: int = 96, threads: int = 1) -> duckdb.DuckDBPyConnection:
    """An in-memory database that spills to a new folder below ``temp`` and removes it when closed."""
    import duckdb

    temp.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect(
        config={
            "memory_limit": f"{memory_limit_mb}MB",
            "threads": threads,
            "temp_directory": str(temp / f"roma-sort-{uuid.uuid4().hex[:12]}"),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "enable_external_file_cache": False,
        }
    )
    connection.execute("SET GLOBAL TimeZone = 'UTC'")  # of dates without an offset
    connection.execute("SET GLOBAL disabled_optimizers = 'join_order,build_side_probe_side'")
    connection.execute("SET enable_progress_bar = false")
    return connection


@contextmanager
def read_errors(files: Sequence[TableFile]) -> Iterator[None]:
    """Raise DuckDB's errors as ``DataError`` with file, line and column where the error has them."""
    import duckdb
    import pyarrow as pa

    try:
        yield
    except (duckdb.Error, OSError, pa.ArrowException) as error:  # Arrow's from within a stream
        kind, _, text = str(error).partition(": ")
        text, *_ = (text if kind.endswith("Error") else str(error)).split("\n\n")
        paths = [path for file in files for path in file.paths]
        path = next((path for path in paths if str(path) in text), paths[0])
        if text.startswith(f"{path}: "):  # by error() in our own SQL
            raise DataError(text) from error
        if kind == "Out of Memory Error":
            raise DataError(
                f"{path}: reading it takes more memory or disk than it may use ({text}); raise "
                f"memory_limit_mb of the source, or free some disk space"
            ) from error
        text = text.replace(
            "not latin-1 encoded", "no UTF-8, perhaps Windows-1252; save it as UTF-8"
        )
        line = re.match(r"CSV Error on Line: (\d+)\nOriginal Line: (.*)\n(.*)", text)
        text = f"line {line[1]}, {line[2]!r}: {line[3]}" if line else text
        raise DataError(f"{path} cannot be read: {text}") from error


def expand(patterns: Sequence[Path]) -> list[Path]:
    """Files, and files matching patterns such as ``data/*.parquet``, in order.

    Raises:
        DataError: a pattern matches nothing.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        matching = sorted(map(Path, glob.glob(str(pattern))))  # noqa: PTH207 - may be absolute
        if not (files := [path for path in matching if path.is_file()]):
            raise DataError(f"there is no file {pattern} (from {Path.cwd()})")
        paths |= dict.fromkeys(files)
    return [*paths]


def file_patterns(paths: Sequence[Path], most: int = 8) -> list[str]:
    """The files, or, of more than so many, the pattern that matches them all and no other."""
    top = Path(os.path.commonpath([path.parent for path in paths]))
    forms = {
        ("*",) * len(path.parent.relative_to(top).parts) + (f"*{path.suffix}",) for path in paths
    }
    if len(paths) > most and len(forms) == 1:
        pattern = "/".join(forms.pop())
        if sorted(top.glob(pattern)) == sorted(paths):
            return [str(top / pattern)]
    return [*map(str, paths)]


class Number(NamedTuple):
    """A column of numbers, of dates in a unit, or of words that are indices of categories."""

    column: str
    unit: str
    categories: Sequence[str] = ()
    unknown: bool = False  # whether another word is the index after the last
    what: str = "categories"  # that the words are, for errors


class OptionalText(NamedTuple):
    """A column of texts, or of numbers as texts, that is NULL where a word for missing stands."""

    column: str
    is_number: bool


class TableFile:
    """Parquet or CSV files of one form: the same columns in the same order, read one after the other.

    A CSV file is UTF-8, UTF-16 or Latin-1, plain or compressed (``.gz``, ``.zst``), and separated by
    commas, semicolons, tabs or bars; comment lines above the header are skipped, and the header may
    be one. Numbers may have decimal commas if the separator is another, and then no points; dates
    are like 2024-03-31T00:30:00Z or 31.03.2024 00:30, durations like 36:15 or 1 days 02:00:00. A
    column of text in Parquet may hold the same. Folders such as ``class=a`` are columns of text, and
    so is ``FILE_NAME``.

    Attributes:
        kinds: by column, ``number``, ``text``, ``date`` (or a duration), ``list``, or the DuckDB type
            of anything else; of text as the first 10,000 rows suggest. Of equal names the last.
        marks: by column, the metadata in a Parquet file, such as ``unit`` and ``role``.

    Raises:
        DataError: the file cannot be read, or is neither CSV nor Parquet.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        connection: duckdb.DuckDBPyConnection,
        missing_values: Sequence[float | str] = (),
    ) -> None:
        self.paths, self.path, self._connection = paths, paths[0], connection
        self.missing_words = (*_MISSING, *(x for x in missing_values if isinstance(x, str)))
        self._missing_numbers = [float(x) for x in missing_values if not isinstance(x, str)]
        self.marks: dict[str, dict[str, str]] = {}
        self._is_list = False  # whether this is ``unnested``
        self._kept: tuple[str, Sequence[str]] | None = None
        self.names: list[str] = []
        self._types: dict[str, str] = {}
        self._is_csv = self.path.suffix.lower() != ".parquet"
        with read_errors([self]):
            if self._is_csv:
                self._encoding, self._n_above, self._separator, names = _csv_form(self.path)
                self.names, self._n_own = [*names], len(names)
                self._types = dict.fromkeys(names, "VARCHAR")
            else:
                self._open_parquet()
            self._hive = [name for name in _hive_columns(self.path) if name not in self.names]
            self.names = [*self.names, *self._hive]
            self._types = dict.fromkeys((*self._hive, FILE_NAME), "VARCHAR") | self._types
            self._find_kinds()

    def _open_parquet(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pq.read_schema(self.path)
        self._n_own = len(schema.names)
        self.names = schema.names  # DuckDB renames "T" beside "t"
        described = self._connection.execute(f"DESCRIBE FROM {self._files()}").fetchall()
        self._types = {}
        for field, (_, type_, *_) in zip(schema, described, strict=False):
            marks = (field.metadata or {}).items()
            self.marks[field.name] = {key.decode(): value.decode() for key, value in marks}
            inner = getattr(field.type, "value_type", field.type)  # of a list
            if pa.types.is_duration(inner):  # a whole number to DuckDB
                type_ = f"DURATION_{inner.unit}" + "[]" * (inner != field.type)
            self._types[field.name] = type_

    def _find_kinds(self) -> None:
        """Set ``kinds``, those of text by its first cells."""
        self.kinds = {name: _kind(type_) for name, type_ in self._types.items()}
        self._has_decimal_commas, self._mixed = False, list[str]()
        texts = [name for name in self.names if self._types[name] == "VARCHAR"]
        if not texts:
            return
        missing = literal(self.missing_words)
        counts = [
            f"count(*) FILTER (trim({c}) NOT IN {missing}), count(TRY_CAST({c} AS DOUBLE)), "
            f"count(TRY_CAST(replace({c}, ',', '.') AS DOUBLE)), count({_seconds(c)}), "
            f"count({_seconds(c)}) FILTER (regexp_matches({c}, {literal(_OFFSET)}))"
            for c in map(self._column, texts)
        ]
        sample = f"SELECT * FROM {self._scan()} LIMIT 10000"
        (row,) = self._connection.execute(f"SELECT {', '.join(counts)} FROM ({sample})").fetchall()
        found = [row[k : k + 5] for k in range(0, len(row), 5)]
        self._has_decimal_commas = (
            self._is_csv
            and self._separator != ","
            and any(n_commas > max(n_points, n // 2) for n, n_points, n_commas, *_ in found)
        )
        for name, (n, n_points, n_commas, n_dates, n_offsets) in zip(texts, found, strict=True):
            if name in self._hive:
                continue
            is_number = (n_commas if self._has_decimal_commas else n_points) >= n
            is_date = n_dates >= 0.99 * n  # the other cells are errors when they are read
            self.kinds[name] = "number" if is_number else "date" if is_date else "text"
            if 0 < n_offsets < n_dates:
                self._mixed.append(name)

    def _scan(self) -> str:
        """The files with columns ``c0, c1, …``, those of folders last, and ``path``; CSV is text."""
        columns = [f"c{k}" for k in range(self._n_own)]
        hive = [
            f"regexp_extract(path, {literal(f'(?:^|/){re.escape(name)}=([^/]*)/')}, 1) AS {self._column(name)}"
            for name in self._hive
        ]
        rows = f"{self._files()} AS t({', '.join([*columns, 'path'])})"
        return f"(SELECT {', '.join(['*', *hive])} FROM {rows})" if hive else rows

    def _files(self) -> str:
        options: dict[str, Any] = {"filename": "path of the file"}
        if self._is_csv:
            reader = "read_csv"
            options |= {
                "auto_detect": False, "header": True, "skip": self._n_above, "strict_mode": True,
                "delim": self._separator, "quote": '"', "escape": '"',
                "columns": {f"c{k}": "VARCHAR" for k in range(self._n_own)}, "buffer_size": 1 << 22,
                "encoding": self._encoding.removesuffix("-sig"),
            }  # fmt: skip
        else:
            reader = "read_parquet"
            options |= {"binary_as_string": True, "hive_partitioning": False}
        chosen = ", ".join(f"{name} = {literal(value)}" for name, value in options.items())
        return f"{reader}({literal([glob.escape(str(path)) for path in self.paths])}, {chosen})"

    def check_columns(self, names: Sequence[str]) -> None:
        """Raise DataError if a column is missing, or there is more than one of its name."""
        if missing := [name for name in names if name not in self._types]:
            raise DataError(f"{self.path} has no column {missing[0]!r}; it has {self.names}")
        if twice := [name for name in names if self.names.count(name) > 1]:
            raise DataError(
                f"{self.path} has more than one column {twice[0]!r}; rename all but the one meant"
            )

    def select(
        self,
        text: Sequence[str | OptionalText],
        numbers: Sequence[Number] = (),
        lists: Sequence[str] = (),
        strict: bool = True,
    ) -> str:
        """SQL of the rows as ``t0, t1, …, n0, n1, …, l0, l1, …``; DataError if a column is unsuitable.

        Args:
            text: columns for ``t*``: whole numbers as they are, everything else as stripped VARCHAR,
                where 7.0 is 7.
            numbers: for ``n*``, FLOAT or DOUBLE: numbers; dates in the unit, ``s`` for ``1``; or
                indices of words in the categories, if there are any.
            lists: columns for ``l*``, the lengths of their lists.
            strict: whether a text that is no number is an error of the query; else it is NULL.
        """
        columns = [one if isinstance(one, str) else one.column for one in text]
        names = [*columns, *(number.column for number in numbers), *lists]
        self.check_columns(names)
        parts = [f"{self._cell(one)} AS t{k}" for k, one in enumerate(text)]
        parts += [f"{self._known(number, strict)} AS n{k}" for k, number in enumerate(numbers)]
        parts += [f"coalesce(len({self._column(c)}), 0) AS l{k}" for k, c in enumerate(lists)]
        source = self._scan()
        if self._is_list:
            unnested = [f"unnest({c}) AS {c}" for c in dict.fromkeys(map(self._column, names))]
            source = f"(SELECT {', '.join(unnested)} FROM {source})"
        elif self._is_csv and numbers and len(self.paths) == 1:  # for errors
            source = f"(SELECT *, row_number() OVER () AS row FROM {source})"
        kept = ""
        if self._kept is not None:
            column, words = self._kept
            kept = f" WHERE CAST({self._text(column)} AS VARCHAR) IN {literal(tuple(words))}"
        return f"SELECT {', '.join(parts)} FROM {source}{kept}"

    def keep(self, column: str, words: Sequence[str]) -> None:
        """Leave out the rows with another word than these in a column."""
        self.check_columns([column])
        self._kept = column, words

    def _column(self, name: str) -> str:
        if name in self.names:
            return f"c{self.names.index(name)}"
        return f"regexp_extract(path, {literal(_STEM)}, 1)"  # FILE_NAME

    def _text(self, name: str) -> str:
        column, type_ = self._column(name), self._types[name]
        if type_ in _INTEGERS:
            return column
        if type_ in ("FLOAT", "DOUBLE"):  # pandas writes whole numbers so, if a cell was empty
            problem = (
                f"{self.path}: column {name!r} holds whole numbers as {type_}, which is exact up to "
                f"{_EXACT[type_]:,} only; write them as integers or text"
            )
            return (
                f"CASE WHEN isfinite({column}) AND abs({column}) > {_EXACT[type_]} THEN "
                f"error({literal(problem)}) WHEN {column} = floor({column}) THEN CAST(CAST({column} AS "
                f"BIGINT) AS VARCHAR) ELSE nullif(CAST({column} AS VARCHAR), 'nan') END"
            )
        text = f"trim(CAST({column} AS VARCHAR), ' \t\r\n')"
        whole = f"ends_with({text}, '.0') AND TRY_CAST({text} AS DOUBLE) IS NOT NULL"
        return f"CASE WHEN {whole} THEN left({text}, -2) ELSE {text} END"

    def _cell(self, one: str | OptionalText) -> str:
        if isinstance(one, str):
            return self._text(one)
        text = f"CAST({self._text(one.column)} AS VARCHAR)"
        if one.is_number and self._types[one.column] == "BOOLEAN":
            text = f"CAST(CAST({self._column(one.column)} AS TINYINT) AS VARCHAR)"
        number = f"replace({text}, ',', '.')" if self._is_csv and self._has_decimal_commas else text
        words = f"coalesce({text}, '') IN {literal(self.missing_words)}"
        numbers = ", ".join(map(repr, self._missing_numbers)) or "NULL"
        missing = f"{words} OR TRY_CAST({number} AS DOUBLE) IN ({numbers})"
        return f"CASE WHEN {missing} THEN NULL ELSE {number if one.is_number else text} END"

    def _known(self, number: Number, strict: bool) -> str:
        """The number, or NULL where it is one of ``missing_values``."""
        found = self._number(*number, strict)
        if not self._missing_numbers or number.categories:
            return found
        known = ", ".join(map(repr, self._missing_numbers))
        return f"CASE WHEN {found} NOT IN ({known}) THEN {found} END"

    def _number(
        self,
        name: str,
        unit: str,
        categories: Sequence[str],
        unknown: bool,
        what: str,
        strict: bool,
    ) -> str:
        column, kind, type_ = self._column(name), self.kinds[name], self._types[name]
        where = f"{self.path}: column {name!r} holds"
        if categories:
            word = f"CAST({self._text(name)} AS VARCHAR)"
            known = f", which is not among its {what} {list(categories)}; append it there"
            quoted = f"coalesce('''' || {word} || '''', 'nothing')"
            problem = f"{literal(where + ' ')} || {quoted} || {literal(known)}"
            index = f"CAST(list_position({literal(list(categories))}, {word}) - 1 AS DOUBLE)"
            if unknown:
                return f"coalesce({index}, CAST({len(categories)} AS DOUBLE))"
            return f"coalesce({index}, error({problem}))"
        if kind == "date" and unit not in ("1", *_SECONDS_PER_UNIT):
            raise DataError(
                f"{where} dates, which cannot be given in {unit!r}; set its unit to one of "
                f"{', '.join(names.split()[0] for _, names in _UNITS)}"
            )
        if strict and kind == "date" and name in self._mixed:
            raise DataError(
                f"{where} times with an offset from UTC and times without, which may be hours apart; "
                f"give all of them one, or none"
            )
        is_text = type_ == "VARCHAR"
        if kind not in ("date", "number") and not (is_text if not strict else self._is_csv):
            if not strict:
                return "CAST(NULL AS DOUBLE)"
            first = next(iter(self.words(name, 1)), None)
            raise DataError(
                f"{where} {kind} (first {first!r}), expected numbers; convert it, or list its words "
                f"as 'categories' if it is a position axis"
            )
        if kind == "date":
            seconds = _seconds(column, type_)
            if type_.startswith("DURATION"):
                seconds = f"{column} * {_SECONDS_PER_UNIT[type_.partition('_')[2]]!r}"
            number = f"{seconds} / {_SECONDS_PER_UNIT.get(unit, 1.0)!r}"
        elif not is_text:
            return column if type_ == "FLOAT" else f"CAST({column} AS DOUBLE)"
        else:
            points = f"replace(replace({column}, '.', '?'), ',', '.')"
            cell = points if self._has_decimal_commas else column
            # alone, TRY_CAST is left to the CSV reader, which is strict
            number = f"TRY_CAST({cell if strict else f'trim({cell})'} AS DOUBLE)"
        if not (is_text and strict):
            return number
        form = "numbers with decimal commas, no points" if self._has_decimal_commas else "numbers"
        expected = literal(
            f", expected {f'{form}, or ' * (kind != 'date')}dates like 2024-03-31; correct "
            f"it, or add it to missing_values of the source"
        )
        place = f"{literal(where)} || ' ''' || {column} || ''' in row ' || row"
        if len(self.paths) > 1 or not self._is_csv:
            place = f"path || {literal(f': column {name!r} holds ')} || '''' || {column} || ''''"
        problem = f"{place} || {expected}"
        is_missing = f"coalesce(trim({column}), '') IN {literal(self.missing_words)}"
        return f"coalesce({number}, CASE WHEN {is_missing} THEN NULL ELSE error({problem}) END)"

    def words(self, name: str, most: int = 1 << 30) -> list[str]:
        """Different texts of a column, at most so many."""
        query = f"SELECT DISTINCT CAST(t0 AS VARCHAR) FROM ({self.select([name])})"
        query += f" WHERE t0 IS NOT NULL LIMIT {most}"
        with read_errors([self]):
            return [word for (word,) in self._connection.execute(query).fetchall()]

    def unnested(self, names: Sequence[str]) -> TableFile:
        """The rows of the named list columns below each other, as a long table; else DataError."""
        self.check_columns(names)
        for name in names:
            if self.kinds[name] != "list":
                raise DataError(
                    f"{self.path}: column {name!r} holds {self._types[name]}, expected a list of "
                    f"numbers per series; for one row per observation use a source of kind 'table'"
                )
        long = copy.copy(self)
        long._is_list = True
        long._types = {name: self._types[name].rpartition("[")[0] for name in names}
        long.kinds = {name: _kind(type_) for name, type_ in long._types.items()}
        return long


def open_tables(
    paths: Sequence[Path],
    connection: duckdb.DuckDBPyConnection,
    missing_values: Sequence[float | str] = (),
) -> list[TableFile]:
    """The files in order, neighbours of one form as one table; DataError as ``TableFile``."""
    groups = itertools.groupby(paths, _form)
    return [TableFile([*group], connection, missing_values) for _, group in groups]


def _form(path: Path) -> Hashable:
    """Equal for files that can be read as one: columns, dialect of CSV, folders that are columns."""
    import pyarrow.parquet as pq

    form: Hashable = path  # of what cannot be read; opening it is the error
    if path.suffix.lower() != ".parquet":
        form = _csv_form(path)
    else:
        with suppress(OSError, ValueError):
            form = tuple((field.name, str(field.type)) for field in pq.read_schema(path))
    return form, tuple(_hive_columns(path))


def _hive_columns(path: Path) -> list[str]:
    found = (_HIVE.fullmatch(part) for part in path.parts[:-1])
    return [*dict.fromkeys(match[1] for match in found if match)]


def _csv_form(path: Path) -> tuple[str, int, str, tuple[str, ...]]:
    """Encoding, lines above the header, separator and names of the columns of a CSV file."""
    import pyarrow as pa

    endings = {ending.lower() for ending in path.suffixes}
    is_packed = path.suffix.lower() in (".bz2", ".xz", ".zip")
    if is_packed or not endings & {".csv", ".tsv", ".txt"}:
        raise DataError(
            f"{path}: expected a .parquet or .csv file, plain or compressed as .gz or .zst"
        )
    try:
        with pa.input_stream(str(path)) as stream:
            start = stream.read(_HEADER_BYTES)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    encoding = text_encoding(path, start)
    lines = re.split(r"\r\n?|\n", start.decode(encoding, errors="replace"))
    above = ("#", "sep=")  # comments, and what Excel writes
    content = (k for k, s in enumerate(lines) if s.strip() and not s.startswith(above))
    if (top := next(content, None)) is None:
        raise DataError(f"{path} cannot be read: it has no header line")
    n_above, (separator, names) = top, _split(lines[top])
    if top and lines[top - 1].startswith("#"):  # a comment, or the header of data without one
        mark, above_names = _split(lines[top - 1].lstrip("# "))
        _, cells = _split(lines[top], mark)
        if len(above_names) == len(cells) > 1 and any(map(_NUMBER_OR_DATE.fullmatch, cells)):
            n_above, separator, names = top - 1, mark, above_names
    return encoding, n_above, separator, tuple(names)


def _split(line: str, separators: str = _SEPARATORS) -> tuple[str, list[str]]:
    """The separator that gives the most cells, and the cells."""
    splits = {mark: next(csv.reader([line], delimiter=mark), []) for mark in separators}
    separator = max(separators, key=lambda mark: len(splits[mark]))
    return separator, [cell.strip() for cell in splits[separator]]


def _kind(type_: str) -> str:
    if type_.endswith("]"):
        return "list"
    numbers = ("FLOAT", "DOUBLE", "DECIMAL", "BOOLEAN", '"NULL"')
    if type_ in _INTEGERS or type_.startswith(numbers):
        return "number"
    if type_.startswith(("VARCHAR", "UUID", "ENUM")):
        return "text"
    return "date" if type_.startswith(("DATE", "TIME", "DURATION")) else type_.lower()


def _seconds(column: str, type_: str = "VARCHAR") -> str:
    """SQL of a column of dates or durations as seconds, NULL where it holds neither."""
    if type_ == "TIME":  # of day
        return f"epoch_us({column}) / 1e6"
    dates = f"epoch_us(TRY_CAST({column} AS TIMESTAMPTZ))"
    if type_ == "VARCHAR":
        other = f"CAST(try_strptime({column}, {literal([*_DATES])}) AS TIMESTAMPTZ)"
        interval = f"CASE WHEN contains({column}, ':') THEN TRY_CAST({column} AS INTERVAL) END"
        dates = f"coalesce({dates}, epoch_us({other}), epoch_us({interval}))"
    return f"{dates} / 1e6"


def literal(value: Any) -> str:
    """A Python value as SQL."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(k)}: {literal(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        items = ", ".join(map(literal, value))
        return f"[{items}]" if isinstance(value, list) else f"({items})"
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)
