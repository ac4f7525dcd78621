"""PostgreSQL as the one place of Dagster's and MLflow's state: ``ROMA_STORAGE_DATABASE_URL``.

Both have tables called ``runs`` and ``alembic_version``, so each gets a schema of its own in the one
database: ``dagster`` and ``mlflow``. A password in the URL moves into ``PGPASSWORD`` of this process,
where every client of PostgreSQL finds it: no URL that is passed on, printed, written to a file or
given to a program as an argument has one.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from typing import Any

from roma_pipelines.storage import StorageError, StorageSettings

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
