"""Dagster definitions that ``workspace.yaml`` names: all experiments under ``defs/``."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from roma_pipelines.automation.alerts import alert_on_failure
from roma_pipelines.automation.sensors import reconcile_jobs
from roma_pipelines.executor import executor
from roma_pipelines.experiment import ENCODER, all_experiments


@dg.definitions
def defs() -> dg.Definitions:
    """All experiments, and the sensors that maintain jobs. Loads without torch, mlflow or wandb.

    Raises:
        ValueError: an experiment's file is invalid; one line per error, with file and setting.
    """
    operations = dg.Definitions(executor=executor(), sensors=[reconcile_jobs, alert_on_failure])
    try:
        experiments = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    except Exception:  # Dagster raises several types, with our error as a distant cause
        if errors := [error for error in all_experiments().values() if isinstance(error, str)]:
            raise ValueError("\n".join(errors)) from None
        raise
    merged = dg.Definitions.merge(experiments, operations)
    _check_shared_encoders(merged)
    return merged


def _check_shared_encoders(definitions: dg.Definitions) -> None:
    """Dagster takes an unknown key for an external asset, which would never be materialised."""
    graph = definitions.resolve_asset_graph()
    for key in graph.external_asset_keys:
        if key.path[-1] == ENCODER:
            users = ", ".join(sorted(child.path[0] for child in graph.get(key).child_keys))
            raise ValueError(
                f"{users}: pretrained_from: {key.path[0]}: no experiment of that name pretrains an "
                f"encoder"
            )
