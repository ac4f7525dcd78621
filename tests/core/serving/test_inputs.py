"""Requests with missing values, categories and covariates, in both forms, to both layouts."""

from __future__ import annotations

import json
import warnings

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from roma_core import (
    RoMAForClassification,
    RoMAForClassificationConfig,
    RoMAForPreTraining,
    RoMAForPreTrainingConfig,
)
from roma_core.data import StoredDataset
from roma_core.data.store import raw_series
from roma_core.evaluation.drift import _number, reference_profile
from roma_core.evaluation.reconstruction import mask_as_trained, reconstruct, requests
from roma_core.schema import Channel, Covariate, PositionAxis
from roma_core.serving import pyfunc_model
from roma_core.serving.batch import read_chunks, score
from roma_core.serving.client import ServedModel, ServerError
from roma_core.serving.package import build_package, json_schema
from roma_core.serving.pyfunc_model import InvalidSeries, Series, _category, open_package
from roma_core.sources.base import RawSeries
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.dataloader import Collate
from roma_core.trainer.job import TrainingJobConfig, data_fields, model_of
from tests.core.hand_made import HandMade, built, series

COVARIATES = (Covariate(name="age", unit="y"), Covariate(name="sex", categories=("f", "m")))
WARD = PositionAxis(
    name="ward", unit="index of a, b", categories=("a", "b"), encoding="embedding", unknown=True
)


def patient(k):
    g = np.random.default_rng(k)
    n = 3 + k
    values = (g.normal(size=(n, 2)) * [5, 0.1] + [70, 4]).astype(np.float32)
    values[g.random((n, 2)) < 0.3] = np.nan
    values[0] = [70 + k, 4.1 + k / 10]
    values[np.isnan(values).all(1), 0] = 71
    at = np.column_stack([np.sort(g.uniform(0, 40, n)), g.integers(0, 2, n)])
    covariates = np.float32([50 + k, g.choice([0, 1, np.nan])])
    split = "train" if k < 6 else "test"
    return RawSeries(f"p{k}", at, values, "xy"[k % 2], split, covariates=covariates)


def patients(folder, layout, **options):
    source = HandMade(
        series=tuple(map(patient, range(10))),
        channels=(Channel(name="hr", unit="1/min"), Channel(name="k", unit="mmol/l")),
        axes=(PositionAxis(name="hours", unit="h"), WARD),
        covariates=COVARIATES,
    )
    axes = {"hours": {"anchor": "first"}}
    return StoredDataset(built(folder, source=source, layout=layout, axes=axes, **options))


def packaged(folder, model, program, schema, golden, **options):
    """The loaded package of a model."""
    weights, package = folder / "weights.safetensors", folder / "package"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
    golden = [Series(**row) for row in golden]
    document = model.config_document()
    build_package(package, program, weights, document, schema, golden, {}, name="w", **options)
    return open_package(package)


STACK = {"d_model": 16, "nhead": 2, "depth": 1}


@pytest.fixture(scope="module", params=["joint", "per_channel"])
def served(request, tmp_path_factory):
    """A data set, an untrained classifier of it, and its loaded package."""
    folder = tmp_path_factory.mktemp(request.param)
    dataset = patients(folder, request.param)
    torch.manual_seed(0)
    fields = {"encoder_config": STACK, "dim_output": 2} | data_fields(dataset.schema)
    model = RoMAForClassification(RoMAForClassificationConfig.from_values(fields)).eval()
    golden = raw_series(dataset.split("test"), [0, 1])
    profile = reference_profile(dataset).model_dump(mode="json")
    package = packaged(folder, model, model.export(), dataset.schema, golden, profile=profile)
    return dataset, model, package


@pytest.fixture(scope="module", params=["joint", "per_channel"])
def interpolating(request, tmp_path_factory):
    """Hidden values of a test split as requests and as a table of the model's own predictions, and the
    loaded package of the untrained autoencoder."""
    folder, is_joint = tmp_path_factory.mktemp(request.param), request.param == "joint"
    transforms = {"hr": {"transform": "arcsinh", "transform_scale": 3.0}}
    by = {"normalise_by": "ward"} if is_joint else {}
    dataset = patients(folder, request.param, channels=transforms, **by)
    torch.manual_seed(0)
    fields = {
        "encoder_config": STACK,
        "decoder_config": STACK,
        "predict_variance": is_joint,
        "mask_strategy": "value" if is_joint else "random",
        "mask_ratio": 0.4,
        "neighbours": 1,
    }
    model = RoMAForPreTraining(
        RoMAForPreTrainingConfig.from_values(fields | data_fields(dataset.schema))
    )
    test = dataset.split("test")
    table = reconstruct(model, test, mask_as_trained(model.config, 0), batch_size=3)
    asked = list(requests(table, test))
    program = model.export_reconstruction()
    golden = [one for _, one in asked]
    package = packaged(folder, model, program, dataset.schema, golden, kind="autoencoder")
    return dataset, table, asked, package


