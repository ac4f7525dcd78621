"""NumPy arrays and whole-number ids in requests: taken everywhere, or refused in one sentence.

The report: errors of schema checks repeat the whole input, and NumPy types and ints trip pyfunc
models. A real registry, a real server, the thin client and the command are asked.
"""

import json
import shutil
import urllib.request
from array import array

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from roma_core.cli import main
from roma_core.serving.client import RequestRejected, Series, ServedModel
from roma_core.serving.registry_client import AliasWatcher
from roma_pipelines.registry.promotion import promote
from roma_pipelines.registry.store import MlflowSettings, connect
from tests.core.serving import toy
from tests.pipelines.registry.conftest import registered_as, served
from tests.time_limits import within

pytestmark = pytest.mark.slow
TIME, BAND = [0.0, 1.0, 4.0], [1.0, 2.0, 1.0]
UNITS = {"time": "d", "flux": "mJy"}


def row(time=TIME, flux=(3.0, 2.0, 5.0), **fields):
    positions, values = {"time": time, "band": BAND}, {"flux": flux, "ratio": [0.0, 1.0, 2.0]}
    return {"positions": positions, "values": values, "units": UNITS, **fields}


@pytest.fixture(scope="module")
def house(store_template, tmp_path_factory):
    """A store with a champion, the champion as MLflow loads it, and the address of its server."""
    root = tmp_path_factory.mktemp("registry")
    shutil.copyfile(store_template, root / store_template.name)
    client = connect(MlflowSettings.from_values({}), root)
    package = root / "toy"
    registered_as(client, (package, toy.build_toy(package)), "stars", "k1")
    promote(client, "stars", "1", reason="first", actor="tester", evidence={})
    import mlflow

    mlflow.set_tracking_uri(client.tracking_uri)
    model = mlflow.pyfunc.load_model("models:/stars@champion")
    command = ["models", "serve", "-m", "models:/stars@champion", "--env-manager", "local"]
    folder = tmp_path_factory.mktemp("serving")
    with served(command, folder, "/ping", MLFLOW_TRACKING_URI=client.tracking_uri) as url:
        yield client, model, url


@pytest.fixture(scope="module")
def expected(house):
    (answer,) = house[1].predict([row(list(TIME), [3.0, 2.0, 5.0])])
    assert answer.id is None
    return pytest.approx(answer.probabilities, abs=1e-6)


TAKEN = {
    "numpy": (row(np.array(TIME), np.array([3, 2, 5])), None),
    "small numpy types": (row(np.array(TIME, np.float16), np.array([3, 2, 5], np.uint8)), None),
    "tuples": (row(tuple(TIME), (3.0, 2.0, 5.0)), None),
    "whole numbers": (row([0, 1, 4], [3, 2, 5]), None),
    "NumPy numbers in a list": (row([np.float32(0), np.int64(1), 4], [3, 2, 5]), None),
    "pandas": (row(pd.Series(TIME), pd.Series([3, 2, 5])), None),
    "torch": (row(torch.tensor(TIME), torch.tensor([3.0, 2.0, 5.0])), None),
    "arrays of Python": (row(array("d", TIME), array("f", [3, 2, 5])), None),
    "int id": (row(id=615), "615"),
    "numpy id beyond 2^53": (row(id=np.uint64(2**64 - 1)), "18446744073709551615"),
    "id of a column with a missing one": (row(id=615.0), "615"),
    "bytes": (row(id=np.bytes_(b"HD 1")), "HD 1"),
    "text": (row(id="0615"), "0615"),
    "null": (row(id=None), None),
}


@pytest.mark.parametrize(("given", "name"), TAKEN.values(), ids=TAKEN)
def test_the_model_and_the_clients_take_it(house, expected, tmp_path, given, name):
    client, model, url = house
    with AliasWatcher(client, "models:/stars@champion", tmp_path) as watched:
        answers = [
            *model.predict([given]),
            *model.predict([Series(**given)]),
            *ServedModel(url, timeout_s=within(30)).predict([given, Series(**given)]),
            *watched.predict([given]).predictions,
        ]
    for answer in answers:
        assert answer.id == name
        assert answer.probabilities == expected


def post(url, body):
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=within(60)) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_whole_number_is_an_id_over_http_and_ids_may_repeat(house, expected):
    code, answer = post(house[2], {"inputs": [row(id=615), row(id=615), row(id="615")]})
    assert code == 200
    assert [one["id"] for one in answer["predictions"]] == ["615"] * 3
    assert all(one["probabilities"] == expected for one in answer["predictions"])


