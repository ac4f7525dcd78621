"""Regression of every observation: the table, its metrics, and the commands from data to report."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from roma_core.data import DatasetConfig, StoredDataset, build_dataset
from roma_core.evaluation.job import NOT_PACKAGED
from roma_core.evaluation.metrics import evaluate_regression
from roma_core.evaluation.predictions import RegressionTable
from roma_core.files import read_json
from roma_core.model import EncoderConfig, RoMAForClassification, RoMAForClassificationConfig
from roma_core.schema import Channel, PositionAxis
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.job import TrainingJobConfig, data_fields
from tests.core.cli.test_cli import roma
from tests.core.hand_made import HandMade, built, config_of, series

TIME = (PositionAxis(name="time", unit="s"),)
TARGETS = (Channel(name="depth", unit="m"), Channel(name="heat", unit="K"))


def table_of(errors, lengths, true=None):
    """A table with these ``(T, 2)`` errors, of series of these lengths."""
    errors = np.array(errors, dtype=float)
    true = np.arange(errors.size, dtype=float).reshape(errors.shape) if true is None else true
    places = np.concatenate([np.arange(n, dtype=float) for n in lengths])
    return RegressionTable(
        ids=[f"s{k}" for k in range(len(lengths))],
        series=np.repeat(np.arange(len(lengths)), lengths),
        axes=TIME,
        positions=places[:, None],
        channels=TARGETS,
        true=true,
        predicted=true + errors,
    )


def test_metrics_are_means_over_values_whatever_the_series_they_are_in():
    metrics = evaluate_regression(table_of([[1, 0], [-1, 0], [2, 4]], [1, 2]))

    assert metrics.mse.value == pytest.approx((1 + 1 + 4 + 16) / 6)
    assert metrics.rmse.value == pytest.approx(np.sqrt(22 / 6))
    assert metrics.mae.value == pytest.approx(8 / 6)
    depth, heat = metrics.per_target
    assert (depth.name, depth.unit, heat.unit) == ("depth", "m", "K")
    assert depth.mse.value == pytest.approx(2) and heat.mse.value == pytest.approx(16 / 3)
    assert depth.r2.value == pytest.approx(1 - 2 / np.var([0, 2, 4]))
    assert [(one.first, one.count) for one in metrics.by_position] == [(0, 2), (1, 1)]
    assert metrics.by_position[1].rmse == (2, 4)
    assert metrics.n_series == 2 and metrics.n_observations == 3


def test_resampling_takes_whole_series_so_that_equal_errors_in_a_series_count_once():
    random = np.random.default_rng(0)
    own = random.normal(size=(50, 1, 2))  # an error of its own for every series
    alike = table_of(np.repeat(own, 20, axis=1).reshape(-1, 2), [20] * 50)
    single = table_of(own[:, 0], [1] * 50)

    many, few = evaluate_regression(alike), evaluate_regression(single)

    assert many.mse.value == pytest.approx(few.mse.value)
    assert (many.mse.low, many.mse.high) == pytest.approx((few.mse.low, few.mse.high))
    assert many.mse.low < many.mse.value < many.mse.high


def test_a_target_that_never_changes_has_no_r2():
    metrics = evaluate_regression(table_of([[1, 1]] * 4, [2, 2], true=np.ones((4, 2))))

    assert [one.r2 for one in metrics.per_target] == [None, None]


def test_a_table_that_does_not_fit_together_is_refused_by_what_is_wrong():
    with pytest.raises(ValueError, match=r"positions: expected float64 of shape \(3, 1\)"):
        RegressionTable(
            ids=["a"], series=np.zeros(3, np.int64), axes=TIME, positions=np.zeros((2, 1)),
            channels=TARGETS, true=np.zeros((3, 2)), predicted=np.zeros((3, 2)),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"first is of series 's1': \[nan"):
        table_of([[0, 0], [0, 0], [np.nan, 0]], [2, 1])


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A data set of places that are to be told, and a run folder."""
    root = tmp_path_factory.mktemp("regression")
    config = DatasetConfig(
        name="places", source={"kind": "synthetic", "process": "positions", "n_series": 300}
    )
    return build_dataset(config, root, root, progress=False), root


def test_the_commands_end_with_errors_in_the_units_of_the_targets(places):
    data, root = places
    changes = {
        "model.problem_type": "regression",
        "model.pooling": "token",
        "model.encoder_config": "{d_model: 24, nhead: 2, depth: 1}",
        "trainer.epochs": 12,
        "trainer.batch_size": 16,
        "trainer.base_lr": 0.02,
    }
    settings = [word for pair in changes.items() for word in ("--set", "{}={}".format(*pair))]
    roma("finetune", "--data", data, "--run-dir", root / "fine", *settings)
    weights = root / "fine/outputs/model"

    said = roma(
        "evaluate",
        "--data",
        data,
        "--weights",
        weights,
        "--run-dir",
        root / "eval",
        "--name",
        "places",
    )

    assert NOT_PACKAGED in said and not (root / "eval/outputs/package").exists()
    metrics = read_json(root / "eval/outputs/metrics.json")
    rows = pq.read_table(root / "eval/outputs/predictions.parquet")
    dataset = StoredDataset(data)
    test = dataset.split("test")
    true = np.concatenate([dataset.targets(int(i))[:, 0] for i in test.indices])
    assert rows["true_true_place"].to_numpy() == pytest.approx(true)
    assert rows["position_place"].to_numpy() == pytest.approx(true), "the target is the place"
    assert rows["id"].to_pylist()[:10] == [dataset.ids[test.indices[0]]] * 10
    error = rows["predicted_true_place"].to_numpy() - true
    assert metrics["mse"]["value"] == pytest.approx(float((error**2).mean()))
    assert (
        metrics["mse"]["low"] < metrics["mse"]["value"] < metrics["mse"]["high"] < 0.5 * true.var()
    )
    assert read_json(root / "eval/result.json")["metrics"]["mse"] == metrics["mse"]["value"]
    report = (root / "eval/outputs/report.html").read_text()
    for shown in ("Evaluation of places", "true_place", "Error against position", NOT_PACKAGED):
        assert shown in report
    assert report.count("data:image/png;base64") == 3


