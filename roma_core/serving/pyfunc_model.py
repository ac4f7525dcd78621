"""The served model: this one file, logged beside a package folder, runs without this project.

It needs mlflow, numpy, pydantic and torch; as a part of this project it imports torch on first use,
and MLflow never. ``package.py`` writes the folder:

    model.pt2             exported program: values (B, N, P) float32, NaN where missing, positions
                          (B, N, D) float32, valid (B, N) bool, True at a real token, and covariates
                          (B, M) float32, of a model that has some -> (B, K): logits of K classes, K
                          features of an encoder, or of a regressor targets in their units and, if it
                          predicts them, as many standard deviations; (B, N, K) if the targets are
                          those of observations. Of an autoencoder also queries (B, Q, D) float32
                          and query_valid (B, Q) bool, before covariates -> means (B, Q, P), or
                          means and variances
    schema.json           channels, axes, classes, targets, and the constants of
                          ``roma_core.schema.Normaliser``
    golden.jsonl          series with their expected outputs
    package.json          name, kind, limits, lineage
    weights.safetensors, model_config.json, series.schema.json    for research and for clients
    profile.json, requirements.lock, MODEL_CARD.md                training data, packages, card
    MANIFEST.json         sha256 of every other file, verified before anything else is read

Shapes:  B series   N tokens, padded   P numbers of a token   D axes   M covariates   K outputs
         Q queries, padded
"""

import hashlib
import inspect
import json
import logging
import math
import reprlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

SCHEMA_VERSION = 1
MANIFEST = "MANIFEST.json"
_MAX_OFF_GRID = 0.15  # of a step, mean of a series; times at random have a quarter
_MAX_GAP = 16.5  # steps
_FEW_TOKENS, _MAX_PADDING = 2048, 1.03  # of a batch: larger ones are not faster
REQUIRED_FILES = (
    "model.pt2", "weights.safetensors", "model_config.json", "schema.json", "series.schema.json",
    "golden.jsonl", "package.json",
)  # fmt: skip


class InvalidSeries(ValueError):
    """A series does not fit the model; the message names the series and the field."""


class PackageError(RuntimeError):
    """The package folder is damaged or incomplete, or its golden rows are not reproduced."""


class Series(BaseModel):
    """One irregular series, in one of two forms: lists by name, or a list of observations.

    ``positions`` and ``values`` hold lists of equal length, one entry per observation (at least 1). An
    entry of a categorical axis is the category's name; null or NaN marks a value that is missing.
    ``observations`` holds an object for each: ``{"time": 0.5, "channel": "hr", "value": 71}``, or
    ``{"time": 0.5, "hr": 71, "sbp": 120}``. Names and units are those of the model's schema. Series
    of one request may differ in length. Tuples and arrays are taken as lists, and a whole number as
    the text of an id.

    An autoencoder predicts the values at ``queries``: positions on every axis, before, between or
    after the observed ones; lists by name, or a list of objects such as ``{"time": 0.5}``. In the
    per_channel layout ``channel`` says which one to predict; without it all are. The queries of a
    series are predicted together.
    """

    model_config = ConfigDict(extra="forbid")

    id: str | None = Field(None, description="Returned with the prediction; free text.")
    positions: dict[str, list[float | str]] = Field(
        {}, description="Axis name -> one number, or name of a category, per observation."
    )
    values: dict[str, list[float | None]] = Field(
        {}, description="Channel name -> one number per observation; null where it is missing."
    )
    observations: list[dict[str, float | str | None]] | None = Field(
        None, description="In place of positions and values: an object per observation."
    )
    covariates: dict[str, float | str | None] | None = Field(
        None, description="Covariate -> number or category of the whole object; null if unknown."
    )
    queries: dict[str, list[float | str]] | None = Field(
        None,
        description="Of an autoencoder: axis name -> one number, or name of a category, per value to "
        "predict; or an object per value.",
    )
    units: dict[str, str] | None = Field(
        None,
        description="Axis or channel name -> unit, checked against the model's. Pure numbers (unit "
        "'1') and axes counted in themselves (frame, in frames) may be left out, no other.",
    )

    def __init__(self, **fields: Any) -> None:
        """Raises :class:`InvalidSeries` where a field is missing, unknown or of another type."""
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field, reason = ".".join(map(str, first["loc"])), first["msg"]
            if first["type"] == "extra_forbidden":
                reason = f"no field of a series; it has {', '.join(type(self).model_fields)}"
            field = shortened(field).strip("'\"")
            raise InvalidSeries(f"{field}: {reason.removeprefix('Value error, ')}") from None

    @field_validator("id", mode="before")
    @classmethod
    def _id_is_text(cls, given: Any) -> Any:
        is_number = isinstance(given, int | float | np.integer) and not isinstance(given, bool)
        if is_number and given % 1 == 0:  # pandas has whole numbers as floats if one is missing
            return str(int(given))
        if not isinstance(given, str | bytes | None):
            raise ValueError(f"expected text or a whole number, got {shortened(given)}")
        return given

    @field_validator("positions", "values", mode="before")
    @classmethod
    def _lists_of_entries(cls, given: Any, info: ValidationInfo) -> dict[Any, list[Any]]:
        if not isinstance(given, Mapping):
            raise ValueError(f"expected a list of numbers for each name, got {shortened(given)}")
        at = info.field_name == "positions"
        return {n: _entries(n, column, text=at, missing=not at) for n, column in given.items()}

    @field_validator("queries", mode="before")
    @classmethod
    def _lists_of_queries(cls, given: Any) -> dict[Any, list[Any]] | None:
        if given is not None and not isinstance(given, Mapping):
            rows = cls._objects(given) or []
            names = dict.fromkeys(name for one in rows for name in one)
            for index, one in enumerate(rows):
                if lacking := [name for name in names if name not in one]:
                    raise ValueError(f"{shortened(lacking[0])} is missing at index {index}")
            given = {name: [one[name] for one in rows] for name in names}
        if given is None:
            return None
        return {n: _entries(n, column, text=True, missing=False) for n, column in given.items()}

    @field_validator("observations", mode="before")
    @classmethod
    def _objects(cls, given: Any) -> list[dict[str, Any]] | None:
        if given is None:
            return None
        given = given.tolist() if hasattr(given, "tolist") else given
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            raise ValueError(f"expected a list of objects, got {shortened(given)}")
        rows = []
        for index, one in enumerate(given):
            if not isinstance(one, Mapping):
                raise ValueError(f"expected an object at index {index}, got {shortened(one)}")
            rows.append({name: _entry(name, x, index, text=True) for name, x in one.items()})
        return rows

    @field_validator("covariates", mode="before")
    @classmethod
    def _entries_by_name(cls, given: Any) -> dict[str, Any] | None:
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise ValueError(f"expected a number or text for each name, got {shortened(given)}")
        numbers = {n: float(x) if isinstance(x, bool | np.bool_) else x for n, x in given.items()}
        return {name: _entry(name, x, text=True) for name, x in numbers.items()}


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str | None = None


