"""Blocking checks block in their own run; whoever comes later asks whether an evaluation passed."""

from __future__ import annotations

import pytest

from roma_core.files import write_json
from roma_core.job import JobFolder, Result
from roma_pipelines.registry.gate import GateCheck, GateDecision, has_passed


@pytest.mark.parametrize("gate_passed", [True, False])
def test_it_reads_the_decision_that_was_written(tmp_path, gate_passed):
    folder = JobFolder(tmp_path)
    folder.outputs.mkdir()
    check = GateCheck(
        name="accuracy", passed=gate_passed, value=0.5, threshold=0.5, explanation="for the test"
    )
    write_json(folder.outputs / "gate.json", GateDecision(checks=(check,)).model_dump(mode="json"))
    folder.write_result(Result(job_key="k", attempt=1, world_size=1, metrics={}, wall_s=1.0))
    assert has_passed(tmp_path) is gate_passed


def test_an_evaluation_without_a_result_has_not_passed(tmp_path):
    assert not has_passed(tmp_path)