def by_channel(answers):
    return np.concatenate([np.array(list(one.values()), np.float64).T for one in answers])


def test_queries_get_the_values_that_the_evaluation_predicts(interpolating):
    dataset, table, asked, package = interpolating
    rows = [one for _, one in asked]
    answers = package.predict(rows)

    assert [one.id for one in answers] == [one["id"] for one in rows]
    hidden = ~np.isnan(table.true)
    found = by_channel([one.mean for one in answers])
    np.testing.assert_allclose(found[hidden], table.predicted[hidden], rtol=1e-4, atol=1e-4)
    if table.std is None:
        assert {one.std for one in answers} == {None}
    else:
        std = by_channel([one.std for one in answers])
        np.testing.assert_allclose(std[hidden], table.std[hidden], rtol=1e-4, atol=1e-4)
    per_channel = package.is_per_channel
    assert np.isnan(found).any() == per_channel  # where a query names another channel

    # the same as lists of objects
    objects = []
    for one in rows:
        columns = zip(*one["queries"].values(), strict=True)
        queries = [dict(zip(one["queries"], entries, strict=True)) for entries in columns]
        objects.append(one | {"queries": queries})
    assert package.predict(objects) == answers
    schema = json_schema(dataset.schema, 100, kind="autoencoder")
    jsonschema.validate({"inputs": json.loads(json.dumps(rows + objects))}, schema)
    for one in answers:
        answer = one.model_dump()
        jsonschema.validate(answer, schema["$defs"]["Interpolation"])


def test_queries_lie_anywhere_and_ask_for_all_channels_unless_one_is_named(interpolating):
    _, _, asked, package = interpolating
    one = asked[0][1]
    times = [-1e3, 10.5, 1e4]
    queries = {"hours": times, "ward": ["a", "b", "elsewhere"]}
    (answer,) = package.predict([one | {"queries": queries}])
    assert list(answer.mean) == ["hr", "k"]
    assert all(len(numbers) == 3 and np.isfinite(numbers).all() for numbers in answer.mean.values())
    if not package.is_per_channel:
        return
    columns = {name: np.repeat(column, 2).tolist() for name, column in queries.items()}
    (named,) = package.predict([one | {"queries": columns | {"channel": ["hr", "k"] * 3}}])
    assert named.mean["hr"][::2] == answer.mean["hr"] and named.mean["k"][1::2] == answer.mean["k"]
    assert {*named.mean["hr"][1::2], *named.mean["k"][::2]} == {None}


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (None, "queries: expected the positions to predict values at, got none"),
        ([], "queries: expected the positions to predict values at, got none"),
        ({"hours": [], "ward": []}, "queries: expected 1 to 4096 values to predict, got 0"),
        ({"hours": [1.0]}, "queries: 'ward' is missing; got ['hours']"),
        ({"hours": [float("nan")], "ward": ["a"]}, "queries: 'hours' must hold finite numbers, got nan"),
        ({"hours": [1.0, 2.0], "ward": ["a"]}, "'ward' has 1 numbers, but 'hours' has 2; every axis"),
        ({"hours": [1.0], "ward": ["a"], "channel": ["temp"]}, "queries: "),
        ({"hours": [1.0], "ward": ["a"], "hr": [70.0]}, "queries: unknown 'hr'; this model takes 'hours'"),
        ({"hours": [1e39], "ward": ["a"]}, "positions: a number is too large for float32"),
        ([{"hours": 1.0, "ward": "a"}, {"hours": 2.0}], "queries: 'ward' is missing at index 1"),
        ([{"hours": None, "ward": "a"}], "queries: 'hours' must hold finite numbers, got None"),
        ([3.0], "queries: expected an object at index 0, got 3.0"),
        ("all", "queries: expected a list of objects, got 'all'"),
    ],
)  # fmt: skip
def test_a_wrong_query_is_one_sentence(interpolating, queries, message):
    _, _, asked, package = interpolating
    with pytest.raises(InvalidSeries, match=r"^series 0 ") as raised:
        package.predict([asked[0][1] | {"queries": queries}])
    text = str(raised.value)
    assert message in text and len(text) < 300 and "\n" not in text


