"""Where everything lies on disk: one root, ``.roma/`` by default.

.roma/
    layout.json     version of this layout
    cache/          what sources fetched
    datasets/       <name>/<version>/
    jobs/           <job key>/
    predictions/    <experiment>/<input>.parquet, what champions said
    results/        <row>/<share>/<seed>.json, one cell of the results each
    clusters/       <site>/poll.json, what a scheduler said last
    mlflow/         the embedded tracking store and registry
    dagster/        the embedded Dagster instance (DAGSTER_HOME)
    alerts.jsonl    what people were told

The Dagster instance of a tick, opened once in a process.
PostgreSQL as the one place of Dagster's and MLflow's state: ``ROMA_STORAGE_DATABASE_URL``.
The embedded Dagster instance: DAGSTER_HOME under the storage root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import dagster as dg
from dagster._core.instance.ref import InstanceRef
from dagster._serdes import serialize_value
from filelock import FileLock
from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from roma_core.files import create_json, read_json, write_bytes, write_json
from roma_core.settings import RomaSettings

LAYOUT_VERSION = 1
MIN_FREE_MB = 200
"""Less free space than this is refused before work begins: databases, logs and a small model need it."""


UPGRADES: dict[int, Callable[[Storage], None]] = {}
"""Layout version -> what takes a root of it to the next version; may be repeated after a crash."""


class StorageSettings(RomaSettings):
    """Where state is kept."""

    model_config = SettingsConfigDict(env_prefix="ROMA_STORAGE_")

    root: Path = Field(
        Path(".roma"),
        description="Folder of data sets, jobs and the embedded stores; relative to the working "
        "directory. Jobs on a cluster need it on a file system that both sides see.",
    )
    database_url: SecretStr | None = Field(
        None,
        description="postgresql://USER:PASSWORD@HOST:PORT/DATABASE for the state of Dagster and of "
        "MLflow, each in a schema of its own; null keeps both in SQLite files under the root.",
    )


class StorageError(RuntimeError):
    """The storage root cannot be used as it is; the message says what to do."""


def _version_of(layout: Path) -> int:
    document = read_json(layout)
    version = document.get("schema_version") if isinstance(document, dict) else None
    return version if isinstance(version, int) else -1


class Storage:
    """The folders under one root; made by :meth:`open`."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.cache = self.root / "cache"
        self.datasets = self.root / "datasets"
        self.jobs = self.root / "jobs"
        self.clusters = self.root / "clusters"
        self.mlflow = self.root / "mlflow"
        self.dagster = self.root / "dagster"

    @classmethod
    def open(cls, root: Path | None = None) -> Self:
        """The configured storage, created if it is not there.

        Raises:
            StorageError: it was written by another version, cannot be written, or has no room.
        """
        storage = cls(root or StorageSettings().root)
        layout = storage.root / "layout.json"
        try:
            for folder in (storage.cache, storage.datasets, storage.jobs, storage.mlflow):
                folder.mkdir(parents=True, exist_ok=True)
            create_json(layout, {"schema_version": LAYOUT_VERSION})
        except OSError as error:
            raise StorageError(
                f"cannot write to {storage.root} ({error}); free some space or set ROMA_STORAGE_ROOT to "
                f"a folder that can be written"
            ) from error
        try:
            storage._upgrade(layout)
            read_json(layout, schema_version=LAYOUT_VERSION)
        except ValueError as error:
            raise StorageError(
                f"{storage.root} was written by another version of this software ({error}); move it "
                f"away, or set ROMA_STORAGE_ROOT to another folder"
            ) from error
        if storage.free_mb < MIN_FREE_MB:
            raise StorageError(
                f"{storage.root} has {storage.free_mb:.0f} MB of free space, at least {MIN_FREE_MB} MB "
                f"are needed; free some, or set ROMA_STORAGE_ROOT to a folder on another disk"
            )
        return storage

    def _upgrade(self, layout: Path) -> None:
        """Take an older layout to the present one, step by step; one process does, others wait.

        The version is written after each step, so a crash repeats the step it interrupted.
        """
        if _version_of(layout) not in UPGRADES:
            return
        with FileLock(self.root / ".layout.lock"):
            while (step := UPGRADES.get(_version_of(layout))) is not None:
                step(self)
                write_json(layout, {"schema_version": _version_of(layout) + 1})

    @property
    def free_mb(self) -> float:
        """Free space on the disk of the root, in MB."""
        return shutil.disk_usage(self.root).free / 1e6

    def is_full(self, error: BaseException) -> bool:
        """Whether an error comes of a full disk; SQLite does not always say so."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                return True
            cause = cause.__cause__ or cause.__context__
        return self.free_mb < 1


_lock = threading.Lock()
_open: dict[str, dg.DagsterInstance] = {}  # at most one: a code server has one instance


def instance_of(
    context: dg.SensorEvaluationContext | dg.ScheduleEvaluationContext,
) -> dg.DagsterInstance:
    """The instance that the context names; the context has it, too, from now on."""
    if context._instance is None and context.instance_ref is not None:
        context._instance = _opened(context.instance_ref)
    return context.instance


def _opened(ref: InstanceRef) -> dg.DagsterInstance:
    key = serialize_value(ref)
    with _lock:
        if key not in _open:
            for other in _open.values():
                other.dispose()
            _open.clear()
            _open[key] = dg.DagsterInstance.from_ref(ref)
        return _open[key]


SCHEMAS = ("dagster", "mlflow")
PASSWORD_VARIABLES = ("PGPASSWORD", "PGPASSFILE")
"""Where libpq takes a password from; whoever starts a process that connects hands them on."""
_CONNECT_TIMEOUT_S = 10
_SQLALCHEMY = "postgresql+psycopg2"  # without a driver's name SQLAlchemy would look for psycopg 3


def database_url() -> str | None:
    """The configured database without its password, None if SQLite serves.

    Raises:
        StorageError: it is no URL of a PostgreSQL database, or its driver is not installed.
    """
    secret = StorageSettings().database_url
    if secret is None:
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(secret.get_secret_value())
    except (ArgumentError, ValueError):
        raise StorageError(_EXPECTED.format("something that is no URL")) from None
    if url.drivername not in ("postgresql", "postgres", _SQLALCHEMY) or not url.database:
        raise StorageError(_EXPECTED.format(f"{url.drivername}://…/{url.database or ''}"))
    try:
        import dagster_postgres  # noqa: F401
        import psycopg2  # noqa: F401
    except ImportError as error:
        raise StorageError(
            f"ROMA_STORAGE_DATABASE_URL needs a driver that is not installed ({error}); install "
            f"roma-pipeline[postgres]"
        ) from error
    if url.password is not None:
        os.environ["PGPASSWORD"] = str(url.password)
    without = url._replace(
        drivername="postgresql", password=None
    )  # set() takes None for "as it is"
    return without.render_as_string(hide_password=False)


_EXPECTED = (
    "ROMA_STORAGE_DATABASE_URL: expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE, got {}"
)


def schema_url(url: str, schema: str) -> str:
    """The URL by which SQLAlchemy sees only that schema of the database, through psycopg2."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    given = parsed.query.get("options", "")
    options = f"{given} -csearch_path={schema}".strip()
    changed = parsed.set(drivername=_SQLALCHEMY).update_query_dict({"options": options})
    return changed.render_as_string(hide_password=False)


