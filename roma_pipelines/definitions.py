"""What ``workspace.yaml`` names: every experiment under ``defs/``."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from roma_pipelines.automation.alerts import tell_of_failures
from roma_pipelines.automation.housekeeping import reconcile_jobs
from roma_pipelines.executor import executor
from roma_pipelines.experiment import ENCODER
from roma_pipelines.experiment_files import mistakes_in_defs


@dg.definitions
def defs() -> dg.Definitions:
    """All experiments, and what looks after their jobs. Loads without torch, mlflow or wandb.

    Raises:
        ValueError: an experiment's file is wrong; a sentence for each mistake names file and setting.
    """
    operations = dg.Definitions(executor=executor(), sensors=[reconcile_jobs, tell_of_failures])
    try:
        experiments = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    except Exception:  # Dagster's, of several kinds, with ours as a distant cause
        if wrong := mistakes_in_defs():
            raise ValueError("\n".join(wrong)) from None
        raise
    merged = dg.Definitions.merge(experiments, operations)
    _check_shared_encoders(merged)
    return merged


def _check_shared_encoders(definitions: dg.Definitions) -> None:
    """Dagster takes a key that no asset has for one made elsewhere, which would never come."""
    graph = definitions.resolve_asset_graph()
    for key in graph.external_asset_keys:
        if key.path[-1] == ENCODER:
            users = ", ".join(sorted(child.path[0] for child in graph.get(key).child_keys))
            raise ValueError(
                f"{users}: pretrained_from: {key.path[0]}: there is no experiment of that name that "
                f"pretrains an encoder"
            )
