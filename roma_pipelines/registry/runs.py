"""MLflow runs of jobs: one per job, found by the tag ``roma.job_key``, ended explicitly.

MLflow's own hooks mark crashed and preempted runs as finished and cannot find a run again.

What MLflow should hold of a job is first written to the job folder (``mlflow_record.json``), then sent.
A server that is away therefore fails no job: the record is pending until a later call sends it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout
from pydantic import Field

from roma_core.files import digest_of, read_json, write_json
from roma_core.job import JobFolder
from roma_core.settings import Frozen, without_credentials
from roma_core.trainer import trackers
from roma_pipelines.launching.jobs import SettledJobs
from roma_pipelines.launching.outcome import read_records
from roma_pipelines.registry import store
from roma_pipelines.storage import PASSWORD_VARIABLES, Storage

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

JOB_KEY_TAG = "roma.job_key"
WANDB_TAG = "roma.weights_and_biases"
"""Tag of a version that was linked at W&B; its value is what ``link_wandb`` returned."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_ENDS: Mapping[str, Literal["FINISHED", "FAILED", "KILLED"]]
_ENDS = {"completed": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
SHORT_S = 10
"""Seconds that a job waits for an answer of MLflow, each time that it has something to send."""
_LATE_S = 600
"""Seconds in which a server may still create a run that it was asked for without an answer."""
_ASKED = ".mlflow_asked"  # in a job folder, while that may happen
_PARAMS_PER_BATCH = 100  # MLflow's limit
_log = logging.getLogger(__name__)


def checked_name(kind: str, name: str) -> str:
    """The name, if it is safe in paths and in MLflow's filter strings, else ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{kind} {name!r}: expected letters, digits, '_', '-' and '.', in parts divided by '/'"
        )
    return name


def code_version() -> str:
    """The git commit, with ``-dirty`` if files differ from it.

    An installed package names the one it was built from; without it and without git: the release.
    """
    package = Path(__file__).parents[1]
    if (baked := package / "COMMIT").exists():
        return baked.read_text(encoding="utf-8").strip()
    # beside an installed package, git would describe the repository that its environment is in
    if (package.parent / "pyproject.toml").exists() and shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        described = subprocess.run(command, cwd=package, capture_output=True, text=True)
        if described.returncode == 0 and described.stdout.strip():
            return described.stdout.strip()
    return f"release {importlib.metadata.version('roma-pipeline')}"


def find_or_create_run(
    client: MlflowClient,
    experiment: str,
    job_key: str,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    start_time: int | None = None,
    known_id: str = "",
) -> str:
    """Id of the job's run, set to RUNNING: the one with its key, or else a new one.

    Of several runs with the key, ``known_id`` or else the oldest remains, see :func:`_only_run`.
    Parameters cannot change in MLflow. An existing run keeps its own; missing ones are added, and
    those that differ are listed in a warning. The experiment is ensured, with its errors.
    """
    from mlflow.entities import Param

    checked_name("job key", job_key)
    with store.write_lock(client):
        experiment_id = ensure_experiment(client, experiment).experiment_id
        run = _only_run(client, experiment_id, job_key, known_id)
        if run is None:
            tags = {**tags, JOB_KEY_TAG: job_key}
            created = client.create_run(experiment_id, start_time, tags, run_name=name)
            run = _only_run(client, experiment_id, job_key, known_id) or created
        run_id = run.info.run_id
        wanted = {k: str(v) for k, v in params.items()}
        present = run.data.params
        if changed := {k: (present[k], v) for k, v in wanted.items() if present.get(k, v) != v}:
            _log.warning("run %s keeps its first parameters; these differ now: %s", run_id, changed)
        missing = [Param(k, v) for k, v in wanted.items() if k not in present]
        for start in range(0, len(missing), _PARAMS_PER_BATCH):
            client.log_batch(run_id, params=missing[start : start + _PARAMS_PER_BATCH])
        if run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
    return run_id


def _only_run(client: MlflowClient, experiment_id: str, job_key: str, known_id: str) -> Run | None:
    """The run of a job; deletes those that requests without an answer created besides."""
    found = client.search_runs(
        [experiment_id], f"tags.`{JOB_KEY_TAG}` = '{job_key}'", order_by=["start_time ASC"]
    )
    kept = next((run for run in found if run.info.run_id == known_id), next(iter(found), None))
    for run in found:
        if run is not kept:
            client.delete_run(run.info.run_id)
    return kept


class RunRecord(Frozen):
    """What MLflow should hold of the run of a job, beside ``metrics.jsonl``."""

    schema_version: Literal[1] = 1
    experiment: str
    name: str
    tags: dict[str, str]  # of a new run
    params: dict[str, str]
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] = "RUNNING"
    ended_at: float | None = None  # seconds since the epoch
    results: dict[str, float] = Field({})  # metrics of the whole job
    final_tags: dict[str, str] = Field({})
    artifacts: dict[str, str] = Field({})  # file or folder of the job folder -> folder of the run
    # key of the job in whose run this one is nested; excluded when empty: digests of old records stay
    parent: str = Field("", exclude_if=lambda key: not key)

    @property
    def digest(self) -> str:
        return digest_of(self.model_dump(mode="json"))


def read_record(folder: JobFolder) -> RunRecord | None:
    if not folder.mlflow_record.exists():
        return None
    return RunRecord.model_validate(read_json(folder.mlflow_record, schema_version=1))


def write_record(folder: JobFolder, record: RunRecord) -> None:
    write_json(folder.mlflow_record, record.model_dump(mode="json"))


def change_record(
    folder: JobFolder, change: Callable[[RunRecord], RunRecord], first: RunRecord | None = None
) -> None:
    """Replace the record, or else ``first``, by what ``change`` makes of it.

    One process at a time, also while another one sends the record.
    """
    with FileLock(folder.path / ".mlflow_record.lock"):
        present = read_record(folder)
        before = present or first
        if before is not None and (after := change(before)) != present:
            write_record(folder, after)


def known_run(folder: JobFolder) -> dict[str, str]:
    """``run_id`` and ``experiment_id`` of a job's run; empty until MLflow has it."""
    return read_json(folder.mlflow_run, schema_version=1) if folder.mlflow_run.exists() else {}


def is_pending(folder: JobFolder) -> bool:
    """Whether MLflow has not received the record of this job as it is now."""
    record = read_record(folder)
    return record is not None and known_run(folder).get("sent") != record.digest


def ended(folder: JobFolder, record: RunRecord) -> RunRecord:
    """The record with the end of its job; the same if that runs, may resume, or was recorded before."""
    attempts = read_records(folder) if record.status == "RUNNING" else []
    end = attempts[-1].end if attempts else None
    if end is None or end.status not in _ENDS:
        return record
    artifacts = {}
    if end.status == "completed" and (result := folder.read_result()):
        artifacts = {file.name: "" for file in (folder.config, folder.result)}
        artifacts |= {path: "plots" for path in result.outputs.values() if path.endswith(".png")}
    known = {"status": _ENDS[end.status], "ended_at": end.ended_at}
    return record.model_copy(update={**known, "artifacts": artifacts})


def send_record(client: MlflowClient, folder: JobFolder, wait_s: float = SHORT_S) -> None:
    """Send MLflow the record of a job unless it has it; one process at a time.

    Raises:
        filelock.Timeout: another process sends it for longer than ``wait_s``; below 0 is no limit.
        Exception: whatever MLflow raises; the record stays pending.
    """
    with FileLock(folder.path / ".mlflow.lock", timeout=wait_s):
        record, asked = read_record(folder), folder.path / _ASKED
        asked_before = asked.exists()
        if record is not None and is_pending(folder):
            if not known_run(folder):
                asked.touch()
            run = log_run(client, folder, record)
            write_json(folder.mlflow_run, run | {"sent": record.digest})
            if not asked_before:
                asked.unlink(missing_ok=True)
        elif asked_before and time.time() - asked.stat().st_mtime > _LATE_S:
            run = known_run(folder)
            _only_run(client, run["experiment_id"], folder.path.name, run["run_id"])
            asked.unlink()


def log_run(client: MlflowClient, folder: JobFolder, record: RunRecord) -> dict[str, Any]:
    """Make the job's run hold what the record says, however often it is repeated; its ids.

    A job that was rejected has no folder.
    """
    from mlflow.entities import Metric, RunTag

    start_ms = round(folder.spec.stat().st_mtime * 1000) if folder.spec.exists() else None
    about = record.tags
    if record.parent:
        parent = JobFolder(folder.path.with_name(record.parent))
        send_record(client, parent)
        if outer := known_run(parent).get("run_id"):
            about = about | {"mlflow.parentRunId": outer}
    key = folder.path.name
    known_id = known_run(folder).get("run_id", "")
    run_id = find_or_create_run(
        client, record.experiment, key, record.name, about, record.params, start_ms, known_id
    )
    experiment_id = client.get_run(run_id).info.experiment_id
    run = {"schema_version": 1, "run_id": run_id, "experiment_id": experiment_id}
    if folder.path.exists():
        write_json(folder.mlflow_run, run)  # the job itself sends its metrics from now on
    if record.status == "RUNNING":
        return run
    if folder.metrics.exists():
        trackers.forward_to_mlflow(folder.metrics, client.tracking_uri, run_id)
    end_ms = round((record.ended_at or time.time()) * 1000)
    metrics = [Metric(name, value, end_ms, 0) for name, value in record.results.items()]
    tags = [RunTag(name, value) for name, value in record.final_tags.items()]
    client.log_batch(run_id, metrics=metrics, tags=tags)
    for name, place in record.artifacts.items():
        path = folder.path / name
        log = client.log_artifacts if path.is_dir() else client.log_artifact
        log(run_id, str(path), place or None)
    client.set_terminated(run_id, record.status, end_ms)
    return run


_sent = SettledJobs()
_refused: dict[Path, tuple[float, float]] = {}  # jobs: when to try again, and the wait before (s)


def send_pending(storage: Storage, *, patient: bool = False) -> tuple[list[str], list[str]]:
    """Send MLflow every pending record; keys of the sent jobs, and one line per job that failed.

    The runs of jobs that ended without a supervisor are ended, too. The rest waits if the server is away.
    Unless ``patient``, passes over jobs that another process is sending, and tries those that MLflow
    refuses less and less often.
    """
    limit_requests(120 if patient else SHORT_S)
    sent, failed = [], []
    for folder in map(JobFolder, _sent.others(storage.jobs)):
        key = folder.path.name
        not_before, wait_s = _refused.get(folder.path, (0.0, 30.0))
        if not patient and time.monotonic() < not_before:
            continue
        try:
            if (record := read_record(folder)) and ended(folder, record) != record:
                change_record(folder, functools.partial(ended, folder))
            pending = is_pending(folder)
            if pending or (folder.path / _ASKED).exists():
                client = store.connect(store.MlflowSettings(), storage.mlflow)
                send_record(client, folder, -1 if patient else 0)
            else:
                _sent.add(folder.path)
            if pending:
                sent.append(key)
            _refused.pop(folder.path, None)
        except Timeout:  # another process is sending it
            continue
        except Exception as error:  # whatever MLflow raises; the next call tries again
            failed.append(f"job {key}: MLflow has not received its run: {reason_of(error)}")
            if not store.answers(store.MlflowSettings()):
                break
            failed[-1] += f"; `roma-pipeline jobs sync --drop {key}` gives it up"
            _refused[folder.path] = time.monotonic() + 2 * wait_s, min(2 * wait_s, 3600.0)
    return sent, failed


def drop_record(folder: JobFolder) -> None:
    """Give up what MLflow has not received of a job."""
    folder.mlflow_record.unlink(missing_ok=True)
    (folder.path / _ASKED).unlink(missing_ok=True)


@dataclass
class JobRun:
    """The MLflow run of a job, for the process that supervises it; MLflow's errors are warnings."""

    storage: Storage
    folder: JobFolder
    record: RunRecord  # at the start of the job
    settings: store.MlflowSettings
    warn: Callable[[str], None]

    def environment(self, target: str) -> dict[str, str]:
        """Variables with which the job itself forwards metrics to its MLflow run.

        The embedded store is a SQLite file, which two computers must not share, or a database whose
        password stays here: cluster jobs get neither, and their metrics are forwarded at the outcome.
        """
        uri = store.tracking_uri(self.settings, self.storage.mlflow)
        passwords: dict[str, str] = {}
        if not store.is_server(uri):
            if target != "local":
                return {}
            passwords = {
                name: os.environ[name] for name in PASSWORD_VARIABLES if name in os.environ
            }
        run = str(self.folder.mlflow_run.absolute())
        return {**passwords, "MLFLOW_TRACKING_URI": uri, trackers.MLFLOW_RUN_VARIABLE: run}

    def update(self, change: Callable[[RunRecord], RunRecord]) -> None:
        """Change what MLflow should hold, and send it."""
        try:
            if self.folder.path.exists():
                change_record(self.folder, change, self.record)
                if not is_pending(self.folder):
                    return
            limit_requests(SHORT_S)
            client = store.connect(self.settings, self.storage.mlflow)
            if self.folder.path.exists():
                send_record(client, self.folder)
            else:  # the target rejected the job
                log_run(client, self.folder, change(self.record))
        except Exception as error:  # whatever MLflow raises: a finished training is finished
            self.warn(
                f"MLflow: {reason_of(error)}; the job continues. What MLflow lacks is kept in "
                f"{self.folder.path} and sent later: by the reconcile sensor, by the evaluation and "
                f"registration, or by `roma-pipeline jobs sync`"
            )

    def end(self) -> None:
        """Forward the job's metrics and end the run, if the job has ended."""
        self.update(lambda record: ended(self.folder, record))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Of the errors behind this one, those of sockets, files and HTTP; the innermost last."""
    inner = error.__cause__ or error.__context__
    while inner is not None:
        if isinstance(inner, OSError) or type(inner).__module__.startswith("urllib3"):
            yield inner
        inner = inner.__cause__ or inner.__context__


def reason_of(error: BaseException) -> str:
    """One line: MLflow and requests wrap the error that says it several times."""
    told = [error, *_causes(error)][-1]
    return (str(told) or type(told).__name__).partition("\n")[0][:300]


def no_answer(error: BaseException) -> str:
    """A sentence, if MLflow failed because the configured server is away or overloaded; else ''."""
    settings = store.MlflowSettings()
    uris = (settings.tracking_uri, settings.registry_uri)
    servers = tuple(without_credentials(uri).lower() for uri in uris if uri)
    requests = (getattr(cause, "request", None) for cause in _causes(error))  # perhaps to a bucket
    urls = [without_credentials(request.url or "").lower() for request in requests if request]
    if not any(url.startswith(servers) for url in urls) and store.answers(settings):
        return ""
    uri = without_credentials(settings.tracking_uri or settings.registry_uri or "")
    return f"the MLflow server {uri} does not answer ({reason_of(error)})"


_GIVEN_TIMEOUT_S = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT")


def limit_requests(timeout_s: int) -> None:
    """From now on, MLflow's HTTP client fails after one request of so many seconds.

    By default it repeats one for minutes, and may do twice what is to be done once, such as creating a
    run. ``MLFLOW_HTTP_REQUEST_TIMEOUT``, if the process was started with it, is kept.
    """
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = _GIVEN_TIMEOUT_S or str(timeout_s)


def ensure_experiment(client: MlflowClient, name: str) -> Experiment:
    """The experiment, made if missing; ValueError for its name, RuntimeError if it was deleted."""
    checked_name("experiment", name)
    found = client.get_experiment_by_name(name)
    if found is None:
        root = store.artifacts_root(client.tracking_uri)
        # without a location, MLflow would store artifacts under the present working directory
        location = None if root is None else (root / name.replace("/", "__")).as_uri()
        return client.get_experiment(client.create_experiment(name, location))
    if found.lifecycle_stage == "deleted":
        raise RuntimeError(
            f"the MLflow experiment {name!r} was deleted; restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}`, or use another name"
        )
    return found


def link_wandb(
    client: MlflowClient,
    config: trackers.WandbConfig,
    trainer: Mapping[str, Any],
    name: str,
    version: str,
    facts: Mapping[str, Any],
    folder: Path,
) -> str:
    """Link a registered version at W&B, in the project of its training, unless done before.

    ``trainer`` are the settings of the training, ``facts`` the artifact's metadata (plain JSON), and
    ``folder`` holds W&B's own files. Returns ``off``, ``linked``, ``left for sync`` (offline), or
    ``failed: …``: an error of W&B ends nothing, and the next call tries again.
    """
    if (done := client.get_model_version(name, version).tags.get(WANDB_TAG)) is not None:
        return done
    mode = config.effective_mode
    if mode == "disabled":
        return "off"
    facts = {"mlflow_tracking_uri": without_credentials(client.tracking_uri), **facts}
    try:
        trackers.import_tracker("wandb")
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        with wandb.init(
            mode=mode,
            project=trainer["project_name"],
            entity=trainer["entity_name"],
            job_type="register",
            name=f"{name} version {version}",
            dir=str(folder),
            settings=trackers.wandb_settings(config),
        ) as run:
            artifact = wandb.Artifact(name, type="model", metadata=dict(facts))
            # W&B shows the reference and does not follow it
            artifact.add_reference(f"models:/{name}/{version}", name="model", checksum=False)
            aliases = [f"v{version}"] if mode == "offline" else None
            logged = run.log_artifact(artifact, aliases=aliases)
            if mode == "online":
                logged.wait()
                collection = f"wandb-registry-model/{name}"
                run.link_artifact(logged, collection, aliases=[f"mlflow-{version}"])
    except Exception as error:  # whatever W&B raises
        _log.warning("%s version %s was not linked at W&B: %s", name, version, error)
        return f"failed: {error}"
    done = "linked" if mode == "online" else "left for sync"
    client.set_model_version_tag(name, version, WANDB_TAG, done)
    return done
