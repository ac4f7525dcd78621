"""Infer what the columns of tables are: object, time, values, quantities, covariates, metadata.

    a row per observation    id  time  hr  lab           every number is a channel, with gaps
    a row per value          id  time  variable  value   every word of ``variable`` is a channel
    a row per series         lists, as ``roma data export`` writes

Names decide first, then types and contents; the notes name the option that decides otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roma_core.data.table_columns import (
    DATES,
    MAX_QUANTITIES,
    USUAL_NAMES,
    ColumnContents,
    ColumnRoles,
    TableContents,
    all_like,
    is_usual,
    key_of,
    oddity,
    sentinels_of,
)
from roma_core.schema import DataError, TargetLevel
from roma_core.sources.base import SPLIT_WORDS
from roma_core.sources.table_files import FILE_NAME, file_patterns

_ROW_NUMBERS = re.compile(r"(Unnamed: \d+|__index_level_\d+__|)$")  # as pandas names its index
_MISSING_WORDS = {  # besides those of ``TableFile``, in lower case
    "-", "--", "---", ".", "..", "*", "bad", "missing", "unknown", "unk", "nil", "nd", "n.d.", "n/d",
    "n.a.", "n.a", "na", "error", "err", "invalid",
}  # fmt: skip
_TIME_WORD = re.compile(
    r"(^|[\W_])(time|date|datetime|timestamp|mjd|[jbh]jd|jd|hours?|days?|minutes?|seconds?)([\W_]|$)"
)
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")
_MAX_CATEGORIES = 64
_MIN_OBJECTS = 10  # or a tenth of all, below which a quantity may be missing in train


@dataclass
class InferredSource:
    """Settings of a source, and sentences on how they were inferred."""

    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dataset: dict[str, Any] = field(default_factory=dict)  # settings besides the source


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = [*names]
    return ", ".join(names[:most] + ["…"] * (len(names) > most))


class TableInference:
    """Every column's role, of long tables or of a row per series, in the order of what depends on what.

    Raises:
        DataError: a column that was named does not exist, or a role cannot be inferred.
    """

    def __init__(self, paths: Sequence[Path], roles: ColumnRoles, objects: Path | None) -> None:
        self.paths, self.path, self.roles, self.objects = paths, paths[0], roles, objects
        self.rows = TableContents(paths, roles.missing_values)
        self.names = self.rows.names
        self.missing = list(roles.missing_values)
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.unused: dict[str, str] = {}  # what they hold, by column; empty if there is a warning
        self.dataset: dict[str, Any] = {}
        self.contents: dict[str, ColumnContents] = {}

    def infer(self) -> InferredSource:
        roles, names, kinds = self.roles, self.names, self.rows.kinds
        if len(self.rows.tables[0].names) == 1:
            raise DataError(
                f"{self.path}: its only column is {self.rows.tables[0].names[0]!r}; expected at least an "
                f"object, a time and a value, separated by commas, semicolons, tabs or bars"
            )
        given = [roles.object, roles.time, *roles.axes, *roles.channels, roles.quantity]
        if unknown := [name for name in given if name is not None and name not in kinds]:
            raise DataError(f"{self.path} has no column {unknown[0]!r}; it has {names}")
        ours = [n for n in names if _ROW_NUMBERS.match(n) and kinds[n] != "date" and n not in given]
        self.unused |= dict.fromkeys(ours, "row numbers")
        columns = [name for name in names if name not in self.unused]
        lists = [name for name in columns if kinds[name] == "list"]
        self.marked = {
            role: [n for n in columns if self.rows.marks.get(n, {}).get("role") == role]
            for role in ("axis", "target", "covariate")
        }
        self.targets = [*roles.targets] or self.marked["target"]
        self.object = self._object([n for n in columns if n not in lists], bool(lists))
        rest = [name for name in columns if name != self.object]
        self._objects_table([name for name in rest if name not in lists])
        if not lists:
            self._find_missing(rest)
            self.contents = self.rows.contents(self.object, rest)
        self.time = self._time(lists or rest)
        self.target_level = self._target_level()
        not_known = {self.time, *self.targets}
        self.metadata = self._metadata([name for name in self.known if name not in not_known])
        config = self._lists(lists) if lists else self._long(rest)
        return InferredSource(config, self.notes, self.warnings, self.dataset)

    def _not_found(self, role: str, candidates: Sequence[str]) -> DataError:
        differ = {name for table in self.rows.tables for name in table.names} - set(self.names)
        hint = f", or --objects FILE for a row per object: not all files have {sorted(differ)}"
        return DataError(
            f"{self.path}: no {role} column found among {list(candidates)}; expected a name such as "
            f"{USUAL_NAMES[role].split()[0]!r}: pass --{role} COLUMN{hint * bool(differ)}"
        )

    def _object(self, columns: Sequence[str], is_row_per_series: bool) -> str:
        ids = [n for n in columns if key_of(n).endswith("id") and not all_like([n], "quantity")]
        found = all_like(columns, "object") or ids[: len(ids) == 1]
        if self.roles.object is not None or (is_row_per_series and found):
            return self.roles.object or found[0]
        one_file = len(self.paths) == 1
        for name in [*found]:  # what numbers the rows is no object
            unique = "SELECT count(DISTINCT t0) = count(*) FROM ROWS"
            if one_file and len(found) > 1 and self.rows.query(unique, [name]) == [(True,)]:
                found.remove(name)
            elif not one_file and self.rows.kinds[name] == "number":
                ends = [
                    TableContents([path]).first([name])[name]
                    for path in (self.path, self.paths[-1])
                ]
                if all(oddity(numbers) == "row numbers" for numbers in ends):
                    found.remove(name)
        if not found and (one_file or is_row_per_series):
            raise self._not_found("object", columns)
        return found[0] if found else FILE_NAME

    def _objects_table(self, columns: Sequence[str]) -> None:
        """Set ``known``: the columns, of the table of objects if there is one, of metadata."""
        self.known, self.objects_id, self.object_rows = columns, self.object, self.rows
        if self.objects is not None:
            self.object_rows = TableContents([self.objects], self.missing)
            names = self.object_rows.names
            if self.object not in names:
                if not (found := all_like(names, "object")):
                    raise DataError(f"{self.objects} has no column {self.object!r}; it has {names}")
                self.objects_id = found[0]
            self.known = [n for n in names if n != self.objects_id and not _ROW_NUMBERS.match(n)]

    def _find_missing(self, columns: Sequence[str]) -> None:
        """Words and numbers that stand for missing ones; then the columns are read again without."""
        roles = self.roles
        others = {roles.label, roles.group, roles.split, roles.quantity, roles.time, *roles.axes}
        others |= {*all_like(columns, "time", "label", "group", "split")}
        names = [name for name in columns if name not in others]
        for name in names:
            if self.rows.kinds[name] == "text":
                self._odd_words(name)
        self.rows = TableContents(self.paths, self.missing)
        samples = self.rows.sample([n for n in columns if self.rows.kinds[n] == "number"])
        names = [n for n in names if n in samples and not all_like([n], "band", "quantity")]
        if self.objects is not None:
            kinds = self.object_rows.kinds
            covariates = [n for n in roles.covariates if kinds.get(n) == "number"]
            samples |= self.object_rows.sample(covariates)
            names += [n for n in covariates if n not in names]
        where: dict[float, list[str]] = {}
        for name in names:
            found, odd = sentinels_of(samples[name])
            for value in found:
                where.setdefault(value, []).append(name)
            self.warnings += [
                f"{name} is {value:.10g} again and again, far from all its other values; pass "
                f"--missing-value {value:.10g} if it stands for a missing one"
                for value in odd
            ]
        for value, of in [*where.items()]:  # it would be taken from every column
            if usual := [n for n, x in samples.items() if n not in of and is_usual(value, x)]:
                del where[value]
                self.warnings.append(
                    f"{value:.10g} in {_listed(of)} seems to stand for a missing value, but is a usual "
                    f"value of {_listed(usual)}, so it is kept: empty those cells of {_listed(of)}"
                )
        self.notes += [
            f"{value:.10g} in {_listed(names)} stands for a missing value"
            for value, names in where.items()
        ]
        if where:
            self.missing += where
            self.rows = TableContents(self.paths, self.missing)
        if self.objects is None:
            self.object_rows = self.rows

    def _odd_words(self, name: str) -> None:
        """Let the few words among the numbers of a column stand for missing ones."""
        odd = f"n0 IS NULL AND t0 NOT IN {self.rows.missing}"
        query = f"SELECT count(*) FILTER ({odd}), count(n0), approx_count_distinct(n0) FROM ROWS"
        ((n_odd, n, n_different),) = self.rows.query(query, [name], [name])
        query = f"SELECT DISTINCT t0 FROM ROWS WHERE {odd} ORDER BY t0 LIMIT 9"
        words = [word for (word,) in self.rows.query(query, [name], [name])]
        is_known = all(word.lower() in _MISSING_WORDS for word in words)
        is_rare = n >= 9 * n_odd and len(words) < 9
        if not n or not (is_known or (n > n_odd and n_different > 20)):
            return  # a column of words
        text = f"{name}: {_listed(map(repr, words))} among its numbers, {n_odd:,} times"
        if is_known or is_rare:
            self.missing += [word for word in words if word not in self.missing]
            (self.notes if is_known else self.warnings).append(f"{text}, taken for a missing value")
            return
        self.unused[name] = ""
        self.warnings.append(
            f"{text}: it is not used; write numbers instead, or pass --missing-value {words[0]!r}"
        )

    def _time(self, columns: Sequence[str]) -> str:
        roles, kinds = self.roles, self.rows.kinds
        fixed = {n for n, found in self.contents.items() if not found.n_varying}
        moving = [n for n in columns if n not in fixed and n not in self.unused] or columns
        dates = [n for n in moving if kinds[n] == "date"]
        usual = all_like(moving, "time")
        likely = [
            n for n in moving if kinds[n] in ("number", "list") and _TIME_WORD.search(n.lower())
        ]
        found = [*dict.fromkeys([*usual, *dates, *likely])]
        time = roles.time or next(iter(self.marked["axis"]), None)
        if time is None:
            if not found or (len(found) > 1 and not usual + dates):
                raise self._not_found("time", columns)
            time, *others = found
            if others:
                self.notes.append(f"time: {time}; pass --time COLUMN if it is {_listed(others)}")
        first = {} if kinds[time] == "list" else self.rows.first([*{*dates, time}])
        if kinds[time] == "number" and oddity(first[time]) == DATES:
            raise DataError(
                f"{self.path}: {time!r} holds {DATES}; convert them to 2024-03-31 or days"
            )
        if kinds[time] == "date" and roles.time is None:
            most_s = {name: numbers.max(initial=0) for name, numbers in first.items()}
            clocks = [n for n in dates if most_s[n] < 86400]
            days = [n for n in dates if most_s[n] > 1e8]
            if clocks and days and (time in clocks or not (first[time] % 86400).any()):
                raise DataError(
                    f"{self.path}: {clocks[0]!r} holds times of day and {days[0]!r} dates; join them in one "
                    f"column such as 2024-03-31 00:30, or pass --time COLUMN to use one alone"
                )
        return time

    def _target_level(self) -> TargetLevel:
        """Whether the targets change within an object. Columns of a table of objects do not."""
        inputs = {self.object, self.time, *self.roles.axes, *self.roles.channels}
        if wrong := [name for name in self.targets if name in inputs]:
            raise DataError(
                f"--target-column {wrong[0]}: it is the object, a position or a value as well, so the model would "
                f"be given what it predicts; leave one of the options out"
            )
        here = [n for n in self.targets if self.objects is None or n not in self.object_rows.names]
        moving = {n for n, found in self.contents.items() if found.n_varying}
        for name in [n for n in here if n in moving]:
            if 20 * (found := self.contents[name]).n_varying <= found.n_repeated:
                self.warnings.append(
                    f"{name} changes within {found.n_varying} of {found.n_repeated:,} objects, so it is predicted "
                    f"at every observation; if there is one for an object, correct those"
                )
        varying = [n for n in here if n in moving or self.rows.kinds.get(n) == "list"]
        if varying not in ([], self.targets) or (self.objects is not None and varying != here):
            raise DataError(
                f"{self.path}: of the targets {self.targets} all must change within an object, or none; these "
                f"stand in the table of objects, if there is one"
            )
        return "observation" if varying else "series"

    def _metadata(self, known: Sequence[str]) -> dict[str, str]:
        metadata: dict[str, str] = {}
        varies = {n for n, c in self.contents.items() if c.n_varying and not self.objects}
        for key in ("label", "group", "split"):
            named = getattr(self.roles, key)
            if named is not None and named not in known:
                raise DataError(f"--{key} {named}: there is no such column among {list(known)}")
            usual = all_like([n for n in known if n not in metadata.values()], key)
            usual.sort(key=varies.__contains__)
            if key == "label" and self.roles.targets:
                usual = []
            is_channel = usual[:1] and usual[0] in varies and key_of(usual[0]) in ("y", "target")
            if named or (usual and not is_channel):
                metadata[key] = named or usual[0]
        if self.roles.split is None and "split" in metadata:
            words = self.object_rows.words(metadata["split"], 100)
            kept = {SPLIT_WORDS.get(word.lower()) for word in words}
            if None in kept or (not {"train", "test"} <= kept and len(kept) > 1):
                self.unused[column := metadata.pop("split")] = ""
                self.warnings.append(
                    f"{column} holds {_listed(words)}, expected train, validation and test: it is not "
                    f"used, and objects are split anew"
                )
        persons = [n for n in all_like(known, "person") if n not in self.roles.covariates]
        if persons and "group" not in metadata:
            query = "SELECT count(DISTINCT t0), count(DISTINCT t1) FROM ROWS"
            ids = [self.objects_id, persons[0]]
            ((n_objects, n_persons),) = self.object_rows.query(query, ids)
            if n_persons < n_objects:
                metadata["group"] = persons[0]
                self.notes.append(f"{n_objects:,} objects of {n_persons:,} {persons[0]} as groups")
        return metadata

    def _covariates(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Settings of the covariates that were named; a warning of all other columns."""
        rows = self.object_rows
        named = [*self.roles.covariates] or self.marked["covariate"]
        if unknown := [name for name in named if name not in rows.names]:
            raise DataError(f"--covariate {unknown[0]}: there is no such column among {rows.names}")
        if wrong := [n for n in named if n in (self.metadata.get("label"), *self.targets)]:
            raise DataError(
                f"--covariate {wrong[0]}: it is the label or target, which is not known at prediction time; "
                f"leave the option out"
            )
        other = {*named, *self.metadata.values(), *self.targets}
        left = [name for name in names if name not in other]
        self.unused |= dict.fromkeys(left, "")
        groups = all_like(left, "person", "together")
        if groups and "group" not in self.metadata:
            self.warnings.append(
                f"{_listed(groups)} may name groups: pass --group {groups[0]} if objects that share it must "
                f"not be split between train and test"
            )
        if left := [name for name in left if name not in groups]:
            self.warnings.append(
                f"{_listed(left)} never change{'s' * (len(left) == 1)} within an object, and may give the label "
                f"away: not used, unless --covariate NAME names what is known at prediction time (or "
                f"--group NAME what must not be split)"
            )
        columns = [*map(self._column, named)]
        for column in columns:
            if rows.kinds[column["column"]] == "text" and "categories" not in column:
                column["categories"] = self._categories(column["column"], rows)
        return columns

    def _categories(self, name: str, rows: TableContents) -> list[str]:
        words = rows.words(name, _MAX_CATEGORIES + 1)
        if len(words) > _MAX_CATEGORIES:
            raise DataError(
                f"{self.path}: the text column {name!r} holds more than {_MAX_CATEGORIES} words, too many "
                f"for an axis or a covariate; leave it out, or use fewer words"
            )
        return words

    def _column(self, name: str) -> dict[str, Any]:
        mark = self.rows.marks.get(name, {})
        found: dict[str, Any] = {"column": name}
        if "categories" in mark:
            found |= {"categories": json.loads(mark["categories"])}
            found |= {"unknown": True} if "unknown" in mark else {}
        elif unit := mark.get("unit"):
            found |= {"unit": unit}
        return found | ({"name": "time"} if _ROW_NUMBERS.match(name) else {})

    def _lists(self, lists: Sequence[str]) -> dict[str, Any]:
        """The source of a table with a row per series."""
        axes = [self.time, *(self.roles.axes or self.marked["axis"])]
        axes = [*dict.fromkeys(axes)]
        taken = {*axes, *self.targets}
        channels = self.roles.channels or [name for name in lists if name not in taken]
        of_axes, of_channels = ([*map(self._column, names)] for names in (axes, channels))
        return self._config(of_axes, of_channels, self._covariates(self.known), kind="parquet")

    def _long(self, columns: Sequence[str]) -> dict[str, Any]:
        """The source of a table with a row per observation, or per value."""
        roles, kinds = self.roles, self.rows.kinds
        taken = {self.time, *self.targets, *roles.covariates, *roles.axes, *roles.channels}
        taken |= {*all_like(columns, "band", "quantity"), roles.quantity or self.time}
        metadata = set() if self.objects else {*self.metadata.values()}
        most = max((found.n_objects for found in self.contents.values()), default=0)
        self.few = min(_MIN_OBJECTS, most / 10)
        constant: list[str] = []
        first = self.rows.first([name for name in columns if kinds[name] == "number"])
        units = all_like(columns, "unit") if roles.quantity or all_like(columns, "quantity") else []
        for name in columns:
            found, is_number = self.contents[name], kinds[name] == "number"
            if name in taken | metadata or name in self.unused or name in units:
                continue
            if name in first and (what := oddity(first[name])):
                self.unused[name] = what
            elif found.n_objects == 0 or (found.is_one_word and not is_number):
                self.unused[name] = "one word" if found.n_objects else "nothing"
            elif found.never_varies and not found.is_one_word:
                constant.append(name)
            elif is_number and found.n_objects < self.few:
                self.unused[name] = f"numbers of {found.n_objects} objects only"
            elif kinds[name] == "date":
                self.unused[name] = "dates"
        if self.objects is not None:
            self.unused |= dict.fromkeys(constant, "what never changes within an object")
        covariates = self._covariates(constant if self.objects is None else self.known)
        away = {self.time, *self.targets, *roles.covariates, *metadata, *self.unused}
        rest = [name for name in columns if name not in away]
        numbers = list(roles.channels) or [n for n in rest if kinds[n] == "number"]
        words = [n for n in rest if n not in roles.channels]
        names = [n for n in words if kinds[n] == "text"]
        kind = "quantity" if all_like(numbers, "value") else "code"
        coded = all_like([n for n in words if n not in names], kind, "band")
        if len(numbers) > len(coded) or not all_like(coded, kind):  # a band is never the value
            names += filter(self.rows.is_coded, coded)
        names += [n for n in (roles.quantity, *roles.axes) if n is not None and n not in names]
        numbers = [n for n in numbers if n not in names]
        quantity = self._quantity(names, numbers)
        channels = [self._column(name) for name in numbers]
        if quantity:
            beside = dict.fromkeys(numbers, f"what is beside {quantity['value']}")
            self.unused |= {n: what for n, what in beside.items() if n != quantity["value"]}
            channels = self._quantities(quantity, rest)
            names = list(roles.axes)  # other words are flags and comments on the values
        axes = [self._column(self.time), *(self._axis(name, numbers) for name in names)]
        return self._config([axis for axis in axes if axis], channels, covariates, quantity)

    def _quantity(self, names: Sequence[str], numbers: Sequence[str]) -> dict[str, str]:
        """The column that names the quantity, and that of the value; empty if there are none."""
        names = [name for name in names if name not in self.roles.axes]
        value = numbers[0] if len(numbers) == 1 else next(iter(all_like(numbers, "value")), None)
        if column := self.roles.quantity or next(iter(all_like(names, "quantity")), None):
            if value is None and self.roles.quantity:
                raise DataError(
                    f"{self.path}: {column!r} names quantities, but which of {_listed(numbers)} is the value? "
                    f"Pass --channel COLUMN"
                )
            return {} if value is None else {"column": column, "value": value}
        for name in names:
            if value is None or len(numbers) > 1:
                break
            if not all_like([name], "band") and self.rows.differ(self.object, name, value):
                self.notes.append(
                    f"{name} names quantities, whose values differ by orders of magnitude; pass --axis "
                    f"{name} if they are one quantity"
                )
                return {"column": name, "value": value}
        return {}

    def _quantities(self, quantity: dict[str, str], rest: Sequence[str]) -> list[dict[str, Any]]:
        """Channels of the words of a column."""
        column, value = quantity.values()
        words = self.rows.named(self.object, column, value)
        if len(words) > MAX_QUANTITIES:
            raise DataError(
                f"{self.path}: {column!r} names more than {MAX_QUANTITIES} quantities; keep the rows of "
                f"those that matter"
            )
        kept = [w.word for w in words if w.n_objects >= self.few and w.low != w.high]
        if left := [w.word for w in words if w.word not in kept]:
            quantity["others"] = "drop"
            self.notes.append(
                f"rows left out, of quantities with one value or in few objects: {_listed(left, 20)}"
            )
        units: dict[str, list[str]] = {word: [] for word in kept}
        for unit in all_like(rest, "unit")[:1]:
            self.unused[unit] = "units"
            query = "SELECT DISTINCT t0, t1 FROM ROWS WHERE n0 IS NOT NULL AND t1 IS NOT NULL ORDER BY 2"
            for word, text in self.rows.query(query, [column, unit], [value]):
                units.get(word, []).append(text)
        self.warnings += [
            f"{word} has the units {_listed(found)}; convert its values to one"
            for word, found in units.items()
            if len(found) > 1
        ]
        return [
            {"column": word} | ({"unit": units[word][0]} if len(units[word]) == 1 else {})
            for word in kept
        ]

    def _axis(self, name: str, numbers: Sequence[str]) -> dict[str, Any] | None:
        """Settings of an axis; None, with a warning, for a column that holds too many words."""
        by_name = bool(all_like([name], "band", "quantity"))
        if not (self.rows.kinds[name] == "text" or (by_name and self.rows.is_coded(name))):
            return self._column(name)
        query = (
            f"SELECT count(*), count(*) FILTER (coalesce(t0, '') IN {self.rows.missing}) FROM ROWS"
        )
        ((n_rows, n_empty),) = self.rows.query(query, [name])
        words = self.rows.words(name, _MAX_CATEGORIES + 1)
        n_words, has_commas = len(words), all(map(_DECIMAL_COMMA.fullmatch, words))
        if name not in self.roles.axes and (n_words > _MAX_CATEGORIES or 2 * n_words > n_rows):
            self.unused[name] = ""
            self.warnings.append(
                f"{name} holds {n_words} different words{' or more' * (n_words > _MAX_CATEGORIES)}, too many "
                f"for an axis of categories: it is not used"
                + "; write numbers with points, or separate the cells by semicolons"
                * has_commas
            )
            return None
        axis = self._column(name) | {"categories": self._categories(name, self.rows)}
        if n_empty:
            axis["unknown"] = True
            self.notes.append(f"{name}: {n_empty:,} empty cells are one more category, 'unknown'")
        if not by_name:
            self.notes.append(
                f"{name}: an axis of categories; pass --quantity {name} if its words name quantities"
            )
        value = next((n for n in numbers if n != name), None)
        if value is not None and "normalise_by" not in self.dataset:
            found = self.rows.named(self.object, name, value)
            if all(word.n_objects >= self.few for word in found) and (
                by_name or self.rows.differ(self.object, name, value)
            ):
                self.dataset["normalise_by"] = name
        return axis

    def _config(
        self,
        axes: list[dict[str, Any]],
        channels: list[dict[str, Any]],
        covariates: list[dict[str, Any]],
        quantity: dict[str, str] | None = None,
        kind: str = "table",
    ) -> dict[str, Any]:
        """Settings of the source; the notes begin with them."""
        if not channels:
            reasons = "".join(f"; {warning}" for warning in self.warnings)
            raise DataError(
                f"{self.path}: no column is left for the values, name them with --channel COLUMN{reasons}"
            )
        targets = [self._column(name) for name in self.targets]
        optional = {"quantity": quantity, "covariates": covariates, "targets": targets}
        columns = {"axes": axes, "channels": channels, "metadata": self.metadata}
        columns |= {key: value for key, value in optional.items() if value}
        columns |= {"target_level": "series"} if targets and self.target_level == "series" else {}
        config: dict[str, Any] = {"kind": kind, "files": file_patterns(self.paths)}
        is_list = kind == "parquet"
        own = {"id": self.object} if is_list else {"object": self.object}
        config |= own | columns if is_list else {"columns": own | columns}
        config |= {"missing_values": self.missing} if self.missing else {}
        if self.objects is not None:
            config["objects"] = {"file": str(self.objects), "object": self.objects_id}

        names = [[one["column"] for one in part] for part in (axes, channels, covariates, targets)]
        row = "series" if is_list else "value" if quantity else "observation"
        used = {self.object, *self.metadata.values(), *self.unused, *(quantity or {}).values()}
        unused = [n for n in self.names if n not in used.union(*names)]
        metadata = ", ".join(f"{key}: {name}" for key, name in self.metadata.items())
        lines = {
            "covariates": _listed(names[2]),
            "targets": names[3] and f"{_listed(names[3])}, of every {self.target_level}",
            "missing values": _listed(map(repr, self.missing), 20),
            "normalise_by": self.dataset.get("normalise_by"),
            "not used": ", ".join(unused),
        }
        self.notes = [
            f"a row per {row}; objects: {self.object}; positions: {', '.join(names[0])}; values: "
            f"{_listed(names[1])}" + (f" of {quantity['column']}" if quantity else ""),
            metadata or "no metadata of objects",
            *self.notes,
            *(f"{what}: {found}" for what, found in lines.items() if found),
            *(f"not used: {what} in {name!r}" for name, what in self.unused.items() if what),
        ]
        return config
