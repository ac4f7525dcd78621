"""MLflow's tables in the PostgreSQL database: made, or brought to the installed version, once."""

from __future__ import annotations

import logging

from roma_pipelines.database import advisory_lock, ensure_schemas, schema_url
from roma_pipelines.registry.store import StoreError, known_revisions
from roma_pipelines.storage import Storage

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
