"""State of an experiment for its sensors and schedule: what is current, what to run next, budget."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import dagster as dg

from roma_core.data.config import source_fingerprint
from roma_core.files import digest_of
from roma_pipelines.automation.alerts import ATTEMPT_TAG, again_after, send_alert
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.jobs import hours_of, read_job
from roma_pipelines.storage import Storage

FINGERPRINT = "source_fingerprint"  # metadata of the data set: its source at build time
TRAINED_WITH = "trained_with"  # metadata of the report: run config of the trainings, as JSON
_SEARCHED = 50  # reports in which the newest one of these settings is looked for
EXPERIMENT_TAG, TRIGGER_TAG = "roma/experiment", "roma/trigger"  # of requested runs
_REQUESTED_TAG = "roma/requested_at"  # seconds since the epoch, by the clock of the sensor
_UNFINISHED = [
    dg.DagsterRunStatus[name]
    for name in ("QUEUED", "NOT_STARTED", "STARTING", "STARTED", "CANCELING")
]

Trigger = Literal["schedule", "new data", "drift", "promotion"]
Decision = dg.RunRequest | dg.SkipReason


class Data(NamedTuple):
    """Newest data set."""

    version: str | None = None
    run: str = ""
    fingerprint: str | None = None  # of its source at build time


class Trained(NamedTuple):
    """Newest evaluated model: its data and settings, and the run that evaluated it.

    Settings are the code version and, if the run config changed model or trainer, its digest.
    """

    on: tuple[str, str] | None = None
    run: str = ""


class Comparison(NamedTuple):
    """Newest comparison of recent inputs, as the asset ``recent_inputs`` has it in its metadata."""

    run: str
    inputs: str  # digest of the files
    n: int  # series
    effects: Mapping[str, float]  # by name, as ``value.flux psi``
    remark: str  # what was not compared; or empty


class TrainingState(NamedTuple):
    """Facts about one experiment."""

    data: Data
    trained: Trained
    sound: bool  # whether the newest data set passed its blocking check
    code_version: str  # settings of a training that automation starts now
    unfinished: str | None  # id of an unfinished run


class Step(NamedTuple):
    """Next action, reason, and a key that is equal exactly for the same action."""

    do: Literal["build", "train", "compare", "wait", "nothing"]
    why: str
    key: str = ""


def newest_data(instance: dg.DagsterInstance, experiment: Experiment) -> Data:
    """One query, enough for most ticks."""
    event = instance.get_latest_materialization_event(experiment.key("dataset"))
    if event is None or (made := event.asset_materialization) is None:
        return Data()
    found = made.metadata.get(FINGERPRINT)
    fingerprint = None if found is None else str(found.value)
    return Data((made.tags or {}).get("dagster/data_version"), event.run_id, fingerprint)


def newest_trained(instance: dg.DagsterInstance, experiment: Experiment) -> Trained:
    """Of the models trained with the run config of automation; if there is none, of all.

    One query, unless somebody trained with another run config since: such a model is no step of
    automation, and makes the model before it no older.
    """
    key = experiment.key("evaluation_report")
    wanted = _changes(experiment, experiment.automation.run_config)
    newest, cursor = Trained(), None
    for _ in range(_SEARCHED):  # one by one: their metadata have pictures
        page = instance.fetch_materializations(key, 1, cursor)
        for record in page.records:
            made = record.asset_materialization
            assert made is not None
            tags, text = made.tags or {}, made.metadata.get(TRAINED_WITH)
            found = _changes(experiment, json.loads(str(text.value)) if text else {})
            version = tags.get(f"dagster/input_data_version/{experiment.name}/dataset", "")
            settings = tags.get("dagster/code_version", "") + found
            one = Trained((version, settings), record.event_log_entry.run_id)
            if found == wanted:
                return one
            newest = newest if newest.on else one
        if not page.has_more:
            break
        cursor = page.cursor
    return newest


def _changes(experiment: Experiment, run_config: Mapping[str, Mapping[str, Any]]) -> str:
    """Digest of what a run config of these assets changes in its own trainings, as text; or ''."""
    changes = {
        (name, field): config[field]
        for name, config in run_config.items()
        for field in ("model", "trainer")
        if config.get(field) and name in experiment.own_assets
    }
    return f" with run config {digest_of(sorted(changes.items()))[:12]}" if changes else ""


def newest_comparison(instance: dg.DagsterInstance, experiment: Experiment) -> Comparison | None:
    """One query."""
    event = instance.get_latest_materialization_event(experiment.key("recent_inputs"))
    if event is None or (made := event.asset_materialization) is None:
        return None
    facts: dict[str, Any] = {name: value.value for name, value in made.metadata.items()}
    if not {"features", "inputs", "series", "drift_sizes"} <= facts.keys():
        return None  # reported in the UI
    remark = "" if facts["features"] == "compared" else f"; features were {facts['features']}"
    return Comparison(event.run_id, facts["inputs"], facts["series"], facts["drift_sizes"], remark)


def next_step(state: TrainingState, fingerprint: str) -> Step:
    """The step that brings the model up to date with the source's fingerprint; pure."""
    data, trained = state.data, state.trained
    if state.unfinished is not None:
        return Step("wait", f"run {state.unfinished} is unfinished")
    if fingerprint != data.fingerprint:
        why = "files of the source changed" if data.fingerprint else "no data set was built yet"
        return Step("build", why, f"build:{fingerprint}:{data.run}")
    if not state.sound:
        why = f"the data set of run {data.run} failed its check `sound`; new data are needed"
        return Step("nothing", why)
    assert data.version is not None
    key = f"train:{data.version}:{state.code_version}:{trained.run}"
    if trained.on is None:
        return Step("train", "no model was trained yet", key)
    now = (data.version, state.code_version)
    changes = [
        f"{what} {old[:n]} → {new[:n]}"
        for what, n, old, new in zip(("data", "settings"), (12, None), trained.on, now, strict=True)
        if old != new
    ]
    if changes:
        return Step("train", ", ".join(changes), key)
    return Step(
        "nothing",
        f"nothing changed: run {trained.run} trained on data {data.version[:12]} with settings "
        f"{state.code_version}",
    )


