"""What the thin client refuses before it asks a server."""

import subprocess
import sys
from decimal import Decimal

import pytest

from roma_core.serving.client import RequestRejected, Series, ServedModel, ServerError
from tests.core.serving import toy


def test_what_is_no_number_is_refused_by_the_name_of_its_field():
    rows = [toy.series(2, seed=1), toy.series(2, seed=2)]
    rows[1].values["flux"][1] = Decimal("1.5")
    with pytest.raises(
        RequestRejected, match=r"series 1 \(id 's2'\): values: 'flux' .* numbers, got Decimal"
    ):
        ServedModel("http://127.0.0.1:9", timeout_s=2).predict(rows)


def test_the_client_and_the_types_of_requests_need_neither_torch_nor_mlflow():
    code = "import sys, roma_core.serving.client; print({'torch', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "answers", [[{"features": [0.1, 0.2]}], []], ids=["an encoder", "too few predictions"]
)
def test_a_server_of_another_kind_is_a_server_error(monkeypatch, answers):
    served = ServedModel("http://127.0.0.1:1")
    monkeypatch.setattr(served, "_post", lambda rows: answers)

    with pytest.raises(ServerError, match="returns"):
        served.predict([Series(positions={"time": [0.0]}, values={"flux": [1.0]})])
