"""Where runs and models are stored: an MLflow server, PostgreSQL, or the embedded store.

MLflow creates and migrates its tables without a lock, and processes that start together leave them
half-migrated. Here one process at a time does: of the embedded store, ``<root>/mlflow.db`` (SQLite),
in a copy that is renamed at the end; in PostgreSQL by ``mlflow db upgrade``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock
from pydantic import SecretStr
from pydantic_settings import SettingsConfigDict

from roma_core.files import sync_folder
from roma_core.serving.registry_client import set_mlflow_defaults
from roma_core.settings import RomaSettings, without_credentials
from roma_pipelines import storage

if TYPE_CHECKING:
    import requests
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
_SQLITE = "sqlite:///"
_USERNAME, _PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
_TOKEN = "MLFLOW_TRACKING_TOKEN"
_PROBE = "/api/2.0/mlflow/experiments/search?max_results=1"
LOCK_SUFFIX = ".lock"
_HOLDER_TAG = "roma.holder"
_LEASE_S, _CALL_S = 120.0, 30.0  # of the lock of a model, and of a request while it is held
_WAIT_S, _KEEP_BROKEN_S = 2 * _LEASE_S, 3600.0
_log = logging.getLogger(__name__)


class StoreError(RuntimeError):
    """The store cannot be used as it is; the message says what to do."""


class MlflowSettings(RomaSettings):
    """Where MLflow is; by default the embedded store."""

    model_config = SettingsConfigDict(env_prefix="ROMA_MLFLOW_")

    tracking_uri: str | None = None
    """URI of the tracking server; null uses the store under the storage root."""
    registry_uri: str | None = None
    """URI of the model registry; null uses the tracking server."""
    username: str | None = None
    """User name for a server with authentication; null uses MLFLOW_TRACKING_USERNAME. Jobs receive
    user name and password by their environment."""
    password: SecretStr | None = None
    """Password for that server; null uses MLFLOW_TRACKING_PASSWORD."""
    experiment_prefix: str = "roma"
    """MLflow experiments are named <prefix>/<experiment>."""


def tracking_uri(settings: MlflowSettings, root: Path) -> str:
    """URI of the configured server or store, which need not exist yet; does not import MLflow.

    Raises StorageError if the configured database URL is invalid.
    """
    if settings.tracking_uri:
        return settings.tracking_uri
    if (url := storage.database_url()) is not None:
        return storage.schema_url(url, "mlflow")
    return f"{_SQLITE}{root.absolute() / DATABASE}"


def connect(settings: MlflowSettings, root: Path) -> MlflowClient:
    """A client of the configured server, or of the own store, which is in the folder ``root``.

    Both URIs also become this process's defaults, which parts of MLflow use. Raises StoreError if a
    server refuses the credentials, or the own store cannot be used.
    """
    check_access(settings)
    set_mlflow_defaults()
    import mlflow

    uri = settings.tracking_uri or own_store(root)
    registry = settings.registry_uri or uri
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(registry)
    return mlflow.MlflowClient(uri, registry)


def own_store(root: Path) -> str:
    """URI of the installation's own store, created or upgraded: PostgreSQL if configured.

    Raises StoreError or StorageError, which say what to do.
    """
    url = storage.database_url()
    return ensure_store(root) if url is None else _ensure_postgres(url, root.absolute())


def is_server(uri: str) -> bool:
    """Whether a URI is that of an MLflow server, which jobs on other computers can reach."""
    return uri.startswith(("http:", "https:"))


def embedded_root(uri: str) -> Path | None:
    """Folder of the embedded store behind a URI; None for a server or PostgreSQL."""
    return Path(uri.removeprefix(_SQLITE)).parent if uri.startswith(_SQLITE) else None


def artifacts_root(uri: str) -> Path | None:
    """Artifact folder of the installation's own store; None for a server."""
    if is_server(uri):
        return None
    root = embedded_root(uri) or storage.Storage(storage.StorageSettings().root).mlflow
    return root / "artifacts"


def write_lock(client: MlflowClient) -> contextlib.AbstractContextManager[object]:
    """Serialise read-then-write steps between all processes that use the own store.

    With a server there is no lock; Dagster's pools run such steps one at a time.
    """
    return _own_lock(client.tracking_uri, "mlflow write")


@contextlib.contextmanager
def _own_lock(uri: str, name: str) -> Iterator[Callable[[], None]]:
    """Yields a check that the lock is held, which a lost connection of PostgreSQL releases."""
    if (root := embedded_root(uri)) is not None:
        with FileLock(root / ".mlflow-write.lock"):
            yield lambda: None
    elif is_server(uri):
        yield lambda: None
    else:
        with storage.advisory_lock(uri, name) as session, session.cursor() as cursor:
            yield lambda: cursor.execute("SELECT 1")