def uses_gpus(experiment: Experiment) -> bool:
    resources = experiment.resources
    return any(resources.of(stage).gpus_per_node for stage in ("pretraining", "finetuning"))


def hours_used(experiment: Experiment, jobs_root: Path, now: float | None = None) -> float:
    """GPU-hours of attempts that run, or ended in the last 7 days; CPU-hours if trainings use no GPU.

    Those of trials of the asset ``tuning_study`` do not count: it has a limit of its own.
    """
    now = time.time() if now is None else now
    since = now - 7 * 86400
    hours, search = 0.0, f"{experiment.name}/tuning_study"
    for path in jobs_root.iterdir():
        try:
            # the end of an attempt replaces a file in attempts/, and a supervisor renews lease.json:
            # older folders need not be read
            files = [path / "attempts", path / "lease.json"]
            if max(file.stat().st_mtime for file in files if file.exists()) < since:
                continue
            job = read_job(path)
        except (OSError, ValueError):  # being created, removed, or damaged, which `health` reports
            continue
        if job is None or job.asset == search or job.asset.split("/")[0] != experiment.name:
            continue
        if uses_gpus(experiment) and not job.spec.gpus_per_node:
            continue
        hours += hours_of(job, since, now)
    return hours


def state_of(experiment: Experiment, instance: dg.DagsterInstance) -> TrainingState:
    """Current state from Dagster's event log."""
    data = newest_data(instance, experiment)
    check = dg.AssetCheckKey(experiment.key("dataset"), "sound")
    storage = instance.event_log_storage
    record = storage.get_latest_asset_check_execution_by_key([check]).get(check)
    beside = {experiment.key("recent_inputs"), experiment.key("tuning_study")}
    unfinished = (
        run.run_id
        for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED), limit=200)
        if (
            run.tags.get(EXPERIMENT_TAG) == experiment.name
            or any(key.path[0] == experiment.name for key in run.asset_selection or ())
        )
        and (not run.asset_selection or run.asset_selection - beside)
    )
    return TrainingState(
        data=data,
        trained=newest_trained(instance, experiment),
        sound=record is not None
        and record.run_id == data.run
        and record.status.value == "SUCCEEDED",
        code_version=experiment.code_version("evaluation_report")
        + _changes(experiment, experiment.automation.run_config),
        unfinished=next(unfinished, None),
    )