def ensure_schemas(url: str) -> None:
    """Create the two schemas if they are not there; any number of processes may ask at once.

    Raises:
        StorageError: the database does not answer, or this user may not create schemas in it.
    """
    with connection(url) as session, session.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_namespace WHERE nspname = ANY(%s)", (list(SCHEMAS),)
        )
        if cursor.fetchone() == (len(SCHEMAS),):
            return
    with advisory_lock(url, "schemas") as session, session.cursor() as cursor:
        for schema in SCHEMAS:
            cursor.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")


@contextlib.contextmanager
def connection(url: str) -> Iterator[Any]:
    """A psycopg2 connection that commits every statement; takes a ``schema_url``, too.

    Raises:
        StorageError: the database does not answer, or refuses a statement; without the password.
    """
    import psycopg2

    try:
        plain = url.replace(f"{_SQLALCHEMY}:", "postgresql:", 1)
        session = psycopg2.connect(plain, connect_timeout=_CONNECT_TIMEOUT_S)
    except psycopg2.OperationalError as error:
        raise StorageError(
            f"the database {url} does not let this process in ({' '.join(str(error).split())}); is "
            f"it running, and are name and password of ROMA_STORAGE_DATABASE_URL right?"
        ) from error
    try:
        session.autocommit = True
        yield session
    except psycopg2.Error as error:
        raise StorageError(f"the database {url} refused: {' '.join(str(error).split())}") from error
    finally:
        session.close()


@contextlib.contextmanager
def advisory_lock(url: str, name: str) -> Iterator[Any]:
    """Hold a lock that all computers of the database see; it goes with the connection.

    Yields:
        The connection that holds it.
    """
    number = zlib.crc32(f"roma-pipeline {name}".encode())
    with connection(url) as session:
        with session.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", (number,))
        yield session


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
