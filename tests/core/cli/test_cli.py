"""The commands a researcher types, one after the other, on a data set of two kinds of waves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from roma_core.cli import main
from roma_core.data.store import StoredDataset
from roma_core.evaluation.predictions import PredictionTable
from roma_core.files import read_json
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.dataloader import Collate
from tests import forked
from tests.time_limits import within

SMALL = ["--set", "model.encoder_config={d_model: 16, nhead: 2, depth: 1}"]
DECODER = ["--set", "model.decoder_config={d_model: 16, nhead: 2, depth: 1}"]
pytestmark = pytest.mark.slow


def roma(*arguments, ok=True, process=False):
    """``roma``, in this process or in one of its own; what it says."""
    arguments = list(map(str, arguments))
    if process:
        done = forked.run("roma_core.cli", *arguments, seconds=within(60))
        code, said = done.returncode, done.stdout + done.stderr
    else:
        result = CliRunner().invoke(main, arguments)
        code, said = result.exit_code, result.output
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
    assert (code == 0) is ok, said
    return said


def write_waves(path: Path, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = ["@problemName waves", "@timeStamps false", "@classLabel true slow fast", "@data"]
    for i in range(n):
        t = np.arange(rng.integers(6, 14))
        wave = np.sin(t * (0.4 + 0.8 * (i % 2))) + rng.normal(0, 0.05, len(t))
        trend = np.full(len(t), i % 2) + rng.normal(0, 0.05, len(t))
        columns = [",".join(f"{v:.4f}" for v in column) for column in (wave, trend)]
        lines.append(":".join([*columns, ("slow", "fast")[i % 2]]))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A data set, a pretraining, a finetuning and an evaluation, made by the commands."""
    root = tmp_path_factory.mktemp("cli")
    write_waves(root / "train.ts", 48, seed=0)
    write_waves(root / "test.ts", 24, seed=1)
    (root / "waves.yaml").write_text(
        json.dumps(
            {
                "name": "waves",
                "drop_rate": 0.2,
                "source": {
                    "kind": "ts",
                    "files": [
                        {"path": str(root / "train.ts"), "split": "train"},
                        {"path": str(root / "test.ts"), "split": "test"},
                    ],
                    "format": {
                        "kind": "ts",
                        "axis": "step",
                        "axis_unit": "step",
                        "channel_unit": "1",
                    },
                },
            }
        )
    )
    build = ["data", "build", root / "waves.yaml", "--out", root / "data", "--cache", root / "c"]
    said = roma(*build, process=True)
    data = next((root / "data" / "waves").glob("[0-9a-f]*"))
    assert str(data) in said
    roma(
        "pretrain",
        "--data",
        data,
        "--run-dir",
        root / "pre",
        "--set",
        "trainer.epochs=2",
        *SMALL,
        *DECODER,
        process=True,
    )
    weights = root / "pre/outputs/model"
    finetune = [
        "--weights",
        weights,
        "--set",
        "trainer.epochs=15",
        "--set",
        "trainer.base_lr=0.005",
    ]
    roma("finetune", "--data", data, "--run-dir", root / "fine", *finetune, process=True)
    classifier = root / "fine/outputs/model"
    arguments = ["--weights", classifier, "--autoencoder", weights]
    roma("evaluate", "--data", data, "--run-dir", root / "eval", *arguments, process=True)
    return root, data


def test_the_commands_end_with_a_classifier_that_classifies(runs):
    root, data = runs
    metrics = read_json(root / "eval/result.json")["metrics"]
    assert metrics["accuracy"] > 0.9
    assert metrics["serving_difference"] < 1e-5
    report = (root / "eval/outputs/report.html").read_text()
    assert "accuracy is the primary metric: the classes are balanced: " in report
    assert "ROC and precision-recall curves" in report
    assert "<h1>Evaluation of waves</h1>" in report and "data:image/png;base64" in report
    assert "Baselines of this run" in report and "summary features" in report
    assert report.count("<a><title>") == len(StoredDataset(data).split("test"))  # of the map
    assert "Published results" not in report, "none was given"
    assert read_json(root / "eval/config.json")["trained_on"] == [str(data)]


