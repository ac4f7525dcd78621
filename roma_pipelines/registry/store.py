"""Where runs and models are kept: an MLflow server, PostgreSQL, or the embedded store of one computer.

The embedded store is ``<root>/mlflow.db`` (SQLite) and ``<root>/artifacts``. MLflow itself creates
and migrates such a file unguarded: processes that start together on a missing one leave it
half-migrated, and a newer MLflow migrates it unasked. Here, one process at a time builds a new file
aside and renames it, so a crash at any moment leaves the old file or none.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from filelock import FileLock
from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from roma_core.files import sync_folder
from roma_core.settings import RomaSettings
from roma_pipelines.storage import Storage, StorageSettings

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
_SQLITE = "sqlite:///"
_log = logging.getLogger(__name__)


class StoreError(RuntimeError):
    """The store cannot be used as it is; the message says what to do."""


class MlflowSettings(RomaSettings):
    """Where MLflow is. With nothing set, the embedded store is used."""

    model_config = SettingsConfigDict(env_prefix="ROMA_MLFLOW_")

    tracking_uri: str | None = Field(
        None, description="URI of the tracking server; None takes the store under the storage root."
    )
    registry_uri: str | None = Field(
        None, description="URI of the model registry; None takes the tracking server's."
    )
    username: str | None = Field(
        None,
        description="Of a server that asks for it; null takes MLFLOW_TRACKING_USERNAME of the "
        "environment. Jobs are handed both by their environment.",
    )
    password: SecretStr | None = Field(
        None, description="Null takes MLFLOW_TRACKING_PASSWORD of the environment."
    )
    experiment_prefix: str = Field(
        "roma", description="MLflow experiments are named <prefix>/<experiment>."
    )


def tracking_uri(settings: MlflowSettings, root: Path) -> str:
    """The URI of the configured server, or of our own store, there or to come; imports no MLflow.

    Raises:
        StorageError: the configured database is none.
    """
    from roma_pipelines.database import database_url, schema_url

    if settings.tracking_uri:
        return settings.tracking_uri
    if (url := database_url()) is not None:
        return schema_url(url, "mlflow")
    return f"{_SQLITE}{root.absolute() / DATABASE}"


def connect(settings: MlflowSettings, root: Path) -> MlflowClient:
    """A client of the configured server, or of the embedded store in ``root``.

    Both URIs also become this process's defaults, because parts of MLflow know no other way.

    Raises:
        StoreError: a server refuses us, or our own store cannot be used.
    """
    from roma_pipelines.registry.access import check_access

    check_access(settings)
    _no_telemetry()
    import mlflow

    uri = settings.tracking_uri or own_store(root)
    registry = settings.registry_uri or uri
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(registry)
    return mlflow.MlflowClient(uri, registry)


def own_store(root: Path) -> str:
    """The URI of the store this installation keeps itself: in PostgreSQL if one is configured.

    Raises:
        StoreError, StorageError: it cannot be used; the message says what to do.
    """
    from roma_pipelines.database import database_url

    url = database_url()
    if url is None:
        return ensure_store(root)
    _no_telemetry()
    from roma_pipelines.registry.postgres_store import ensure_postgres_store

    return ensure_postgres_store(url, Storage(root.parent))


def ensure_store(root: Path) -> str:
    """Create or upgrade the embedded store if necessary; return its URI.

    An older database is copied, the copy upgraded and put in its place; the old one stays beside it
    as ``mlflow.db.<revision>.backup``. Safe to call from any number of processes at once.

    Raises:
        StoreError: the database is newer than the installed MLflow, half-migrated with runs in it,
            no MLflow database at all, or in use while it should be upgraded.
    """
    root = root.absolute()
    if set("?#%") & set(str(root)):
        raise StoreError(f"{root}: a path with '?', '#' or '%' cannot be named in a database URI")
    _no_telemetry()
    root.mkdir(parents=True, exist_ok=True)
    database = root / DATABASE
    with FileLock(root / ".mlflow-create.lock"):
        state, revision = _state_of(database)
        if state == "half-migrated":
            broken = database.with_name(f"{DATABASE}.broken")
            _log.warning(
                "%s was left half-migrated and holds no runs; it is now %s", database, broken
            )
            database.replace(broken)
            state = "missing"
        if state == "missing":
            _log.info("creating the MLflow database %s, which takes some seconds", database)
            _build(database)
        elif state == "older":
            backup = database.with_name(f"{DATABASE}.{revision}.backup")
            _log.info("upgrading the MLflow database %s; the old one stays as %s", database, backup)
            with _exclusively(database):
                _build(database, backup)
    return f"{_SQLITE}{database}"


def embedded_root(uri: str) -> Path | None:
    """The folder of the embedded store behind a URI, None for a server or PostgreSQL."""
    return Path(uri.removeprefix(_SQLITE)).parent if uri.startswith(_SQLITE) else None


def is_server(uri: str) -> bool:
    """Whether a URI is that of an MLflow server, which jobs on other computers may talk to."""
    return uri.startswith(("http:", "https:"))


def artifacts_root(uri: str) -> Path | None:
    """The folder of artifacts of a store this installation keeps itself, None for a server."""
    if is_server(uri):
        return None
    folder = embedded_root(uri)
    return (folder if folder is not None else Storage(StorageSettings().root).mlflow) / "artifacts"


@contextlib.contextmanager
def one_at_a_time(client: MlflowClient) -> Iterator[None]:
    """Serialise what looks first and writes then, between all processes of our own store.

    A server is shared by computers that no file lock reaches; there, the orchestrator runs such
    steps one at a time.
    """
    root = embedded_root(client.tracking_uri)
    if root is not None:
        with FileLock(root / ".mlflow-write.lock"):
            yield
    elif not is_server(client.tracking_uri):
        from roma_pipelines.database import advisory_lock

        with advisory_lock(client.tracking_uri, "mlflow write"):
            yield
    else:
        yield


def _no_telemetry() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


State = Literal["missing", "ready", "older", "half-migrated"]


def _state_of(database: Path) -> tuple[State, str | None]:
    """What is there, and its schema revision."""
    if not database.exists():
        return "missing", None
    from mlflow.version import VERSION

    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=rw", uri=True)) as connection:
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"{database} is no SQLite database ({error}); move it away and run again"
            ) from error
        if "alembic_version" not in tables or any(t.startswith("_alembic_tmp_") for t in tables):
            runs = (
                connection.execute("SELECT count(*) FROM runs").fetchone()[0]
                if "runs" in tables
                else 0
            )
            if runs:
                raise StoreError(
                    f"{database} was left half-migrated by a crash and holds {runs} runs; put back "
                    f"a backup, or move it away to start with an empty store"
                )
            return "half-migrated", None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    revision = row[0] if row else None
    known = known_revisions()
    if revision in known.heads:
        return "ready", revision
    if revision in known.all:
        return "older", revision
    raise StoreError(
        f"{database} has schema revision {revision}, which MLflow {VERSION} does not know: a newer "
        f"MLflow wrote it. Install that version, or move the file away to start with an empty store"
    )


class Revisions(NamedTuple):
    """Revisions of MLflow's tables that the installed version knows."""

    heads: frozenset[str]
    all: frozenset[str]