_STD: Any = Field(None, description="Predicted standard deviations, of a model that predicts them.")


class Prediction(_Answer):
    """The class of one series, with the probability of every class."""

    label: str = Field(description="The most probable class.")
    probabilities: dict[str, float] = Field(description="Class name -> probability; they sum to 1.")


class TargetValues(_Answer):
    """The targets of one series, in their units."""

    values: dict[str, float] = Field(description="Target -> predicted number.")
    std: dict[str, float] | None = _STD


class ObservationValues(_Answer):
    """The targets of every observation of one series, in their units and in the order given.

    An observation without a value has null; one with several tokens, the mean of theirs.
    """

    values: dict[str, list[float | None]] = Field(description="Target -> predicted numbers.")
    std: dict[str, list[float | None]] | None = _STD


class Features(_Answer):
    """Encoder features of one series: the mean of its encoded tokens."""

    features: list[float] = Field(description="Same length for every series.")


class Interpolation(_Answer):
    """Predicted values at the queries of one series, in the units of the data.

    Every channel has a number per query, null where the query names another channel.
    """

    mean: dict[str, list[float | None]] = Field(description="Channel name -> predicted values.")
    std: dict[str, list[float | None]] | None = _STD


def answer_type(kind: str, per_observation: bool) -> type[BaseModel]:
    """What a model of this kind answers per series."""
    if kind == "regressor":
        return ObservationValues if per_observation else TargetValues
    if kind == "autoencoder":
        return Interpolation
    return Features if kind == "encoder" else Prediction


_limited = reprlib.Repr()
_limited.maxstring = _limited.maxother = 80
shortened = _limited.repr  # of what came, in an error: a request may be of any size


def _entry(
    name: str, given: Any, index: int | None = None, *, text: bool = False, missing: bool = True
) -> Any:
    """A finite number, None for null or NaN, or where it may be there a text; else ValueError."""
    one = given.item() if isinstance(given, np.generic) else given
    if text and isinstance(one, str):
        return one
    if missing and (one is None or one != one):
        return None
    if type(one) in (float, int) and abs(one) <= sys.float_info.max:
        return float(one)
    where = "" if index is None else f" at index {index}"
    advice = "null where a value is missing"
    if not missing:
        advice = "leave out what has no position"
        if isinstance(given, str):
            advice = "a date is a number since 1970 in UTC, in the unit of the axis"
    raise ValueError(
        f"{shortened(name)} must hold finite numbers, got {shortened(given)}{where}; {advice}"
    )


def _entries(name: str, column: Any, **allowed: bool) -> list[Any]:
    column = column.tolist() if hasattr(column, "tolist") else column  # NumPy, pandas, torch
    if not isinstance(column, Sequence) or isinstance(column, str | bytes):
        raise ValueError(f"{shortened(name)} must be a list of numbers, got {shortened(column)}")
    if set(map(type, column)) <= {float} and all(map(math.isfinite, column)):
        return list(column)
    return [_entry(name, given, index, **allowed) for index, given in enumerate(column)]


def parse_series(rows: Iterable[Any]) -> list[Series]:
    """The series of a request: mappings, or objects, with the fields of ``Series``.

    Raises InvalidSeries if there is none, or with the name of one that is no series.
    """
    if isinstance(rows, Mapping | BaseModel) or not isinstance(rows, Iterable):
        raise InvalidSeries(f"expected a list of series, got {shortened(rows)}")
    series = []
    for number, row in enumerate(rows):
        try:
            series.append(Series(**dict(row)))
        except InvalidSeries as error:
            raise InvalidSeries(f"{_name(number, dict(row).get('id'))}: {error}") from None
        except (TypeError, ValueError):
            reason = f"expected an object with positions and values, got {shortened(row)}"
            raise InvalidSeries(f"series {number}: {reason}") from None
    if not series:
        raise InvalidSeries("expected a list of at least one series, got an empty list")
    return series


def _name(number: int, given: Any) -> str:
    return f"series {number}" if given is None else f"series {number} (id {shortened(given)})"


