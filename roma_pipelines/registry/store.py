"""Where runs and models are kept: an MLflow server, PostgreSQL, or the embedded store of one computer.

The embedded store is ``<root>/mlflow.db`` (SQLite) and ``<root>/artifacts``. MLflow itself creates
and migrates such a file unguarded: processes that start together on a missing one leave it
half-migrated, and a newer MLflow migrates it unasked. Here, one process at a time builds a new file
aside and renames it, so a crash at any moment leaves the old file or none.

MLflow's tables in the PostgreSQL database: made, or brought to the installed version, once.
An MLflow server that asks who one is: name and password on their way to it, and a look beforehand.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import logging
import os
import shutil
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from filelock import FileLock
from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from roma_core.files import sync_folder
from roma_core.settings import RomaSettings, without_credentials
from roma_pipelines.storage import (
    Storage,
    StorageSettings,
    advisory_lock,
    ensure_schemas,
    schema_url,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)


def ensure_postgres_store(url: str, storage: Storage) -> str:
    """Create or upgrade MLflow's tables if necessary; return the URI by which MLflow finds them.

    One process does it at a time; the others wait and find it done.

    Raises:
        StoreError: a newer MLflow made the tables.
        StorageError: the database does not answer.
    """
    uri = schema_url(url, "mlflow")
    if _revision(uri) in known_revisions().heads:
        return uri
    ensure_schemas(url)
    with advisory_lock(url, "mlflow schema"):
        revision, known = _revision(uri), known_revisions()
        if revision in known.heads:
            return uri
        if revision is not None and revision not in known.all:
            raise StoreError(
                f"{url} has MLflow's tables of revision {revision}, which the installed MLflow does "
                f"not know: a newer one made them. Install that version, or name another database"
            )
        _build(uri, storage, revision)
    return uri


def _revision(uri: str) -> str | None:
    """Revision of MLflow's tables; None if there are none."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    try:
        with engine.connect() as session:
            found = session.execute(sqlalchemy.text("SELECT to_regclass('alembic_version')"))
            if found.scalar() is None:
                return None
            row = session.execute(sqlalchemy.text("SELECT version_num FROM alembic_version"))
            return row.scalar()
    except sqlalchemy.exc.OperationalError as error:
        raise StoreError(f"MLflow's database does not answer: {error.orig}") from error


def _build(uri: str, storage: Storage, revision: str | None) -> None:
    import sqlalchemy
    from mlflow.store.db.utils import _upgrade_db
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if revision is None:
        _log.info("creating MLflow's tables in PostgreSQL, which takes some seconds")
        artifacts = storage.mlflow / "artifacts"
        SqlAlchemyStore(uri, artifacts.as_uri()).engine.dispose()
        return
    _log.warning("upgrading MLflow's tables in PostgreSQL from revision %s", revision)
    engine = sqlalchemy.create_engine(uri)
    _upgrade_db(engine)
    engine.dispose()


USERNAME, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
TOKEN = "MLFLOW_TRACKING_TOKEN"
_QUESTION = "/api/2.0/mlflow/experiments/search?max_results=1"
_TIMEOUT_S = 10.0


def take_credentials(settings: MlflowSettings) -> None:
    """Put a configured name and password where MLflow looks for them.

    Raises:
        StoreError: a server is configured, and there is one without the other.
    """
    if settings.username is not None:
        os.environ[USERNAME] = settings.username
    if settings.password is not None:
        os.environ[PASSWORD] = settings.password.get_secret_value()
    has = [name for name in (USERNAME, PASSWORD) if os.environ.get(name)]
    if len(has) == 1 and _servers(settings) and not os.environ.get(TOKEN):
        (missing,) = {USERNAME, PASSWORD} - set(has)
        raise StoreError(
            f"MLflow needs a name and a password: {has[0]} is set, {missing} is not; "
            f"ROMA_MLFLOW_USERNAME and ROMA_MLFLOW_PASSWORD set both"
        )


def _servers(settings: MlflowSettings) -> list[str]:
    uris = (settings.tracking_uri, settings.registry_uri)
    return [uri.rstrip("/") for uri in uris if uri is not None and is_server(uri)]


_welcome: set[tuple[str, str]] = set()  # (server, header) that were asked and let us in


def check_access(settings: MlflowSettings) -> None:
    """Ask the configured servers whether they take us, until one has; nothing else is asked.

    A server that is away is no error here: jobs go on without it and tell it later.

    Raises:
        StoreError: one refuses; the text says as whom we came, and never with which password.
    """
    take_credentials(settings)
    for uri in _servers(settings):
        if (uri, _header()) not in _welcome and _takes_us(uri, os.environ.get(USERNAME, "")):
            _welcome.add((uri, _header()))


def _takes_us(uri: str, who: str) -> bool:
    """False if the server did not answer."""
    shown, header = without_credentials(uri), _header()
    if shown != uri:  # the address has them; MLflow takes them from there
        return True
    try:
        request = urllib.request.Request(
            uri + _QUESTION, headers={"Authorization": header} if header else {}
        )
        urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            return False
        as_whom = f"the user {who!r}" if who else "a token" if header else "somebody without a name"
        said = " ".join(error.read(300).decode(errors="replace").split())
        raise StoreError(
            f"the MLflow server {shown} refuses {as_whom} ({error.code}: {said}); set "
            f"ROMA_MLFLOW_USERNAME and ROMA_MLFLOW_PASSWORD, or {USERNAME} and {PASSWORD}"
        ) from None
    except (http.client.InvalidURL, ValueError):  # the text of either may hold what it is about
        raise StoreError(
            f"the MLflow server {shown} cannot be asked: expected http(s)://host:port, and a name, "
            f"password and token of one line each without a line break"
        ) from None
    except (OSError, http.client.HTTPException):
        return False
    return True


def _header() -> str:
    """What MLflow's clients would send."""
    if os.environ.get(USERNAME) and os.environ.get(PASSWORD):
        pair = f"{os.environ[USERNAME]}:{os.environ[PASSWORD]}"
        return "Basic " + base64.standard_b64encode(pair.encode()).decode()
    token = os.environ.get(TOKEN)
    return f"Bearer {token}" if token else ""


DATABASE = "mlflow.db"
_SQLITE = "sqlite:///"


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
    from roma_pipelines.storage import database_url, schema_url

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
    from roma_pipelines.storage import database_url

    url = database_url()
    if url is None:
        return ensure_store(root)
    _no_telemetry()

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
            _store_build(database)
        elif state == "older":
            backup = database.with_name(f"{DATABASE}.{revision}.backup")
            _log.info("upgrading the MLflow database %s; the old one stays as %s", database, backup)
            with _exclusively(database):
                _store_build(database, backup)
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
        from roma_pipelines.storage import advisory_lock

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


def _store_build(database: Path, backup: Path | None = None) -> None:
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
