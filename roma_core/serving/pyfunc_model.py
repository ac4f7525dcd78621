"""The model as it is logged: this one file, beside a package folder, runs without this project.

It needs mlflow, numpy, pydantic and torch. ``package.py`` writes the folder:

    model.pt2             exported program: values (B, N, P) float32, positions (B, N, D) float32,
                          valid (B, N) bool, True at a real token -> (B, K): logits of K classes, or
                          K features of an encoder
    schema.json           channels, axes, classes, normalisation
    golden.jsonl          series with the outputs they must get
    package.json          name, kind, limits, lineage
    weights.safetensors, model_config.json, series.schema.json    for research and for clients
    profile.json, requirements.lock, MODEL_CARD.md                what the model was trained on
    MANIFEST.json         sha256 of every other file, checked before anything else is read

Shapes here:  B series   N tokens, padded   P channels   D axes   K outputs
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import ModelConfig, set_model
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
MANIFEST = "MANIFEST.json"
NEEDED = (
    "model.pt2",
    "weights.safetensors",
    "model_config.json",
    "schema.json",
    "series.schema.json",
    "golden.jsonl",
    "package.json",
)


class Series(BaseModel):
    """One irregular series: positions and values of its observations, by name.

    Every list of one series has the same length, its number of observations (at least 1). Names
    and units are those of the model's schema. Series of one request may differ in length.
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


class Prediction(BaseModel):
    """The class of one series, with the probability of every class."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    label: str = Field(description="The most probable class.")
    probabilities: dict[str, float] = Field(description="Class name -> probability; they sum to 1.")


class Features(BaseModel):
    """What the encoder makes of one series: the mean of its tokens."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    features: list[float] = Field(description="As many numbers for every series.")


class InvalidSeries(ValueError):
    """A series that the model cannot take; the message names it and the field."""


class PackageError(RuntimeError):
    """The package folder is damaged, incomplete, or does not compute here what it should."""