class Package:
    """A loaded package folder: maps series to one row of outputs each.

    The constructor trusts the folder; ``open_package`` verifies it.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        import torch

        package, schema = _read(folder / "package.json"), _read(folder / "schema.json")
        self.kind: str = package["kind"]
        self.is_classifier = self.kind == "classifier"
        fields = {"classifier": "probabilities", "encoder": "features"}
        fields |= {"autoencoder": "interpolation", "regressor": "targets"}
        self.golden_field = fields[self.kind]
        self.max_length: int = package["max_length"]
        self.max_batch_tokens: int = package["max_batch_tokens"]
        self.channels: list[dict[str, str]] = schema["channels"]
        self.normalisation: list[dict[str, Any]] = schema["normalisation"]
        self.is_per_channel: bool = schema.get("layout") == "per_channel"
        self.may_miss: bool = self.is_per_channel or schema.get("missing_values", False)
        self._all_axes: list[dict[str, Any]] = schema["axes"]
        # in the per_channel layout the last axis is that of channels, which requests do not give
        self.axes = self._all_axes[: len(self._all_axes) - self.is_per_channel]
        names = [axis["name"] for axis in self._all_axes]
        by = schema.get("normalise_by")
        self._group_axis = None if by is None else names.index(by)
        self.covariates: list[dict[str, Any]] = schema.get("covariates", [])
        self.classes: list[str] = schema["classes"]
        self.units = {
            one["name"]: one["unit"]
            for one in [*self.axes, *self.channels, *self.covariates]
            if not one.get("categories")
        }
        self.units_required: bool = package["units_required"]
        self.grid_step: float | None = package.get("grid_step")  # in the unit of the first axis
        profile = folder / "profile.json"
        known = _read(profile).get("quantities", {}) if profile.is_file() else {}
        found = [known.get(f"value.{c['name']}", {}).get("quantiles", (0,)) for c in self.channels]
        ends = [(x[0], x[-1]) if x[0] < x[-1] else (-np.inf, np.inf) for x in found]
        self._ranges = np.array(ends, np.float64).T  # in training, of channels that change
        self._out_of_range: set[str] = set()  # channels of which a warning was given
        self.n_outputs: int = package["n_outputs"]
        targets = schema.get("targets", []) if self.kind == "regressor" else []
        self.targets: dict[str, str] = {one["name"]: one["unit"] for one in targets}
        self.per_observation: bool = package.get("per_observation", False)
        std = [one.get("std", 1.0) for one in targets] or [1.0]
        self.scale = np.resize(std, self.n_outputs)  # unit of differences
        self.device = device
        program = torch.export.load(folder / "model.pt2")
        if device == "cpu":
            self._program = _through_onednn(program.module())
        else:
            from torch.export.passes import move_to_device_pass

            self._program = move_to_device_pass(program, device).module()

    def outputs(self, rows: Iterable[Any]) -> NDArray[np.float64]:
        """Outputs ``(n, K)`` float64 of n rows as ``parse_series`` takes them, in the order given.

        Probabilities, features, or targets and then their standard deviations. Of targets of
        observations ``(T, K)``, those of all series one after the other. The order of observations
        inside a series does not matter.

        Raises:
            InvalidSeries: there is none, or one does not fit the schema.
            PackageError: the program returns another shape, or outputs that are not finite.
        """
        return self._outputs(parse_series(rows))

    def _outputs(self, series: list[Series]) -> NDArray[np.float64]:
        if given := [i for i, one in enumerate(series) if one.queries is not None]:
            where = _name(given[0], series[given[0]].id)
            raise InvalidSeries(
                f"{where}: queries: this model is of kind {self.kind}, which takes none; leave them out"
            )
        named = [(one, _name(i, one.id)) for i, one in enumerate(series)]
        tokens = [self._tokens(*one) for one in named]
        return self._outputs_of(tokens, [self._covariates(one.covariates, at) for one, at in named])

    def _outputs_of(
        self, tokens: Sequence[Sequence[NDArray[Any]]], covariates: Sequence[list[float]]
    ) -> NDArray[np.float64]:
        import torch

        lengths = [len(one[0]) if self.per_observation else 1 for one in tokens]
        ends = np.cumsum(lengths)
        outputs = torch.empty(int(ends[-1]), self.n_outputs, dtype=torch.float64)
        for rows, (found, *_) in self._computed(tokens, covariates):
            if self.per_observation:
                found = torch.cat([found[k, : lengths[row]] for k, row in enumerate(rows)])
            at = [k for row in rows for k in range(ends[row] - lengths[row], ends[row])]
            expected = (len(at), self.n_outputs)
            if found.shape != expected or not found.isfinite().all():
                raise PackageError(
                    f"the program should give finite outputs of shape {expected}, got shape "
                    f"{tuple(found.shape)}, {int((~found.isfinite()).sum())} not finite"
                )
            outputs[at] = found.double()
        return (torch.softmax(outputs, dim=1) if self.is_classifier else outputs).numpy()

    def outputs_of_columns(
        self,
        lengths: NDArray[np.int64],
        columns: Mapping[str, Any],
        covariates: Sequence[Mapping[str, Any]] = (),
        units: Mapping[str, str] | None = None,
    ) -> NDArray[np.float64]:
        """Outputs ``(n, K)`` of n series that lie one after the other in arrays, without lists.

        Args:
            lengths: ``(n,)`` observations of each series.
            columns: axis or channel -> ``(T,)`` numbers, NaN where one is missing; or of text
                ``(T,)`` indices into the list beside them.
            covariates: of each series, by name; empty: none.
            units: as a series has them.

        Raises InvalidSeries as ``outputs`` does, but may not name the series.
        """
        where = "a series"
        axes, channels = ([one["name"] for one in part] for part in (self.axes, self.channels))
        for name in [*axes, *(() if self.may_miss else channels)]:
            if name not in columns:
                raise InvalidSeries(f"{where}: {name!r} is missing")
        _check_names(columns, [*axes, *channels], where)
        self._check_units(dict(units or {}), where)
        known = {one["name"]: one for one in [*self.axes, *self.channels]}
        numbers: dict[str, NDArray[np.float64]] = {}
        for name, column in columns.items():
            if not isinstance(column, tuple):
                missing = np.isnan(column) & (self.may_miss and name in channels)
                if not (np.isfinite(column) | missing).all():
                    raise InvalidSeries(f"{where}: {name!r} must hold finite numbers")
            if known[name].get("categories"):
                if not isinstance(column, tuple):  # categories by index, or called by numbers
                    column = np.unique(column, return_inverse=True)[::-1]
                codes, words = column
                found = [_category(known[name], word, where) for word in np.asarray(words).tolist()]
                column = np.array(found, np.float64)[codes]
            elif isinstance(column, tuple):
                raise InvalidSeries(f"{where}: {name!r} must hold numbers")
            numbers[name] = column
        rows = [self._covariates(one, where) for one in covariates or [{}] * len(lengths)]
        values, positions, lengths = self._normalised(numbers, lengths, [where] * len(lengths))
        ends = np.cumsum(lengths)[:-1]
        tokens = zip(np.split(values, ends), np.split(positions, ends), strict=True)
        return self._outputs_of(list(tokens), rows)

    def _observed(self, series: Series) -> tuple[NDArray[np.int64], int]:
        """Index of the observation of every token, and how many observations were given."""
        positions, values = self.columns_of(series, "")
        n = len(next(iter(positions.values())))
        if not self.may_miss:
            return np.arange(n), n
        columns = [values.get(channel["name"]) or [None] * n for channel in self.channels]
        seen = np.array([[x is not None for x in column] for column in columns]).T  # (n, C)
        return np.nonzero(seen if self.is_per_channel else seen.any(axis=1))[0], n

    def _of_targets(self, series: list[Series], outputs: NDArray[np.float64]) -> list[Any]:
        """Answers of a regressor from its outputs."""
        answers: list[Any] = []
        k, first = len(self.targets), 0
        for row, one in enumerate(series):
            columns: list[Any] = outputs[row].tolist()
            if self.per_observation:
                index, n = self._observed(one)
                part, first = outputs[first : first + len(index)], first + len(index)
                count = np.bincount(index, minlength=n)
                sums = [np.bincount(index, column, n) for column in part.T]
                columns = [
                    [total / many if many else None for total, many in zip(x, count, strict=True)]
                    for x in sums
                ]
            fields = [
                dict(zip(self.targets, part, strict=True))
                for part in (columns[:k], columns[k:])
                if part
            ]
            answer = answer_type(self.kind, self.per_observation)
            answers.append(answer(id=one.id, **dict(zip(("values", "std"), fields, strict=False))))
        return answers

    def _interpolate(self, series: list[Series]) -> list[Interpolation]:
        named = [(one, _name(i, one.id)) for i, one in enumerate(series)]
        queries = [self._queries(*one) for one in named]
        tokens = [self._tokens(*one, at) for one, at in zip(named, queries, strict=True)]
        covariates = [self._covariates(one.covariates, where) for one, where in named]
        answers: dict[int, Interpolation] = {}
        for rows, parts in self._computed(tokens, covariates):
            for k, row in enumerate(rows):
                at = queries[row]
                numbers = [part[k, : len(at)].double().numpy() for part in parts]
                answers[row] = self._interpolation(series[row], at, *numbers)
        return [answers[row] for row in range(len(series))]

    def _interpolation(
        self,
        series: Series,
        queries: NDArray[np.float64],
        mean: NDArray[np.float64],
        variance: NDArray[np.float64] | None = None,
    ) -> Interpolation:
        """The program's ``(Q, P)`` numbers at ``(Q, D)`` queries, in the units of the data."""
        names = [channel["name"] for channel in self.channels]
        mean, slope = denormalise_values(mean, self.normalisation, self._group(queries))
        found = {"mean": mean}
        if variance is not None:
            found["std"] = np.sqrt(variance) * slope  # to first order, of a nonlinear transform
        if not all(np.isfinite(numbers).all() for numbers in found.values()):
            raise PackageError("the program should give finite values at queries, and does not")
        columns = {}
        for field, numbers in found.items():
            table = numbers
            if self.is_per_channel:
                asked = np.arange(len(numbers))
                if "channel" not in (series.queries or {}):  # each query was one of every channel
                    asked = asked // len(names)
                table = np.full((asked[-1] + 1, len(names)), np.nan)
                table[asked, queries[:, -1].astype(int)] = numbers[:, 0]
            columns[field] = {
                name: [None if x != x else x for x in column.tolist()]
                for name, column in zip(names, table.T, strict=True)
            }
        return Interpolation(id=series.id, **columns)

    def _computed(
        self, tokens: Sequence[Sequence[NDArray[Any]]], covariates: Sequence[list[float]]
    ) -> Iterator[tuple[list[int], Sequence[Any]]]:
        """Rows of series of similar length, each once, with what the program returns for them."""
        import torch

        lengths = np.array([sum(map(len, parts[1:])) for parts in tokens])
        for rows in self._batches(lengths):
            columns = zip(*(tokens[row] for row in rows), strict=True)
            (values, valid), (positions, _), *asked = map(_padded, columns)
            inputs = [values, positions, valid, *(x for pair in asked for x in pair)]
            if self.covariates:
                inputs.append(torch.tensor([covariates[row] for row in rows], dtype=torch.float32))
            with torch.inference_mode():
                found = self._program(*(x.to(self.device) for x in inputs))
            parts = found if isinstance(found, tuple | list) else (found,)
            yield rows, [part.cpu() for part in parts]

    def answers(self, rows: Iterable[Any]) -> list[Any]:
        """Answers in the form of golden rows; takes and raises as ``outputs``."""
        if self.kind in ("classifier", "encoder"):
            return [self.named(row) for row in self.outputs(rows)]
        return [one.model_dump(exclude={"id"}, exclude_none=True) for one in self.predict(rows)]

    def named(self, outputs: NDArray[np.float64]) -> dict[str, float] | list[float]:
        """One row of outputs as in a golden row: class name -> probability, or the features."""
        numbers = outputs.tolist()
        return dict(zip(self.classes, numbers, strict=True)) if self.is_classifier else numbers

    def predict(self, rows: Iterable[Any]) -> list[Any]:
        """An answer per row, of ``answer_type``; takes and raises as ``outputs``."""
        series = parse_series(rows)
        if self.kind == "autoencoder":
            return self._interpolate(series)
        outputs = self._outputs(series)
        if self.targets:
            return self._of_targets(series, outputs)
        pairs = zip(series, outputs, strict=True)
        if not self.is_classifier:
            return [Features(id=one.id, features=row.tolist()) for one, row in pairs]
        return [
            Prediction(id=one.id, label=self.classes[row.argmax()], probabilities=self.named(row))
            for one, row in pairs
        ]

    def check_golden(self, path: Path) -> float:
        """Predict the golden series again; return the largest absolute difference of an output.

        Raises PackageError if a row differs by more than its tolerance.
        """
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of series that nobody asked about
            answers = self.answers(row["series"] for row in rows)
        largest = 0.0
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            difference = difference_of(row[self.golden_field], answer, row.get("scale", {}))
            if not difference <= row["tolerance"]:
                raise PackageError(
                    f"golden row {number} of {path}: {self.golden_field} differ by "
                    f"{difference:.2g}, more than {row['tolerance']}; with torch "
                    f"{version('torch')} on this computer the program computes other numbers: do "
                    f"not use it here"
                )
            largest = max(largest, difference)
        return largest

    def _queries(self, series: Series, where: str) -> NDArray[np.float64]:
        """Validated ``(Q, D)`` positions of queries, as delivered and indices of categories."""
        given = series.queries or {}
        if not given:
            raise InvalidSeries(
                f"{where}: queries: expected the positions to predict values at, got none"
            )
        _check_names(given, [axis["name"] for axis in self._all_axes], f"{where}: queries")
        axes = self._all_axes if "channel" in given else self.axes
        columns = {
            one["name"]: np.array(self._column(one, "queries", given, where), np.float64)
            for one in self._expected(axes, "queries", given, where)
        }
        _check_lengths(columns, where, "query")
        queries = np.stack(list(columns.values()), axis=1)
        if len(axes) < len(self._all_axes):
            n, n_channels = len(queries), len(self.channels)
            channels = np.tile(np.arange(n_channels), n)
            queries = np.column_stack([queries.repeat(n_channels, axis=0), channels])
        if not 1 <= len(queries) <= self.max_length:
            raise InvalidSeries(
                f"{where}: queries: expected 1 to {self.max_length} values to predict, got {len(queries)}"
            )
        return queries

    def _tokens(
        self, series: Series, where: str, queries: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[Any], ...]:
        """Validated and normalised values ``(n, P)`` and positions ``(n, D)``, both float32.

        With queries also their positions ``(Q, D)``, float32.
        """
        given = self.columns_of(series, where)
        known = [("positions", self.axes, given[0]), ("values", self.channels, given[1])]
        columns = {
            one["name"]: np.array(self._column(one, part, columns, where), np.float64)
            for part, expected, columns in known
            for one in self._expected(expected, part, columns, where)
        }
        self._check_units(series.units or {}, where)
        n = _check_lengths(columns, where, "observation")
        values, at, lengths = self._normalised(columns, np.array([n]), [where], queries)
        n = lengths[0]
        return (values, at) if queries is None else (values, at[:n], at[n:])

    def _normalised(
        self,
        columns: Mapping[str, NDArray[np.float64]],
        lengths: NDArray[np.int64],
        names: Sequence[str],
        queries: NDArray[np.float64] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Values ``(T, P)`` and positions ``(T, D)`` of series one after the other, and their lengths.

        Positions end with those of the queries of a single series.
        """
        nothing = np.full(lengths.sum(), np.nan)  # a channel that was not given
        values = np.stack([columns.get(c["name"], nothing) for c in self.channels], axis=1)
        positions = np.stack([columns[axis["name"]] for axis in self.axes], axis=1)
        series = np.repeat(np.arange(len(lengths)), lengths)
        self._warn_of_values(values, series, names)
        if self.is_per_channel:
            rows, channels = np.nonzero(~np.isnan(values))
            positions = np.column_stack([positions[rows], channels])
            values, series = values[rows, channels][:, None], series[rows]
        elif self.may_miss:
            seen = ~np.isnan(values).all(axis=1)
            positions, values, series = positions[seen], values[seen], series[seen]
        lengths = np.bincount(series, minlength=len(lengths))
        for i in np.flatnonzero((lengths < 1) | (lengths > self.max_length)).tolist():
            what = "values" if self.is_per_channel else "observations"
            raise InvalidSeries(
                f"{names[i]}: expected 1 to {self.max_length} {what}, got {lengths[i]}"
            )
        self._warn_of_times(positions[:, 0], lengths, names)
        with np.errstate(over="ignore"):
            tokens = normalise_values(values, self.normalisation, self._group(positions))
            # as in training, where hidden tokens count for the first position of a series
            given, n = positions, lengths
            if queries is not None:
                given, n = np.concatenate([positions, queries]), lengths + len(queries)
            at = normalise_positions(given, self._all_axes, n)
        for field, array in (("values", tokens), ("positions", at)):
            for row in np.flatnonzero(np.isinf(array).any(axis=1)).tolist():
                where = names[series[min(row, len(series) - 1)]]
                raise InvalidSeries(f"{where}: {field}: a number is too large for float32")
        return tokens, at, lengths

    def _warn_of_values(
        self, values: NDArray[np.float64], series: NDArray[np.int64], names: Sequence[str]
    ) -> None:
        """Warn, once of a channel, of series most of whose values are far from all training values."""
        low, high = self._ranges
        outside = (values < 1.5 * low - 0.5 * high) | (values > 1.5 * high - 0.5 * low)
        for k in np.flatnonzero(outside.any(axis=0)).tolist():
            n, known = (np.bincount(series, x[:, k]) for x in (outside, ~np.isnan(values)))
            found, name = np.flatnonzero(n > known / 2).tolist(), self.channels[k]["name"]
            if found and name not in self._out_of_range:
                self._out_of_range.add(name)
                example = values[outside[:, k] & (series == found[0]), k][0]
                warnings.warn(
                    f"{names[found[0]]}: most values of {name!r}, such as {example:.4g}, are far "
                    f"from those this model learnt from, {low[k]:.4g} to {high[k]:.4g}; check their unit",
                    stacklevel=2,
                )

    def _warn_of_times(
        self, times: NDArray[np.float64], lengths: NDArray[np.int64], names: Sequence[str]
    ) -> None:
        """Warn of series whose times are not on the steps that a model of windows moves them to."""
        if self.grid_step is None:
            return
        series = np.repeat(np.arange(len(lengths)), lengths)
        order = np.lexsort((times, series))
        with np.errstate(over="ignore", invalid="ignore"):
            gaps = np.diff(times[order]) / self.grid_step
            # over long gaps the errors of the step itself add up
            counts = (series[1:] == series[:-1]) & (gaps < _MAX_GAP)
            off = np.abs(gaps - gaps.round())[counts]
        n = np.bincount(series[1:][counts], minlength=len(lengths))
        mean = np.bincount(series[1:][counts], off, minlength=len(lengths)) / n.clip(1)
        # the mean of few gaps scatters; data sets have times of up to a fifth of a step off
        found = np.flatnonzero(mean > _MAX_OFF_GRID + 0.25 / np.sqrt(n.clip(1))).tolist()
        if found:
            more = f" and {len(found) - 1} more series" if len(found) > 1 else ""
            axis = self.axes[0]
            warnings.warn(
                f"{names[found[0]]}{more}: {axis['name']!r} lies between the steps of {self.grid_step:g} "
                f"{axis['unit']} that this model learnt from (on average {mean[found[0]]:.2f} of a step); "
                f"every observation counts for the nearest step",
                stacklevel=2,
            )

    def _group(self, positions: NDArray[np.float64]) -> NDArray[np.int64] | None:
        """``(n,)`` group of normalisation of ``(n, D)`` positions; None if there is only one."""
        return None if self._group_axis is None else positions[:, self._group_axis].astype(int)

    def columns_of(self, series: Series, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Lists by axis and by channel, of either form of a series."""
        if series.observations is None:
            return series.positions, series.values
        if series.positions or series.values:
            raise InvalidSeries(
                f"{where}: give positions and values, or observations in place of both"
            )
        axes, channels = ([one["name"] for one in part] for part in (self.axes, self.channels))
        positions: dict[str, Any] = {name: [] for name in axes}
        values: dict[str, Any] = {name: [] for name in channels}
        last: dict[tuple[Any, ...], int] = {}  # values of channels at one place are one observation
        for index, one in enumerate(series.observations):
            row = dict(one)
            here = f"{where}: observations: index {index}"
            if "channel" in row and "channel" not in axes:
                name = str(row.pop("channel"))
                _check_names([name], channels, f"{here}: channel")
                if name in row:
                    raise InvalidSeries(f"{here}: {name!r} is given twice")
                row[name] = row.pop("value", None)
            _check_names(row, [*axes, *channels], here, ", or 'channel' and 'value'")
            if lacking := [name for name in axes if row.get(name) is None]:
                raise InvalidSeries(f"{here}: {lacking[0]!r} is missing")
            place = tuple(row[name] for name in axes)
            given = [name for name in channels if row.get(name) is not None]
            at = last.get(place)
            if at is None or any(values[name][at] is not None for name in given):
                at = last[place] = len(values[channels[0]])
                for name in axes:
                    positions[name].append(row[name])
                for name in channels:
                    values[name].append(None)
            for name in given:
                values[name][at] = row[name]
        return positions, values

    def _expected(
        self, expected: list[dict[str, Any]], part: str, given: dict[str, Any], where: str
    ) -> list[dict[str, Any]]:
        """Those of the axes or channels that were given; InvalidSeries if one is unknown or lacking."""
        names = [one["name"] for one in expected]
        _check_names(given, names, f"{where}: {part}")
        needed = part != "values" or not self.may_miss
        for name in names if needed else ():
            if name not in given:
                raise InvalidSeries(
                    f"{where}: {part}: {name!r} is missing; got {shortened(sorted(given))}"
                )
        return [one for one in expected if one["name"] in given]

    def _column(
        self, one: dict[str, Any], part: str, given: dict[str, list[Any]], where: str
    ) -> list[Any]:
        """Numbers of one axis or channel; indices of categories, NaN where a value is missing."""
        name, column = one["name"], given[one["name"]]
        if one.get("categories"):
            return [_category(one, entry, f"{where}: {part}") for entry in column]
        try:
            column = _entries(name, column, missing=part == "values")
        except ValueError as error:
            raise InvalidSeries(f"{where}: {part}: {error}") from None
        if None in column and not self.may_miss:
            raise InvalidSeries(
                f"{where}: values: {name!r} has no number at index {column.index(None)}, but no "
                f"value was missing in this model's training data; leave out missing observations"
            )
        return [np.nan if entry is None else entry for entry in column]

    def _covariates(self, given: Mapping[str, Any] | None, where: str) -> list[float]:
        """``(M,)`` normalised numbers and indices of categories, NaN where unknown."""
        given = given or {}
        _check_names(given, [one["name"] for one in self.covariates], f"{where}: covariates")
        row = []
        for one in self.covariates:
            entry = given.get(one["name"])
            if entry is None:
                row.append(np.nan)
            elif one["categories"]:
                row.append(_category(one, entry, f"{where}: covariates"))
            elif isinstance(entry, str):
                raise InvalidSeries(
                    f"{where}: covariates: {one['name']!r} must be a number, got {shortened(entry)}"
                )
            else:
                with np.errstate(over="ignore"):
                    row.append((float(np.float32(entry)) - one["mean"]) / one["std"])
                if not abs(row[-1]) <= np.finfo(np.float32).max:
                    raise InvalidSeries(
                        f"{where}: covariates: {one['name']!r} is too large for float32"
                    )
        return row

    def _check_units(self, given: dict[str, str], where: str) -> None:
        _check_names(given, self.units, f"{where}: units")
        for name, unit in given.items():
            if unit != (own := self.units[name]):
                expected, advice = f"must be in {own!r}", "convert the numbers"
                if own in ("1", name):
                    expected = f"is a plain number to this model (unit {own!r})"
                    advice = "was it trained on such series?"
                raise InvalidSeries(
                    f"{where}: units: {name!r} {expected}, got {shortened(unit)}; {advice}"
                )
        for name, unit in self.units.items() if self.units_required else ():
            if unit not in ("1", name) and name not in given:
                raise InvalidSeries(
                    f"{where}: units: {name!r} is missing; this model takes it in {unit!r}"
                )

    def _batches(self, lengths: NDArray[np.int64]) -> Iterator[list[int]]:
        """Rows of similar length: at most ``max_batch_tokens`` with padding unless it is one row, and
        little padding unless they are few tokens."""
        batch: list[int] = []
        n_tokens = 0
        for row in np.argsort(lengths, kind="stable").tolist():
            length = int(lengths[row])
            padded, n_tokens = (len(batch) + 1) * length, n_tokens + length
            if batch and (
                padded > self.max_batch_tokens
                or (padded > _FEW_TOKENS and padded > _MAX_PADDING * n_tokens)
            ):
                yield batch
                batch, n_tokens = [], length
            batch.append(row)
        yield batch


def _linear(x: Any, weight: Any, activation: str = "none") -> Any:
    """``activation(x weight')`` of float32 on CPU, by oneDNN where there are enough rows."""
    import torch

    if x.dtype == torch.float32 and x.shape[:-1].numel() >= _FEW_TOKENS:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, activation, [], "")
    product = torch.nn.functional.linear(x, weight)
    return torch.nn.functional.silu(product) if activation == "swish" else product


