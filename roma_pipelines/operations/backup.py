"""A backup: one tar file with the databases, the registry's artifacts and the record of every job.

    MANIFEST.json       first: versions, the root it was made of, and whether PostgreSQL was in use
    database.dump       pg_dump of both schemas, with PostgreSQL
    root/…              files of the storage root; SQLite files as consistent copies
    SHA256.json         last: sha256 of every member before it

Databases are copied before files are listed: what they name was written before, so it is there. Left
out are caches, logs of servers, checkpoints of jobs, and data sets unless they are asked for (they can
be built again). State that is kept elsewhere, such as that of an MLflow server, is not in it either;
``kept_elsewhere`` names it.

PostgreSQL's own programs for dumps, wherever the system keeps them.
Putting a backup back: into an empty root, and an empty database if it has one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sqlite3
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from roma_core.files import sync_folder
from roma_core.settings import without_credentials
from roma_pipelines.registry.store import DATABASE, MlflowSettings, embedded_root
from roma_pipelines.storage import (
    DATABASE_VARIABLE,
    SCHEMAS,
    Storage,
    connection,
    database_url,
    schema_url,
)


def postgres_tool(name: str) -> str:
    """Path of pg_dump or pg_restore, the newest version there is.

    Raises:
        RuntimeError: it is not installed.
    """
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=_version)
    if debian:
        return str(debian[-1])
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(
            f"{name} is not installed here; it is in the package postgresql-client, and must be at "
            f"least as new as the server"
        )
    return found


def _version(path: Path) -> int:
    number = path.parents[1].name
    return int(number) if number.isdigit() else 0


MANIFEST, HASHES, DUMP = "MANIFEST.json", "SHA256.json", "database.dump"
SCHEMA_VERSION = 1
_SQLITE_MAGIC = b"SQLite format 3\0"
_SIDE_FILES = ("-wal", "-shm", "-journal")  # of SQLite; the copy of the database has all of it
_LEFT_OUT = frozenset(
    {"cache", "clusters", "dagster/logs"}
)  # of the root; names below are anybody's


class BackupError(RuntimeError):
    """A backup cannot be made, or is damaged, or cannot be put there."""


def write_backup(storage: Storage, target: Path, *, with_datasets: bool = False) -> int:
    """Write the backup, verify it, and only then give it its name; returns its bytes.

    Raises:
        BackupError: the file is there already, or pg_dump fails.
        OSError: no room, or the folder cannot be written.
    """
    if target.exists():
        raise BackupError(f"{target} exists; give another name")
    aside = target.with_name(f".{target.name}.writing")
    try:
        with aside.open("wb") as file, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _write(storage, file, Path(scratch), with_datasets)
        verify(aside)
        aside.rename(target)
        sync_folder(target.parent)
    finally:
        aside.unlink(missing_ok=True)
    return target.stat().st_size


def kept_elsewhere(storage: Storage) -> list[str]:
    """State of this installation that no backup of its root and database has; a line for each."""
    found = []
    settings = MlflowSettings()
    for what, uri in (
        ("runs and models", settings.tracking_uri),
        ("registry", settings.registry_uri),
    ):
        if uri and embedded_root(uri) != storage.mlflow:
            found.append(f"MLflow's {what} at {without_credentials(uri)}")
    home = Path(os.environ.get("DAGSTER_HOME") or storage.dagster)
    config = home / "dagster.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    if DATABASE_VARIABLE in text and database_url() is not None:  # it is in the dump
        return found
    document = yaml.safe_load(text) or {}
    own = sorted({"storage", "run_storage", "event_log_storage"} & set(document))
    if own:
        found.append(
            f"Dagster's history, which {config} ({', '.join(own)}) keeps in a place of its own"
        )
    elif not home.absolute().is_relative_to(storage.root):
        found.append(f"Dagster's history in DAGSTER_HOME, {home}")
    return found


def _write(storage: Storage, file: IO[bytes], scratch: Path, with_datasets: bool) -> None:
    url = database_url()
    hashes: dict[str, str] = {}
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "made_at": time.time(),
            "root": str(storage.root),
            "postgres": url is not None,
            "with_datasets": with_datasets,
        }
        _add_bytes(tar, MANIFEST, json.dumps(manifest, indent=2).encode(), hashes)
        if url is not None:
            dump = scratch / DUMP
            _pg_dump(url, dump)
            _add_file(tar, dump, DUMP, hashes)
        for databases_only in (True, False):
            for path in _files(storage.root, with_datasets):
                name = f"root/{path.relative_to(storage.root)}"
                with contextlib.suppress(FileNotFoundError):  # it went since it was listed
                    is_database = _is_sqlite(path)
                    if name in hashes or (databases_only and not is_database):
                        continue
                    if is_database:
                        copy = scratch / "copy.db"
                        _copy_sqlite(path, copy)
                        _add_file(tar, copy, name, hashes)
                        copy.unlink()
                    else:
                        _add_file(tar, path, name, hashes)
        _add_bytes(tar, HASHES, json.dumps(hashes, indent=0).encode(), {})


def _files(root: Path, with_datasets: bool) -> Iterator[Path]:
    for where, folders, names in os.walk(root):
        folder = Path(where)
        inside = folder.relative_to(root)
        folders[:] = sorted(
            name for name in folders if not _is_left_out(inside / name, with_datasets)
        )
        for name in sorted(names):
            path = folder / name
            hidden = name.startswith(".") or name.endswith(_SIDE_FILES)
            if not hidden and path.is_file() and not path.is_symlink():
                yield path


def _is_left_out(inside: Path, with_datasets: bool) -> bool:
    """Whether a folder is, by its path in the root."""
    if inside.parts[0] == "jobs":
        return inside.parts[2:] == ("checkpoints",)
    return inside.as_posix() in _LEFT_OUT or (inside == Path("datasets") and not with_datasets)


def _is_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_SQLITE_MAGIC)) == _SQLITE_MAGIC


def _copy_sqlite(path: Path, copy: Path) -> None:
    """A consistent copy while others write, by SQLite's own backup."""
    with (
        contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


def _add_bytes(tar: tarfile.TarFile, name: str, content: bytes, hashes: dict[str, str]) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = len(content), int(time.time())
    hashes[name] = hashlib.sha256(content).hexdigest()
    tar.addfile(entry, io.BytesIO(content))


def _add_file(tar: tarfile.TarFile, path: Path, name: str, hashes: dict[str, str]) -> None:
    with path.open("rb") as file:
        entry = tar.gettarinfo(
            arcname=name, fileobj=file
        )  # its size now; what is appended stays out
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        reader = _Hashing(file)
        tar.addfile(entry, reader)  # type: ignore[arg-type]  # it needs nothing but read()
    hashes[name] = reader.hash.hexdigest()


class _Hashing:
    """Passes a file on and hashes what passes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def read(self, n: int) -> bytes:
        content = self.file.read(n)
        self.hash.update(content)
        return content


def _pg_dump(url: str, target: Path) -> None:
    command = [postgres_tool("pg_dump"), "--format=custom", "--no-owner", "--no-privileges"]
    command += [f"--schema={schema}" for schema in SCHEMAS]
    done = subprocess.run([*command, f"--file={target}", url], capture_output=True, text=True)
    if done.returncode:
        raise BackupError(f"pg_dump failed: {done.stderr.strip()}")


def verify(path: Path) -> dict[str, Any]:
    """Compare every member with its sha256; returns the manifest.

    Raises:
        BackupError: it is damaged, cut short, or no backup.
    """
    found: dict[str, str] = {}
    documents: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is None:
                    raise BackupError(f"{path}: {member.name} is no file")
                if member.name in (MANIFEST, HASHES):
                    documents[member.name] = data = content.read()
                    found[member.name] = hashlib.sha256(data).hexdigest()
                else:
                    found[member.name] = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto
        manifest, hashes = json.loads(documents[MANIFEST]), json.loads(documents[HASHES])
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        raise BackupError(f"{path} is no whole backup ({error!r}); use another one") from error
    found.pop(HASHES)
    if wrong := [name for name in {**found, **hashes} if found.get(name) != hashes.get(name)]:
        raise BackupError(f"{path} is damaged: {', '.join(sorted(wrong)[:5])}; use another one")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise BackupError(
            f"{path} has schema_version {manifest.get('schema_version')!r}, this version of the "
            f"software reads {SCHEMA_VERSION}; restore it with the version that wrote it"
        )
    return manifest


def is_empty(url: str) -> bool:
    """Whether neither schema is in the database yet, or both have no table."""
    with connection(url) as session, session.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM information_schema.tables WHERE table_schema = ANY(%s)",
            (list(SCHEMAS),),
        )
        return cursor.fetchone() == (0,)


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
