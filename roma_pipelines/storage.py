"""The storage root, ``.roma/`` by default, and the databases of Dagster, MLflow and Optuna.

.roma/
    layout.json     version of this layout
    cache/          downloads of sources, fetched models
    datasets/       <name>/<version>/
    jobs/           <job key>/
    predictions/    <experiment>/<input>.parquet, predictions of champions
    clusters/       <profile>/poll.json, last answer of a scheduler
    mlflow/         embedded tracking store and registry
    dagster/        embedded Dagster instance (DAGSTER_HOME)
    tuning/         embedded store of hyperparameter searches
    logs/           of the servers that `roma-pipeline up` starts
    alerts.jsonl    alerts
    servers.json    addresses of the last `roma-pipeline up`
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from dotenv import dotenv_values
from pydantic import SecretStr
from pydantic_settings import SettingsConfigDict

from roma_core.files import create_json, read_json, write_bytes
from roma_core.settings import RomaSettings, SettingsError, find_env_file

LAYOUT_VERSION = 2
DEFS = Path(__file__).parent / "defs"  # the shipped experiments
MIN_FREE_MB = 200  # to start work: room for databases, logs and a small model


def project_folder() -> Path:
    """The user's folder, with experiments in ``defs/`` and clusters in ``profiles/slurm/NAME.yaml``.

    ``ROMA_PROJECT`` of the environment or ``.env``, by default the working directory; SettingsError if
    there is no such folder.
    """
    env_file = find_env_file()
    of_file = {} if env_file is None else dotenv_values(env_file)
    given = os.environ.get("ROMA_PROJECT") or of_file.get("ROMA_PROJECT")
    folder = Path(given or ".").expanduser().absolute()
    if not folder.is_dir():
        raise SettingsError(
            f"ROMA_PROJECT={given}: there is no such folder; create it, correct the path or unset it"
        )
    return folder


def defs_files() -> dict[str, Path]:
    """Every ``defs.yaml``, shipped or of the project, by the path of its folder in ``defs/``."""
    found: dict[str, Path] = {}
    for root in (DEFS, project_folder() / "defs"):
        # a link to a file that is gone, too, which `**/defs.yaml` leaves out
        paths = sorted(path for path in root.rglob("*.yaml") if path.name == "defs.yaml")
        found |= {path.parent.relative_to(root).as_posix(): path for path in paths}
    return found


class StorageSettings(RomaSettings):
    """Where state is stored."""

    model_config = SettingsConfigDict(env_prefix="ROMA_STORAGE_")

    root: Path = Path(".roma")
    """Folder of data sets, jobs and the embedded stores; relative to the working directory. Jobs on
    a cluster need it on a file system that both sides mount."""
    database_url: SecretStr | None = None
    """postgresql://USER:PASSWORD@HOST:PORT/DATABASE for the state of Dagster, MLflow and Optuna,
    each in its own schema; null uses SQLite files under the root."""


class StorageError(RuntimeError):
    """The storage root or the database cannot be used; the message says what to do."""


class Storage:
    """The folders under one root; created by :meth:`open`."""

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
        """The configured storage, created if it does not exist.

        Raises StorageError: of another version, not writable, or without free space.
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
                f"a writable folder"
            ) from error
        try:
            read_json(layout, schema_version=LAYOUT_VERSION)
        except ValueError as error:
            raise StorageError(
                f"{storage.root} was written by another version of this software ({error}); move it "
                f"away (its models stay loadable from its mlflow folder), or set ROMA_STORAGE_ROOT to "
                f"another folder"
            ) from error
        free_mb = shutil.disk_usage(storage.root).free / 1e6
        if free_mb < MIN_FREE_MB:
            raise StorageError(
                f"{storage.root} has {free_mb:.0f} MB of free space, at least {MIN_FREE_MB} MB "
                f"are needed; free some, or set ROMA_STORAGE_ROOT to a folder on another disk"
            )
        return storage

    def is_full(self, error: BaseException) -> bool:
        """Whether an error was caused by a full disk, which SQLite does not always report."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                return True
            cause = cause.__cause__ or cause.__context__
        return shutil.disk_usage(self.root).free < 1e6


SCHEMAS = ("dagster", "mlflow")
TUNING_SCHEMA = "roma_tuning"  # made by the first search
PASSWORD_VARIABLES = ("PGPASSWORD", "PGPASSFILE")  # of libpq; passed on to child processes
_SQLALCHEMY = "postgresql+psycopg2"  # without a driver name SQLAlchemy would look for psycopg 3


def database_url() -> str | None:
    """The configured database without its password, None for SQLite; exports ``PGPASSWORD``.

    Raises StorageError if it is not a PostgreSQL URL, or its driver is not installed.
    """
    secret = StorageSettings().database_url
    if secret is None:
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    expected = "ROMA_STORAGE_DATABASE_URL: expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
    try:
        url = make_url(secret.get_secret_value())
    except (ArgumentError, ValueError):
        raise StorageError(f"{expected}, got something that is not a URL") from None
    if url.drivername not in ("postgresql", "postgres", _SQLALCHEMY) or not url.database:
        raise StorageError(f"{expected}, got {url.drivername}://…/{url.database or ''}")
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
    # set() takes None for "unchanged"
    plain = url._replace(drivername="postgresql", password=None)
    return plain.render_as_string(hide_password=False)


def schema_url(url: str, schema: str) -> str:
    """The URL with which SQLAlchemy sees only that schema of the database, through psycopg2."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    options = f"{parsed.query.get('options', '')} -csearch_path={schema}".strip()
    changed = parsed.set(drivername=_SQLALCHEMY).update_query_dict({"options": options})
    return changed.render_as_string(hide_password=False)


