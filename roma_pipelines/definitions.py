"""What ``workspace.yaml`` names: every experiment under ``defs/``."""

from __future__ import annotations

from pathlib import Path

import dagster as dg


@dg.definitions
def defs() -> dg.Definitions:
    """All experiments. Loads without torch, mlflow or wandb."""
    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
