"""A regression and an interpolation from data to the registry: real jobs, a real Dagster instance, a real MLflow store."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from urllib.parse import unquote

import dagster as dg
import numpy as np
import pyarrow.parquet as pq
import pytest

from roma_core.files import read_json
from roma_core.serving.registry_client import connect as connect_to
from roma_pipelines.pages.overview import overview
from roma_pipelines.registry.gate import checks_of
from roma_pipelines.registry.lineage import plan_replay
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.storage import Storage
from tests.pipelines import tiny
from tests.pipelines.forked_jobs import jobs_are_forked
from tests.pipelines.registry.test_versions import installed_packages_alone

pytestmark = pytest.mark.slow
CONSUMER = """
    import importlib.util, json, sys
    assert importlib.util.find_spec("roma_core") is None, "the project must not be importable here"
    import mlflow, mlflow.pyfunc
    uri, model, request = sys.argv[1:]
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model(model)
    print(json.dumps([answer.model_dump() for answer in model.predict(json.loads(request))]))
"""


def write_levels(path):
    """80 series of one channel, 4 to 9 steps about a level of -2 to 2; the target is 100 levels."""
    rng = np.random.default_rng(0)
    lines = ["@dimensions 1", "@equalLength false", "@targetLabel true", "@data"]
    for _ in range(80):
        level = rng.uniform(-2, 2)
        values = level + 0.1 * rng.normal(size=rng.integers(4, 10))
        lines.append(",".join(f"{v:.4f}" for v in values) + f":{100 * level:.3f}")
    path.write_text("\n".join(lines) + "\n")


def materialised(sections, tmp_path, monkeypatch):
    """Metadata of every asset, the outcome of every check, and the view of an experiment's overview."""
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "roma"))
    monkeypatch.setenv("ROMA_ENV_FILE", str(tmp_path / "empty.env"))
    (tmp_path / "empty.env").touch()
    (tmp_path / "dagster").mkdir()
    definitions, experiment = tiny.definitions(sections), tiny.RomaExperiment(**sections)
    with (
        dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance,
        jobs_are_forked(),
    ):
        job = definitions.resolve_implicit_global_asset_job_def()
        done = job.execute_in_process(instance=instance, raise_on_error=False)
        client = connect(MlflowSettings(), tmp_path / "roma" / "mlflow")
        views = overview(
            {experiment.name: experiment}, Storage(tmp_path / "roma"), instance, client
        )
    assert done.success
    made = {
        event.asset_key.path[-1]: {k: v.value for k, v in event.materialization.metadata.items()}
        for event in done.get_asset_materialization_events()
    }
    predictions = ("batch_predictions",) if experiment.predictions else ()
    assert tuple(made) == (*experiment.asset_names, *predictions)
    gate = {c.check_name: c.passed for c in done.get_asset_check_evaluations()}
    assert {"sound", "unsuspicious", *checks_of(experiment.task)} == set(gate)
    assert all(gate.values()), gate
    assert made[experiment.registered]["aliases"] == "champion, candidate"
    return made, views[0], client.tracking_uri


def served(tmp_path, uri, name, rows):
    """Answers of the champion to a request, where this project is not installed."""
    program = f"import sys; sys.path.append({str(installed_packages_alone(tmp_path / 'i'))!r})\n"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW"))}
    done = subprocess.run(
        [
            *(sys.executable, "-I", "-S", "-c", program + textwrap.dedent(CONSUMER)),
            *(uri, f"models:/{name}@champion", json.dumps(rows)),
        ],
        cwd=tmp_path,
        env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_regression_becomes_champion_and_is_served_in_the_units_of_its_target(
    tmp_path, monkeypatch
):
    write_levels(tmp_path / "levels.ts")
    series = {"positions": {"step": [0, 1, 2, 3]}, "units": {"step": "step"}}
    rows = [{**series, "values": {"c01": [level] * 4}} for level in (-1.0, 1.5)]
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "ts", "files": [{"path": str(tmp_path / "levels.ts")}]}
    source["format"] = {"kind": "ts", "target": {"name": "depth", "unit": "m"}}
    sections = tiny.attributes(
        tmp_path,
        dataset={"source": source, "drop_rate": 0.0, "test_fraction": 0.3},
        finetuning={"trainer": {"epochs": 30, "batch_size": 8, "base_lr": 0.01}},
    ) | {"name": "levels", "task": "regression", "predictions": {"input": str(new)}}

    made, view, uri = materialised(sections, tmp_path, monkeypatch)

    trained = read_json(Path(made["finetuned_regressor"]["job_folder"]) / "config.json")
    assert trained["model"]["problem_type"] == "regression"
    assert trained["trainer"]["best_metric"] == "eval/r2"
    assert made["evaluation_report"]["primary_metric"].startswith("R² 0.9")
    assert "depth: predicted against true" in unquote(made["evaluation_report"]["summary_plot"])
    assert view.evaluations[-1].metric == "R²" and view.evaluations[-1].passed
    assert set(view.versions) == {"champion", "candidate"}
    answers = served(tmp_path, uri, "levels", rows)
    low, high = (answer["values"]["depth"] for answer in answers)
    assert low == pytest.approx(-100, abs=40) and high == pytest.approx(150, abs=40)
    predicted = pq.read_table(made["batch_predictions"]["path"])["values"].to_pylist()
    assert [dict(values)["depth"] for values in predicted] == pytest.approx([low, high], rel=1e-4)


def test_an_autoencoder_becomes_champion_and_answers_queries(tmp_path, monkeypatch):
    stack = {"d_model": 32, "nhead": 2, "depth": 1}
    model = {"encoder_config": stack, "decoder_config": stack}
    source = {"kind": "synthetic", "process": "rbf", "n_series": 160}
    sections = tiny.attributes(
        tmp_path,
        dataset={"source": source, "drop_rate": 0.3, "axes": {"time": {"scale": "auto"}}},
        pretraining={
            "model": model,
            "trainer": {"epochs": 12, "batch_size": 8, "base_lr": 0.003, "log_every": 10},
        },
    ) | {"name": "curves", "task": "interpolation"}
    del sections["finetuning"]

    made, view, uri = materialised(sections, tmp_path, monkeypatch)

    assert made["evaluation_report"]["primary_metric"].startswith("R² 0.")
    assert "value: predicted against true" in unquote(made["evaluation_report"]["summary_plot"])
    assert view.evaluations[-1].metric == "R²" and view.evaluations[-1].passed
    assert set(view.versions) == {"champion", "candidate"}
    times = [0.02 * k for k in range(2, 40, 2)]
    levels = [1.0 if t < 0.4 else -1.0 for t in times]
    queries = [{"time": t} for t in (0.21, 0.61, 0.95)]  # the last is a forecast
    row = {"positions": {"time": times}, "values": {"value": levels}, "queries": queries}
    row["units"] = {"time": "s"}
    (answer,) = served(tmp_path, uri, "curves", [row])
    (mean,), (std,) = (list(answer[name].values()) for name in ("mean", "std"))
    replay = plan_replay(
        connect_to(uri), "curves", "1", tmp_path / "replay", tmp_path / "roma" / "datasets"
    )
    assert list(replay.folders) == ["pretrain", "evaluate"]
    again = read_json(replay.folders["evaluate"] / "config.json")
    assert again["classifier"] is None and again["autoencoder"].startswith(str(tmp_path / "replay"))
    assert mean[0] > 0.2 > -0.2 > mean[1] and min(std) > 0