def ensure_schemas(url: str, *names: str) -> None:
    """Create missing schemas, safely from any number of processes; StorageError as for connection."""
    wanted = names or SCHEMAS
    with connection(url) as session, session.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_namespace WHERE nspname = ANY(%s)", ([*wanted],))
        if cursor.fetchone() == (len(wanted),):
            return
    with advisory_lock(url, "schemas") as session, session.cursor() as cursor:
        for schema in wanted:
            cursor.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")


@contextlib.contextmanager
def connection(url: str) -> Iterator[Any]:
    """A psycopg2 connection with autocommit; takes a ``schema_url``, too.

    Raises StorageError, without the password, if it fails or a statement is rejected.
    """
    import psycopg2

    try:
        plain = url.replace(f"{_SQLALCHEMY}:", "postgresql:", 1)
        session = psycopg2.connect(plain, connect_timeout=10)
    except psycopg2.OperationalError as error:
        raise StorageError(
            f"cannot connect to the database {url} ({' '.join(str(error).split())}); check that it "
            f"runs, and user and password of ROMA_STORAGE_DATABASE_URL"
        ) from error
    try:
        session.autocommit = True
        yield session
    except psycopg2.Error as error:
        message = " ".join(str(error).split())
        raise StorageError(f"the database {url} rejected a statement: {message}") from error
    finally:
        session.close()


@contextlib.contextmanager
def advisory_lock(url: str, name: str) -> Iterator[Any]:
    """Hold a lock across all computers of the database; yields the connection that holds it."""
    number = zlib.crc32(f"roma-pipeline {name}".encode())
    with connection(url) as session:
        with session.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", (number,))
        yield session


DATABASE_VARIABLE = "DAGSTER_POSTGRES_URL"  # not ROMA_…: unknown ROMA_ variables are errors
_IN_POSTGRES = f"""
storage:
  postgres:
    postgres_url:
      env: {DATABASE_VARIABLE}
""".encode()


def prepare_instance(storage: Storage) -> Path:
    """Create the embedded Dagster instance, set DAGSTER_HOME for child processes, too; return it.

    A given DAGSTER_HOME is used as it is. A ``dagster.yaml`` that differs from ours belongs to the
    operator, but must name the configured database, or StorageError is raised: state must not be
    split between two.
    """
    url = database_url()
    if url is not None:
        ensure_schemas(url)
        os.environ[DATABASE_VARIABLE] = schema_url(url, "dagster")
    if configured := os.environ.get("DAGSTER_HOME"):
        return Path(configured)
    home = storage.dagster
    home.mkdir(parents=True, exist_ok=True)
    _write_config(home / "dagster.yaml", in_postgres=url is not None)
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ["ROMA_STORAGE_ROOT"] = str(storage.root)
    return home


def _write_config(path: Path, in_postgres: bool) -> None:
    plain = files("roma_pipelines").joinpath(path.name).read_bytes()
    wanted = plain + _IN_POSTGRES if in_postgres else plain
    present = path.read_bytes() if path.exists() else None
    if present is None or (present == plain and not (path.parent / "history").exists()):
        if present != wanted:
            write_bytes(path, wanted)
        return
    names_postgres = DATABASE_VARIABLE.encode() in present
    if names_postgres and not in_postgres:
        raise StorageError(
            f"{path} keeps Dagster's state in PostgreSQL; set ROMA_STORAGE_DATABASE_URL again, or "
            f"remove that file to start with an empty state in SQLite"
        )
    if in_postgres and not names_postgres:
        raise StorageError(
            f"ROMA_STORAGE_DATABASE_URL is set, but {path} keeps Dagster's state elsewhere, and its "
            f"history is not migrated. To start with an empty one in PostgreSQL, add:\n"
            + _IN_POSTGRES.decode()
        )
