"""The data-set asset: what its checks refuse, what they only mention, and what they compare with."""

import os
import shutil
import signal
import threading
from types import MappingProxyType

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roma_core.files import read_json
from roma_pipelines.components import RomaExperiment
from roma_pipelines.launching.spec import job_key
from roma_pipelines.resources import JOB_CLIENTS

COLUMNS = {
    "object": "id",
    "axes": [{"column": "t", "unit": "s"}],
    "channels": [{"column": "x", "unit": "V"}],
    "metadata": {"label": "kind"},
}


def deliver(folder, n, loud=1.0, copies=()):
    """A long table of n series; ``copies`` are pairs (from, to) of equal content."""
    content = {k: np.random.default_rng(k).normal(size=12) * loud for k in range(n)}
    content |= {to: content[of] for of, to in copies}
    table = pa.table(
        {
            "id": np.repeat([f"o{k}" for k in range(n)], 12),
            "t": np.tile(np.arange(12.0), n),
            "x": np.concatenate([content[k] for k in range(n)]),
            "kind": np.repeat([["slow", "fast"][k % 2] for k in range(n)], 12),
        }
    )
    pq.write_table(table, folder / "series.parquet")


@pytest.fixture
def materialized(tmp_path, monkeypatch):
    """Makes the asset; gives its checks by name and its metadata."""
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)

    def make(resources=MappingProxyType({}), tags=None, **dataset):
        source = {"kind": "table", "files": ["series.parquet"], "columns": COLUMNS}
        experiment = RomaExperiment(
            name="own", dataset={"source": source, **dataset}, resources=resources
        )
        assets = [
            asset
            for asset in experiment.build_defs(None).assets
            if asset.key == dg.AssetKey(["own", "dataset"])
        ]
        # a blocking check fails its step
        result = dg.materialize(
            assets, raise_on_error=tags is not None, resources=JOB_CLIENTS, tags=tags
        )
        (event,) = result.asset_materializations_for_node("own__dataset")
        return {c.check_name: c for c in result.get_asset_check_evaluations()}, event.metadata

    return make


def test_deliveries_are_compared_and_content_in_two_splits_is_refused(tmp_path, materialized):
    deliver(tmp_path, 100)
    checks, first = materialized()
    assert checks["sound"].passed and checks["unsuspicious"].passed
    assert checks["sound"].metadata["compared_with"].value == "no previous version"

    deliver(tmp_path, 200, loud=4.0)
    checks, second = materialized()
    assert checks["sound"].passed, checks["sound"].metadata["first"].value
    assert not checks["unsuspicious"].passed
    assert checks["unsuspicious"].severity is dg.AssetCheckSeverity.WARN
    assert "channel 'x' drifted" in checks["unsuspicious"].metadata["findings"].value
    assert checks["sound"].metadata["compared_with"].value == first["digest"].value[:12]

    pairs = [(k, k + 1) for k in range(0, 60, 2)]
    deliver(tmp_path, 200, loud=4.0, copies=pairs)
    checks, _ = materialized()
    assert not checks["sound"].passed
    assert checks["sound"].severity is dg.AssetCheckSeverity.ERROR
    assert "have equal content: remove one of them" in checks["sound"].metadata["first"].value
    assert second["digest"].value != first["digest"].value


def test_a_job_whose_first_attempt_is_killed_makes_the_same_data_set(tmp_path, materialized):
    deliver(tmp_path, 100)
    _, here = materialized()
    shutil.rmtree(tmp_path / "state/datasets")
    killed = threading.Event()

    def kill():
        while not (owners := [*tmp_path.glob("state/jobs/*/attempts/1/owner.json")]):
            killed.wait(0.01)
        os.kill(read_json(owners[0])["pid"], signal.SIGKILL)
        killed.set()

    threading.Thread(target=kill, daemon=True).start()
    checks, of_job = materialized(resources={"dataset": {"threads_per_process": 2}})

    assert killed.is_set() and of_job["attempts"].value == 2
    assert checks["sound"].passed and checks["sound"].metadata["compared_with"]
    assert here.keys() < of_job.keys()
    assert {name: of_job[name] for name in here} == dict(here)
    assert (tmp_path / "state/datasets/own").is_dir()
    (log,) = tmp_path.glob("state/jobs/*/attempts/2/log")
    assert "the data set is built; checking it" in log.read_text()

    job = log.parents[2]
    retried = job.with_name(job_key("own/dataset", "first"))
    retried.mkdir()
    shutil.copy(job / "config.json", retried)
    retry = {"dagster/retry_number": "1", "dagster/root_run_id": "first"}
    materialized(tags=retry)
    with pytest.raises(dg.Failure, match=r"dataset of own changed since .* start a new run"):
        materialized(tags=retry, split={"stratified": True})


def test_another_rule_that_moves_objects_is_refused(tmp_path, materialized):
    deliver(tmp_path, 100)
    materialized()

    checks, _ = materialized(split={"stratified": True})

    assert not checks["sound"].passed
    assert (
        "a model may have been trained on its test data" in checks["sound"].metadata["first"].value
    )