class RegistryBusy(RuntimeError):
    """Another process holds the lock of this model for too long, or ours has expired."""


@dataclass(frozen=True)
class ModelLock:
    """A lock that is held; aliases are moved through it, because it may be lost meanwhile."""

    client: MlflowClient
    check: Callable[[], None]  # raises RegistryBusy or StorageError

    def set_alias(self, name: str, alias: str, version: str) -> None:
        self.check()
        self.client.set_registered_model_alias(name, alias, version)

    def delete_alias(self, name: str, alias: str) -> None:
        self.check()
        self.client.delete_registered_model_alias(name, alias)


@contextlib.contextmanager
def model_lock(client: MlflowClient, name: str) -> Iterator[ModelLock]:
    """Hold the lock of a registered model, also between computers: one promotion at a time.

    The own store has a lock of its file or database, which ends with its holder. A server has none,
    and its only atomic operation is the creation of a registered model: of two processes that create
    a name, one fails. The lock is therefore an empty model ``NAME.lock`` with a random token.

    It is a lease. A token that stays for ``_LEASE_S`` belongs to a dead process, and its lock is
    broken by renaming it to a name made of that token, which stays for an hour: a request to rename
    it that arrives later fails, and does not rename a newer lock. The holder releases it by the same
    name. It moves no alias, and releases nothing, later than ``_CALL_S`` before the end, and gives
    requests up in that time, half of it to connect and half to wait. If one was not answered, it may
    still be carried out, so the lock is not released: it expires.

    Raises:
        RegistryBusy: the lock was not free in time.
    """
    import mlflow
    from mlflow.exceptions import MlflowException, RestException

    uri = client.tracking_uri
    if uri == mlflow.get_tracking_uri():
        uri = mlflow.get_registry_uri()  # may be a server beside the own store
    if not is_server(uri):
        with _own_lock(uri, f"mlflow model {name}") as check:
            yield ModelLock(client, check)
        return
    lock, token = name + LOCK_SUFFIX, f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with one_request(_CALL_S / 2):
        expires_at = _acquire(client, lock, token)

        def check() -> None:
            if _holder(client, lock) != token or time.monotonic() + _CALL_S > expires_at:
                raise RegistryBusy(
                    f"{lock} was lost, or expires before an alias could be moved: the server is too "
                    f"slow, or the lock was deleted. No further alias was moved; run this again"
                )

        answered = False
        try:
            yield ModelLock(client, check)
            answered = True
        except Exception as error:
            answered = isinstance(error, RestException) or not isinstance(error, MlflowException)
            raise
        finally:
            try:
                if not answered:
                    raise RegistryBusy("the last request may still be carried out")
                check()
                client.rename_registered_model(lock, f"{lock}.of.{token}")
                client.delete_registered_model(f"{lock}.of.{token}")
                for broken in client.search_registered_models(f"name LIKE '{lock}.of.%'"):
                    if time.time() - broken.last_updated_timestamp / 1000 > _KEEP_BROKEN_S:
                        client.delete_registered_model(broken.name)
            except Exception as error:  # others break it; the error of the promotion matters more
                _log.warning("%s was not released (%s); it expires", lock, error)


def _acquire(client: MlflowClient, lock: str, token: str) -> float:
    """Wait for the lock; returns when it expires, in seconds of the monotonic clock."""
    from mlflow.exceptions import MlflowException

    seen, since, start = None, time.monotonic(), time.monotonic()
    while True:
        sent = time.monotonic()
        try:
            client.create_registered_model(
                lock, tags={_HOLDER_TAG: token}, description="Held while aliases are moved."
            )
            return sent + _LEASE_S
        except MlflowException as error:
            holder, now = _holder(client, lock), time.monotonic()
            if holder == token:  # only the answer was lost
                return sent + _LEASE_S
            # the server looks a name up that exists, and may find that it was released meanwhile
            if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
                raise
        if holder != seen:
            seen, since = holder, now
        elif holder is not None and now - since > _LEASE_S:
            _log.warning("breaking %s: its holder %s appears to be dead", lock, holder)
            with contextlib.suppress(MlflowException):  # another process was first
                client.rename_registered_model(lock, f"{lock}.of.{holder}")
        if now - start > _WAIT_S:
            raise RegistryBusy(
                f"{lock} is held by {holder} for {now - since:.0f} s; if that process no longer "
                f"exists, delete the registered model {lock!r} and try again"
            )
        time.sleep(0.1)


