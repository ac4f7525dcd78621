"""A month at its first day."""

import dagster as dg
import pytest

from tests.pipelines.automation.played_month import Month


@pytest.fixture
def month(storage, tmp_path, monkeypatch):
    # a worker that dies decides nothing about its job
    monkeypatch.setattr("roma_pipelines.launching.pipes.on_interrupt", lambda *_: "detach")
    with dg.DagsterInstance.get() as instance:
        yield Month(tmp_path, storage, instance)
