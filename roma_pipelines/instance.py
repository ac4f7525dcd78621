"""The embedded Dagster instance: DAGSTER_HOME under the storage root."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from roma_core.files import write_bytes
from roma_pipelines.database import database_url, ensure_schemas, schema_url
from roma_pipelines.storage import Storage, StorageError

CONFIG = "dagster.yaml"
DATABASE_VARIABLE = "DAGSTER_POSTGRES_URL"  # no ROMA_…: those are settings, read by their classes
_IN_POSTGRES = f"""
storage:
  postgres:
    postgres_url:
      env: {DATABASE_VARIABLE}
""".encode()


def prepare_instance(storage: Storage) -> Path:
    """Make the instance's folder and point this process, and what it starts, at it.

    A DAGSTER_HOME that is set already is left alone. The same goes for a dagster.yaml that differs
    from ours: it is the operator's, but it must name the database that is configured, for state
    must not be split between two.

    Returns:
        DAGSTER_HOME.

    Raises:
        StorageError: the database cannot be used, or dagster.yaml and the settings disagree.
    """
    url = database_url()
    if url is not None:
        ensure_schemas(url)
        os.environ[DATABASE_VARIABLE] = schema_url(url, "dagster")
    configured = os.environ.get("DAGSTER_HOME")
    if configured:
        return Path(configured)
    home = storage.dagster
    home.mkdir(parents=True, exist_ok=True)
    _write_config(home / CONFIG, in_postgres=url is not None)
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ["ROMA_STORAGE_ROOT"] = str(storage.root)
    return home


def _write_config(path: Path, in_postgres: bool) -> None:
    plain = files("roma_pipelines").joinpath(CONFIG).read_bytes()
    wanted = plain + _IN_POSTGRES if in_postgres else plain
    there = path.read_bytes() if path.exists() else None
    if there is None or (there == plain and not _has_state(path.parent)):
        if there != wanted:
            write_bytes(path, wanted)
        return
    names_postgres = DATABASE_VARIABLE.encode() in there
    if names_postgres and not in_postgres:
        raise StorageError(
            f"{path} keeps Dagster's state in PostgreSQL; set ROMA_STORAGE_DATABASE_URL again, or "
            f"remove that file to begin with an empty state in SQLite"
        )
    if in_postgres and not names_postgres:
        raise StorageError(
            f"ROMA_STORAGE_DATABASE_URL is set, but {path} keeps Dagster's state elsewhere; its "
            f"history does not move by itself. To begin with an empty one in PostgreSQL, add:\n"
            + _IN_POSTGRES.decode()
        )


def _has_state(home: Path) -> bool:
    return (home / "history").exists()
