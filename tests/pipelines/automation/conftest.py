"""A month at its first day."""

import dagster as dg
import pytest

from tests.pipelines.automation.played_month import Month
from tests.pipelines.launching.conftest import (
    eventually,
    folder,
    launcher,
    make_spec,
    nothing_is_left_running,
    processes,
    starts,
)

__all__ = [
    "eventually",
    "folder",
    "launcher",
    "make_spec",
    "nothing_is_left_running",
    "processes",
    "starts",
]


@pytest.fixture
def month(storage, tmp_path, monkeypatch):
    # a worker that dies decides nothing about its job
    monkeypatch.setattr("roma_pipelines.launching.pipes.on_interrupt", lambda *_: "detach")
    with dg.DagsterInstance.get() as instance:
        yield Month(tmp_path, storage, instance)
