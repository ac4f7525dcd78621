"""The served model: this one file, logged beside a package folder, runs without this project.

It needs mlflow, numpy, pydantic and torch; as a part of this project it imports torch on first use,
and MLflow never. ``package.py`` writes the folder:

    model.pt2             exported program: values (B, N, P) float32, positions (B, N, D) float32,
                          valid (B, N) bool, True at a real token -> (B, K): logits of K classes, or
                          K features of an encoder
    schema.json           channels, axes, classes, and the constants of ``roma_core.schema.Normaliser``
    golden.jsonl          series with their expected outputs
    package.json          name, kind, limits, lineage
    weights.safetensors, model_config.json, series.schema.json    for research and for clients
    profile.json, requirements.lock, MODEL_CARD.md                training data, packages, card
    MANIFEST.json         sha256 of every other file, verified before anything else is read

Shapes:  B series   N tokens, padded   P channels   D axes   K outputs
"""

import hashlib
import inspect
import json
import math
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

SCHEMA_VERSION = 1
MANIFEST = "MANIFEST.json"
REQUIRED_FILES = (
    "model.pt2",
    "weights.safetensors",
    "model_config.json",
    "schema.json",
    "series.schema.json",
    "golden.jsonl",
    "package.json",
)


class InvalidSeries(ValueError):
    """A series does not fit the model; the message names the series and the field."""


class PackageError(RuntimeError):
    """The package folder is damaged or incomplete, or its golden rows are not reproduced."""


