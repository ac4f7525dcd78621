"""``mlflow models serve`` as it is, asked with curl and with the thin client."""

import json
import shutil
import subprocess
import urllib.request

import pytest

from roma_core.serving.client import RequestRejected, ServedModel, ServerError
from roma_core.serving.client import Series as ClientSeries
from roma_core.serving.pyfunc_model import InvalidSeries, Series, open_package
from roma_pipelines.registry.promotion import promote
from roma_pipelines.registry.store import MlflowSettings, connect
from tests.core.serving import toy
from tests.pipelines.registry.conftest import registered_as, served
from tests.time_limits import within

pytestmark = pytest.mark.slow

# the example of docs/registry.md, with the names of this model; rows have 3 and 1 observations
CURL = """
curl -s -w '\\n%{http_code}' URL/invocations -H 'Content-Type: application/json' -d '{"inputs": [
  {"positions": {"time": [0.0, 1.5, 4.0], "band": [1, 2, 1]}, "values": {"flux": [3.1, 2.9, 3.4], "ratio": [0.1, 0.2, 0.1]}, "units": {"time": "d", "flux": "mJy"}},
  {"id": "short", "positions": {"time": [7.0], "band": [2]}, "values": {"flux": [1.0], "ratio": [0.3]}, "units": {"time": "d", "flux": "mJy"}}
]}'
"""


@pytest.fixture(scope="module")
def house(store_template, toy_package, other_package, tmp_path_factory):
    """A store with a champion and another version, and a server of the champion."""
    root = tmp_path_factory.mktemp("registry")
    shutil.copyfile(store_template, root / store_template.name)
    client = connect(MlflowSettings.from_values({}), root)
    registered_as(client, toy_package, "stars", "k1")
    registered_as(client, other_package, "stars", "k2", **{"roma.compared_with": "1"})
    promote(client, "stars", "1", reason="first", actor="tester", evidence={})
    uri = client.tracking_uri
    command = ["models", "serve", "-m", "models:/stars@champion", "--env-manager", "local"]
    folder = tmp_path_factory.mktemp("serving")
    with served(command, folder, "/ping", MLFLOW_TRACKING_URI=uri) as url:
        yield uri, url


def test_the_example_with_curl(house, toy_package):
    done = subprocess.run(
        ["bash", "-c", CURL.replace("URL", house[1])], capture_output=True, text=True, check=True
    )
    body, _, code = done.stdout.rpartition("\n")
    assert code == "200", body
    answers = json.loads(body)["predictions"]
    rows = json.loads(CURL.split("-d '")[1].rstrip("'\n"))["inputs"]
    expected = open_package(toy_package[0]).predict([Series(**row) for row in rows])
    assert [a["id"] for a in answers] == [None, "short"]
    for answer, one in zip(answers, expected, strict=True):
        assert answer["label"] == one.label
        assert answer["probabilities"] == pytest.approx(one.probabilities, abs=1e-6)


GOOD = toy.series(2, seed=1).model_dump()
LONG = toy.series(10_000, seed=1).model_dump()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": [GOOD | {"values": GOOD["values"] | {"colour": [1, 2]}}]}, "unknown 'colour'"),
        ({"inputs": [GOOD | {"values": {"flux": [1, 2]}}]}, "'ratio' is missing"),
        ({"inputs": [GOOD | {"units": {"time": "d"}}]}, "'flux' is missing; this model takes it in 'mJy'"),
        ({"inputs": [GOOD | {"units": None}]}, "units: 'time' is missing"),
        ({"inputs": [GOOD | {"units": {"time": "d", "flux": "Jy"}}]}, "'flux' must be in 'mJy', got 'Jy'"),
        ({"inputs": [GOOD | {"values": {"flux": [1, float("nan")], "ratio": [1, 2]}}]}, "flux"),
        ({"inputs": [GOOD | {"values": {"flux": ["bright", 1], "ratio": [1, 2]}}]}, "flux"),
        ({"inputs": [GOOD | {"values": {"flux": 3, "ratio": [1, 2]}}]}, "flux"),
        ({"inputs": [{"values": GOOD["values"]}]}, "positions"),
        ({"inputs": [GOOD | {"color": "red"}]}, "color"),
        ({"inputs": [LONG]}, "expected 1 to 50 observations, got 10000"),
        ({"inputs": []}, "at least one"),
        ({"dataframe_records": [GOOD]}, ""),
    ],
    ids=lambda x: x[:24] if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_requests_get_a_4xx_that_names_the_field(house, body, words):
    request = urllib.request.Request(
        f"{house[1]}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=within(20))
    answer = caught.value.read().decode()
    assert 400 <= caught.value.code < 500, answer
    assert words in answer.replace('\\"', '"')


def test_the_thin_client_knows_which_version_answers(house, toy_package, tmp_path):
    uri, url = house
    model = ServedModel.verified(url, "models:/stars@champion", uri, tmp_path, timeout_s=within(30))
    assert model.version.version == "1"
    rows = [toy.series(n, seed=n) for n in (4, 1, 9)]
    expected = open_package(toy_package[0]).predict([Series(**r.model_dump()) for r in rows])
    for found, one in zip(model.predict(rows), expected, strict=True):
        assert found.label == one.label
        assert found.probabilities == pytest.approx(one.probabilities, abs=1e-6)

    with pytest.raises(ServerError, match="it serves another version"):
        ServedModel.verified(url, "models:/stars/2", uri, tmp_path, timeout_s=within(30))
    with pytest.raises(RequestRejected, match="'ratio' is missing"):
        model.predict([ClientSeries(**GOOD | {"values": {"flux": [1, 2]}})])
    with pytest.raises(InvalidSeries, match="'flux' must hold finite numbers, got inf"):
        infinite = GOOD["values"] | {"flux": [1, float("inf")]}
        model.predict([ClientSeries(**GOOD | {"values": infinite})])
    with pytest.raises(ServerError, match="did not answer"):
        ServedModel("http://127.0.0.1:9", timeout_s=2).predict(rows)