def test_predict_gives_the_probabilities_of_the_report(runs):
    root, data = runs
    command = ["predict", "--model", root / "eval/outputs/package", data, root / "out.parquet"]
    roma(*command, process=True)
    rows = pq.read_table(root / "out.parquet").to_pylist()
    table = PredictionTable.load(root / "eval/outputs/predictions.parquet")
    served = np.array([[dict(row["probabilities"])[c] for c in table.classes] for row in rows])
    assert [row["id"] for row in rows] == table.ids
    every = len(StoredDataset(data))
    assert f"{every} series classified" in roma(
        *command[:-1], root / "all.parquet", "--split", "all"
    )
    assert [row["label"] for row in rows] == [table.classes[k] for k in table.predicted]
    np.testing.assert_allclose(served, table.probabilities, atol=1e-5)
    exported, again = root / "new" / "test.parquet", root / "again.parquet"
    roma("data", "export", data, exported, "--split", "test")
    roma("predict", "--model", root / "eval/outputs/package", exported, again)
    said = pq.read_table(again).drop("scored_at").to_pylist()
    for row, before in zip(said, rows, strict=True):
        now = dict(
            row.pop("probabilities")
        )  # another process: rounded otherwise on some processors
        assert now == pytest.approx(dict(before["probabilities"]), abs=1e-6)
        assert all(before[name] == value for name, value in row.items())


def test_embed_gives_the_features_of_the_pretrained_encoder(runs):
    root, data = runs
    command = ["embed", "--model", root / "eval/outputs/encoder_package", data, root / "f.parquet"]
    roma(*command, process=True)
    rows = pq.read_table(root / "f.parquet").to_pylist()
    model = RoMAForPreTraining.from_pretrained(root / "pre/outputs/model").eval()
    test = StoredDataset(data).split("test")
    collate = Collate(model.config, seed=0)
    for i in range(0, len(test), 5):
        with torch.no_grad():
            expected = model.embed(collate([(0, i, test[i])]), pooling="mean")[0]
        np.testing.assert_allclose(rows[i]["features"], expected, atol=1e-5)
    classifier = ["--model", root / "eval/outputs/package", data, root / "x.parquet"]
    assert "use `roma predict`" in roma("embed", *classifier, ok=False)


def test_metrics_and_profile_as_json_are_all_of_stdout(runs, tmp_path, monkeypatch):
    root, data = runs

    def evaluated(folder, work):
        print("3 of 24 series")
        (folder.path / "outputs").symlink_to(root / "eval/outputs")
        return 0

    monkeypatch.setattr("roma_core.cli.evaluate.run_in_folder", evaluated)
    weights = ["--weights", root / "fine/outputs/model", "--run-dir", tmp_path / "again"]
    for command, key in (
        (["evaluate", "--data", data, *weights], "metrics"),
        (["data", "inspect", data], "splits"),
    ):
        done = CliRunner().invoke(main, [*map(str, command), "--json"])
        assert key in json.loads(done.stdout), done.stderr


def test_explain_prints_the_contribution_of_windows_and_channels_and_draws_them(runs):
    root, data = runs
    command = ["explain", "--model", root / "eval/outputs/package", data, "--windows", "5"]
    table = PredictionTable.load(root / "eval/outputs/predictions.parquet")
    command += ["--series", table.ids[3]]
    found = json.loads(roma(*command, "--html", root / "pages" / "why.html", "--json"))
    label = f"log p({table.classes[table.predicted[3]]})"
    assert (found["id"], list(found["outputs"])) == (table.ids[3], [label])
    assert found["outputs"][label] == pytest.approx(np.log(table.probabilities[3].max()), abs=1e-4)
    assert [part["kind"] for part in found["parts"]] == ["window"] * 5 + ["channel"] * 2
    page = (root / "pages" / "why.html").read_text()
    assert "data:image/png;base64" in page and "(set to its mean)" in page
    text = roma(*command)
    assert text.startswith(f"series {table.ids[3]}: class {table.classes[table.predicted[3]]}, ")
    assert "has no series 'none'" in roma(*command, "--series", "none", ok=False)
    command[2] = root / "eval/outputs/encoder_package"
    assert "expected a classifier or a regressor of whole series" in roma(*command, ok=False)