def test_the_client_compares_the_answers_to_queries_with_those_of_the_package(
    interpolating, monkeypatch, tmp_path
):
    _, _, asked, package = interpolating
    shift = 0.0

    def post(rows):
        answers = [one.model_dump() for one in package.predict(rows)]
        column = answers[-1]["mean"]["hr"]
        answers[-1]["mean"]["hr"] = [None if x is None else x + shift for x in column]
        return json.loads(json.dumps(answers))

    served = ServedModel("http://127.0.0.1:9")
    monkeypatch.setattr(served, "_post", post)
    rows = [one for _, one in asked]
    assert served.interpolate(rows) == package.predict(rows)
    golden = [
        {"series": row, "interpolation": answer, "tolerance": 1e-4, "scale": {"hr": 5.0, "k": 0.1}}
        for row, answer in zip(rows, package.answers(rows), strict=True)
    ]
    (tmp_path / "golden.jsonl").write_text("\n".join(map(json.dumps, golden)))
    served.check_golden(tmp_path)
    shift = 1e-2
    with pytest.raises(ServerError, match=r"returns other values for golden row \d+ of"):
        served.check_golden(tmp_path)


def test_files_of_series_with_queries_get_a_list_per_channel(interpolating, tmp_path):
    _, _, asked, package = interpolating
    package.module = pyfunc_model
    rows = [one for _, one in asked]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = [
        {"id": row["id"], "queries": row["queries"]}
        | {
            key: row[part][key]
            for part in ("positions", "values", "covariates")
            for key in row[part]
        }
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(columns), tmp_path / "in.parquet")

    for name in ("in.jsonl", "in.parquet"):
        ((_, chunk),) = read_chunks(str(tmp_path / name), "test", package)
        table = score(package, chunk, {"model": "m"})
        assert {"id", "mean", "model"} <= set(table.column_names)
        for row, answer in zip(table.to_pylist(), package.predict(rows), strict=True):
            assert row["id"] == answer.id and dict(row["mean"]) == answer.mean
            assert dict(row.get("std") or {}) == (answer.std or {})


def test_a_classifier_takes_no_queries(served):
    dataset, _, package = served
    (row,) = raw_series(dataset.split("test"), [0])
    with pytest.raises(
        InvalidSeries, match=r"queries: this model is of kind classifier, which takes"
    ):
        package.predict([row | {"queries": {"hours": [1.0], "ward": ["a"]}}])


def probabilities(model, dataset):
    """Of all series, by the model itself, from packed batches of the data set."""
    batch = Collate(model.config, seed=0).batch(dataset.split("test"), np.arange(4))
    with torch.no_grad():
        logits, _ = model(batch)
    order = np.argsort(batch.indices.numpy())
    return torch.softmax(logits.double(), dim=1).numpy()[order]


def test_series_as_delivered_get_the_answers_of_the_model(served):
    dataset, model, package = served
    rows = list(raw_series(dataset.split("test"), range(4)))
    assert any(None in column for row in rows for column in row["values"].values())
    expected = probabilities(model, dataset)
    np.testing.assert_allclose(package.outputs(rows), expected, atol=1e-6)
    schema = json_schema(dataset.schema, 100)
    jsonschema.validate({"inputs": json.loads(json.dumps(rows))}, schema)

    # the same as a list of observations, channels named or as columns
    by_value, by_row = [], []
    for row in rows:
        others = {k: v for k, v in row.items() if k not in ("positions", "values")}
        at = [
            dict(zip(row["positions"], entries, strict=True))
            for entries in zip(*row["positions"].values(), strict=True)
        ]
        single = [
            {**place, "channel": name, "value": column[i]}
            for i, place in enumerate(at)
            for name, column in row["values"].items()
            if column[i] is not None
        ]
        joint = [
            place | {name: column[i] for name, column in row["values"].items()}
            for i, place in enumerate(at)
        ]
        by_value.append({**others, "observations": single})
        by_row.append({**others, "observations": joint})
    np.testing.assert_allclose(package.outputs(by_row), expected, atol=1e-6)
    np.testing.assert_allclose(package.outputs(by_value), expected, atol=1e-6)
    jsonschema.validate({"inputs": json.loads(json.dumps(by_value + by_row))}, schema)


