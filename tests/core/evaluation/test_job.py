"""Evaluation jobs by the command: reconstructions, regressions, and the packages they leave."""

import json
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from roma_core.cli import main
from roma_core.data import DatasetConfig, StoredDataset, build_dataset
from roma_core.data.store import raw_series
from roma_core.evaluation.config import EvaluationJobConfig
from roma_core.evaluation.drift import reference_profile
from roma_core.evaluation.metrics import r2_samples
from roma_core.evaluation.packaging import write_package
from roma_core.evaluation.predictions import ReconstructionTable, RegressionTable
from roma_core.files import read_json, sha256_of, write_json
from roma_core.model import (
    EncoderConfig,
    RoMAForClassification,
    RoMAForClassificationConfig,
    RoMAForPreTraining,
    RoMAForPreTrainingConfig,
)
from roma_core.serving.package import MAX_LENGTH
from roma_core.serving.pyfunc_model import open_package
from roma_core.trainer.job import data_fields
from tests import forked
from tests.core.cli.test_cli import roma
from tests.core.hand_made import built, series


@pytest.fixture(autouse=True)
def smoke_tests_start_quickly(monkeypatch):
    """In forked processes; ``test_package.py`` has them in one that Python starts."""
    stand_in = SimpleNamespace(run=forked.run_python, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr("roma_core.serving.package.subprocess", stand_in)


@pytest.mark.parametrize("longest", [9, MAX_LENGTH + 1])
def test_no_series_of_the_data_set_is_too_long_for_its_package(tmp_path, longest):
    folder = built(tmp_path, *[series(f"s{k}", seed=k) for k in range(9)], series("long", longest))
    dataset = StoredDataset(folder)
    stack = {"d_model": 8, "nhead": 2, "depth": 1}
    shape = data_fields(dataset.schema) | {"encoder_config": stack, "decoder_config": stack}
    model = RoMAForPreTraining(RoMAForPreTrainingConfig(**shape)).eval()
    model.save_pretrained(tmp_path / "weights")
    config = EvaluationJobConfig(
        name="waves",
        dataset=str(folder),
        dataset_digest=dataset.manifest.digest,
        classifier="",
        autoencoder=str(tmp_path / "weights"),
    )

    profile = reference_profile(dataset)
    write_package(config, model, dataset.split("train"), profile, tmp_path / "package")

    taken = read_json(tmp_path / "package" / "package.json")["max_length"]
    assert taken == max(MAX_LENGTH, longest)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Curves with a clean course, and an autoencoder pretrained on them by the command."""
    root = tmp_path_factory.mktemp("rbf")
    source = {"kind": "synthetic", "process": "rbf", "n_series": 160}
    config = DatasetConfig(name="g", source=source, axes={"time": {"scale": "auto"}})
    data = build_dataset(config, root, root, progress=False)
    settings = {
        "model.encoder_config": "{d_model: 32, nhead: 2, depth: 2}",
        "model.decoder_config": "{d_model: 32, nhead: 2, depth: 1}",
        "model.mask_ratio": 0.6,
        "model.mask_ratio_max": 0.8,
        "model.predict_variance": "true",
        "trainer.epochs": 12,
        "trainer.batch_size": 8,
        "trainer.base_lr": 0.003,
        "trainer.log_wandb": "false",
    }
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    done = CliRunner().invoke(
        main, ["pretrain", "--data", str(data), "--run-dir", str(root / "run"), *sets]
    )
    assert done.exit_code == 0, done.output
    return data, root / "run" / "outputs" / "model", root


@pytest.fixture
def two_threads():
    """What torch starts with where a launcher set OMP_NUM_THREADS to 2."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_pretraining_is_judged_by_one_command(trained, two_threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    data, weights, root = trained
    out = root / "judged"
    command = [
        "evaluate",
        "--data",
        str(data),
        "--autoencoder",
        str(weights),
        "--run-dir",
        str(out),
    ]

    done = CliRunner().invoke(main, [*command, "--n-observed", "3", "--n-observed", "20"])

    assert done.exit_code == 0, done.output
    metrics = read_json(out / "outputs" / "metrics.json")
    value = {name: e["value"] for name, e in metrics.items() if isinstance(e, dict)}
    assert value["noise_mse"] == pytest.approx(0.01, rel=0.2)
    assert value["noise_mse"] < value["mse"] < 0.7 * value["mean_mse"]  # it has learnt something
    assert value["mse"] == pytest.approx(value["clean_mse"] + value["noise_mse"], rel=0.2)
    assert value["mse_observed_20"] < value["mse_observed_3"]
    assert 0.6 <= metrics["mean_hidden_fraction"] <= 0.8
    assert 0.5 < value["coverage_95"] <= 1
    result = read_json(out / "result.json")
    assert result["facts"]["threads"] == "1", "a command that is run by hand takes one"
    assert result["facts"]["device"] == str(torch.accelerator.current_accelerator(True) or "cpu")
    assert result["metrics"]["mse"] == value["mse"]
    checks = read_json(out / "outputs" / "serving_checks.json")
    assert checks["serving_difference"] < 1e-4 and checks["smoke_test"]["golden_difference"] < 1e-4
    assert result["facts"]["manifest_sha256"] == sha256_of(out / "outputs/package/MANIFEST.json")
    card = (out / "outputs" / "package" / "MODEL_CARD.md").read_text()
    assert "(`queries`)" in card and "| R² of straight lines |" in card
    assert all((out / place).exists() for place in result["outputs"].values())
    page = (out / "outputs" / "report.html").read_text()
    assert (
        "Errors by number of visible observations" in page
        and "data:image/png" in page
        and "0.6 to 0.8" in page
    )


def test_a_hand_made_judgement_names_test_series_that_training_saw(
    trained, two_threads, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    data, weights, root = trained
    source = {"kind": "synthetic", "process": "rbf", "n_series": 160}
    more = DatasetConfig(name="g", source=source, test_fraction=0.02)
    seen = build_dataset(more, root / "more", root, progress=False)
    again = root / "again" / "outputs" / "model"  # of a run that was given more to train on
    shutil.copytree(weights, again)
    write_json(root / "again" / "config.json", {"dataset": str(seen), "weights": None})
    out = root / "apart"
    command = ["evaluate", "--data", str(data), "--autoencoder", str(again), "--run-dir", str(out)]

    done = CliRunner().invoke(main, command)

    assert done.exit_code == 0, done.output
    assert read_json(out / "config.json")["trained_on"] == [str(seen)]
    assert read_json(out / "result.json")["facts"]["threads"] == "2"
    assert "were in train or validation of" in done.output
    page = (out / "outputs" / "report.html").read_text()
    assert "Possible leakage between test and training data" in page
    assert "not used in training" not in page
    assert "<h1>Reconstructions of g</h1>" in page


def test_a_planned_job_judges_the_same_series_the_same_way(trained):
    data, weights, root = trained
    config = {
        "schema_version": 1,
        "name": "planned",
        "dataset": str(data),
        "dataset_digest": read_json(data / "manifest.json")["digest"],
        "autoencoder": str(weights),
    }
    for name in ("first", "second"):
        (root / name).mkdir()
        if name == "second":  # compared with itself
            champion = str(root / "first" / "outputs" / "package")
            config |= {"champion": champion, "champion_version": "1"}
        write_json(root / name / "config.json", config)
        done = CliRunner().invoke(main, ["evaluate", "--job", str(root / name)])
        assert done.exit_code == 0, done.output

    first, second = (root / name / "outputs" / "metrics.json" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert "mse_observed_3" not in json.loads(first.read_text())
    found = [
        ReconstructionTable.load(root / "second" / "outputs" / f"{name}.parquet")
        for name in ("predictions", "champion_predictions")
    ]
    assert found[0].differs_from(found[1]) is None
    gains = r2_samples(found[0]) - r2_samples(found[1])
    assert np.abs(gains).max() < 1e-4 and r2_samples(found[0])[0] > 0.3
    page = (root / "second" / "outputs" / "report.html").read_text()
    assert "Version 1 on the same series" in page and "+0.000" in page
    assert read_json(root / "second/outputs/serving_checks.json")["champion_smoke_test"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_reconstructs_as_the_cpu_does(trained, monkeypatch):
    data, weights, root = trained
    found = {}
    for device in ("gpu", "cpu"):
        if device == "cpu":
            monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda available: None)
        command = ["evaluate", "--data", data, "--autoencoder", weights, "--run-dir", root / device]
        done = CliRunner().invoke(main, list(map(str, command)))
        assert done.exit_code == 0, done.output
        found[device] = read_json(root / device / "outputs" / "metrics.json")
    assert found["gpu"]["mse"]["value"] == pytest.approx(found["cpu"]["mse"]["value"], rel=1e-3)


def test_wrong_calls_are_explained(trained):
    data, weights, root = trained
    call = ["evaluate", "--data", str(data), "--run-dir", str(root / "no")]

    neither = CliRunner().invoke(main, call)
    both = CliRunner().invoke(main, [*call, "--weights", str(weights), "--n-observed", "3"])
    blind = CliRunner().invoke(main, [*call, "--autoencoder", str(weights), "--n-observed", "0"])

    assert "one of --weights and --autoencoder" in neither.output
    assert "--n-observed is for reconstructions" in both.output
    assert "0 is not in the range" in blind.output
    assert {neither.exit_code, both.exit_code, blind.exit_code} == {2}


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

    call = ["evaluate", "--data", data, "--weights", weights, "--run-dir", root / "eval"]
    roma(*call, "--name", "places")

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
    assert metrics["primary_metric"] == "r2" and metrics["r2"]["low"] > 0.5
    report = (root / "eval/outputs/report.html").read_text()
    for shown in ("Evaluation of places", "true_place", "Error against position", "residuals"):
        assert shown in report
    assert report.count("data:image/png;base64") == 3
    package = open_package(root / "eval/outputs/package")
    (answer,) = package.predict(raw_series(test, [0]))
    predicted = rows["predicted_true_place"].to_numpy()[:10]
    assert answer.values["true_place"] == pytest.approx(predicted, abs=1e-4)


def test_a_regressor_of_series_is_packaged_with_its_spread(tmp_path):
    """Of new weights: the numbers are those of no model, but of all the code."""
    source = {"kind": "synthetic", "process": "damped", "n_series": 60}
    config = DatasetConfig(name="waves", source=source)
    data = build_dataset(config, tmp_path, tmp_path, progress=False)
    dataset = StoredDataset(data)
    fields = data_fields(dataset.schema) | {
        "encoder_config": {"d_model": 8, "nhead": 1, "depth": 1}
    }
    fields |= {"dim_output": 2, "problem_type": "regression", "predict_variance": True}
    scales = [(target.mean, target.std) for target in dataset.schema.targets]
    model = RoMAForClassification(RoMAForClassificationConfig(**fields, target_scales=scales))
    model.save_pretrained(tmp_path / "weights")
    out = tmp_path / "eval" / "outputs"

    roma("evaluate", "--data", data, "--weights", tmp_path / "weights", "--run-dir", out.parent)

    table, test = RegressionTable.load(out / "predictions.parquet"), dataset.split("test")
    assert table.ids == [dataset.ids[i] for i in test.indices] and table.positions is None
    assert table.true == pytest.approx(dataset.series_targets[test.indices])
    checks = read_json(out / "serving_checks.json")
    assert checks["serving_difference"] < 1e-5 and checks["smoke_test"]["latency_ms"] > 0
    answers = open_package(out / "package").predict(raw_series(test, range(len(test))))
    served = [[a.values["decay"], a.std["decay"]] for a in answers]
    expected = np.stack([table.predicted[:, 1], table.std[:, 1]], axis=1)
    assert np.array(served) == pytest.approx(expected, rel=1e-4)
    metrics = read_json(out / "metrics.json")
    assert 0 < metrics["coverage_95"]["value"] <= 1 and metrics["by_position"] == []
    assert not (out / "plots" / "by_position.png").exists()
    card = (out / "package" / "MODEL_CARD.md").read_text()
    assert "trained on targets of whole series" in card and "| decay | s |" in card


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
        ({"dim_output": 1}, "predicts 1 values of every series (pooling=cls)"),
        ({"dim_output": 2, "pooling": "token"}, "has 1 targets of every observation"),
    ):
        model = RoMAForClassification(RoMAForClassificationConfig(**shape, **wrong))
        weights = tmp_path / f"w{wrong['dim_output']}"
        model.save_pretrained(weights)
        out = tmp_path / f"e{wrong['dim_output']}"
        said = roma("evaluate", "--data", data, "--weights", weights, "--run-dir", out, ok=False)
        assert message in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("what", "other"),
    [("classes", {"classes": ["cat", "dog"]}), ("normalisation", {}), ("channels", {})],
)
def test_a_classifier_is_not_evaluated_on_data_of_another_schema(tmp_path, what, other):
    data = built(
        tmp_path,
        *[series(f"s{k}", seed=k, label="xy"[k % 2]) for k in range(8)],
        series("t", split="test", seed=9),
    )
    schema = StoredDataset(data).schema
    fields = data_fields(schema) | {"encoder_config": {"d_model": 8, "nhead": 1, "depth": 1}}
    model = RoMAForClassification(RoMAForClassificationConfig(**fields, dim_output=2))
    document = schema.model_dump(mode="json")
    if what == "normalisation":
        document[what][0]["mean"] += 1.0
    elif what == "channels":
        document[what][0]["unit"] = "mV"
    model.data_schema = document | other
    model.save_pretrained(tmp_path / "weights")

    call = [
        "evaluate",
        "--data",
        data,
        "--weights",
        tmp_path / "weights",
        "--run-dir",
        tmp_path / "e",
    ]
    said = roma(*call, ok=False)

    assert f"{what} of this data set and of the data the model was trained on differ" in said
    assert "Traceback" not in said


def test_a_folder_without_weights_is_named_with_the_right_one(trained, tmp_path):
    data, weights, _ = trained
    run = weights.parents[1]
    for command in ("evaluate", "finetune"):
        call = [command, "--data", data, "--weights", run, "--run-dir", tmp_path / command]
        said = roma(*call, ok=False)
        assert f"{run} has no model_config.json; expected a folder with" in said
        assert "outputs/model" in said and "Traceback" not in said


@pytest.mark.parametrize("leakage", ["warn", "ignore"])
def test_a_report_claims_nothing_of_leakage_that_was_allowed(tmp_path, leakage):
    twin = series("twin", 30, seed=1)
    rows = [series(f"s{k}", seed=k, label="xy"[k % 2]) for k in range(8)]
    test = replace(twin, id="test", recorded_split="test")
    data = built(tmp_path, *rows, twin, test, leakage=leakage)
    schema = StoredDataset(data).schema
    stack = {"d_model": 8, "nhead": 1, "depth": 1}
    fields = data_fields(schema) | {"encoder_config": stack, "decoder_config": stack}
    model = RoMAForPreTraining(RoMAForPreTrainingConfig(**fields))
    model.save_pretrained(tmp_path / "weights")

    call = ["evaluate", "--data", data, "--autoencoder", tmp_path / "weights"]
    said = roma(*call, "--run-dir", tmp_path / "e")

    page = (tmp_path / "e" / "outputs" / "report.html").read_text()
    assert "not used in training" not in page
    assert ("Possible leakage" in page) == ("possible leakage" in said) == (leakage == "warn")