def _through_onednn(program: Any) -> Any:
    """The program with its large products, and SiLU after them, in one call: a tenth faster on CPU."""
    import torch

    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return program
    aten = torch.ops.aten
    for node in program.graph.nodes:
        if node.target is aten.linear.default and len(node.args) == 2:
            node.target = _linear
        elif node.target is aten.silu.default and node.args[0].target is _linear:
            node.target, node.args = _linear, (*node.args[0].args, "swish")
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def open_package(folder: Path, device: str = "cpu") -> Package:
    """Verify every file of a package, load it for a device, and check its golden rows there.

    Raises:
        PackageError: a file is missing, changed or of another version (found before anything is
            deserialised), or a golden row is not reproduced.
    """
    verify_files(folder)
    package = Package(folder, device)
    package.check_golden(folder / "golden.jsonl")
    return package


def difference_of(
    expected: Any, found: Any, scale: Mapping[str, float], unit: float = 1.0
) -> float:
    """Largest difference of two answers, of a channel with a ``scale`` in units of it.

    Infinite if their names or lengths differ.
    """
    if isinstance(expected, dict):
        if not isinstance(found, dict) or expected.keys() != found.keys():
            return math.inf
        pairs = [(x, found[name], scale.get(name, unit)) for name, x in expected.items()]
        return max(difference_of(x, other, scale, one) for x, other, one in pairs)
    a, b = (np.array(x, np.float64) for x in (expected, found))  # null is NaN
    if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any():
        return math.inf
    return float(np.nanmax(np.abs(a - b), initial=0.0)) / unit


