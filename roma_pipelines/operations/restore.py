"""Putting a backup back: into an empty root, and an empty database if it has one."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

from roma_pipelines.database import SCHEMAS, connection, database_url, schema_url
from roma_pipelines.operations.backup import DUMP, BackupError, is_empty, verify
from roma_pipelines.operations.postgres_tools import postgres_tool
from roma_pipelines.registry.store import DATABASE
from roma_pipelines.storage import Storage

_LOCATIONS = {  # columns in which MLflow keeps absolute paths
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


def restore_backup(path: Path, root: Path) -> str | None:
    """Verify a backup and restore it; nothing is changed before it is found whole.

    Returns:
        The root it was made of, if that is another one: the registry's artifacts are found at the
        new place, but Dagster's history still names the old one until assets are made again.

    Raises:
        BackupError: it is damaged, or the root or the database is not empty, or one has PostgreSQL
            and the other has not.
    """
    root = root.absolute()
    manifest = verify(path)
    if root.exists() and any(root.iterdir()):
        raise BackupError(f"{root} is not empty; restore into an empty folder (ROMA_STORAGE_ROOT)")
    url = database_url()
    if manifest["postgres"] != (url is not None):
        kept = "in PostgreSQL" if manifest["postgres"] else "in SQLite files"
        raise BackupError(
            f"{path} has its state {kept}; "
            + ("set" if manifest["postgres"] else "unset")
            + " ROMA_STORAGE_DATABASE_URL to restore it"
        )
    if url is not None and not is_empty(url):
        raise BackupError(f"the database {url} has tables of an installation; name an empty one")
    aside = root.with_name(f".{root.name}.restoring")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with tarfile.open(path, "r:") as tar:
            tar.extractall(aside, filter="data")
        moved = manifest["root"] if manifest["root"] != str(root) else None
        content = aside / "root"
        if url is not None:
            _pg_restore(url, aside / DUMP)
        if moved is not None:
            store = content / "mlflow" / DATABASE
            uri = schema_url(url, "mlflow") if url is not None else f"sqlite:///{store}"
            if url is not None or store.exists():
                _relocate(uri, Path(moved), root)
        if root.exists():
            root.rmdir()
        content.rename(root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    Storage(root).cache.mkdir(exist_ok=True)
    return moved


def _pg_restore(url: str, dump: Path) -> None:
    with connection(url) as session, session.cursor() as cursor:
        for schema in SCHEMAS:  # empty, or is_empty() had said so; the dump brings its own
            cursor.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
    command = [postgres_tool("pg_restore"), "--no-owner", "--no-privileges", "--exit-on-error"]
    command += ["--single-transaction", f"--dbname={url}", str(dump)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BackupError(f"pg_restore failed, the database is as it was: {done.stderr.strip()}")


def _relocate(uri: str, old: Path, new: Path) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    with engine.begin() as session:
        for table, columns in _LOCATIONS.items():
            for column in columns:
                session.execute(
                    sqlalchemy.text(
                        f"UPDATE {table} SET {column} = replace({column}, :old, :new) "
                        f"WHERE {column} LIKE :begin"
                    ),
                    {
                        "old": f"{old.as_uri()}/",
                        "new": f"{new.as_uri()}/",
                        "begin": f"{old.as_uri()}/%",
                    },
                )
    engine.dispose()
