"""``roma-pipeline gc``: what may be removed from the storage root, and its removal.

Needed is what a registered version, the newest materialisation of an asset, an input of predictions
or an active or young job refers to, directly or through the configuration of a needed job; and the
newest versions of every data set (the next version keeps the last one's splits).
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from roma_core.files import read_json
from roma_core.job import JobFolder
from roma_pipelines import experiment as experiments
from roma_pipelines.launching.jobs import Job, all_jobs, read_job
from roma_pipelines.launching.supervisor import LEASE_EXPIRES_S
from roma_pipelines.registry.runs import JOB_KEY_TAG, is_pending
from roma_pipelines.registry.store import is_server
from roma_pipelines.storage import Storage, defs_files
from roma_pipelines.tracked_job import newest_materialization

if TYPE_CHECKING:
    import dagster as dg
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Removal:
    """One thing that may be removed."""

    what: str
    n_bytes: int  # on the disk
    remove: Callable[[], bool]  # False if it is needed now after all


@contextlib.contextmanager
def operations_lock(storage: Storage) -> Iterator[None]:
    """Excludes other operations, such as a backup; RuntimeError if another one is running."""
    try:
        with FileLock(storage.root / ".operations.lock", timeout=0):
            yield
    except Timeout:
        raise RuntimeError(
            f"a backup or clean-up of {storage.root} is running; try again when it is done"
        ) from None


def removals(
    storage: Storage,
    instance: dg.DagsterInstance,
    client: MlflowClient,
    *,
    days: float,
    keep_versions: int,
) -> list[Removal]:
    """Everything that is not needed and older than ``days``.

    Raises RuntimeError if Dagster's instance knows none of the runs that made the jobs here: then
    what it refers to is no evidence.
    """
    if keep_versions < 1:
        raise ValueError(f"keep_versions: {keep_versions}: the newest version is needed to split")
    before = time.time() - days * 86400
    jobs = all_jobs(storage.jobs)
    runs = {str(job.lease["dagster_run_id"]) for job in jobs if "dagster_run_id" in job.lease}
    if runs and not any(instance.has_run(run) for run in runs):
        raise RuntimeError(
            f"jobs here were made by {len(runs)} Dagster runs, and this Dagster instance knows none "
            f"of them, so what is needed is unknown; set DAGSTER_HOME (or unset it) and "
            f"ROMA_STORAGE_DATABASE_URL as they are where Dagster runs. Nothing was removed"
        )
    old = {job.folder.path.name: job for job in jobs if _ended_before(job, before)}
    needed_jobs, needed_data = _needed(storage, instance, client, frozenset(old))

    def remove_job(folder: Path) -> bool:
        now = read_job(folder)  # a retry may have resumed it since it was listed
        if now is None or not _ended_before(now, before):
            return False
        shutil.rmtree(folder)
        return True

    found = []
    for name, job in old.items():
        if name not in needed_jobs:
            what = f"job {job.key}: {job.asset}, {job.status}"
            folder = job.folder.path
            found.append(Removal(what, _size(folder), partial(remove_job, folder)))
        elif job.status == "completed" and (size := _size(job.folder.checkpoints)):
            what = f"checkpoints of job {job.key}: {job.asset}, completed"
            found.append(_removal(what, job.folder.checkpoints, size))
    found += _datasets(storage, needed_data, before, keep_versions)
    found += _cached(storage, client, needed_data, before)
    return found + _deleted_runs(client, before)


def _removal(what: str, path: Path, size: int | None = None) -> Removal:
    def remove() -> bool:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return True

    return Removal(what, _size(path) if size is None else size, remove)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 if it does not exist."""
    if path.is_file():
        return path.stat().st_size
    return sum(below.lstat().st_size for below in path.rglob("*") if not below.is_dir())


def _ended_before(job: Job, before: float) -> bool:
    end = job.records[-1].end if job.records else None
    if end is None or end.status == "continue" or end.ended_at > before:
        return False
    if is_pending(job.folder):  # MLflow has not received its metrics and artifacts
        return False
    return not (job.supervised and time.time() - float(job.lease["beat"]) < LEASE_EXPIRES_S)