def test_what_cannot_be_evaluated_is_explained(places, tmp_path):
    data, _ = places
    shape = {
        "encoder_config": EncoderConfig(d_model=8, nhead=1, depth=1),
        "tubelet_size": (1, 1, 1),
        "n_channels": 1,
        "n_pos_dims": 1,
        "problem_type": "regression",
    }
    for wrong, message in (
        ({"dim_output": 1}, "set pooling=token|train with pooling=token"),
        ({"dim_output": 2, "pooling": "token"}, "has 1 targets"),
    ):
        model = RoMAForClassification(RoMAForClassificationConfig(**shape, **wrong))
        weights = tmp_path / f"w{wrong['dim_output']}"
        model.save_pretrained(weights)
        out = tmp_path / f"e{wrong['dim_output']}"
        said = roma("evaluate", "--data", data, "--weights", weights, "--run-dir", out, ok=False)
        assert any(part in said for part in message.split("|")) and "Traceback" not in said


@pytest.mark.parametrize("use_cls", [True, False])
def test_equal_values_tell_their_places_only_beside_a_cls_token(use_cls):
    torch.manual_seed(0)
    model = RoMAForClassification(
        RoMAForClassificationConfig(
            encoder_config=EncoderConfig(d_model=16, nhead=2, depth=2),
            tubelet_size=(1, 1, 1),
            n_channels=1,
            n_pos_dims=1,
            use_cls=use_cls,
            pooling="token",
            dim_output=1,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # so that no part is neutral
    places = torch.rand(1, 1, 10) * 49 + 1

    told = model(torch.ones(1, 10, 1, 1, 1), places)[0].squeeze().detach()

    spread = float((told - told.mean()).abs().max())
    assert (spread > 1e-2) is use_cls, "attention mixes equal values, whatever its weights"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"problem_type": "regression"}, "set pooling=token"),
        ({"pooling": "token", "dim_output": 2}, "classes belong to series"),
        ({"dim_output": 2}, "a classifier needs classes"),
    ],
)
def test_a_training_for_what_the_data_do_not_know_is_refused_when_it_is_planned(
    places, fields, message
):
    with pytest.raises(ValueError, match=message):
        TrainingJobConfig.resolve("finetune", places[0], fields, TrainerConfig())


def test_a_regression_without_targets_is_refused_when_it_is_planned(tmp_path):
    data = built(tmp_path, *[series(f"s{k}", seed=k) for k in range(5)])
    fields = {"problem_type": "regression", "pooling": "token"}
    with pytest.raises(ValueError, match="has none; name their columns in `targets`"):
        TrainingJobConfig.resolve("finetune", data, fields, TrainerConfig())


def test_the_environment_does_not_make_a_regressor_of_a_published_classifier(
    places, tmp_path, monkeypatch
):
    data, manifest = places[0], StoredDataset(places[0]).manifest
    shape = {"encoder_config": {"d_model": 8, "nhead": 1}, "dim_output": 1}
    config = RoMAForClassificationConfig.from_values(shape | data_fields(manifest.data_schema))
    published = config.model_dump(mode="json")
    del published["problem_type"], published["pooling"]
    (tmp_path / "model_config.json").write_text(json.dumps(published))
    monkeypatch.setenv("ROMA_CLASSIFIER_PROBLEM_TYPE", "regression")

    with pytest.raises(ValueError, match="a classifier needs classes"):
        TrainingJobConfig.resolve("finetune", data, {}, TrainerConfig(), weights=tmp_path)


def test_targets_far_from_unit_size_are_warned_of_when_a_regression_is_planned(tmp_path):
    rng = np.random.default_rng(0)
    columns = np.array([[5000, 200], [0, 1], [0, 0.001], [0.5, 0]])  # mean and deviation
    names = ("far", "usual", "tiny", "constant")
    targets = tuple(Channel(name=name, unit="m") for name in names)

    def one(k):
        drawn = columns[:, 0] + columns[:, 1] * rng.normal(size=(40, 4))
        return series(f"s{k}", 40, split="train", seed=k, targets=drawn.astype(np.float32))

    source = HandMade(series=[one(k) for k in range(6)], targets=targets)
    data = build_dataset(config_of(source=source), tmp_path, tmp_path, progress=False)
    fields = {"problem_type": "regression", "pooling": "token"}

    with pytest.warns(UserWarning) as told:
        TrainingJobConfig.resolve("finetune", data, fields, TrainerConfig())

    said = [str(w.message) for w in told if "are not normalised" in str(w.message)]
    assert [text.split("'")[1] for text in said] == ["far", "tiny"]
    assert "let the source provide (x - " in said[0]


def test_the_environment_may_ask_for_a_regression(places, monkeypatch):
    for name, value in (("PROBLEM_TYPE", "regression"), ("POOLING", "token")):
        monkeypatch.setenv(f"ROMA_CLASSIFIER_{name}", value)

    config = TrainingJobConfig.resolve("finetune", places[0], {}, TrainerConfig())

    assert config.model["dim_output"] == 1, json.dumps(config.model)