def test_predict_reads_ragged_rows_and_names_what_is_wrong(runs):
    root, data = runs
    channels = [c["name"] for c in read_json(data / "manifest.json")["data_schema"]["channels"]]
    good = {"positions": {"step": [0, 1, 3]}, "values": {c: [0.1, 0.2, 0.3] for c in channels}}
    short = {"positions": {"step": [5]}, "values": {c: [0.1] for c in channels}}
    rows = json.dumps(good) + "\n" + json.dumps(short) + "\n"
    (root / "rows.jsonl").write_text(rows, encoding="utf-8-sig")  # as some editors of Windows do
    package = root / "eval/outputs/package"
    assert "2 series" in roma(
        "predict", "--model", package, root / "rows.jsonl", root / "o.parquet"
    )

    bad = {**good, "values": {channels[0]: [1, 2, 3]}}
    (root / "bad.jsonl").write_text(json.dumps(bad) + "\n")
    said = roma("predict", "--model", package, root / "bad.jsonl", root / "o.parquet", ok=False)
    assert f"'{channels[1]}' is missing" in said and "Traceback" not in said


def test_a_folder_of_other_settings_is_refused_and_the_same_settings_resume(runs):
    root, data = runs
    arguments = ["pretrain", "--data", data, "--run-dir", root / "pre", *SMALL, *DECODER]
    said = roma(*arguments, "--set", "trainer.epochs=3", ok=False)
    assert "other settings: trainer.epochs 2 → 3; set them back" in said and "Traceback" not in said
    before = (root / "pre/outputs/model/model.safetensors").read_bytes()
    frozen = read_json(root / "pre/config.json")  # as before there were these settings
    frozen["model"].pop("value_features")
    frozen["model"].pop("neighbours")
    frozen.pop("train_fraction")
    (root / "pre/config.json").write_text(json.dumps(frozen))
    said = roma(*arguments, "--set", "trainer.epochs=2", "--set", "trainer.save_every=7")
    assert "resumed from step-" in said and "resumes with trainer.save_every" in said
    assert (root / "pre/outputs/model/model.safetensors").read_bytes() == before


def test_mistakes_on_the_command_line_are_explained(runs):
    root, data = runs
    out = ["--run-dir", root / "x"]
    assert "--data and --run-dir are required" in roma("pretrain", ok=False)
    said = roma("pretrain", "--data", data, *out, "--set", "trainer.epoch=3", ok=False)
    assert "epoch" in said and "Traceback" not in said
    said = roma("pretrain", "--data", data, *out, "--set", "epochs=3", ok=False)
    assert "expected model.NAME=VALUE or trainer.NAME=VALUE" in said
    said = roma("pretrain", "--data", data / "nothing", *out, ok=False)
    assert "Traceback" not in said
    assert not (root / "x").exists()


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    source = tmp_path / "in.parquet"
    source.touch()
    for output, reason in (("s3://bucket/out/", "is no local path"), (tmp_path, "is a folder")):
        said = roma("predict", "--model", tmp_path / "none", source, output, ok=False)
        assert reason in " ".join(said.replace("\u2502", " ").split())


def test_a_store_that_is_not_there_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("ROMA_MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "in.jsonl").touch()
    arguments = "--model", "models:/w@champion", tmp_path / "in.jsonl", tmp_path / "out.parquet"
    said = " ".join(roma("predict", *arguments, ok=False).replace("\u2502", " ").split())
    assert f"there is no MLflow store {tmp_path}/mlflow/mlflow.db; correct --tracking-uri" in said
    assert not (tmp_path / "mlflow").exists()


def test_show_config_names_the_source_of_each_setting(runs):
    _, data = runs
    said = roma("pretrain", "--data", data, "--show-config", "--set", "trainer.epochs=7")
    assert "epochs" in said and "[code]" in said and "[default]" in said
    assert "n_channels: 2" in said


def test_a_mistake_is_one_sentence_and_the_stack_is_in_a_file(runs, tmp_path):
    said = roma(
        *("pretrain", "--data", runs[1], "--run-dir", tmp_path / "out", *SMALL, *DECODER),
        *("--set", "trainer.tokens_per_batch=3"),
        ok=False,
    )
    assert "failed: the longest series has" in said and "Traceback" not in said
    assert "Traceback" in (tmp_path / "out/attempts/1/traceback.txt").read_text()
