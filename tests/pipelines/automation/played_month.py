"""A month of an experiment in seconds: a real instance and data set, and jobs that are only played.

Deliveries are Parquet files whose times are the month's. A day ends when nothing asks for a run any
more. Runs are launched as Dagster's daemon would: once for each run key.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roma_core.data.manifest import read_manifest
from roma_core.data.store import StoredDataset
from roma_core.evaluation.drift import drift_effects, reference_profile, sample_from_parquet
from roma_core.files import digest_of, read_json, write_json
from roma_core.job import Attempt, Exit, JobFolder
from roma_pipelines.assets.dataset import dataset_asset
from roma_pipelines.automation.alerts import alert_on_failure, read_alerts
from roma_pipelines.automation.state import newest_trained
from roma_pipelines.components import RomaExperiment
from roma_pipelines.launching.pipes import job_folder, run_job
from roma_pipelines.launching.spec import JobFailed, JobSpec, JobState, Phase
from roma_pipelines.registry.promotion import CHAMPION, promote
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.registry.versions import version_at
from roma_pipelines.resources import JOB_CLIENTS
from roma_pipelines.storage import Storage
from tests.pipelines.launching.fake import FakeLauncher, completed, ended, running

DAY_S = 86400.0
START = 1_767_225_600.0  # 2026-01-01


class WorkerKilled(BaseException):
    """The process of a run dies; its job goes on."""


def write_series(path: Path, n: int, seed: int, at: float, shift: float = 0.0, bad: bool = False):
    """A delivery: ``n`` series of 8 to 15 observations; a bad one has a number that is none."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, 16, n)
    rows: dict[str, list[Any]] = {
        "id": [f"{path.stem}-{k}" for k in range(n)],
        "time": [np.cumsum(rng.exponential(1.0, k)).tolist() for k in lengths],
        "value": [rng.normal(shift, 1.0, k).tolist() for k in lengths],
        "kind": [("odd", "even")[k % 2] for k in range(n)],
    }
    if bad:
        rows["value"][n // 2][3] = float("nan")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)
    os.utime(path, (at, at))


class Month:
    """The experiment and what happens to it.

    Attributes:
        mood: what the next job of pretraining does: ``work``, ``fail`` or ``kill``.
        error: what a job that fails says of its end, such as ``DataError: no series``.
        accuracy: of the next classifier.
        trained, promoted: days on which a pretraining job was submitted, a champion made.
        runs: (day, assets, trigger) of every run that was launched.
    """

    def __init__(self, folder: Path, storage: Storage, instance: dg.DagsterInstance) -> None:
        self.folder, self.storage, self.instance = folder, storage, instance
        self.day, self.mood, self.accuracy = 0, "work", 0.9
        self.error = ""
        self.killed: JobFolder | None = None
        self.trained: list[int] = []
        self.promoted: list[int] = []
        self.runs: list[tuple[int, str, str]] = []
        self.launcher = FakeLauncher([self._begin, self._play])
        self.experiment = RomaExperiment(
            name="waves",
            dataset={
                "source": {
                    "kind": "parquet",
                    "files": [str(folder / "data" / "*.parquet")],
                    "axes": [{"column": "time"}],
                    "channels": [{"column": "value"}],
                    "metadata": {"label": "kind"},
                },
                "repair": {"missing": "refuse"},
            },
            schedule="0 3 * * *",
            automation={
                "new_data": {"settle_s": 60},
                "drift": {
                    "files": [str(folder / "inbox" / "*.parquet")],
                    "only_if_new": False,
                    "newest": 1,
                },
            },
        )
        self.assets = [dataset_asset(self.experiment), *self._played_assets()]
        self.failure_cursor: str | None = None
        self.alerts: list[tuple[int, str]] = []
        self.send_failure_alerts()  # the first tick only sets the cursor

    @property
    def now(self) -> float:
        """Noon of the day."""
        return START + self.day * DAY_S + DAY_S / 2

    def deliver(self, bad: bool = False) -> Path:
        path = self.folder / "data" / f"day-{self.day:02d}.parquet"
        write_series(path, 40, self.day, self.now - 3600, bad=bad)
        return path

    def receive_inputs(self, shift: float = 0.0) -> None:
        path = self.folder / "inbox" / f"day-{self.day:02d}.parquet"
        write_series(path, 120, 1000 + self.day, self.now - 3600, shift=shift)

    def launch(self, decision: Any, asker: str) -> bool:
        """As the daemon does it: a run key is served once for each sensor, and once in each tick of the
        schedule. True if a run began."""
        if not isinstance(decision, dg.RunRequest):
            return False
        tags = dict(decision.tags)
        if decision.run_key is not None:
            tags |= {"dagster/run_key": decision.run_key, "dagster/sensor_name": asker}
            keys = ("dagster/run_key", "dagster/sensor_name")
            same = dg.RunsFilter(tags={key: tags[key] for key in keys})
            if asker != "schedule" and self.instance.get_runs(same, limit=1):
                return False
        nouns = [key.path[-1] for key in decision.asset_selection]
        self.runs.append((self.day, "+".join(nouns), tags["roma/trigger"]))
        self._execute(decision.asset_selection, tags)
        return True

    def _execute(self, keys: Any, tags: dict[str, str]) -> None:
        result = dg.materialize(
            self.assets,
            instance=self.instance,
            selection=list(keys),
            tags=tags,
            resources=JOB_CLIENTS,
            raise_on_error=False,
        )
        if (
            self.killed is not None
        ):  # the reconcile sensor fails such a run, and the daemon retries it
            watcher = read_json(self.killed.lease)
            write_json(self.killed.lease, {**watcher, "start": "of another process"})
            self.killed = None
            self.instance.add_run_tags(result.run_id, {"dagster/will_retry": "true"})
            parents = ("dagster/parent_run_id", "dagster/root_run_id")
            family = dict.fromkeys(parents, result.run_id)
            self._execute(keys, {**tags, **family, "dagster/is_resume_retry": "true"})

    def send_failure_alerts(self) -> None:
        """Ticks of the real sensor, cursor and all, until it finds no further failure."""
        known = {alert["id"] for alert in read_alerts(self.storage)}
        while True:
            context = dg.build_sensor_context(
                instance=self.instance,
                cursor=self.failure_cursor,
                repository_name="__repository__",
            )
            tick = alert_on_failure.evaluate_tick(context)
            if tick.cursor in (None, self.failure_cursor):
                break
            self.failure_cursor = tick.cursor
        new = [alert for alert in read_alerts(self.storage) if alert["id"] not in known]
        self.alerts += [(self.day, alert["subject"]) for alert in new]

    def champion(self) -> str | None:
        return version_at(connect(MlflowSettings(), self.storage.mlflow), "waves", CHAMPION)

    def _begin(self, folder: JobFolder, attempt: Attempt, spec: JobSpec) -> JobState:
        if self.mood == "kill":
            self.mood, self.killed = "work", folder
            raise WorkerKilled
        return running()(folder, attempt, spec)

    def _play(self, folder: JobFolder, attempt: Attempt, spec: JobSpec) -> JobState:
        attempt.path.mkdir(parents=True, exist_ok=True)
        attempt.log.write_text("".join(f"line {k}\n" for k in range(80)))
        mood, self.mood = self.mood, "work"
        if mood == "fail":
            report = Exit(status="failed", reason=self.error) if self.error else None
            return ended(Phase.ENDED_BAD, "exit code 1", report)(folder, attempt, spec)
        return completed()(folder, attempt, spec)

    def _run_job(self, context: dg.AssetExecutionContext) -> dict[str, Any]:
        folder = job_folder(context)
        if not folder.path.exists() and context.asset_key.path[-1] == "pretrained_encoder":
            self.trained.append(self.day)
        spec = JobSpec(
            key=folder.path.name,
            command=("-m", context.asset_key.path[-1]),
            config_digest=digest_of({}),
            runner="plain",
        )
        try:
            outcome = run_job(context, self.launcher, folder, spec, {}, poll_every_s=0.001)
        except JobFailed as error:
            raise dg.Failure(
                str(error), metadata={"job_folder": str(folder.path)}, allow_retries=False
            ) from error
        return outcome.metadata()

    def _played_assets(self) -> list[dg.AssetsDefinition]:
        def asset(body: Callable, **more: Any) -> dg.AssetsDefinition:
            return dg.asset(**self.experiment.asset_arguments(body.__name__), **more)(body)

        def pretrained_encoder(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            return dg.MaterializeResult(metadata=self._run_job(context))

        def finetuned_classifier(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            return dg.MaterializeResult(metadata=self._run_job(context))

        def evaluation_report(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            return dg.MaterializeResult(
                check_results=[
                    dg.AssetCheckResult(
                        check_name="gate",
                        passed=self.accuracy >= 0.8,
                        metadata={"accuracy": self.accuracy},
                    )
                ]
            )

        def registered_classifier(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            client = connect(MlflowSettings(), self.storage.mlflow)
            if self.champion() is None:
                client.create_registered_model("waves")
            artifact = (self.storage.mlflow / "artifacts").as_uri()
            tags = {"roma.compared_with": self.champion() or "none", "roma.gate": "passed"}
            version = client.create_model_version("waves", artifact, tags=tags).version
            promote(client, "waves", str(version), "it passed", "the played gate", {})
            self.promoted.append(self.day)
            return dg.MaterializeResult(metadata={"version": str(version)})

        def recent_inputs(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            files, inputs = self.experiment.automation.drift.newest_files()
            version = newest_trained(context.instance, self.experiment).on[0]
            data = self.storage.datasets / "waves" / version[:12]
            sample = sample_from_parquet(files, read_manifest(data).data_schema)
            found = drift_effects(reference_profile(StoredDataset(data)), sample)
            sizes = {effect.name: effect.size for effect in found}
            facts = {"inputs": inputs, "series": sample.n, "drift_sizes": sizes}
            return dg.MaterializeResult(metadata={**facts, "features": "not compared: played"})

        check = dg.AssetCheckSpec(
            "gate", asset=self.experiment.key("evaluation_report"), blocking=True
        )
        return [
            asset(pretrained_encoder),
            asset(finetuned_classifier),
            asset(evaluation_report, check_specs=[check]),
            asset(registered_classifier),
            asset(recent_inputs),
        ]
