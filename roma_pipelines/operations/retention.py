"""What may be removed from the storage root, and removing it.

Kept is whatever something still needs. Needed from the start: what a registered version names, what
the newest materialisation of an asset names, the input that an experiment predicts, jobs that run, are
watched or are young, and the newest versions of every data set: a split goes on from the last. From
there, what a needed job's configuration names is needed, too: the report of a version needs its
classifier, that one its encoder, all of them their data.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from roma_core.job import JobFolder
from roma_pipelines import experiment_files
from roma_pipelines.launching.jobs import WATCHER_SILENT_S, Job, all_jobs, read_job
from roma_pipelines.launching.jobs import remove as remove_job
from roma_pipelines.registry.runs import JOB_KEY_TAG
from roma_pipelines.registry.store import is_server
from roma_pipelines.storage import Storage

if TYPE_CHECKING:
    import dagster as dg
    from mlflow import MlflowClient

_JOB = re.compile(r"jobs/([0-9a-f]{12,64})(?![0-9a-f])")
_DATASET = re.compile(r"datasets/([A-Za-z0-9_-]+)/([0-9a-f]{12})(?![0-9a-f])")


@dataclass(frozen=True)
class Removal:
    """One thing that may go.

    Attributes:
        n_bytes: what it takes on the disk.
        remove: removes it; False if it is needed now after all.
    """

    what: str
    n_bytes: int
    remove: Callable[[], bool]


@dataclass(frozen=True)
class _Needed:
    jobs: frozenset[str]
    datasets: frozenset[tuple[str, str]]  # (name, digest[:12])


@contextlib.contextmanager
def operations_lock(storage: Storage) -> Iterator[None]:
    """One operation at a time: what is being backed up is not removed meanwhile.

    Raises:
        RuntimeError: another one runs.
    """
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
    """All that nothing needs and that is older than ``days``.

    Args:
        keep_versions: newest versions of every data set that stay in any case, at least 1.

    Raises:
        RuntimeError: Dagster's instance is not the one that the jobs here were made by, so what it
            names says nothing.
    """
    if keep_versions < 1:
        raise ValueError(f"keep_versions: {keep_versions}: the newest version is needed to split")
    now, age_s = time.time(), days * 86400
    jobs = all_jobs(storage.jobs)
    _check_is_theirs(instance, jobs)
    old = {job.folder.path.name: job for job in jobs if _is_over(job, now - age_s)}
    needed = _needed(storage, instance, client, frozenset(old))
    found = []
    for name, job in old.items():
        if name not in needed.jobs:
            what = f"job {job.key}: {job.asset}, {job.status}"
            found.append(Removal(what, _size(job.folder.path), _removal_of(job, now - age_s)))
        elif job.status == "completed" and (size := _size(job.folder.checkpoints)):
            what = f"checkpoints of job {job.key}: {job.asset}, completed"
            found.append(Removal(what, size, _tree(job.folder.checkpoints)))
    found += _datasets(storage, needed, now - age_s, keep_versions)
    found += _cached(storage, client, needed, now - age_s)
    return found + _deleted_runs(client, now - age_s)


def _check_is_theirs(instance: dg.DagsterInstance, jobs: Sequence[Job]) -> None:
    runs = {str(job.watcher["dagster_run_id"]) for job in jobs if "dagster_run_id" in job.watcher}
    if runs and not any(instance.has_run(run) for run in runs):
        raise RuntimeError(
            f"jobs here were made by {len(runs)} Dagster runs, and this Dagster instance knows none "
            f"of them, so it cannot say what is needed; set DAGSTER_HOME (or unset it) and "
            f"ROMA_STORAGE_DATABASE_URL as they are where Dagster runs. Nothing was removed"
        )


def _is_over(job: Job, before: float) -> bool:
    end = job.records[-1].end if job.records else None
    if end is None or end.how == "continue" or end.ended_at > before:
        return False
    return not (job.watched and time.time() - float(job.watcher["beat"]) < WATCHER_SILENT_S)


def _removal_of(job: Job, before: float) -> Callable[[], bool]:
    def remove() -> bool:
        now = read_job(job.folder.path)  # a retry may have begun it again since
        if now is None or not _is_over(now, before):
            return False
        remove_job(now)
        return True

    return remove


def _tree(folder: Path) -> Callable[[], bool]:
    def remove() -> bool:
        shutil.rmtree(folder)
        return True

    return remove


def _file(path: Path) -> Callable[[], bool]:
    def remove() -> bool:
        path.unlink(missing_ok=True)
        return True

    return remove


def _needed(
    storage: Storage, instance: dg.DagsterInstance, client: MlflowClient, old: frozenset[str]
) -> _Needed:
    texts = [*_named_by_versions(client), *_named_by_assets(instance), *_named_by_experiments()]
    folders = {path.name for path in storage.jobs.iterdir() if path.is_dir()}
    jobs, datasets, todo = set(folders - old), set(), list(folders - old)
    while texts or todo:
        if todo:
            config = JobFolder(storage.jobs / todo.pop()).config
            texts.append(config.read_text(errors="replace") if config.exists() else "")
        text = texts.pop()
        datasets |= set(_DATASET.findall(text))
        new = (set(_JOB.findall(text)) & folders) - jobs
        jobs |= new
        todo += new
    return _Needed(frozenset(jobs), frozenset(datasets))


def _named_by_versions(client: MlflowClient) -> Iterator[str]:
    """Every registered version, whatever its aliases: a rollback may want any of them."""
    for version in _paged(client.search_model_versions):
        if key := version.tags.get(JOB_KEY_TAG):
            yield f"jobs/{key}"
        if digest := version.tags.get("roma.dataset_digest"):
            yield f"datasets/{version.name}/{digest[:12]}"
        if version.run_id:
            with _gone_is_fine():
                run = client.get_run(version.run_id)
                yield f"jobs/{run.data.tags.get(JOB_KEY_TAG, '')}"


def _named_by_assets(instance: dg.DagsterInstance) -> Iterator[str]:
    for key in instance.get_asset_keys():
        event = instance.get_latest_materialization_event(key)
        if event is not None and event.asset_materialization is not None:
            for value in event.asset_materialization.metadata.values():
                if isinstance(value.value, str):
                    yield value.value


def _named_by_experiments() -> Iterator[str]:
    """Inputs of predictions; of a definition that cannot be used now, whatever it says."""
    for path in experiment_files.DEFS.glob("**/defs.yaml"):
        yield path.read_text(errors="replace")


def _datasets(
    storage: Storage, needed: _Needed, before: float, keep_versions: int
) -> Iterator[Removal]:
    for home in sorted(path for path in storage.datasets.iterdir() if path.is_dir()):
        versions = [path for path in home.iterdir() if (path / "manifest.json").is_file()]
        versions.sort(key=lambda path: (path / "manifest.json").stat().st_mtime, reverse=True)
        digests = {digest for name, digest in needed.datasets}  # a version may bear another name
        for path in versions[keep_versions:]:
            young = (path / "manifest.json").stat().st_mtime > before
            if path.name not in digests and not young:
                yield Removal(f"data set {home.name} {path.name}", _size(path), _tree(path))


def _cached(
    storage: Storage, client: MlflowClient, needed: _Needed, before: float
) -> Iterator[Removal]:
    """Copies of versions that have no alias, and profiles of data that is not needed.

    Both are made again when somebody asks for them.
    """
    aliased = {
        (model.name.replace("/", "__"), str(version))
        for model in _paged(client.search_registered_models)
        for version in model.aliases.values()
    }
    for path in sorted((storage.cache / "models").glob("*/*")):
        if (path.parent.name, path.name) not in aliased and path.stat().st_mtime <= before:
            what = f"cached model {path.parent.name} {path.name}"
            yield Removal(what, _size(path), _tree(path))
    digests = {digest for _, digest in needed.datasets}
    for path in sorted((storage.cache / "profiles").glob("*.json")):
        if path.stem[:12] not in digests and path.stat().st_mtime <= before:
            what = f"cached profile of data {path.stem[:12]}"
            yield Removal(what, path.stat().st_size, _file(path))


def _deleted_runs(client: MlflowClient, before: float) -> list[Removal]:
    """MLflow runs that somebody deleted on MLflow's page, in a store that is our own."""
    if is_server(client.tracking_uri):
        return []
    from mlflow.entities import ViewType

    registered = {version.run_id for version in _paged(client.search_model_versions)}
    experiments = [e.experiment_id for e in _paged(client.search_experiments)]
    found = []
    for run in _paged(client.search_runs, experiments, run_view_type=ViewType.DELETED_ONLY):
        ended = (run.info.end_time or run.info.start_time) / 1000
        if run.info.run_id in registered or ended > before:
            continue
        artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
        what = f"deleted MLflow run {run.info.run_id}: {run.info.run_name}"
        found.append(Removal(what, _size(artifacts), _purge(client.tracking_uri, run.info.run_id)))
    return found


def _purge(uri: str, run_id: str) -> Callable[[], bool]:
    def remove() -> bool:
        command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", uri]
        done = subprocess.run([*command, "--run-ids", run_id], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"mlflow gc of run {run_id} failed:\n{done.stderr[-2000:]}")
        return True

    return remove


def _paged(search: Callable, *arguments: object, **options: object) -> Iterator:
    token = None
    while True:
        page = search(*arguments, **options, page_token=token)
        yield from page
        if not (token := page.token):
            return


@contextlib.contextmanager
def _gone_is_fine() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _size(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if it is not there."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
