"""The thin client of a served model: resolve, verify, call. No torch.

    model = ServedModel("http://127.0.0.1:5001")
    model.predict([Series(positions={"time": [0.0, 1.5]}, values={"flux": [3.0, 2.5]}, units=…)])

``verified`` goes the whole way: the alias is resolved in the registry, the package is downloaded and
compared with its checksums, and the server must give the package's golden rows the outputs recorded
there. So it is known which version answers, though the server itself does not say so.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from roma_core.serving.registry_client import ModelVersion, connect, fetch, package_of, resolve
from roma_core.serving.schema import Prediction, Series


class RequestRefused(ValueError):
    """The server does not take these series; the message names the field."""


class ServerFailed(RuntimeError):
    """The server did not answer, answered with an error of its own, or serves another model."""


class ServedModel:
    """A model behind ``mlflow models serve``.

    Attributes:
        version: the version that is known to answer; None if nobody verified it.
    """

    def __init__(self, url: str, *, timeout_s: float = 30.0) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.version: ModelVersion | None = None

    @classmethod
    def verified(
        cls, url: str, model: str, tracking_uri: str, cache: Path, *, timeout_s: float = 30.0
    ) -> Self:
        """A client of a server that was found to serve ``model``.

        Args:
            model: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
            cache: folder for downloaded models.

        Raises:
            FetchError: the model is not in the registry, or is not what was registered.
            ServerFailed: the server does not answer, or computes something else.
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
            RequestRefused: a series does not fit the model.
            ServerFailed: anything else went wrong.
        """
        rows = [one.model_dump(exclude_none=True) for one in series]
        return [Prediction.model_validate(row) for row in self._answers(rows)]

    def check_golden(self, package: Path) -> None:
        """Compare the server's answers for the golden rows of a package with those recorded.

        Raises:
            ServerFailed: they differ.
        """
        lines = (package / "golden.jsonl").read_text(encoding="utf-8").splitlines()
        golden = [json.loads(line) for line in lines]
        answers = self.predict([Series(**row["series"]) for row in golden])
        for number, (row, answer) in enumerate(zip(golden, answers, strict=True)):
            expected = row["probabilities"]
            if expected.keys() != answer.probabilities.keys() or any(
                abs(expected[name] - p) > row["tolerance"]
                for name, p in answer.probabilities.items()
            ):
                raise ServerFailed(
                    f"{self.url} gives golden row {number} of {package} other probabilities: it "
                    f"serves another version; restart it, an alias is resolved only at its start"
                )

    def _answers(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            body = json.dumps({"inputs": rows}, allow_nan=False).encode()
        except ValueError as error:
            raise RequestRefused(f"a number is not finite ({error})") from error
        except TypeError as error:
            raise RequestRefused(f"{_unsendable(rows)}: {error}; expected plain numbers") from error
        request = urllib.request.Request(
            f"{self.url}/invocations", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return json.load(response)["predictions"]
        except urllib.error.HTTPError as error:
            message = _message(error.read())
            if 400 <= error.code < 500:
                raise RequestRefused(message) from error
            raise ServerFailed(f"{self.url} answered {error.code}: {message}") from error
        except (OSError, KeyError, ValueError) as error:
            raise ServerFailed(f"{self.url} did not answer as a model server: {error}") from error


def _unsendable(rows: list[dict[str, Any]]) -> str:
    """The first field that JSON cannot hold."""
    for number, row in enumerate(rows):
        for field, content in row.items():
            named = content if isinstance(content, dict) else {None: content}
            for name, one in named.items():
                try:
                    json.dumps(one)
                except TypeError:
                    what = field if name is None else f"{field}: {name!r}"
                    return f"series {number}: {what}"
    return "a series"


def _message(body: bytes) -> str:
    try:
        document = json.loads(body)
        return str(document.get("message") or document.get("detail") or document)
    except (ValueError, AttributeError):
        return body.decode(errors="replace")[:500]
