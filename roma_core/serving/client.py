"""A thin client of the server of a registered model. No torch.

model = ServedModel("http://127.0.0.1:5001")
model.predict([Series(positions={"time": [0.0, 1.5]}, values={"flux": [3.0, 2.5]}, units=…)])
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from roma_core.serving.pyfunc_model import Prediction, Series
from roma_core.serving.registry_client import ModelVersion, connect, fetch, package_of, resolve


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

    def predict(self, series: Sequence[Series]) -> list[Prediction]:
        """Class and probabilities of every series, in order; lengths may differ.

        Raises:
            RequestRejected: a series does not fit the model.
            ServerError: anything else went wrong.
        """
        answers = self._post([one.model_dump(exclude_none=True) for one in series])
        try:
            predictions = [Prediction.model_validate(answer) for answer in answers]
        except ValidationError as error:
            raise ServerError(
                f"{self.url} returns no predictions of a classifier: {error}"
            ) from error
        if len(predictions) != len(series):
            raise ServerError(
                f"{self.url} returns {len(predictions)} predictions for {len(series)} series"
            )
        return predictions

    def check_golden(self, package: Path) -> None:
        """Compare the server's predictions of a package's golden rows with the recorded ones.

        Raises:
            ServerError: they differ.
        """
        lines = (package / "golden.jsonl").read_text(encoding="utf-8").splitlines()
        golden = [json.loads(line) for line in lines]
        predictions = self.predict([Series(**row["series"]) for row in golden])
        for number, (row, prediction) in enumerate(zip(golden, predictions, strict=True)):
            expected = row["probabilities"]
            if expected.keys() != prediction.probabilities.keys() or any(
                abs(expected[name] - p) > row["tolerance"]
                for name, p in prediction.probabilities.items()
            ):
                raise ServerError(
                    f"{self.url} returns other probabilities for golden row {number} of {package}: "
                    f"it serves another version; restart it, aliases are resolved only at startup"
                )

    def _post(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            body = json.dumps({"inputs": rows}, allow_nan=False).encode()
        except ValueError as error:
            raise RequestRejected(f"a number is not finite ({error})") from error
        except TypeError as error:
            field = _first_unserialisable(rows)
            raise RequestRejected(f"{field}: {error}; expected plain numbers") from error
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
            if 400 <= error.code < 500:
                raise RequestRejected(message) from error
            raise ServerError(f"{self.url} answered {error.code}: {message}") from error
        except (OSError, KeyError, ValueError) as error:
            raise ServerError(f"{self.url} did not answer as a model server: {error}") from error


def _first_unserialisable(rows: list[dict[str, Any]]) -> str:
    for number, row in enumerate(rows):
        for field, content in row.items():
            for name, one in content.items() if isinstance(content, dict) else [(None, content)]:
                try:
                    json.dumps(one)
                except TypeError:
                    return f"series {number}: {field}" + ("" if name is None else f": {name!r}")
    return "a series"