class Package:
    """A package folder, loaded: series in, one row of numbers each out.

    The constructor trusts the folder; ``open`` verifies it.
    """

    golden_field: str
    """Field of a golden row that holds the outputs."""

    def __init__(self, folder: Path) -> None:
        package, schema = _read(folder / "package.json"), _read(folder / "schema.json")
        self.max_length: int = package["max_length"]
        self.max_batch_tokens: int = package["max_batch_tokens"]
        self.channels: list[dict[str, str]] = schema["channels"]
        self.normalisation: list[dict[str, Any]] = schema["normalisation"]
        self.axes: list[dict[str, Any]] = schema["axes"]
        self.classes: list[str] = schema["classes"]
        self.units = {c["name"]: c["unit"] for c in [*self.axes, *self.channels]}
        self.units_required: bool = package.get("units_required", False)
        self.n_outputs: int = package.get("n_outputs", len(self.classes))
        self._program = torch.export.load(folder / "model.pt2").module()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Verify every file, load, and check the golden rows.

        Raises:
            PackageError: a file is missing, changed or of another version, before anything of it
                is deserialised; or the golden rows come out differently.
        """
        verify_files(folder)
        return cls._loaded(folder)

    @classmethod
    def _loaded(cls, folder: Path) -> Self:
        package = cls(folder)
        package.check_golden(folder / "golden.jsonl")
        return package

    def outputs(self, series: list[Series]) -> NDArray[np.float64]:
        """``(len(series), K)``, in the order given.

        The order of observations inside a series does not matter.

        Raises:
            InvalidSeries: there are none, or one does not fit the schema.
        """
        if not series:
            raise InvalidSeries("expected a list of at least one series, got an empty list")
        tokens = [self._tokens(one, f"series {i}") for i, one in enumerate(series)]
        found = np.empty((len(series), self.n_outputs))
        for rows in self._batches([len(values) for values, _ in tokens]):
            found[rows] = self._run([tokens[i] for i in rows])
        return found

    def named(self, outputs: NDArray[np.float64]) -> Any:
        """One row of outputs as a golden row has it."""
        raise NotImplementedError

    def check_golden(self, path: Path) -> float:
        """Compute the recorded series again; returns the largest difference of an output."""
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = self.outputs([Series(**row["series"]) for row in rows])
        largest = 0.0
        for number, (row, outputs) in enumerate(zip(rows, found, strict=True)):
            expected = row[self.golden_field]
            if isinstance(expected, dict):
                expected = [expected[name] for name in self.classes]
            off = float(np.abs(np.array(expected) - outputs).max())
            if not off <= row["tolerance"]:
                raise PackageError(
                    f"golden row {number} of {path}: {self.golden_field} differ by {off:.2g}, more "
                    f"than {row['tolerance']}; the program computes something else with torch "
                    f"{torch.__version__} on this computer, do not use it here"
                )
            largest = max(largest, off)
        return largest

    def _tokens(self, series: Series, where: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Validated and normalised: values ``(n, P)`` and positions ``(n, D)``, both float32."""
        where = where if series.id is None else f"{where} (id {series.id!r})"
        for name, unit in (series.units or {}).items():
            if name not in self.units:
                raise InvalidSeries(
                    f"{where}: units: {name!r} is no axis or channel of this model; "
                    f"it has {', '.join(map(repr, self.units))}"
                )
            if unit != self.units[name]:
                if self.units[name] in ("1", name):
                    raise InvalidSeries(
                        f"{where}: units: {name!r} is a plain number to this model (unit "
                        f"{self.units[name]!r}), got {unit!r}; was it trained on such series?"
                    )
                raise InvalidSeries(
                    f"{where}: units: {name!r} must be in {self.units[name]!r}, got {unit!r}; "
                    f"convert the numbers"
                )
        for name, unit in self.units.items() if self.units_required else ():
            if unit not in ("1", name) and name not in (series.units or {}):
                raise InvalidSeries(
                    f"{where}: units: {name!r} is missing; this model takes it in {unit!r}"
                )
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
        rules = zip(self.channels, self.normalisation, strict=True)
        with np.errstate(over="ignore"):
            columns = [_normalised(values[channel["name"]], **rule) for channel, rule in rules]
            places = [_placed(positions[axis["name"]], axis) for axis in self.axes]
            result = np.stack(columns, 1).astype(np.float32), np.stack(places, 1).astype(np.float32)
        for field, array in zip(("values", "positions"), result, strict=True):
            if not np.isfinite(array).all():
                raise InvalidSeries(f"{where}: {field}: a number is too large for float32")
        return result

    @staticmethod
    def _columns(
        given: dict[str, list[float]], expected: list[dict[str, Any]], where: str
    ) -> dict[str, NDArray[np.float64]]:
        names = [one["name"] for one in expected]
        if unknown := [name for name in given if name not in names]:
            raise InvalidSeries(
                f"{where}: unknown {unknown[0]!r}; this model takes {', '.join(map(repr, names))}"
            )
        columns = {}
        for name in names:
            if name not in given:
                raise InvalidSeries(f"{where}: {name!r} is missing; got {sorted(given)}")
            columns[name] = np.array(given[name], np.float64)
            bad = ~np.isfinite(columns[name])
            if bad.any():
                at = int(bad.argmax())
                raise InvalidSeries(
                    f"{where}: {name!r} must hold finite numbers, got {given[name][at]} at index "
                    f"{at}; leave out observations that were not made"
                )
        return columns

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Rows of similar length together, at most ``max_batch_tokens`` with padding if several."""
        batch: list[int] = []
        for row in np.argsort(lengths, kind="stable").tolist():
            if batch and (len(batch) + 1) * lengths[row] > self.max_batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        yield batch

    def _run(self, tokens: list[tuple[NDArray[Any], NDArray[Any]]]) -> NDArray[np.float64]:
        """Probabilities ``(B, K)`` of one batch."""
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
        return self._finished(outputs.double()).numpy()

    def _finished(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs


class Classifier(Package):
    """``list[Series] -> list[Prediction]``."""

    golden_field = "probabilities"

    def predict(self, series: list[Series]) -> list[Prediction]:
        """Class and probabilities of every series; errors are those of ``outputs``."""
        return [
            Prediction(id=one.id, label=self.classes[int(p.argmax())], probabilities=self.named(p))
            for one, p in zip(series, self.outputs(series), strict=True)
        ]

    def named(self, outputs: NDArray[np.float64]) -> dict[str, float]:
        """Class name -> probability."""
        return dict(zip(self.classes, outputs.tolist(), strict=True))

    def _finished(self, outputs: torch.Tensor) -> torch.Tensor:
        return torch.softmax(outputs, dim=1)


class FeatureExtractor(Package):
    """``list[Series] -> list[Features]``."""

    golden_field = "features"

    def predict(self, series: list[Series]) -> list[Features]:
        """Features of every series; errors are those of ``outputs``."""
        return [
            Features(id=one.id, features=self.named(row))
            for one, row in zip(series, self.outputs(series), strict=True)
        ]

    def named(self, outputs: NDArray[np.float64]) -> list[float]:
        """The features themselves."""
        return outputs.tolist()


def open_package(folder: Path) -> Classifier | FeatureExtractor:
    """Verify and load a package of either kind; see ``Package.open``."""
    verify_files(folder)
    kind = _read(folder / "package.json").get("kind", "classifier")
    return KINDS[kind]._loaded(folder)


KINDS: dict[str, type[Classifier] | type[FeatureExtractor]] = {
    "classifier": Classifier,
    "encoder": FeatureExtractor,
}


def _normalised(
    x: NDArray[np.float64], transform: str, transform_scale: float, mean: float, std: float
) -> NDArray[np.float64]:
    x = x.astype(np.float32).astype(np.float64)  # a data set on disk holds values as float32
    if transform == "arcsinh":
        x = np.arcsinh(x / transform_scale)
    return (x - mean) / std


def _placed(x: NDArray[np.float64], axis: dict[str, Any]) -> NDArray[np.float64]:
    anchor = x.min() if axis["anchor"] == "first" else 0.0
    return (x - (anchor + axis["offset"])) / axis["scale"]


def verify_files(folder: Path) -> None:
    """Compare the folder with its manifest: all files it lists, no other, unchanged.

    Raises:
        PackageError: otherwise.
    """
    if not (folder / MANIFEST).is_file():
        raise PackageError(f"{folder} has no {MANIFEST}; it is no model package, or not all of it")
    manifest = _read(folder / MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise PackageError(
            f"{folder / MANIFEST} has schema_version {manifest.get('schema_version')!r}, this file "
            f"reads {SCHEMA_VERSION}; load the package with the version that wrote it"
        )
    listed, found = manifest["files"], {p.name for p in folder.iterdir()} - {MANIFEST}
    if not set(NEEDED) <= set(listed) or found != set(listed):
        raise PackageError(
            f"{folder} should hold {sorted(NEEDED)} and what {MANIFEST} lists, {sorted(listed)}; "
            f"there are {sorted(found)}; download it again"
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


class _Logged(PythonModel):
    """What ``mlflow.pyfunc.load_model`` and ``mlflow models serve`` run."""

    kind: type[Classifier] | type[FeatureExtractor]

    def load_context(self, context: Any) -> None:
        """Verify and load the package folder, the artifact ``package``."""
        self.package = self.kind.open(Path(context.artifacts["package"]))

    def answer(self, series: list[Series]) -> Any:
        """Predict; a series that does not fit is an MlflowException that the server answers with 400."""
        try:
            return self.package.predict(series)
        except InvalidSeries as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


class LoggedClassifier(_Logged):
    kind = Classifier

    def predict(  # type: ignore[override]
        self, model_input: list[Series], params=None
    ) -> list[Prediction]:
        """MLflow reads the signature from these types."""
        return self.answer(model_input)


class LoggedEncoder(_Logged):
    kind = FeatureExtractor

    def predict(  # type: ignore[override]
        self, model_input: list[Series], params=None
    ) -> list[Features]:
        """MLflow reads the signature from these types."""
        return self.answer(model_input)


# the kind is logged with the model; without MLflow around, it does not matter
_kind = ModelConfig(development_config={"kind": "classifier"}).get("kind")
set_model(LoggedEncoder() if _kind == "encoder" else LoggedClassifier())