def step_of(experiment: Experiment, instance: dg.DagsterInstance) -> Step:
    """Next step for the current content of the source."""
    return next_step(state_of(experiment, instance), source_fingerprint(experiment.dataset).digest)


def request(
    experiment: Experiment,
    instance: dg.DagsterInstance,
    trigger: Trigger,
    step: Step,
    now: float | None = None,
    *,
    once: bool = True,
) -> Decision:
    """The run of a step, unless an earlier one or the weekly budget forbids it now.

    A build makes the data set; ``train_on_new_data`` follows if its content changed. A training
    is everything from pretraining to the registry. A step that failed is requested again under
    another key, as :func:`again_after` says.

    Args:
        once: a run that was cancelled is not requested again. A schedule does so at its next tick.
    """
    now = time.time() if now is None else now
    found = _next_attempt(experiment, instance, step, now, once)
    if isinstance(found, dg.SkipReason):
        return found
    if step.do == "train" and (text := _over_budget(experiment, step, now)):
        return dg.SkipReason(text)
    of_step = {"build": ("dataset",), "compare": ("recent_inputs",)}
    names = of_step.get(step.do, experiment.asset_names[1:])
    keys = [experiment.key(name) for name in names]
    run_key, attempt = found
    tags = {EXPERIMENT_TAG: experiment.name, TRIGGER_TAG: trigger, "roma/why": step.why[:200]}
    return dg.RunRequest(
        run_key=run_key,  # a sensor's is served once, a schedule's once in each tick
        # a shared encoder is trained by its own experiment, on its data and budget
        asset_selection=[key for key in keys if key.path[0] == experiment.name],
        run_config=experiment.run_config(names),
        tags={**tags, ATTEMPT_TAG: str(attempt), _REQUESTED_TAG: f"{now:.0f}"},
    )


def _next_attempt(
    experiment: Experiment, instance: dg.DagsterInstance, step: Step, now: float, once: bool
) -> tuple[str, int] | dg.SkipReason:
    """Run key and number of the next attempt at a step, or why there is none now."""

    def newest(tags: dict[str, str]) -> dg.DagsterRun | None:
        return next(iter(instance.get_runs(dg.RunsFilter(tags=tags), limit=1)), None)

    for attempt in itertools.count(1):
        run_key = step.key if attempt == 1 else f"{step.key}:{attempt}"
        run = newest({"dagster/run_key": run_key, EXPERIMENT_TAG: experiment.name})
        if run is None:
            break
        requested_at = float(run.tags.get(_REQUESTED_TAG, 0.0))
        run = newest({"dagster/root_run_id": run.run_id}) or run  # its newest retry
        if run.status is dg.DagsterRunStatus.CANCELED:
            if not once:
                continue
            advice = "materialise it manually, or change data or settings"
            return dg.SkipReason(f"{step.why}; run {run.run_id} was cancelled; {advice}")
        if run.status is not dg.DagsterRunStatus.FAILURE:
            break
        if run.tags.get("dagster/will_retry") == "true":
            return dg.SkipReason(f"{step.why}; run {run.run_id} failed and will be retried")
        hours, follows = again_after(instance, run)
        # a daily schedule may be some seconds early
        if hours is None or now + 60 < requested_at + 3600 * hours:
            return dg.SkipReason(f"{step.why}; {follows}")
    return run_key, attempt


def _over_budget(experiment: Experiment, step: Step, now: float) -> str:
    """Why the weekly budget allows no training, after an alert; empty if it does."""
    storage = Storage.open()
    limit = experiment.automation.budget_hours_per_week
    if limit is None or (used := hours_used(experiment, storage.jobs, now)) < limit:
        return ""
    unit = "GPU-hours" if uses_gpus(experiment) else "CPU-hours"
    text = (
        f"{used:.1f} of {limit:g} {unit} of the weekly budget are used, so no training "
        f"starts. Reason to train: {step.why}"
    )
    subject = f"{experiment.name}: out of budget"
    send_alert(storage, "budget", subject, text, key=[experiment.name, step.key])
    return text
