"""A thin client of the server of a registered model. No torch.

model = ServedModel("http://127.0.0.1:5001")
model.predict([Series(positions={"time": [0.0, 1.5]}, values={"flux": [3.0, 2.5]}, units=…)])
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from roma_core.serving.pyfunc_model import (
    Interpolation,
    InvalidSeries,
    ObservationValues,
    Prediction,
    Series,
    TargetValues,
    difference_of,
    parse_series,
    shortened,
)
from roma_core.serving.registry_client import ModelVersion, connect, fetch, package_of, resolve

_PREDICTIONS: Any = Prediction | TargetValues | ObservationValues


class RequestRejected(ValueError):
    """The server does not accept these series; the message names the field."""


class ServerError(RuntimeError):
    """The server cannot be reached, fails, or serves another model."""


class ServedModel:
    """A model behind ``mlflow models serve``; ``version`` is None unless made by ``verified``."""

    def __init__(self, url: str, *, timeout_s: float = 30.0) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.version: ModelVersion | None = None

    @classmethod
    def verified(
        cls, url: str, model: str, tracking_uri: str, cache: Path, *, timeout_s: float = 30.0
    ) -> Self:
        """A client of a server after checking that it serves ``model``, a ``models:/`` URI.

        MLflow's server does not report its version, so its predictions of the golden rows are
        compared with those of the verified package in the registry.

        Raises:
            FetchError: the model is not in the registry, or differs from its recorded checksums.
            ServerError: the server cannot be reached, or returns other predictions.
        """
        registry = connect(tracking_uri)
        version = resolve(registry, model)
        served = cls(url, timeout_s=timeout_s)
        served.check_golden(package_of(fetch(registry, version, cache)))
        served.version = version
        return served

    def predict(self, series: Iterable[Series | Mapping[str, Any]]) -> list[Any]:
        """A ``Prediction`` of every series, in order, of a regressor its values; lengths may differ.

        Raises RequestRejected for a series that does not fit, ServerError for anything else.
        """
        return self._answers(_PREDICTIONS, series)

    def interpolate(self, series: Iterable[Series | Mapping[str, Any]]) -> list[Interpolation]:
        """Values at the ``queries`` of every series, by an autoencoder; raises as ``predict``."""
        return self._answers(Interpolation, series)

    def _answers(self, kind: Any, series: Iterable[Any]) -> list[Any]:
        try:
            rows = [one.model_dump(exclude_none=True) for one in parse_series(series)]
        except InvalidSeries as error:
            raise RequestRejected(str(error)) from error
        answers = self._post(rows)
        try:
            found = [TypeAdapter(kind).validate_python(answer) for answer in answers]
        except (ValidationError, TypeError) as error:
            made_by = "an autoencoder" if kind is Interpolation else "a classifier or regressor"
            raise ServerError(
                f"{self.url} returns no predictions of {made_by}, but {shortened(answers)}"
            ) from error
        if len(found) != len(rows):
            raise ServerError(f"{self.url} returns {len(found)} predictions for {len(rows)} series")
        return found

    def check_golden(self, package: Path) -> None:
        """Compare the server's predictions of a package's golden rows with the recorded ones.

        Raises ServerError if they differ.
        """
        lines = (package / "golden.jsonl").read_text(encoding="utf-8").splitlines()
        golden = [json.loads(line) for line in lines]
        fields = ("probabilities", "targets", "interpolation")
        field = next((name for name in fields if name in golden[0]), None)
        if field is None:
            raise ServerError(f"{package} is an encoder's; a server of features is not compared")
        kind = Interpolation if field == "interpolation" else _PREDICTIONS
        answers = self._answers(kind, [row["series"] for row in golden])
        for number, (row, answer) in enumerate(zip(golden, answers, strict=True)):
            found: Any = answer.model_dump(exclude={"id"}, exclude_none=True)
            found = found.get("probabilities", found)
            if not difference_of(row[field], found, row.get("scale", {})) <= row["tolerance"]:
                what = "probabilities" if field == "probabilities" else "values"
                raise ServerError(
                    f"{self.url} returns other {what} for golden row {number} of {package}: it "
                    f"serves another version; restart it, aliases are resolved only at startup"
                )

    def _post(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        body = json.dumps({"inputs": rows}).encode()
        request = urllib.request.Request(
            f"{self.url}/invocations", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return json.load(response)["predictions"]
        except urllib.error.HTTPError as error:
            body = error.read()
            try:
                document = json.loads(body)
                message = str(document.get("message") or document.get("detail") or document)
            except (ValueError, AttributeError):
                message = body.decode(errors="replace")[:500]
            message = message.rpartition("\nError: ")[2]  # MLflow may put the whole input before it
            if 400 <= error.code < 500:
                raise RequestRejected(message) from error
            raise ServerError(f"{self.url} answered {error.code}: {message}") from error
        except (OSError, KeyError, ValueError) as error:
            raise ServerError(f"{self.url} did not answer as a model server: {error}") from error
