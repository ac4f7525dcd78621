"""State of an experiment for its sensors and schedule: what is current, what to run next, budget."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import dagster as dg

from roma_core.data.config import source_fingerprint
from roma_pipelines.automation.alerts import send_alert
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.jobs import read_job
from roma_pipelines.launching.spec import AttemptRecord, JobSpec
from roma_pipelines.storage import Storage

WEEK_S = 7 * 86400.0


def over_budget(experiment: Experiment, jobs_root: Path, now: float | None = None) -> str | None:
    """Why automation may start no training now; None if it may."""
    limit = experiment.automation.budget_hours_per_week
    if limit is None:
        return None
    kind = "GPU" if experiment.resources.gpus_per_node else "CPU"
    used = hours_used(experiment, jobs_root, now)
    if used < limit:
        return None
    return f"{used:.1f} of {limit:g} {kind}-hours of the weekly budget are used"


def hours_used(experiment: Experiment, jobs_root: Path, now: float | None = None) -> float:
    """GPU-hours of attempts that ended in the last 7 days; CPU-hours where there is no GPU."""
    since = (time.time() if now is None else now) - WEEK_S
    total = 0.0
    for path in jobs_root.iterdir():
        try:
            # the end of an attempt replaces a file there: older folders need not be read
            if (path / "attempts").stat().st_mtime < since:
                continue
            job = read_job(path)
        except (OSError, ValueError):  # being created, removed, or damaged, which `health` reports
            continue
        if job is not None and job.asset.split("/")[0] == experiment.name:
            total += sum(_hours(record, job.spec, since) for record in job.records)
    return total


def _hours(record: AttemptRecord, spec: JobSpec, since: float) -> float:
    end = record.end
    if end is None or end.ended_at < since:
        return 0.0
    ran_s = end.ran_s
    if ran_s is None:
        ran_s = end.ended_at - (record.submitted_at or record.intended_at)
    each = spec.gpus_per_node or spec.processes_per_node * spec.threads_per_process
    return ran_s / 3600 * spec.nodes * each


FINGERPRINT = "source_fingerprint"
"""Metadata of the data set: fingerprint of its source at build time."""
EXPERIMENT_TAG = "roma/experiment"
"""Tag of runs requested by schedules and sensors."""
TRAINING = (
    "pretrained_encoder",
    "finetuned_classifier",
    "evaluation_report",
    "registered_classifier",
)
_UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@dataclass(frozen=True)
class TrainingState:
    """Facts about one experiment.

    Attributes:
        data_version, data_run: of the newest data set; None before the first.
        sound: whether its blocking check passed.
        fingerprint: of its source at build time.
        trained_on: data version and code version of the newest evaluated model.
        trained_run: the run that evaluated it, empty before the first.
        code_version: of a training started now.
        unfinished: an unfinished run of this experiment.
    """

    data_version: str | None
    data_run: str
    sound: bool
    fingerprint: str | None
    trained_on: tuple[str, str] | None
    trained_run: str
    code_version: str
    unfinished: str | None


@dataclass(frozen=True)
class Step:
    """Next action, reason, and a key that is equal exactly for the same action."""

    do: Literal["build", "train", "wait", "nothing"]
    why: str
    key: str = ""


class Data(NamedTuple):
    """Newest data set: version, run and fingerprint of its source, as in TrainingState."""

    version: str | None = None
    run: str = ""
    fingerprint: str | None = None


class Trained(NamedTuple):
    """Newest evaluated model: what it was trained on, and the run that evaluated it."""

    on: tuple[str, str] | None = None
    run: str = ""


def read_state(
    instance: dg.DagsterInstance, experiment: Experiment, code_versions: Mapping[str, str]
) -> TrainingState:
    """Current state from Dagster's event log.

    Args:
        code_versions: by asset name, from the definitions.
    """
    data, trained = newest_data(instance, experiment), newest_trained(instance, experiment)
    return TrainingState(
        data_version=data.version,
        data_run=data.run,
        sound=bool(data.version) and _is_sound(instance, experiment.key("dataset"), data.run),
        fingerprint=data.fingerprint,
        trained_on=trained.on,
        trained_run=trained.run,
        code_version=code_versions["evaluation_report"],
        unfinished=_unfinished_run(instance, experiment.name),
    )


def newest_data(instance: dg.DagsterInstance, experiment: Experiment) -> Data:
    """One query, enough for most ticks."""
    event = instance.get_latest_materialization_event(experiment.key("dataset"))
    if event is None or event.asset_materialization is None:
        return Data()
    version = (event.asset_materialization.tags or {}).get("dagster/data_version")
    found = event.asset_materialization.metadata.get(FINGERPRINT)
    return Data(version, event.run_id, str(found.value) if found is not None else None)


def newest_trained(instance: dg.DagsterInstance, experiment: Experiment) -> Trained:
    """One query: the report has the data version, and its code version covers all settings."""
    event = instance.get_latest_materialization_event(experiment.key("evaluation_report"))
    if event is None or event.asset_materialization is None:
        return Trained()
    tags = event.asset_materialization.tags or {}
    version = tags.get(f"dagster/input_data_version/{experiment.name}/dataset", "")
    return Trained((version, tags.get("dagster/code_version", "")), event.run_id)


def next_step(state: TrainingState, fingerprint: str) -> Step:
    """The step that brings the model up to date; pure.

    Args:
        fingerprint: current one of the source.
    """
    if state.unfinished is not None:
        return Step("wait", f"run {state.unfinished} is unfinished")
    if fingerprint != state.fingerprint:
        why = (
            "the files of the source changed" if state.fingerprint else "no data set was built yet"
        )
        return Step("build", why, f"build:{fingerprint}:{state.data_run}")
    if not state.sound:
        why = f"the newest data set, of run {state.data_run}, failed its check `sound`; new data are needed"
        return Step("nothing", why)
    assert state.data_version is not None
    if state.trained_on != (state.data_version, state.code_version):
        return Step("train", _difference(state), _train_key(state))
    return Step(
        "nothing",
        f"nothing changed: run {state.trained_run} trained on data {state.data_version[:12]} with settings "
        f"{state.code_version}",
    )


def _difference(state: TrainingState) -> str:
    if state.trained_on is None:
        return "no model was trained yet"
    data, code = state.trained_on
    changes = []
    if data != state.data_version:
        changes.append(f"data {data[:12]} → {str(state.data_version)[:12]}")
    if code != state.code_version:
        changes.append(f"settings {code} → {state.code_version}")
    return ", ".join(changes)


def _train_key(state: TrainingState) -> str:
    return f"train:{state.data_version}:{state.code_version}:{state.trained_run}"


def _is_sound(instance: dg.DagsterInstance, key: dg.AssetKey, run_id: str) -> bool:
    check = dg.AssetCheckKey(key, "sound")
    found = instance.event_log_storage.get_latest_asset_check_execution_by_key([check])
    record = found.get(check)
    return record is not None and record.run_id == run_id and record.status.value == "SUCCEEDED"


def _unfinished_run(instance: dg.DagsterInstance, experiment: str) -> str | None:
    for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED), limit=200):
        selected = {key.path[0] for key in run.asset_selection or ()}
        if run.tags.get(EXPERIMENT_TAG) == experiment or experiment in selected:
            return run.run_id
    return None


TRIGGER_TAG = "roma/trigger"
Trigger = Literal["schedule", "new data", "drift", "promotion"]
Decision = dg.RunRequest | dg.SkipReason


@dataclass(frozen=True)
class Automated:
    """An experiment with the code versions of its assets, by asset name."""

    experiment: Experiment
    code_versions: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.experiment.name

    def state(self, instance: dg.DagsterInstance) -> TrainingState:
        return read_state(instance, self.experiment, self.code_versions)

    def step(self, instance: dg.DagsterInstance) -> Step:
        """Next step for the current content of the source."""
        fingerprint = source_fingerprint(self.experiment.dataset)
        return next_step(self.state(instance), fingerprint.digest)

    def build(self, trigger: Trigger, step: Step, run_key: str | None) -> dg.RunRequest:
        """A run that builds the data set; ``train_on_new_data`` follows if its content changed."""
        return self._run(["dataset"], trigger, step.why, run_key)

    def train(
        self, trigger: Trigger, step: Step, run_key: str | None, now: float | None = None
    ) -> Decision:
        """A run from pretraining to the registry, unless the weekly budget is used up."""
        storage = Storage.open()
        if why := over_budget(self.experiment, storage.jobs, now):
            text = f"{why}, so no training starts. Reason to train: {step.why}"
            send_alert(
                storage, "budget", f"{self.name}: out of budget", text, key=[self.name, step.key]
            )
            return dg.SkipReason(text)
        return self._run(TRAINING, trigger, step.why, run_key)

    def _run(
        self, names: tuple[str, ...] | list[str], trigger: Trigger, why: str, run_key: str | None
    ) -> dg.RunRequest:
        keys = [self.experiment.key(name) for name in names]
        return dg.RunRequest(
            run_key=run_key,
            # a shared encoder is trained by its own experiment, on its data and budget
            asset_selection=[key for key in keys if key.path[0] == self.name],
            tags={EXPERIMENT_TAG: self.name, TRIGGER_TAG: trigger, "roma/why": why[:200]},
        )
