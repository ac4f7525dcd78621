"""A regression from data to the registry: real jobs, a real Dagster instance, a real MLflow store."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow.parquet as pq
import pytest

from roma_core.files import read_json
from roma_pipelines.pages.overview import overview
from roma_pipelines.registry.gate import checks_of
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.storage import Storage
from tests.pipelines import tiny
from tests.pipelines.registry.test_versions import installed_packages_alone

pytestmark = pytest.mark.slow
CONSUMER = """
    import importlib.util, json, sys
    assert importlib.util.find_spec("roma_core") is None, "the project must not be importable here"
    import mlflow, mlflow.pyfunc
    uri, request = sys.argv[1:]
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/levels@champion")
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


def test_a_regression_becomes_champion_and_is_served_in_the_units_of_its_target(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "roma"))
    monkeypatch.setenv("ROMA_ENV_FILE", str(tmp_path / "empty.env"))
    (tmp_path / "empty.env").touch()
    (tmp_path / "dagster").mkdir()
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
    definitions = tiny.definitions(sections)

    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance:
        job = definitions.resolve_implicit_global_asset_job_def()
        done = job.execute_in_process(instance=instance, raise_on_error=False)
        experiment = tiny.RomaExperiment(**sections)
        client = connect(MlflowSettings(), tmp_path / "roma" / "mlflow")
        (view,) = overview({"levels": experiment}, Storage(tmp_path / "roma"), instance, client)

    assert done.success
    made = {
        event.asset_key.path[-1]: {k: v.value for k, v in event.materialization.metadata.items()}
        for event in done.get_asset_materialization_events()
    }
    assert tuple(made) == (*experiment.asset_names, "batch_predictions")
    assert made["registered_regressor"]["aliases"] == "champion, candidate"
    gate = {c.check_name: c.passed for c in done.get_asset_check_evaluations()}
    assert {"sound", "unsuspicious", *checks_of("regression")} == set(gate) and all(gate.values())
    trained = read_json(Path(made["finetuned_regressor"]["job_folder"]) / "config.json")
    assert trained["model"]["problem_type"] == "regression"
    assert trained["trainer"]["best_metric"] == "eval/r2"
    assert made["evaluation_report"]["primary_metric"].startswith("R² 0.9")
    assert view.evaluations[-1].metric == "R²" and view.evaluations[-1].passed
    assert set(view.versions) == {"champion", "candidate"}

    program = f"import sys; sys.path.append({str(installed_packages_alone(tmp_path / 'i'))!r})\n"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW"))}
    served = subprocess.run(
        [
            *(sys.executable, "-I", "-S", "-c", program + textwrap.dedent(CONSUMER)),
            *(client.tracking_uri, json.dumps(rows)),
        ],
        cwd=tmp_path,
        env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert served.returncode == 0, served.stderr
    low, high = (answer["values"]["depth"] for answer in json.loads(served.stdout.splitlines()[-1]))
    assert low == pytest.approx(-100, abs=40) and high == pytest.approx(150, abs=40)
    predicted = pq.read_table(made["batch_predictions"]["path"])["values"].to_pylist()
    assert [dict(values)["depth"] for values in predicted] == pytest.approx([low, high], rel=1e-4)