def test_columns_of_many_series_get_the_same_answers_and_refusals(served):
    dataset, _, package = served
    rows = list(raw_series(dataset.split("test"), range(4)))
    lengths = np.array([len(row["positions"]["hours"]) for row in rows])

    def column(part, name):
        return [entry for row in rows for entry in row[part][name]]

    wards = np.array([("a", "b").index(name) for name in column("positions", "ward")])
    columns = {"hours": np.array(column("positions", "hours")), "ward": (wards, ["a", "b"])}
    columns |= {name: np.array(column("values", name), np.float64) for name in ("hr", "k")}
    given = [row["covariates"] for row in rows], rows[0]["units"]

    expected = package.outputs(rows)
    np.testing.assert_array_equal(package.outputs_of_columns(lengths, columns, *given), expected)
    coded = columns | {"ward": wards.astype(float)}
    np.testing.assert_array_equal(package.outputs_of_columns(lengths, coded, *given), expected)
    for wrong in (
        {"hours": np.where(columns["hours"] == columns["hours"].max(), np.nan, columns["hours"])},
        {"hr": np.full(len(wards), np.inf)},
        {"ward": np.where(wards == 0, np.nan, wards)},  # not the category for unknown ones
        {"hr": (wards, ["a", "b"])},
        {"hr": np.full(len(wards), np.nan), "k": np.full(len(wards), np.nan)},
        {"colour": columns["hr"]},
    ):
        with pytest.raises(InvalidSeries):
            package.outputs_of_columns(lengths, columns | wrong, *given)
    for units in ({}, rows[0]["units"] | {"hr": "1/s"}):
        with pytest.raises(InvalidSeries, match="units"):
            package.outputs_of_columns(lengths, columns, given[0], units)


def test_arrays_nan_indices_and_channels_left_out_are_understood(served):
    dataset, _, package = served
    (row,) = raw_series(dataset.split("test"), [2])
    columns = {name: np.array(column, np.float64) for name, column in row["values"].items()}
    wards = np.array(["ab".index(ward) for ward in row["positions"]["ward"]])
    arrays = row | {"values": columns}
    arrays["positions"] = {"hours": np.array(row["positions"]["hours"]), "ward": wards}
    np.testing.assert_array_equal(package.outputs([arrays]), package.outputs([row]))
    without = row | {"values": {"hr": row["values"]["hr"]}}
    nothing = [None] * len(row["values"]["hr"])
    empty = row | {"values": row["values"] | {"k": nothing}}
    np.testing.assert_array_equal(package.outputs([without]), package.outputs([empty]))
    unknown = row | {"covariates": {}}
    none = row | {"covariates": {"age": None, "sex": None}}
    np.testing.assert_array_equal(package.outputs([unknown]), package.outputs([none]))
    elsewhere = row | {"positions": row["positions"] | {"ward": ["c"] * len(wards)}}
    assert not np.allclose(package.outputs([elsewhere]), package.outputs([row]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"covariates": {"weight": 3.0}},
            "covariates: unknown 'weight'; this model takes 'age', 'sex'",
        ),
        ({"covariates": {"sex": "x"}}, "'sex' has no category 'x'; it has 'f', 'm'"),
        ({"covariates": {"age": "old"}}, "'age' must be a number, got 'old'"),
        ({"covariates": {"age": 1e300}}, "covariates: 'age' is too large for float32"),
        ({"values": {"hr": [None], "k": [None]}}, "got 0"),
        ({"values": {"hr": ["high"]}}, "'hr' must hold finite numbers, got 'high' at index 0"),
        ({"values": {"temp": [1.0]}}, "values: unknown 'temp'; this model takes 'hr', 'k'"),
        ({"positions": {"hours": ["noon"], "ward": ["a"]}}, "'hours' must hold finite numbers"),
        (
            {"positions": {"hours": ["2024-03-01"], "ward": ["a"]}},
            "; a date is a number since 1970",
        ),
        ({"positions": {"hours": [0.0]}}, "positions: 'ward' is missing"),
        ({"observations": [{"hours": 1.0, "ward": "a"}]}, "or observations in place of both"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(served, changes, message):
    _, _, package = served
    row = {
        "id": "p",
        "positions": {"hours": [1.0], "ward": ["a"]},
        "values": {"hr": [70.0]},
        "units": {"hours": "h", "hr": "1/min", "k": "mmol/l", "age": "y"},
    }
    with pytest.raises(InvalidSeries, match=r"^series 0 \(id 'p'\): ") as raised:
        package.outputs([row | changes])
    assert message in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (
            {"hours": 1.0, "ward": "a", "channel": "temp", "value": 3},
            "channel: unknown 'temp'; this model takes 'hr', 'k'",
        ),
        (
            {"hours": 1.0, "ward": "a", "channel": "hr", "value": 70, "hr": 90},
            "'hr' is given twice",
        ),
        ({"hours": 1.0, "ward": "a", "value": 3}, "unknown 'value'; this model takes 'hours'"),
        ({"hours": 1.0, "hr": 3}, "'ward' is missing"),
        ({"hours": 1.0, "ward": "a", "temp": 3}, "unknown 'temp'"),
        ({"hours": 1.0, "ward": "a", "hr": "high"}, "'hr' must hold finite numbers, got 'high'"),
        ("nothing", "expected an object at index 0, got 'nothing'"),
    ],
)
def test_a_wrong_observation_is_named(served, observation, message):
    _, _, package = served
    units = {"hours": "h", "hr": "1/min", "k": "mmol/l", "age": "y"}
    with pytest.raises(InvalidSeries) as raised:
        package.outputs([{"observations": [observation], "units": units}])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("names", "entry", "index"),
    [("ab", 1.0, 1), ("123", 1.0, 0), ("123", "3", 2), ("123", 0.0, None), ("ab", 2.0, None)],
)
def test_a_number_is_no_index_of_categories_that_are_called_by_numbers(names, entry, index):
    band = {"name": "band", "categories": list(names)}
    if index is None:
        with pytest.raises(InvalidSeries, match="'band' has no category"):
            _category(band, entry, "series 0")
        band |= {"unknown": True}
    index = len(names) if index is None else index
    assert _category(band, entry, "series 0") == _number(band, entry) == index