def _padded(rows: Sequence[NDArray[np.float32]]) -> tuple[Any, Any]:
    """Arrays ``(n, k)`` as ``(B, N, k)``, 0 past their ends, and ``(B, N)`` bool, True before them."""
    import torch

    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def _check_lengths(columns: Mapping[str, NDArray[Any]], where: str, each: str) -> int:
    """The length of all columns; InvalidSeries if they differ."""
    first, n = next((name, len(column)) for name, column in columns.items())
    for name, column in columns.items():
        if len(column) != n:
            needed = "axis and channel" if each == "observation" else "axis"
            raise InvalidSeries(
                f"{where}: {name!r} has {len(column)} numbers, but {first!r} has {n}; every {needed} "
                f"needs one number per {each}"
            )
    return n


def _check_names(given: Iterable[Any], known: Iterable[str], where: str, more: str = "") -> None:
    names = list(known)
    if unknown := [name for name in given if name not in names]:
        takes = (", ".join(map(repr, names)) or "none") + more
        raise InvalidSeries(f"{where}: unknown {shortened(unknown[0])}; this model takes {takes}")


def _category(one: dict[str, Any], entry: float | str, where: str) -> float:
    """Index of a category of an axis or a covariate, given by name or as the index."""
    names = one["categories"]
    if entry in names:
        return float(names.index(entry))
    if isinstance(entry, float) and (text := f"{entry:g}") in names:  # a category such as "3"
        return float(names.index(text))
    # 0 is no index where categories are called 1, 2, 3
    has_numbers = any(name.replace(".", "", 1).isdigit() for name in names)
    if isinstance(entry, float) and entry in range(len(names)) and not has_numbers:
        return entry
    if one.get("unknown"):
        return float(len(names))
    raise InvalidSeries(
        f"{where}: {one['name']!r} has no category {shortened(entry)}; it has {', '.join(map(repr, names))}"
    )


