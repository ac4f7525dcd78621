"""Blocking checks block in their own run; whoever comes later asks whether an evaluation passed."""

from __future__ import annotations

import pytest

from roma_core.files import write_json
from roma_core.job import JobFolder, Result
from roma_pipelines.assets.evaluation_report import MAX_SERVING_DIFFERENCE, has_passed
from roma_pipelines.registry.promotion import GateCheck, GateDecision


def evaluated(path, difference, gate_passed):
    folder = JobFolder(path)
    folder.outputs.mkdir()
    check = GateCheck(
        name="accuracy", passed=gate_passed, value=0.5, threshold=0.5, explanation="for the test"
    )
    write_json(folder.outputs / "gate.json", GateDecision(checks=(check,)).model_dump(mode="json"))
    metrics = {"serving_difference": difference}
    folder.write_result(Result(job_key="k", attempt=1, world_size=1, metrics=metrics, wall_s=1.0))
    return has_passed(path)


@pytest.mark.parametrize("gate_passed", [True, False])
@pytest.mark.parametrize("factor, serves", [(0.5, True), (2.0, False)])
def test_both_the_gate_and_the_package_must_have_passed(tmp_path, factor, serves, gate_passed):
    found = evaluated(tmp_path, factor * MAX_SERVING_DIFFERENCE, gate_passed)
    assert found is (serves and gate_passed)


def test_an_evaluation_without_a_result_has_not_passed(tmp_path):
    assert not has_passed(tmp_path)