@functools.cache
def known_revisions() -> Revisions:
    """Read from the installed MLflow, once in a process."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    scripts = ScriptDirectory.from_config(_get_alembic_config(""))
    every = frozenset(script.revision for script in scripts.walk_revisions())
    return Revisions(frozenset(scripts.get_heads()), every)


def _build(database: Path, backup: Path | None = None) -> None:
    """Build a database aside and rename it; with ``backup``, from the present one, kept there."""
    import sqlalchemy
    from mlflow.store.db.utils import _upgrade_db
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    aside = database.with_name(f".{DATABASE}.building")
    for left_over in aside.parent.glob(f"{aside.name}*"):
        left_over.unlink()
    if backup:
        shutil.copyfile(database, aside)
        engine = sqlalchemy.create_engine(f"{_SQLITE}{aside}")
        _upgrade_db(engine)
        engine.dispose()
        backup.unlink(missing_ok=True)
        os.link(database, backup)
    else:
        # creates all tables and the default experiment, whose artifacts then are in our folder
        artifacts = (database.parent / "artifacts").as_uri()
        SqlAlchemyStore(f"{_SQLITE}{aside}", artifacts).engine.dispose()
    aside.replace(database)
    sync_folder(database.parent)


@contextlib.contextmanager
def _exclusively(database: Path) -> Iterator[None]:
    """Keep every other process from writing to the database."""
    with contextlib.closing(
        sqlite3.connect(database, timeout=5, isolation_level=None)
    ) as connection:
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"{database} must be upgraded, but another process uses it ({error}); stop that one "
                f"and run again"
            ) from error
        yield