def normalise_values(
    values: NDArray[np.float64],
    constants: list[dict[str, Any]],
    group: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """``(n, P)`` as delivered to float32, equal to ``roma_core.schema.Normaliser.normalise``.

    ``constants``: ``normalisation`` of ``schema.json``; with ``(n,)`` groups, P for each of them.
    """
    transform, scale, mean, std = _constants(values, constants, group)
    x = values.astype(np.float32).astype(np.float64)  # a data set on disk stores float32
    x = np.where(transform == "arcsinh", np.arcsinh(x / scale), x)
    return ((x - mean) / std).astype(np.float32)


def denormalise_values(
    values: NDArray[np.float64],
    constants: list[dict[str, Any]],
    group: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The inverse of :func:`normalise_values`, and its derivative, the factor of deviations."""
    transform, scale, mean, std = _constants(values, constants, group)
    x = values * std + mean
    with np.errstate(over="ignore"):
        sines = np.sinh(x) * scale, np.cosh(x) * scale * std
    bent = transform == "arcsinh"
    return np.where(bent, sines[0], x), np.where(bent, sines[1], std)


def _constants(
    values: NDArray[np.float64], constants: list[dict[str, Any]], group: NDArray[np.int64] | None
) -> Iterator[NDArray[Any]]:
    """Transform, its scale, mean and std, each as ``(n, P)`` or ``(P,)``."""
    rows = 0 if group is None else group
    for field in ("transform", "transform_scale", "mean", "std"):
        yield np.array([c[field] for c in constants]).reshape(-1, values.shape[1])[rows]


def normalise_positions(
    positions: NDArray[np.float64], axes: list[dict[str, Any]], lengths: NDArray[np.int64]
) -> NDArray[np.float32]:
    """``(T, D)`` of series of ``(n,)`` lengths to float32, equal to ``Normaliser.normalise_positions``;
    ``axes``: those of ``schema.json``.
    """
    starts, normalised = np.cumsum(lengths) - lengths, []
    for x, axis in zip(positions.T, axes, strict=True):
        origin: Any = axis["offset"]
        if axis["anchor"] == "first":
            origin = np.repeat(np.minimum.reduceat(x, starts) + origin, lengths)
        normalised.append((x - origin) / axis["scale"])
    return np.stack(normalised, axis=1).astype(np.float32)


def verify_files(folder: Path) -> None:
    """Raise PackageError unless the folder holds exactly the files of its manifest, unchanged."""
    if not (folder / MANIFEST).is_file():
        raise PackageError(f"{folder} has no {MANIFEST}: not a model package, or incomplete")
    manifest = _read(folder / MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise PackageError(
            f"{folder / MANIFEST} has schema_version {manifest.get('schema_version')!r}, this file "
            f"reads {SCHEMA_VERSION}; load the package with the version that wrote it"
        )
    listed, found = manifest["files"], {p.name for p in folder.iterdir()} - {MANIFEST}
    if not set(REQUIRED_FILES) <= set(listed) or found != set(listed):
        raise PackageError(
            f"{folder}: expected {sorted(REQUIRED_FILES)} and the files of {MANIFEST}, "
            f"{sorted(listed)}; found {sorted(found)}; download it again"
        )
    for name in listed:
        with (folder / name).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != listed[name]:
            raise PackageError(
                f"{folder / name} was changed: its sha256 is {sha256}, the manifest says "
                f"{listed[name]}; do not use it, download it again"
            )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if not __package__:  # loaded as a model, not imported as a part of this project
    from mlflow.exceptions import INTERNAL_ERROR, INVALID_PARAMETER_VALUE, MlflowException
    from mlflow.models import ModelConfig, set_model
    from mlflow.pyfunc import PythonModel

    # MLflow says so for every field that takes several types; the fields check their entries themselves
    logging.getLogger("mlflow.types.type_hints").addFilter(
        lambda record: "Union type hint" not in record.getMessage()
    )
    _config = ModelConfig(development_config={"kind": "classifier", "per_observation": False})
    Output = answer_type(_config.get("kind"), _config.get("per_observation"))

    class RequestError(MlflowException):
        """One sentence; MLflow's server would put the whole input before it."""

        message = property(str, lambda self, text: None)

    class Pyfunc(PythonModel):
        """What ``mlflow.pyfunc.load_model`` and ``mlflow models serve`` run."""

        def load_context(self, context: Any) -> None:
            """Verify and load the package folder, the artifact ``package``."""
            self.package = open_package(Path(context.artifacts["package"]))

        def predict(  # type: ignore[override]
            self, model_input: list[Series], params=None
        ) -> list[Output]:  # type: ignore[valid-type]
            """MLflow infers the signature from these types; also takes what ``Package`` does."""
            rows: Any = model_input
            if hasattr(rows, "to_dict"):  # a DataFrame, which mlflow.evaluate and Spark pass
                table = rows.astype(object).where(rows.notna(), None)
                records = table.to_dict("records")  # in which a series lacks fields of others
                records = [{k: x for k, x in row.items() if x is not None} for row in records]
                rows = table[0].tolist() if list(table) == [0] else records
            try:
                return self.package.predict(rows)
            except InvalidSeries as error:
                raise RequestError(str(error), INVALID_PARAMETER_VALUE) from error
            except PackageError as error:
                raise RequestError(str(error), INTERNAL_ERROR) from error

        predict._is_pyfunc = True  # type: ignore[attr-defined]

    # without MLflow's own check of the types, which repeats the whole input in its errors
    Pyfunc.predict = inspect.unwrap(Pyfunc.predict)  # type: ignore[method-assign]
    set_model(Pyfunc())