def _needed(
    storage: Storage, instance: dg.DagsterInstance, client: MlflowClient, old: frozenset[str]
) -> tuple[set[str], set[str]]:
    """Names of the folders of needed jobs and data sets, which are keys and digests.

    Taken from records: tags of versions, metadata of assets, configurations of jobs, experiments;
    RuntimeError if one of the last two cannot be read.
    """
    folders = {path.name for path in storage.jobs.iterdir() if path.is_dir()}
    records: list[Any] = list(_version_records(client))
    for key in instance.get_asset_keys():
        made = newest_materialization(instance, key)
        records += [value.value for value in made.metadata.values()] if made is not None else []
    # inputs of predictions; also of experiments that cannot be used now
    records += map(partial(_read, experiments.read_yaml), defs_files().values())
    jobs, todo, datasets = folders - old, list(folders - old), set[str]()
    while records or todo:
        if todo and (config := JobFolder(storage.jobs / todo.pop()).config).exists():
            records.append(_read(read_json, config))
        for text in _texts(records.pop()) if records else ():
            parts = Path(text).parts  # under whatever root: a restored one may be elsewhere
            named = {part for before, part in pairwise(parts) if before == "jobs"} | {text}
            datasets |= {parts[i + 2] for i, p in enumerate(parts[:-2]) if p == "datasets"}
            new = (named & folders) - jobs
            jobs |= new
            todo += new
    return jobs, datasets


def _read(read: Callable[[Path], Any], path: Path) -> Any:
    try:
        return read(path)
    except ValueError as error:
        raise RuntimeError(
            f"{path} cannot be read ({error}), so what it needs is unknown; repair or remove it. "
            f"Nothing was removed"
        ) from error


def _texts(record: Any) -> Iterator[str]:
    """Every string in a JSON or YAML document."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, Mapping):
        for value in record.values():
            yield from _texts(value)
    elif isinstance(record, Sequence):
        for value in record:
            yield from _texts(value)


def _version_records(client: MlflowClient) -> Iterator[Any]:
    """Of every registered version, with or without an alias: a rollback may need any of them."""
    from mlflow.exceptions import MlflowException

    for version in _paged(client.search_model_versions):
        yield dict(version.tags)  # keys of jobs
        if digest := version.tags.get("roma.dataset_digest"):
            yield f"datasets/{version.name}/{digest[:12]}"
        if version.run_id:
            try:
                yield client.get_run(version.run_id).data.tags.get(JOB_KEY_TAG, "")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise


def _datasets(
    storage: Storage, needed: set[str], before: float, keep_versions: int
) -> Iterator[Removal]:
    for home in sorted(path for path in storage.datasets.iterdir() if path.is_dir()):
        written_at = {
            path: (path / "manifest.json").stat().st_mtime
            for path in home.iterdir()
            if (path / "manifest.json").is_file()
        }
        newest_first = sorted(written_at, key=lambda path: written_at[path], reverse=True)
        for path in newest_first[keep_versions:]:
            # needed under any name: a version may refer to the data set by another one
            if path.name not in needed and written_at[path] <= before:
                yield _removal(f"data set {home.name} {path.name}", path)


def _cached(
    storage: Storage, client: MlflowClient, needed: set[str], before: float
) -> Iterator[Removal]:
    """Copies of versions without an alias, and profiles of data that is not needed."""
    aliased = {
        (model.name.replace("/", "__"), str(version))
        for model in _paged(client.search_registered_models)
        for version in model.aliases.values()
    }
    for path in sorted((storage.cache / "models").glob("*/*")):
        if (path.parent.name, path.name) not in aliased and path.stat().st_mtime <= before:
            yield _removal(f"cached model {path.parent.name} {path.name}", path)
    for path in sorted((storage.cache / "profiles").glob("*.json")):
        if path.stem[:12] not in needed and path.stat().st_mtime <= before:
            yield _removal(f"cached profile of data {path.stem[:12]}", path)


def _deleted_runs(client: MlflowClient, before: float) -> list[Removal]:
    """MLflow runs that were deleted on the MLflow page, in a store of our own."""
    if is_server(client.tracking_uri):
        return []
    from mlflow.entities import ViewType

    def purge(run_id: str) -> bool:
        command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", client.tracking_uri]
        done = subprocess.run([*command, "--run-ids", run_id], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"mlflow gc of run {run_id} failed:\n{done.stderr[-2000:]}")
        return True

    registered = {version.run_id for version in _paged(client.search_model_versions)}
    experiments = [e.experiment_id for e in _paged(client.search_experiments)]
    found = []
    for run in _paged(client.search_runs, experiments, run_view_type=ViewType.DELETED_ONLY):
        ended = (run.info.end_time or run.info.start_time) / 1000
        if run.info.run_id in registered or ended > before:
            continue
        size = _size(Path(run.info.artifact_uri.removeprefix("file://")))
        what = f"deleted MLflow run {run.info.run_id}: {run.info.run_name}"
        found.append(Removal(what, size, partial(purge, run.info.run_id)))
    return found


def _paged(search: Callable, *arguments: object, **options: object) -> Iterator:
    token = None
    while True:
        page = search(*arguments, **options, page_token=token)
        yield from page
        if not (token := page.token):
            return