class Series(BaseModel):
    """One irregular series: positions and values of its observations, by name.

    Every list of one series has the same length, its number of observations (at least 1). Names
    and units are those of the model's schema. Series of one request may differ in length. Tuples
    and arrays of numbers are taken as lists, and a whole number as the text of an id.
    """

    model_config = ConfigDict(extra="forbid")

    id: str | None = Field(None, description="Returned with the prediction; free text.")
    positions: dict[str, list[float]] = Field(
        description="Axis name -> one number per observation."
    )
    values: dict[str, list[float]] = Field(
        description="Channel name -> one number per observation."
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
    def _lists_of_numbers(cls, given: Any) -> dict[Any, list[float]]:
        if not isinstance(given, Mapping):
            raise ValueError(f"expected a list of numbers for each name, got {shortened(given)}")
        return {name: _finite_numbers(name, column) for name, column in given.items()}


class Prediction(BaseModel):
    """The class of one series, with the probability of every class."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    label: str = Field(description="The most probable class.")
    probabilities: dict[str, float] = Field(description="Class name -> probability; they sum to 1.")


class Features(BaseModel):
    """Encoder features of one series: the mean of its encoded tokens."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    features: list[float] = Field(description="Same length for every series.")


_limited = reprlib.Repr()
_limited.maxstring = _limited.maxother = 80
shortened = _limited.repr  # of what came, in an error: a request may be of any size


def _finite_numbers(name: str, column: Any) -> list[float]:
    column = column.tolist() if hasattr(column, "tolist") else column  # NumPy, pandas, torch
    if not isinstance(column, Sequence) or isinstance(column, str | bytes):
        raise ValueError(f"{shortened(name)} must be a list of numbers, got {shortened(column)}")
    if not (set(map(type, column)) <= {float} and all(map(math.isfinite, column))):
        for index, given in enumerate(column):
            one = given.item() if isinstance(given, np.generic) else given
            if type(one) not in (float, int) or not abs(one) <= sys.float_info.max:
                raise ValueError(
                    f"{shortened(name)} must hold finite numbers, got {shortened(given)} at index {index}; "
                    f"leave out missing observations"
                )
    return list(map(float, column))


def parse_series(rows: Iterable[Any]) -> list[Series]:
    """The series of a request: mappings, or objects, with the fields of ``Series``.

    Raises:
        InvalidSeries: there is none, or one is no series; the message names it.
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

    def __init__(self, folder: Path) -> None:
        import torch

        package, schema = _read(folder / "package.json"), _read(folder / "schema.json")
        self.is_classifier: bool = package["kind"] == "classifier"
        self.golden_field = "probabilities" if self.is_classifier else "features"
        self.max_length: int = package["max_length"]
        self.max_batch_tokens: int = package["max_batch_tokens"]
        self.channels: list[dict[str, str]] = schema["channels"]
        self.normalisation: list[dict[str, Any]] = schema["normalisation"]
        self.axes: list[dict[str, Any]] = schema["axes"]
        self.classes: list[str] = schema["classes"]
        self.units = {c["name"]: c["unit"] for c in [*self.axes, *self.channels]}
        self.units_required: bool = package["units_required"]
        self.n_outputs: int = package["n_outputs"]
        self._program = torch.export.load(folder / "model.pt2").module()

    def outputs(self, rows: Iterable[Any]) -> NDArray[np.float64]:
        """Outputs ``(n, K)`` float64 of n rows as ``parse_series`` takes them, in the order given.

        The order of observations inside a series does not matter.

        Raises:
            InvalidSeries: there is none, or one does not fit the schema.
            PackageError: the program returns another shape, or outputs that are not finite.
        """
        return self._outputs(parse_series(rows))

    def _outputs(self, series: list[Series]) -> NDArray[np.float64]:
        tokens = [self._tokens(one, _name(i, one.id)) for i, one in enumerate(series)]
        outputs = np.empty((len(series), self.n_outputs))
        for rows in self._batches([len(values) for values, _ in tokens]):
            outputs[rows] = self._run([tokens[i] for i in rows])
        return outputs

    def named(self, outputs: NDArray[np.float64]) -> dict[str, float] | list[float]:
        """One row of outputs as in a golden row: class name -> probability, or the features."""
        numbers = outputs.tolist()
        return dict(zip(self.classes, numbers, strict=True)) if self.is_classifier else numbers

    def predict(self, rows: Iterable[Any]) -> list[Any]:
        """A ``Prediction`` per row, or ``Features`` of an encoder; takes and raises as ``outputs``."""
        series = parse_series(rows)
        outputs = self._outputs(series)
        pairs = zip(series, outputs, strict=True)
        if not self.is_classifier:
            return [Features(id=one.id, features=row.tolist()) for one, row in pairs]
        return [
            Prediction(id=one.id, label=self.classes[row.argmax()], probabilities=self.named(row))
            for one, row in pairs
        ]

    def check_golden(self, path: Path) -> float:
        """Predict the golden series again; return the largest absolute difference of an output.

        Raises:
            PackageError: a row differs by more than its tolerance.
        """
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        outputs = self.outputs(row["series"] for row in rows)
        largest = 0.0
        for number, (row, output) in enumerate(zip(rows, outputs, strict=True)):
            expected = row[self.golden_field]
            if isinstance(expected, dict):
                expected = [expected[name] for name in self.classes]
            difference = float(np.abs(np.array(expected) - output).max())
            if not difference <= row["tolerance"]:
                raise PackageError(
                    f"golden row {number} of {path}: {self.golden_field} differ by "
                    f"{difference:.2g}, more than {row['tolerance']}; with torch "
                    f"{version('torch')} on this computer the program computes other numbers: do "
                    f"not use it here"
                )
            largest = max(largest, difference)
        return largest

    def _tokens(self, series: Series, where: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Validated and normalised values ``(n, P)`` and positions ``(n, D)``, both float32."""
        self._check_units(series.units or {}, where)
        positions = self._columns(series.positions, self.axes, f"{where}: positions")
        values = self._columns(series.values, self.channels, f"{where}: values")
        lengths = {name: len(column) for name, column in [*positions.items(), *values.items()]}
        first, n = next(iter(lengths.items()))
        for name, length in lengths.items():
            if length != n:
                raise InvalidSeries(
                    f"{where}: {name!r} has {length} numbers, but {first!r} has {n}; every axis and "
                    f"channel needs one number per observation"
                )
        if not 1 <= n <= self.max_length:
            raise InvalidSeries(f"{where}: expected 1 to {self.max_length} observations, got {n}")
        with np.errstate(over="ignore"):
            tokens = (
                normalise_values([values[c["name"]] for c in self.channels], self.normalisation),
                normalise_positions([positions[axis["name"]] for axis in self.axes], self.axes),
            )
        for field, array in zip(("values", "positions"), tokens, strict=True):
            if not np.isfinite(array).all():
                raise InvalidSeries(f"{where}: {field}: a number is too large for float32")
        return tokens

    def _check_units(self, given: dict[str, str], where: str) -> None:
        for name, unit in given.items():
            if name not in self.units:
                raise InvalidSeries(
                    f"{where}: units: {shortened(name)} is no axis or channel of this model; "
                    f"it has {', '.join(map(repr, self.units))}"
                )
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

    @staticmethod
    def _columns(
        given: dict[str, list[float]], expected: list[dict[str, Any]], where: str
    ) -> dict[str, NDArray[np.float64]]:
        names = [one["name"] for one in expected]
        if unknown := [name for name in given if name not in names]:
            raise InvalidSeries(
                f"{where}: unknown {shortened(unknown[0])}; this model takes {', '.join(map(repr, names))}"
            )
        columns = {}
        for name in names:
            if name not in given:
                raise InvalidSeries(f"{where}: {name!r} is missing; got {shortened(sorted(given))}")
            columns[name] = np.array(given[name], np.float64)
        return columns

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Rows of similar length, at most ``max_batch_tokens`` with padding unless it is one row."""
        batch: list[int] = []
        for row in np.argsort(lengths, kind="stable").tolist():
            if batch and (len(batch) + 1) * lengths[row] > self.max_batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        yield batch

    def _run(self, tokens: list[tuple[NDArray[Any], NDArray[Any]]]) -> NDArray[np.float64]:
        """Outputs ``(B, K)`` float64 of one batch."""
        import torch

        longest = max(len(values) for values, _ in tokens)
        values = torch.zeros(len(tokens), longest, len(self.channels))
        positions = torch.zeros(len(tokens), longest, len(self.axes))
        valid = torch.zeros(len(tokens), longest, dtype=torch.bool)
        for row, (v, p) in enumerate(tokens):
            values[row, : len(v)] = torch.from_numpy(v)
            positions[row, : len(p)] = torch.from_numpy(p)
            valid[row, : len(v)] = True
        with torch.inference_mode():
            outputs = self._program(values, positions, valid)
        if outputs.shape != (len(tokens), self.n_outputs) or not outputs.isfinite().all():
            raise PackageError(
                f"the program should give finite outputs of shape {(len(tokens), self.n_outputs)}, "
                f"got shape {tuple(outputs.shape)}, {int((~outputs.isfinite()).sum())} not finite"
            )
        outputs = outputs.double()
        return (torch.softmax(outputs, dim=1) if self.is_classifier else outputs).numpy()


def open_package(folder: Path) -> Package:
    """Verify every file of a package, load it, and check its golden rows.

    Raises:
        PackageError: a file is missing, changed or of another version (found before anything is
            deserialised), or a golden row is not reproduced.
    """
    verify_files(folder)
    package = Package(folder)
    package.check_golden(folder / "golden.jsonl")
    return package


_TRANSFORMS = {"identity": lambda x, scale: x, "arcsinh": lambda x, scale: np.arcsinh(x / scale)}


def normalise_values(
    columns: list[NDArray[np.float64]], constants: list[dict[str, Any]]
) -> NDArray[np.float32]:
    """``(n, P)`` of P columns ``(n,)`` as delivered, equal to ``roma_core.schema.Normaliser.normalise``;
    ``constants``: ``normalisation`` of ``schema.json``.
    """
    normalised = []
    for column, c in zip(columns, constants, strict=True):
        x = column.astype(np.float32).astype(np.float64)  # a data set on disk stores float32
        x = _TRANSFORMS[c["transform"]](x, c["transform_scale"])
        normalised.append((x - c["mean"]) / c["std"])
    return np.stack(normalised, axis=1).astype(np.float32)


def normalise_positions(
    columns: list[NDArray[np.float64]], axes: list[dict[str, Any]]
) -> NDArray[np.float32]:
    """``(n, D)`` of D columns ``(n,)`` as delivered, equal to ``Normaliser.normalise_positions``;
    ``axes``: those of ``schema.json``.
    """
    normalised = []
    for x, axis in zip(columns, axes, strict=True):
        anchor = {"none": 0.0, "first": x.min()}[axis["anchor"]]
        normalised.append((x - (anchor + axis["offset"])) / axis["scale"])
    return np.stack(normalised, axis=1).astype(np.float32)


def verify_files(folder: Path) -> None:
    """Check that the folder holds exactly the files of its manifest, unchanged.

    Raises:
        PackageError: a file is missing, added or changed, or the manifest is of another version.
    """
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

    _kind = ModelConfig(development_config={"kind": "classifier"}).get("kind")
    Output = Features if _kind == "encoder" else Prediction

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
                rows = table[0].tolist() if list(table) == [0] else table.to_dict("records")
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