def test_values_far_from_those_of_training_are_warned_of_once(served):
    dataset, _, package = served
    rows = list(raw_series(dataset.split("test"), [0, 1]))
    beats = rows[1]["values"]["hr"]
    few = [1e4, *beats[1:]]  # one outlier
    per_second = [None if x is None else x / 60 for x in beats]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        package.predict([*rows, rows[1] | {"values": rows[1]["values"] | {"hr": few}}])
    wrong = rows[1] | {"values": rows[1]["values"] | {"hr": per_second}}
    message = r"^series 1 \(id 'p\d'\): most values of 'hr', such as 1\.\d+, are far from .* unit"
    with pytest.warns(UserWarning, match=message):
        package.predict([rows[0], wrong])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        package.predict([wrong])


def test_times_between_the_steps_of_windows_are_warned_of(tmp_path):
    """In both forms, by the name of the series; rounded times are of the nearest step without a word."""
    given = [
        series(f"s{k}", 24, "xy"[k % 2], "train", k, positions=np.arange(24.0)[:, None] / 2 + k)
        for k in range(4)
    ]
    dataset = StoredDataset(built(tmp_path, *given, axes={"t": {"scale": 2.0}}))
    config = TrainingJobConfig.resolve(
        "finetune", dataset.path, {"window": 4, "encoder_config": STACK}, TrainerConfig()
    )
    model = model_of(config, 0, resumes=False).eval()
    golden = list(raw_series(dataset.split("train"), [0, 1]))
    package = packaged(tmp_path, model, model.export(), dataset.schema, golden)
    name = package.axes[0]["name"]
    g = np.random.default_rng(0)

    def at(times):
        n = len(times)
        values = {key: column[:n] for key, column in golden[1]["values"].items()}
        return golden[1] | {"positions": {name: np.asarray(times)}, "values": values}

    on_grid = np.array(golden[1]["positions"][name])
    (whole,) = package.predict([golden[1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (near,) = package.predict([at(on_grid + g.uniform(-0.1, 0.1, 24))])
        for n in (1, 2, 3, 8):  # whatever is left of it, and at a rate that is not quite the same
            package.predict([at(1e6 + 1.002 * g.permutation(on_grid)[:n])])
    assert near.probabilities == pytest.approx(whole.probabilities, abs=1e-3)

    message = (
        rf"'{name}' lies between the steps of 0.5 \S+ that this model learnt from \(on average 0.2"
    )
    irregular = at(np.sort(g.uniform(0, 12, 24)))
    with pytest.warns(UserWarning, match="^series 1 .*" + message):
        package.predict([golden[0], irregular])
    arrays = {key: np.array(column) for key, column in irregular["values"].items()}
    arrays[name] = irregular["positions"][name]
    twice = {key: np.tile(column, 2) for key, column in arrays.items()}
    with pytest.warns(UserWarning, match="^a series and 1 more series: " + message):
        package.outputs_of_columns(np.array([24, 24]), twice, units=irregular["units"])
    with pytest.warns(UserWarning, match=r"on average 0.[45]"):
        package.predict([at(on_grid * 1.5)])  # another rate