@pytest.mark.parametrize(
    "ids",
    [pa.array([615, 7]), pa.array([615.0, 7.0]), pa.array(["615", "7"]), pa.array([b"615", b"7"])],
    ids=lambda ids: str(ids.type),
)
def test_the_command_takes_ids_of_any_type(house, expected, tmp_path, ids):
    one = row()
    columns = {name: [list(c)] * 2 for name, c in (one["positions"] | one["values"]).items()}
    pq.write_table(pa.table({"id": ids, **columns}), tmp_path / "in.parquet")
    lines = [json.dumps(row(id=n if n == 7 else str(n))) for n in (615, 7)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    for name in ("in.parquet", "in.jsonl"):
        target = tmp_path / f"{name}.out"
        options = ["--model", "models:/stars@champion", "--tracking-uri", house[0].tracking_uri]
        done = CliRunner().invoke(
            main, ["predict", *options, str(tmp_path / name), str(target)], catch_exceptions=False
        )
        assert done.exit_code == 0, done.output
        table = pq.read_table(target)
        assert table["id"].to_pylist() == ["615", "7"]
        assert all(dict(one) == expected for one in table["probabilities"].to_pylist())


N = 2000
MANY = [float(n) for n in range(N)]
REFUSED = {
    "None": (row(MANY, [1.0, None] * (N // 2)), "values: 'flux' has no number at index 1, but no value was missing"),
    "only None": (row(MANY, [None] * N), "values: 'flux' has no number at index 0, but no value was missing"),
    "NaN": (row(MANY, [float("nan")] * N), "values: 'flux' has no number at index 0, but no value was missing"),
    "text": (row(["1.5"] * N, MANY), "positions: 'time' must hold finite numbers, got '1.5' at index 0"),
    "true": (row(MANY, [True] * N), "values: 'flux' must hold finite numbers, got True at index 0"),
    "ragged lists in a list": (row([[1.0], [1.0, 2.0]], MANY), "positions: 'time' must hold finite numbers, got [1.0] at index 0"),
    "a number": (row(3, MANY), "positions: 'time' must be a list of numbers, got 3"),
    "a long text": (row("x" * 10**6, MANY), "positions: 'time' must be a list of numbers, got 'xxx"),
    "too large": (row(MANY, [10**400] * N), "values: 'flux' must hold finite numbers, got 1000"),
    "lengths": (row(MANY[:40], MANY[:39]), "'band' has 3 numbers, but 'time' has 40"),
    "too long": ({"positions": {"time": MANY, "band": MANY}, "values": {"flux": MANY, "ratio": MANY}, "units": UNITS}, "expected 1 to 50 observations, got 2000"),
    "no lists": (row() | {"values": None}, "values: expected a list of numbers for each name, got None"),
    "unknown channels": (row() | {"values": {f"c{n}": MANY for n in range(200)}}, "values: unknown 'c0'"),
    "unknown field": (row(MANY, MANY, colour="red"), "colour: no field of a series; it has id, positions"),
    "missing field": ({"values": {"flux": MANY}}, "positions: "),
    "id": (row(MANY, MANY, id=[1, 2]), "id: expected text or a whole number, got [1, 2]"),
    "fraction as id": (row(MANY, MANY, id=1.5), "id: expected text or a whole number, got 1.5"),
    "true as id": (row(MANY, MANY, id=True), "id: expected text or a whole number, got True"),
    "unit": (row(MANY, MANY) | {"units": {"time": 3}}, "units.time: "),
    "no object": (MANY, "expected an object with positions and values, got [0.0, 1.0"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "words"), REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused_in_one_sentence_that_names_series_and_field(house, given, words):
    from mlflow.exceptions import MlflowException

    _, model, url = house
    inputs = [row(id="good"), given]
    with pytest.raises(MlflowException) as caught:
        model.predict(inputs)
    code, answer = post(url, {"inputs": inputs})
    with pytest.raises(RequestRejected) as refused:
        ServedModel(url, timeout_s=within(30)).predict(inputs)
    assert code == 400
    for sentence in (
        str(caught.value),
        caught.value.message,
        answer["message"],
        str(refused.value),
    ):
        assert sentence.startswith("series 1")
        assert words in sentence
        assert len(sentence) < 300 and "\n" not in sentence


@pytest.mark.parametrize("inputs", [[], None, {"positions": {}}, 7], ids=str)
def test_what_is_no_list_of_series_is_refused_too(house, inputs):
    code, answer = post(house[2], {"inputs": inputs})
    assert code == 400 and answer["message"].startswith("expected a list of"), answer
    with pytest.raises(RequestRejected, match="expected a list of"):
        ServedModel(house[2]).predict(inputs)


def test_a_huge_batch_comes_back_in_order(house):
    _, model, url = house
    rows = [row(flux=[float(n), 1.0, 2.0], id=n) for n in range(3000)]
    found = ServedModel(url, timeout_s=within(60)).predict(rows)
    assert [one.id for one in found] == [str(n) for n in range(3000)]
    for n in (0, 1234, 2999):
        alone = model.predict([rows[n]])[0].probabilities
        assert found[n].probabilities == pytest.approx(alone, abs=1e-6)


def test_a_data_frame_is_taken_and_the_signature_is_kept(house, expected):
    """As mlflow.evaluate and Spark pass series: a column per field, or one of whole series."""
    model = house[1]
    signature = model.metadata.signature
    assert "positions" in str(signature.inputs) and "probabilities" in str(signature.outputs)
    columns = row()["positions"] | row()["values"]
    entries = zip(*columns.values(), strict=True)
    other = {k: x for k, x in row().items() if k not in ("positions", "values")}
    other["observations"] = [dict(zip(columns, one, strict=True)) for one in entries]
    frames = pd.DataFrame([row(id="a"), row()]), pd.DataFrame({0: [row(id="a"), row()]})
    for frame in (*frames, pd.DataFrame([row(id="a"), other])):
        found = model.predict(frame)
        assert [one.id for one in found] == ["a", None]
        assert all(one.probabilities == expected for one in found)
