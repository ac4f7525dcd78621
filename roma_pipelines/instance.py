"""The embedded Dagster instance: DAGSTER_HOME under the storage root."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from roma_core.files import write_bytes
from roma_pipelines.storage import Storage

CONFIG = "dagster.yaml"


def prepare_instance(storage: Storage) -> Path:
    """Make the instance's folder and point this process, and what it starts, at it.

    A DAGSTER_HOME that is set already is left alone. The same goes for a dagster.yaml that differs
    from ours: it is the operator's.

    Returns:
        DAGSTER_HOME.
    """
    configured = os.environ.get("DAGSTER_HOME")
    if configured:
        return Path(configured)
    home = storage.dagster
    home.mkdir(parents=True, exist_ok=True)
    if not (home / CONFIG).exists():
        write_bytes(home / CONFIG, files("roma_pipelines").joinpath(CONFIG).read_bytes())
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ["ROMA_STORAGE_ROOT"] = str(storage.root)
    return home
