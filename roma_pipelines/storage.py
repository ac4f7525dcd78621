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
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Self

from filelock import FileLock
from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from roma_core.files import create_json, read_json, write_json
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