def _holder(client: MlflowClient, lock: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(lock).tags.get(_HOLDER_TAG)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


_one_thread = threading.RLock()


@contextlib.contextmanager
def one_request(timeout_s: float) -> Iterator[None]:
    """MLflow's HTTP client fails after one request of so many seconds, instead of minutes of them.

    The limit is of the process, so one thread at a time has it.
    """
    ours = {"TIMEOUT": str(max(1, int(timeout_s))), "MAX_RETRIES": "0"}
    ours = {f"MLFLOW_HTTP_REQUEST_{name}": value for name, value in ours.items()}
    with _one_thread:
        before = {name: os.environ[name] for name in ours if name in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                del os.environ[name]
            os.environ.update(before)


def check_access(settings: MlflowSettings) -> None:
    """Check that the configured servers accept the credentials, once per process.

    An unreachable server is no error: jobs spool what they log until it is back. Raises StoreError,
    with the user's name and never the password, if one is refused or has no counterpart.
    """
    export_credentials(settings)
    uris = (settings.tracking_uri, settings.registry_uri)
    servers = [uri.rstrip("/") for uri in uris if uri is not None and is_server(uri)]
    given = [name for name in (_USERNAME, _PASSWORD) if os.environ.get(name)]
    if len(given) == 1 and servers and not os.environ.get(_TOKEN):
        (missing,) = {_USERNAME, _PASSWORD} - set(given)
        raise StoreError(
            f"MLflow needs a user name and a password: {given[0]} is set, {missing} is not; "
            f"ROMA_MLFLOW_USERNAME and ROMA_MLFLOW_PASSWORD set both"
        )
    for uri in servers:
        if (uri, *_credentials()) not in _accepted and _accepts_credentials(uri):
            _accepted.add((uri, *_credentials()))


def export_credentials(settings: MlflowSettings) -> None:
    """Set the variables that MLflow's clients read."""
    if settings.username is not None:
        os.environ[_USERNAME] = settings.username
    if settings.password is not None:
        os.environ[_PASSWORD] = settings.password.get_secret_value()


def answers(settings: MlflowSettings) -> bool:
    """Whether the configured servers answer now; a store without a server always does."""
    uris = {settings.tracking_uri, settings.registry_uri}
    try:
        return all(_accepts_credentials(uri.rstrip("/")) for uri in uris if uri and is_server(uri))
    except StoreError:  # an answer
        return True


_accepted: set[tuple[str | None, ...]] = set()  # server, user, password, token


def _accepts_credentials(uri: str) -> bool:
    """False if the server cannot be reached."""
    answer = ask(uri, _PROBE)
    return answer is not None and bool(answer.ok)


def ask(uri: str, path: str, timeout_s: float = 10.0) -> requests.Response | None:
    """The server's answer to a GET with the credentials of MLflow's clients, None if it gives none.

    Raises StoreError if it refuses them, or they cannot be sent.
    """
    import requests
    from requests.auth import HTTPBasicAuth

    shown, (user, password, token) = without_credentials(uri), _credentials()
    basic = HTTPBasicAuth(user.encode(), password.encode()) if user and password else None
    headers = {"Authorization": f"Bearer {token}"} if token and not basic else {}
    try:
        in_uri, _ = requests.utils.get_auth_from_url(uri)  # preferred, as by MLflow
        auth = None if in_uri else basic
        answer = requests.get(uri + path, auth=auth, headers=headers, timeout=timeout_s)
    except ValueError:  # its message may contain the credentials
        raise StoreError(
            f"no request can be sent to the MLflow server {shown}: expected http(s)://host:port, and "
            f"user name, password and token without a line break"
        ) from None
    except requests.RequestException:
        return None
    if answer.status_code in (401, 403):
        user = in_uri or user
        name = f"the user {user!r}" if user else "a token" if token else "a request without a user"
        text = " ".join(answer.text[:300].split())
        raise StoreError(
            f"the MLflow server {shown} refuses {name} ({answer.status_code}: {text}); set "
            f"ROMA_MLFLOW_USERNAME and ROMA_MLFLOW_PASSWORD, or {_USERNAME} and {_PASSWORD}"
        )
    return answer


def _credentials() -> tuple[str | None, ...]:
    """User, password and token that MLflow's clients send."""
    return tuple(os.environ.get(name) for name in (_USERNAME, _PASSWORD, _TOKEN))


@functools.cache
def _ensure_postgres(url: str, root: Path) -> str:
    """Create or upgrade MLflow's tables; one process does, others wait. Returns MLflow's URI."""
    set_mlflow_defaults()
    from alembic.util import CommandError

    uri = storage.schema_url(url, "mlflow")
    storage.ensure_schemas(url)
    with storage.advisory_lock(url, "mlflow schema"):
        try:
            _upgrade_tables(uri, root)
        except CommandError as error:
            raise StoreError(
                f"{url} has MLflow tables that the installed MLflow does not know ({error}): a newer "
                f"version wrote them. Install that version, or configure another database"
            ) from error
    return uri


def _upgrade_tables(uri: str, root: Path) -> None:
    """``mlflow db upgrade``, which also creates missing tables, and the default experiment."""
    import mlflow.db
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    mlflow.db.upgrade.main([uri], standalone_mode=False)
    SqlAlchemyStore(uri, (root / "artifacts").as_uri()).engine.dispose()  # artifacts in our folder


def ensure_store(root: Path) -> str:
    """Create or upgrade the embedded store if necessary; return its URI.

    An older database is copied, the copy upgraded and renamed over it; the old one is kept as
    ``mlflow.db.<revision>.backup``. Safe to call from any number of processes at once. Raises
    StoreError if the database is newer than the installed MLflow, half-migrated with runs in it,
    not an MLflow database, or in use while it must be upgraded.
    """
    root = root.absolute()
    if set("?#%") & set(str(root)):
        raise StoreError(
            f"{root}: a path with '?', '#' or '%' cannot be named in a database URI; set ROMA_STORAGE_ROOT"
        )
    set_mlflow_defaults()
    root.mkdir(parents=True, exist_ok=True)
    database = root / DATABASE
    with FileLock(root / ".mlflow-create.lock"):
        state, revision = _inspect(database)
        if state == "half-migrated":
            broken = database.with_name(f"{DATABASE}.broken")
            _log.warning(
                "%s was left half-migrated and holds no runs; renamed to %s", database, broken
            )
            database.replace(broken)
            state = "missing"
        if state == "missing":
            _log.info("creating the MLflow database %s, which takes some seconds", database)
            _build(database)
        elif state == "older":
            backup = database.with_name(f"{DATABASE}.{revision}.backup")
            _log.info("upgrading the MLflow database %s; backup: %s", database, backup)
            with contextlib.closing(
                sqlite3.connect(database, timeout=5, isolation_level=None)
            ) as connection:
                try:
                    connection.execute("BEGIN EXCLUSIVE")  # no other process can write
                except sqlite3.OperationalError as error:
                    raise StoreError(
                        f"{database} must be upgraded, but another process uses it ({error}); stop "
                        f"that one and run again"
                    ) from error
                _build(database, backup)
    return f"{_SQLITE}{database}"


def _inspect(
    database: Path,
) -> tuple[Literal["missing", "ready", "older", "half-migrated"], str | None]:
    """State of the database file, and its schema revision."""
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
            query = "SELECT count(*) FROM runs"
            n_runs = connection.execute(query).fetchone()[0] if "runs" in tables else 0
            if n_runs:
                raise StoreError(
                    f"{database} was left half-migrated by a crash and holds {n_runs} runs; restore "
                    f"a backup, or move it away to start with an empty store"
                )
            return "half-migrated", None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    revision = row[0] if row else None
    newest, known = _known_revisions()
    if revision == newest:
        return "ready", revision
    if revision in known:
        return "older", revision
    raise StoreError(
        f"{database} has schema revision {revision}, which MLflow {VERSION} does not know: a newer "
        f"MLflow wrote it. Install that version, or move the file away to start with an empty store"
    )


@functools.cache
def _known_revisions() -> tuple[str | None, frozenset[str]]:
    """The newest schema revision of the installed MLflow, and all of them."""
    import mlflow.store
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(mlflow.store.__path__[0]) / "db_migrations"))
    return scripts.get_current_head(), frozenset(s.revision for s in scripts.walk_revisions())


def _build(database: Path, backup: Path | None = None) -> None:
    """Build a database aside and rename it; with ``backup``, upgrade a copy and keep the old one."""
    aside = database.with_name(f".{DATABASE}.building")
    for left_over in aside.parent.glob(f"{aside.name}*"):
        left_over.unlink()
    if backup:
        shutil.copyfile(database, aside)
    _upgrade_tables(f"{_SQLITE}{aside}", database.parent)
    if backup:
        backup.unlink(missing_ok=True)
        os.link(database, backup)
    aside.replace(database)
    sync_folder(database.parent)
