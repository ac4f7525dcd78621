"""What ``workspace.yaml`` names: every experiment under ``defs/``."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from roma_pipelines.automation.reconcile_sensor import reconcile_jobs
from roma_pipelines.executor import executor


@dg.definitions
def defs() -> dg.Definitions:
    """All experiments, and what looks after their jobs. Loads without torch, mlflow or wandb."""
    operations = dg.Definitions(executor=executor(), sensors=[reconcile_jobs])
    experiments = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    return dg.Definitions.merge(experiments, operations)
