"""A month at its first day."""

import os

import dagster as dg
import pytest

from roma_pipelines.instance import prepare_instance
from roma_pipelines.storage import Storage
from tests.pipelines.automation.played_month import Month


@pytest.fixture
def storage(store_template, tmp_path, monkeypatch):
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("DAGSTER_HOME", "")
    monkeypatch.delenv("DAGSTER_HOME")
    storage = Storage.open()
    (storage.mlflow / "mlflow.db").write_bytes(store_template.read_bytes())
    prepare_instance(storage)
    yield storage
    os.environ.pop("DAGSTER_HOME", None)


@pytest.fixture
def month(storage, tmp_path, monkeypatch):
    # a worker that dies decides nothing about its job
    monkeypatch.setattr("roma_pipelines.launching.pipes.on_interrupt", lambda *_: "detach")
    with dg.DagsterInstance.get() as instance:
        yield Month(tmp_path, storage, instance)
