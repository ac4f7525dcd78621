"""Reconstructions are judged by what was hidden, all of it and nothing else."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from roma_core.cli import main
from roma_core.data import DatasetConfig, StoredDataset, build_dataset
from roma_core.evaluation.metrics import (
    ReconstructionMetrics,
    coverage,
    errors_by_class,
    noise_error,
    reconstruction_errors,
)
from roma_core.evaluation.plots import errors_by_group
from roma_core.evaluation.predictions import ReconstructionTable
from roma_core.evaluation.reconstruction import (
    clean_columns,
    linear_interpolation,
    mask_all_but,
    mask_as_trained,
    reconstruct,
    train_mean,
)
from roma_core.evaluation.report import ReportContent, render_report
from roma_core.files import read_json, write_json
from roma_core.model.config import EncoderConfig, RoMAForPreTrainingConfig
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.schema import Channel
from tests.core.hand_made import HandMade, config_of, series

STACK = EncoderConfig(d_model=16, nhead=2, depth=1)
CLEAN = (Channel(name="clean_a", unit="V"), Channel(name="clean_b", unit="V"))


def model_of(**changes):
    torch.manual_seed(0)
    shape = {"tubelet_size": (1, 1, 1), "n_channels": 2, "n_pos_dims": 1, "mask_ratio": 0.5}
    return RoMAForPreTraining(
        RoMAForPreTrainingConfig(
            **{"encoder_config": STACK, "decoder_config": STACK, **shape, **changes}
        )
    )


def made(folder, *all_series, targets=CLEAN):
    source = HandMade(series=all_series, targets=targets)
    built = build_dataset(config_of(source=source), folder, folder, progress=False)
    return StoredDataset(built).split("test")


def noisy(name, n, seed, split="test", label="x"):
    one = series(name, n, label, split, seed)
    clean = np.round(one.values)
    return series(name, n, label, split, seed, targets=clean)


def table_of(**changes):
    """Three hidden observations of two of three series; errors 1, 3 and 2 in the only channel."""
    fields = {
        "ids": ["a", "b", "c"],
        "series": np.array([0, 0, 2]),
        "channels": (Channel(name="v", unit="V"),),
        "index": np.array([1, 4, 0]),
        "true": np.array([[0.0], [1], [2]], np.float32),
        "predicted": np.array([[1.0], [4], [0]], np.float32),
        "std": None,
        "clean": None,
    }
    return ReconstructionTable(**{**fields, **changes})


@pytest.mark.parametrize("hide", ["mask_as_trained", "mask_all_but"])
def test_what_is_hidden_is_what_the_mask_says_and_is_told_as_it_was_observed(tmp_path, hide):
    test = made(
        tmp_path, *(noisy(f"s{n}", n, n) for n in (3, 12, 7, 30)), noisy("t", 9, 0, "train")
    )
    model = model_of()

    table = reconstruct(
        model,
        test,
        mask_as_trained(model.config, 0) if hide == "mask_as_trained" else mask_all_but(5, 0),
        2,
    )

    hidden = (
        {3: 2, 12: 6, 7: 4, 30: 15} if hide == "mask_as_trained" else {3: 0, 12: 7, 7: 2, 30: 25}
    )
    assert np.bincount(table.series, minlength=4).tolist() == [hidden[n] for n in test.lengths]
    for k, place, true, clean in zip(
        table.series, table.index, table.true, table.clean, strict=True
    ):
        assert np.array_equal(test.dataset.raw(int(test.indices[k]))[1][place], true)
        assert np.array_equal(test.dataset.targets(int(test.indices[k]))[place], clean)
    alone = reconstruct(model, test, mask_all_but(5, 0), 1)
    together = reconstruct(model, test, mask_all_but(5, 0), 64)
    assert np.allclose(alone.predicted, together.predicted, atol=1e-5)


def test_no_hidden_value_reaches_the_model(tmp_path):
    one, train = noisy("s", 20, 1), noisy("t", 20, 2, "train")
    model = model_of()
    first = reconstruct(model, made(tmp_path / "a", one, train), mask_all_but(6, 0), 8)
    changed = one.values.copy()
    changed[first.index] = 1e6
    other = series("s", 20, "x", "test", 1, values=changed, targets=one.targets)

    second = reconstruct(model, made(tmp_path / "b", other, train), mask_all_but(6, 0), 8)

    assert (second.true == 1e6).all()
    assert np.array_equal(first.index, second.index)
    assert np.array_equal(first.predicted, second.predicted)


def test_a_model_that_looks_is_caught(tmp_path):
    class Peeping(RoMAForPreTraining):
        def predict_hidden(self, batch, masked):
            return batch.tokens[masked.hidden_rows]

    model = model_of()
    model.__class__ = Peeping
    test = made(tmp_path, noisy("s", 20, 1), noisy("t", 20, 2, "train"))

    with pytest.raises(RuntimeError, match="reads hidden values"):
        reconstruct(model, test, mask_as_trained(model.config, 0), 8)


def test_what_cannot_be_judged_is_refused(tmp_path):
    test = made(tmp_path, noisy("s", 4, 1), noisy("t", 20, 2, "train"))

    with pytest.raises(ValueError, match="normalize_targets=False"):
        reconstruct(model_of(normalize_targets=True), test, mask_all_but(2, 0), 8)
    with pytest.raises(ValueError, match="with 3 channels and 0 position axes of its own"):
        reconstruct(model_of(n_channels=3), test, mask_all_but(2, 0), 8)
    with pytest.raises(ValueError, match="nothing is hidden in 1 series of 4 to 4 observations"):
        reconstruct(model_of(), test, mask_all_but(4, 0), 8)
    of_other_data = model_of()
    other = made(tmp_path, noisy("s", 4, 1), noisy("t", 20, 3, "train")).dataset.schema
    of_other_data.data_schema = other.model_dump(mode="json")
    with pytest.raises(
        ValueError,
        match="normalisation of this data set and of the data the model was trained on differ",
    ):
        reconstruct(of_other_data, test, mask_all_but(2, 0), 8)


def test_predictions_are_in_the_units_of_the_data_and_so_are_deviations(tmp_path):
    big = [series(f"s{k}", 20, "x", split, k) for k, split in ((0, "test"), (1, "train"))]
    for one in big:
        one.values[:] = 1000 + 50 * one.values
    test, model = made(tmp_path, *big, targets=()), model_of(predict_variance=True)
    torch.nn.init.zeros_(model.head.linear.weight)
    torch.nn.init.zeros_(model.head.linear.bias)  # mean 0, deviation 1, standardised

    table = reconstruct(model, test, mask_all_but(6, 0), 8)

    of_train = test.dataset.raw(1)[1] if test.indices[0] == 0 else test.dataset.raw(0)[1]
    assert table.clean is None
    assert np.allclose(table.predicted, of_train.mean(0), rtol=1e-5)
    assert np.allclose(table.std, of_train.std(0), rtol=1e-4)
    assert np.allclose(train_mean(table, test).predicted, table.predicted)


def test_straight_lines_join_what_was_seen(tmp_path):
    values = np.array([[0, 9], [5, 5], [20, 4], [5, 5], [40, 8]], np.float32)
    one = series("s", 5, "x", "test", values=values, targets=values)
    test = made(tmp_path, one, noisy("t", 20, 2, "train"))
    table = table_of(
        ids=["s"], series=np.zeros(2, int), index=np.array([1, 3]), true=values[[1, 3]]
    )

    assert linear_interpolation(table, test).predicted.tolist() == [[10, 6.5], [30, 6]]


def test_errors_are_means_over_values_and_by_hand():
    found = reconstruction_errors(table_of())

    assert found["mse"].value == pytest.approx((1 + 9 + 4) / 3)
    assert found["rmse"].value == pytest.approx(np.sqrt(14 / 3))
    assert found["mae"].value == pytest.approx(2)
    # a resample of the two series that have errors is one of them, or both
    assert (found["mse"].low, found["mse"].high) == pytest.approx((4, 5))
    assert reconstruction_errors(table_of(), ranges=np.array([2.0]))[
        "nrmse"
    ].value == pytest.approx(found["rmse"].value / 2)
    assert reconstruction_errors(table_of(), "clean") == {} and noise_error(
        table_of()
    ) == {} == coverage(table_of())


def test_errors_against_the_clean_values_noise_and_coverage():
    table = table_of(
        clean=np.array([[1.0], [1], [2]], np.float32), std=np.array([[1.0], [1], [1.1]], np.float32)
    )

    found = reconstruction_errors(table, "clean")

    assert found["clean_mse"].value == pytest.approx((0 + 9 + 4) / 3)
    assert noise_error(table)["noise_mse"].value == pytest.approx(1 / 3)
    assert coverage(table)["coverage_95"].value == pytest.approx(2 / 3)


def test_errors_by_class_have_names_a_tracker_takes():
    groups = errors_by_class(table_of(), np.array([1, 0, 3]), ("5 Hz", "24 Hz", "a-b", "a b"))

    assert [(g.name, g.slug, g.n_series) for g in groups] == [
        ("24 Hz", "24_hz", 1),
        ("a b", "a_b_class3", 1),
    ]
    assert [g.mse.value for g in groups] == pytest.approx([5, 4])


def test_a_class_of_one_series_has_no_interval():
    table = table_of(series=np.array([0, 1, 2]))
    groups = errors_by_class(table, np.array([0, 1, 1]), ("one", "two"))
    alone, several = (group.mse for group in groups)
    metrics = ReconstructionMetrics(
        n_series=3,
        n_hidden=3,
        mean_hidden_fraction=0.5,
        overall=reconstruction_errors(table),
        groups=groups,
    )

    page = render_report(ReportContent(title="t", summary="s", created="c", metrics=metrics))
    document = json.loads(json.dumps(metrics.document(), allow_nan=False))

    assert (alone.low, alone.high) == (None, None) and several.low < several.high
    assert document["mse_one"] == {"value": alone.value, "low": None, "high": None}
    assert '<td class="number">–</td>' in page and "None" not in page
    assert errors_by_group(groups, None).startswith(b"\x89PNG")


def test_clean_values_are_known_by_the_names_of_the_targets(tmp_path):
    def columns(*names):
        targets = tuple(Channel(name=name, unit="V") for name in names)
        values = np.zeros((4, len(names)), np.float32)
        one = series("s", 4, split="train", targets=values if names else None)
        return clean_columns(made(tmp_path, one, targets=targets).dataset.schema)

    assert columns("clean_b", "angle", "clean_a") == [2, 0]
    assert columns("clean_a") is None and columns("clean") is None and columns() is None


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


def test_a_pretraining_is_judged_by_one_command(trained):
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
    assert result["metrics"]["mse"] == value["mse"]
    assert all((out / place).exists() for place in result["outputs"].values())
    page = (out / "outputs" / "report.html").read_text()
    assert (
        "Errors by number of visible observations" in page
        and "data:image/png" in page
        and "0.6 to 0.8" in page
    )


def test_a_hand_made_judgement_names_test_series_that_training_saw(trained):
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
    assert "were in train or validation of" in done.output
    page = (out / "outputs" / "report.html").read_text()
    assert "Possible leakage: test series were in the training data" in page
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
        write_json(root / name / "config.json", config)
        done = CliRunner().invoke(main, ["evaluate", "--job", str(root / name)])
        assert done.exit_code == 0, done.output

    first, second = (root / name / "outputs" / "metrics.json" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert "mse_observed_3" not in json.loads(first.read_text())


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
