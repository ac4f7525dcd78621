"""The gate's decisions where they are kept: in the folder of the evaluation, and as tags of its run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from roma_core.evaluation.measured import Measured
from roma_core.files import read_json, write_json
from roma_core.job import JobFolder
from roma_pipelines.registry.gate import GateDecision, GateThresholds, gate
from roma_pipelines.registry.runs import JOB_KEY_TAG, checked_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

GATE_TAG = "roma.gate"
SPLIT_TAG = "roma.test_split"


def decide(folder: JobFolder, thresholds: GateThresholds) -> GateDecision:
    """Judge a finished evaluation, and write ``outputs/gate.json``.

    Raises:
        ValueError: the evaluation has no result.
    """
    from roma_core.evaluation.predictions import PredictionTable

    result = folder.read_result()
    if result is None:
        raise ValueError(f"the evaluation in {folder.path} has no result; materialise it again")
    tables = {
        name: PredictionTable.load(folder.path / result.outputs[name])
        for name in ("predictions", "champion_predictions")
        if name in result.outputs
    }
    measured = Measured.load(folder.path / result.outputs["measured"])
    decision = gate(tables["predictions"], tables.get("champion_predictions"), measured, thresholds)
    write_json(folder.outputs / "gate.json", decision.model_dump(mode="json"))
    return decision


def read_decision(job_folder: Path) -> GateDecision:
    """The gate's decision about an evaluation."""
    return GateDecision.model_validate(read_json(job_folder / "outputs" / "gate.json"))


def has_passed(job_folder: Path) -> bool:
    """Whether an evaluation passed its gate.

    Blocking checks block inside their own run only; whoever comes later asks here.
    """
    if JobFolder(job_folder).read_result() is None:
        return False
    return read_decision(job_folder).passed


def decided_before(client: MlflowClient, experiment: str, split: str, job_key: str) -> int:
    """How many other evaluations a test split has decided, as the runs of the experiment tell."""
    checked_name("job key", job_key)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return 0
    runs = client.search_runs(
        [found.experiment_id], f"tags.`{SPLIT_TAG}` = '{split}'", max_results=50_000
    )
    return sum(run.data.tags.get(JOB_KEY_TAG) != job_key for run in runs)


def tag_decision(client: MlflowClient, run_id: str, decision: GateDecision, split: str) -> None:
    """Say at the run of an evaluation which split decided, and how."""
    client.set_tag(run_id, SPLIT_TAG, split)
    client.set_tag(run_id, GATE_TAG, "passed" if decision.passed else "failed")
