"""``roma-pipeline backup`` and ``restore``: the state in one tar file, and back.

    MANIFEST.json       first: versions, the storage root, and whether PostgreSQL was in use
    database.dump       pg_dump of both schemas, with PostgreSQL
    root/…              files of the storage root; SQLite files as consistent copies
    SHA256.json         last: sha256 of every member before it

Databases are copied before files are listed, so that files which they refer to are included.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
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
    TUNING_SCHEMA,
    Storage,
    connection,
    database_url,
    schema_url,
)

MANIFEST, HASHES, DUMP = "MANIFEST.json", "SHA256.json", "database.dump"
SCHEMA_VERSION = 1
_SCHEMAS = (*SCHEMAS, TUNING_SCHEMA)
_SQLITE_MAGIC = b"SQLite format 3\0"
_SIDE_FILES = ("-wal", "-shm", "-journal")  # of SQLite; the copy of the database includes them
_SCRATCH = ".roma-backup-"
_LEFT_OUT = re.compile(  # paths in the root
    rf"cache|clusters|(dagster/)?logs|jobs/[^/]+/checkpoints|(.*/)?{re.escape(_SCRATCH)}[^/]+"
)


class BackupError(RuntimeError):
    """A backup cannot be made or restored, or is damaged."""


def write_backup(storage: Storage, target: Path, *, with_datasets: bool = False) -> int:
    """Write and verify a backup, then rename it to ``target``; returns its size in bytes.

    Raises BackupError if the file exists or pg_dump fails; OSError if it cannot be written.
    """
    if target.exists():
        raise BackupError(f"{target} exists; give another name")
    aside = target.with_name(f".{target.name}.writing")
    try:
        scratch = tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=target.parent)
        with aside.open("wb") as file, scratch as folder:
            _write(storage, file, Path(folder), with_datasets)
        verify(aside)
        aside.rename(target)
        sync_folder(target.parent)
    finally:
        aside.unlink(missing_ok=True)
    return target.stat().st_size


def kept_elsewhere(storage: Storage) -> list[str]:
    """State of this installation that no backup includes; a text for each."""
    settings = MlflowSettings()
    uris = {"runs and models": settings.tracking_uri, "registry": settings.registry_uri}
    found = [
        f"MLflow's {what} at {without_credentials(uri)}"
        for what, uri in uris.items()
        if uri and embedded_root(uri) != storage.mlflow
    ]
    home = Path(os.environ.get("DAGSTER_HOME") or storage.dagster)
    config = home / "dagster.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    if DATABASE_VARIABLE in text and database_url() is not None:  # included in the dump
        return found
    own = {"storage", "run_storage", "event_log_storage"} & set(yaml.safe_load(text) or {})
    if own:
        names = ", ".join(sorted(own))
        found.append(f"Dagster's history in the storage that {config} configures ({names})")
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
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2))
        _add(tar, scratch / MANIFEST, MANIFEST, hashes)
        if url is not None:
            schemas = [f"--schema={schema}" for schema in _SCHEMAS]
            _run("pg_dump", "--format=custom", *schemas, f"--file={scratch / DUMP}", url)
            _add(tar, scratch / DUMP, DUMP, hashes)
        for databases_only in (True, False):
            for path in _files(storage.root, with_datasets):
                name = f"root/{path.relative_to(storage.root)}"
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    with path.open("rb") as content:
                        head = content.read(512)
                    is_database = head.startswith(_SQLITE_MAGIC)
                    if name in hashes or (databases_only and not is_database):
                        continue
                    if head[257:262] == b"ustar" and _is_backup(path):
                        continue
                    copy = scratch / "copy.db"
                    if is_database:
                        _copy_sqlite(path, copy)
                    _add(tar, copy if is_database else path, name, hashes)
                    copy.unlink(missing_ok=True)
        (scratch / HASHES).write_text(json.dumps(hashes, indent=0))
        _add(tar, scratch / HASHES, HASHES, {})


def _files(root: Path, with_datasets: bool) -> Iterator[Path]:
    for where, folders, names in os.walk(root):
        below = {name: (Path(where) / name).relative_to(root).as_posix() for name in folders}
        folders[:] = [
            name
            for name, path in sorted(below.items())
            if not _LEFT_OUT.fullmatch(path) and (with_datasets or path != "datasets")
        ]
        for name in sorted(names):
            file = Path(where) / name
            hidden = name.startswith(".") or name.endswith(_SIDE_FILES)
            if not hidden and file.is_file() and not file.is_symlink():
                yield file


def _is_backup(path: Path) -> bool:
    """Whether a file in the root is an earlier backup, which a new one would contain."""
    with contextlib.suppress(tarfile.TarError), tarfile.open(path, "r:") as tar:
        first, last = tar.next(), max(tar.getmembers(), key=lambda member: member.offset)
        return first is not None and (first.name, last.name) == (MANIFEST, HASHES)
    return False


def _copy_sqlite(path: Path, copy: Path) -> None:
    """A consistent copy while others write, by SQLite's own backup."""
    with (
        contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


def _add(tar: tarfile.TarFile, path: Path, name: str, hashes: dict[str, str]) -> None:
    with path.open("rb") as file:
        entry = tar.gettarinfo(arcname=name, fileobj=file)  # has the size of this moment
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        reader = _Hashing(file)
        tar.addfile(entry, reader)  # type: ignore[arg-type]  # it only needs read()
    hashes[name] = reader.hash.hexdigest()


class _Hashing:
    """A file that hashes what is read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def read(self, n: int) -> bytes:
        content = self.file.read(n)
        self.hash.update(content)
        return content


def verify(path: Path) -> dict[str, Any]:
    """Compare every member with its sha256; returns the manifest. BackupError if it is damaged."""
    found: dict[str, str] = {}
    documents: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is None:
                    raise BackupError(f"{path}: {member.name} is not a file")
                found[member.name] = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto
                if member.name in (MANIFEST, HASHES):
                    content.seek(0)
                    documents[member.name] = json.load(content)
        manifest, hashes = documents[MANIFEST], documents[HASHES]
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        raise BackupError(
            f"{path} is not a complete backup ({error!r}); use another one"
        ) from error
    found.pop(HASHES)
    if wrong := [name for name in {**found, **hashes} if found.get(name) != hashes.get(name)]:
        raise BackupError(f"{path} is damaged: {', '.join(sorted(wrong)[:5])}; use another one")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise BackupError(
            f"{path} has schema_version {manifest.get('schema_version')!r}, this release reads "
            f"{SCHEMA_VERSION}; restore it with the release that wrote it"
        )
    return manifest


_LOCATIONS = {  # columns of MLflow that hold absolute paths
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


def restore_backup(path: Path, root: Path) -> str | None:
    """Verify a backup, then restore it; returns the root it was made of if that is another one.

    Then the registry's artifacts are found in the new root, but Dagster's history refers to the old
    one until assets are materialised again. Raises BackupError if it is damaged, the root or the
    database is not empty, or only one of backup and installation uses PostgreSQL.
    """
    root = root.absolute()
    manifest = verify(path)
    if root.exists() and any(root.iterdir()):
        raise BackupError(f"{root} is not empty; restore into an empty folder (ROMA_STORAGE_ROOT)")
    url = database_url()
    if manifest["postgres"] != (url is not None):
        kept, verb = "SQLite files", "unset"
        if manifest["postgres"]:
            kept, verb = "PostgreSQL", "set"
        raise BackupError(
            f"{path} has its state in {kept}; {verb} ROMA_STORAGE_DATABASE_URL to restore it"
        )
    if url is not None:
        query = "SELECT count(*) FROM information_schema.tables WHERE table_schema = ANY(%s)"
        with connection(url) as session, session.cursor() as cursor:
            cursor.execute(query, ([*_SCHEMAS],))
            if cursor.fetchone() != (0,):
                raise BackupError(
                    f"the database {url} has tables of an installation; configure an empty one"
                )
    aside = root.with_name(f".{root.name}.restoring")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with tarfile.open(path, "r:") as tar:
            tar.extractall(aside, filter="data")
        moved = manifest["root"] if manifest["root"] != str(root) else None
        content = aside / "root"
        if url is not None:
            with connection(url) as session, session.cursor() as cursor:
                for schema in _SCHEMAS:  # they are empty; the dump creates its own
                    cursor.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
            options = ("--exit-on-error", "--single-transaction", f"--dbname={url}")
            _run("pg_restore", *options, str(aside / DUMP))
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


def _relocate(uri: str, old: Path, new: Path) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    values = {"old": f"{old.as_uri()}/", "new": f"{new.as_uri()}/", "begin": f"{old.as_uri()}/%"}
    with engine.begin() as session:
        for table, columns in _LOCATIONS.items():
            for column in columns:
                replaced = (
                    f"SET {column} = replace({column}, :old, :new) WHERE {column} LIKE :begin"
                )
                session.execute(sqlalchemy.text(f"UPDATE {table} {replaced}"), values)
    engine.dispose()


def _run(tool: str, *arguments: str) -> None:
    """Run the newest installed pg_dump or pg_restore, which change nothing if they fail."""

    def version(path: Path) -> int:
        number = path.parents[1].name
        return int(number) if number.isdigit() else 0

    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{tool}"), key=version)
    found = str(debian[-1]) if debian else shutil.which(tool)
    if found is None:
        raise RuntimeError(
            f"{tool} is not installed here; it is in the package postgresql-client, and must be at "
            f"least as new as the server"
        )
    command = [found, "--no-owner", "--no-privileges", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BackupError(f"{tool} failed, the database is unchanged: {done.stderr.strip()}")
