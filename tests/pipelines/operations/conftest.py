"""What commands of operation look at: job folders and data sets as they are left behind."""

import json
import os
import time

import dagster as dg
import pytest

from roma_core.files import write_json
from roma_core.job import JobFolder
from roma_pipelines.launching.spec import AttemptRecord, End, JobSpec
from roma_pipelines.registry.store import MlflowSettings, connect


@pytest.fixture
def client(storage):
    return connect(MlflowSettings(), storage.mlflow)


@pytest.fixture
def instance(storage):
    with dg.DagsterInstance.get() as instance:
        yield instance


@pytest.fixture
def job(storage):
    """Makes a job's folder: its key is one letter 20 times."""

    def make(letter, how="completed", days=100.0, config=None, asset="waves/pretrained_encoder"):
        folder = JobFolder(storage.jobs / (letter * 20))
        (folder.path / "attempts").mkdir(parents=True)
        spec = JobSpec(key=letter * 20, command=("x",), config_digest="")
        write_json(folder.spec, spec.model_dump(mode="json"))
        write_json(folder.config, config or {})
        then = time.time() - days * 86400
        end = End(
            status="failed" if how == "open" else how,
            reason="",
            checkpoint=None,
            ended_at=then,
            ran_s=3600.0,
        )
        record = AttemptRecord(
            attempt=1, backend="local", intended_at=then, end=None if how == "open" else end
        )
        write_json(folder.attempt_record(1), record.model_dump(mode="json"))
        watcher = {"schema_version": 1, "pid": 1, "start": "?", "beat": then, "asset_key": asset}
        write_json(folder.lease, watcher)
        (folder.checkpoints / "step-1").mkdir(parents=True)
        (folder.checkpoints / "step-1" / "model").write_bytes(b"c" * 5000)
        (folder.outputs).mkdir()
        (folder.outputs / "model").write_bytes(b"m" * 1000)
        return folder

    return make


@pytest.fixture
def data(storage):
    """Makes a version of a data set."""

    def make(name, digest, days=100.0):
        folder = storage.datasets / name / digest
        folder.mkdir(parents=True)
        manifest = folder / "manifest.json"
        manifest.write_text(json.dumps({"digest": digest}))
        then = time.time() - days * 86400
        os.utime(manifest, (then, then))
        return folder

    return make
