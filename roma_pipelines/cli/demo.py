"""``roma-pipeline demo``: one experiment from data to registered model, in the foreground."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from roma_core.claim import is_running, process_start
from roma_core.evaluation.metrics import LABELS, headline
from roma_core.files import digest_of, read_json
from roma_core.job import JobFolder
from roma_core.trainer.defaults import PrimaryMetric
from roma_pipelines.cli import complete_experiment
from roma_pipelines.launching.jobs import all_jobs, cancel
from roma_pipelines.launching.targets import launcher_of_attempt
from roma_pipelines.registry.gate import has_passed
from roma_pipelines.registry.runs import send_pending
from roma_pipelines.registry.store import MlflowSettings, own_store
from roma_pipelines.storage import Storage, prepare_instance, project_folder

if TYPE_CHECKING:
    import dagster as dg

_LOGGER = "progress"


@click.command(epilog="Example: roma-pipeline demo japanese_vowels")
@click.argument("experiment", shell_complete=complete_experiment, default="japanese_vowels")
@click.option("--fresh", is_flag=True, help="Run again even if everything is up to date.")
def demo(experiment: str, fresh: bool) -> None:
    """Materialise EXPERIMENT, from the data set to the report and the registered model.

    Assets that the same code made from the same settings are reused. The command resumes an
    interrupted run.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    started = time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    for number in (signal.SIGTERM, signal.SIGHUP):  # end the training, too
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    storage = Storage.open()
    prepare_instance(storage)

    import dagster as dg

    try:
        with dg.DagsterInstance.get() as instance:
            _run(instance, storage, experiment, fresh, started)
    except Exception as error:
        if not storage.is_full(error):
            raise
        raise click.ClickException(
            f"no space left in {storage.root}; free some, then run the same command to resume"
        ) from error


def _run(
    instance: dg.DagsterInstance, storage: Storage, experiment: str, fresh: bool, started: float
) -> None:
    import dagster as dg

    from roma_pipelines.definitions import defs

    loggers = dg.Definitions(loggers={_LOGGER: _progress_logger()})
    definitions = dg.Definitions.merge(defs(), loggers)
    keys = _keys(definitions, experiment)
    held, killed = unfinished(instance, experiment)
    if held:
        process = held[0].tags[PROCESS_TAG].partition(" ")[0]
        raise click.ClickException(
            f"process {process} already runs {experiment}; wait for it, or stop it with Ctrl-C"
        )
    graph = definitions.resolve_asset_graph()
    settings = digest_of([graph.get(key).code_version for key in keys])
    before = killed[0] if killed and not fresh else None
    if before is not None and before.tags.get(SETTINGS_TAG) != settings:
        before = None
    if killed and before is None:
        _end_jobs(instance, storage, killed)
    missing = keys if fresh else _missing(instance, definitions, keys)
    if missing:
        click.echo(f"materialising {experiment}: {', '.join(key.path[-1] for key in missing)}")
        if before is not None:
            click.echo("  resuming an interrupted run")
        tags = tags_of(experiment, settings, before)
        _materialise(instance, definitions, missing, tags, killed)
    else:
        click.echo(f"{experiment} is up to date; --fresh runs it again")
    _conclude(instance, storage, keys, time.monotonic() - started)


def _keys(definitions: dg.Definitions, experiment: str) -> list[dg.AssetKey]:
    """Assets of the experiment in order, after those of a shared encoder."""
    import dagster as dg

    from roma_pipelines.definitions import INVALID
    from roma_pipelines.experiment import ENCODER

    graph = definitions.resolve_asset_graph()
    known = {key.path[0] for key in graph.materializable_asset_keys}
    if experiment not in known:
        if graph.has(left_out := dg.AssetKey([*experiment.split("/"), INVALID])):
            raise click.ClickException(graph.get(left_out).description or "")
        invalid = [
            "/".join(k.path[:-1]) for k in graph.external_asset_keys if k.path[-1] == INVALID
        ]
        text = f"no experiment {experiment!r}; available: {', '.join(sorted(known))}"
        text += f"; yours are read from {project_folder() / 'defs'} (ROMA_PROJECT)"
        if invalid:
            text += f"; left out, `roma-pipeline health` says why: {', '.join(sorted(invalid))}"
        raise click.ClickException(text)
    report = graph.get(dg.AssetKey([experiment, "evaluation_report"]))
    (registered,) = (key for key in report.child_keys if key.path[-1].startswith("registered_"))
    parents = graph.get(registered).parent_keys
    own = [key for key in graph.toposorted_asset_keys if key in {*parents, registered}]
    encoder = next((key for key in own if key.path[-1] == ENCODER), None)
    if encoder is None or encoder.path[0] == experiment:
        return own
    own.remove(encoder)
    return [dg.AssetKey([encoder.path[0], "dataset"]), encoder, *own]


def _end_jobs(instance: dg.DagsterInstance, storage: Storage, killed: list[dg.DagsterRun]) -> None:
    """Cancel jobs of killed runs that this run cannot adopt."""
    runs = {run.run_id for run in killed}
    for job in all_jobs(storage.jobs):
        if job.is_unfinished and job.lease.get("dagster_run_id") in runs:
            click.echo(f"cancelling job {job.key} of an interrupted run")
            cancel(job, "roma-pipeline demo: started again", launcher_of_attempt(storage))
    for line in send_pending(storage)[1]:
        click.echo(line, err=True)
    _report_killed(instance, killed)


def _report_killed(instance: dg.DagsterInstance, killed: list[dg.DagsterRun]) -> None:
    for run in killed:
        now = instance.get_run_by_id(run.run_id)
        if now is not None and not now.is_finished:
            instance.report_run_failed(now, "its process was killed; a later run resumed it")


def _missing(
    instance: dg.DagsterInstance, definitions: dg.Definitions, keys: list[dg.AssetKey]
) -> list[dg.AssetKey]:
    """Assets to materialise: the first that is missing or outdated, and all after it."""
    from roma_pipelines.tracked_job import newest_materialization

    graph = definitions.resolve_asset_graph()
    for i, key in enumerate(keys):
        made = newest_materialization(instance, key)
        if made is None or (
            (made.tags or {}).get("dagster/code_version") != graph.get(key).code_version
        ):
            return keys[i:]
        facts = {name: str(value.value) for name, value in made.metadata.items()}
        paths = [Path(facts[name]) for name in ("path", "weights", "job_folder") if name in facts]
        if "job_folder" in facts:
            folder = JobFolder(facts["job_folder"])
            result = folder.read_result()
            outputs = result.outputs.values() if result else ["result.json"]  # missing, too
            paths += [folder.path / output for output in outputs]
        if not all(path.exists() for path in paths):
            return keys[i:]
        if key.path[-1] == "evaluation_report" and not has_passed(Path(facts["job_folder"])):
            return keys[i:]  # its blocking checks stopped the rest
    return []


def _materialise(
    instance: dg.DagsterInstance,
    definitions: dg.Definitions,
    keys: list[dg.AssetKey],
    tags: dict[str, str],
    killed: list[dg.DagsterRun],
) -> None:
    from roma_pipelines._compat import detach_log_watchers
    from roma_pipelines.automation.alerts import message_of, root_cause

    detach_log_watchers()
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)  # a traceback at Ctrl-C
    job = definitions.resolve_implicit_global_asset_job_def()
    interrupted = "interrupted; the same command resumes"
    try:
        result = job.execute_in_process(
            instance=instance,
            asset_selection=keys,
            run_config={"loggers": {_LOGGER: {}}},
            tags=tags,
            raise_on_error=False,
        )
    except KeyboardInterrupt:  # between two steps
        raise KeyboardInterrupt(interrupted) from None
    finally:  # not earlier: until this run exists, only they lead to their jobs
        _report_killed(instance, killed)
    if result.success:
        return
    lines = []
    for event in result.all_events:
        if event.is_step_failure and event.step_failure_data.error is not None:
            error = root_cause(event.step_failure_data.error)
            if error.cls_name == "DagsterExecutionInterruptedError":
                instance.report_run_canceled(result.dagster_run, interrupted)  # no failure
                raise KeyboardInterrupt(interrupted)
            lines.append(f"{event.step_key}: {message_of(error)}")
    for evaluation in result.get_asset_check_evaluations():
        if not evaluation.passed:
            facts = "; ".join(f"{k}: {v.value}" for k, v in evaluation.metadata.items())
            lines.append(f"check {evaluation.check_name} failed: {evaluation.description or facts}")
    lines = lines or ["the run failed; see the messages above"]
    raise click.ClickException(
        "\n".join([*lines, "once that is mended, the same command continues"])
    )


def _conclude(
    instance: dg.DagsterInstance, storage: Storage, keys: list[dg.AssetKey], seconds: float
) -> None:
    """Print paths, results and next steps."""
    from roma_pipelines.tracked_job import newest_materialization

    facts: dict[str, dict[str, Any]] = {}
    for key in keys:  # of two data sets, the experiment's own comes last
        made = newest_materialization(instance, key)
        assert made is not None
        facts[key.path[-1]] = {name: value.value for name, value in made.metadata.items()}
    job, model = Path(facts["evaluation_report"]["job_folder"]), facts[keys[-1].path[-1]]
    metrics = read_json(job / "outputs" / "metrics.json")
    trained = ", ".join(
        f"{name.replace('_', ' ')} {made['training_s']:.0f} s"
        for name, made in facts.items()
        if "training_s" in made
    )
    here = Path.cwd()
    report, data = job / "outputs" / "report.html", Path(facts["dataset"]["path"])
    report, data = (p.relative_to(here) if p.is_relative_to(here) else p for p in (report, data))
    click.echo(f"\nreport      {report}")
    click.echo(f"model       {model['model']} version {model['version']} ({model['aliases']})")
    if (measured := job / "outputs" / "baselines.json").exists():
        for one in read_json(measured):
            least, most = one["difference"]["low"], one["difference"]["high"]
            ours = f"this model minus it: 95 % {least:+.3f} to {most:+.3f}"
            click.echo(f"baseline    {one['value']['value']:.3f} {one['name']} ({ours})")
    for one in read_json(job / "config.json")["baselines"]:
        click.echo(f"published   {one['accuracy']:.3f} {one['name']} ({one['source']})")
    click.echo(f"time        {seconds:.0f} s (trainings, when they ran: {trained})")
    uri = MlflowSettings().tracking_uri or own_store(storage.mlflow)
    is_default = uri == f"sqlite:///{here}/.roma/mlflow/mlflow.db"
    options = f"--model {model['uri']}{'' if is_default else f' --tracking-uri {uri}'}"
    has_queries = metrics.get("task") == "interpolation"  # a data set has none
    more = "" if has_queries else ", or:"
    up = "roma-pipeline up" if shutil.which("roma-pipeline") else "make up"
    click.echo(f"next        {up}    # the overview, Dagster and MLflow pages{more}")
    if not has_queries:
        click.echo(f"            roma predict {options} {data} predictions.parquet")
    if reason := metrics.get("primary_reason"):
        click.echo(f"metric      {LABELS[metrics['primary_metric']]}; {reason}")
    click.echo(f"test {headline(metrics)}")


_NOISE = ("Dependencies for step", "[pipes] external process successfully")  # Dagster's own


def _progress_logger() -> dg.LoggerDefinition:
    """A console logger for messages and progress of jobs."""
    import dagster as dg

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            meta = getattr(record, "dagster_meta", {})
            text = meta.get("orig_message") if record.levelno >= logging.INFO else None
            if (event := meta.get("dagster_event")) is not None:
                text = _event_text(event)
            if text and not text.startswith(_NOISE):
                click.echo(f"  {text}", file=sys.stdout)

    logger = logging.getLogger("roma_pipelines.demo")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.handlers = [Lines()]
    return dg.logger(lambda _: logger)


def _event_text(event: dg.DagsterEvent) -> str | None:
    if event.event_type_value == "STEP_START":
        return f"── {str(event.step_key).split('__')[-1]}"
    if event.event_type_value != "ASSET_OBSERVATION":
        return None
    facts = event.asset_observation_data.asset_observation.metadata
    if not {"step", "total_steps"} <= facts.keys():
        return None
    shown = "  ".join(
        f"{name} {value.value:.4g}"
        for name, value in facts.items()
        if isinstance(value.value, int | float)
        and name.endswith(("loss", "r2", *get_args(PrimaryMetric)))
    )
    return f"step {facts['step'].value}/{facts['total_steps'].value}  {shown}".rstrip()


_NAME_TAG, _HOST_TAG = "roma/foreground", "roma/foreground_host"
PROCESS_TAG, SETTINGS_TAG = "roma/foreground_process", "roma/foreground_settings"


def tags_of(name: str, settings: str, retried: dg.DagsterRun | None = None) -> dict[str, str]:
    """Tags of a run of this process, with the digest of its settings; it adopts the jobs of ``retried``."""
    process = f"{os.getpid()} {process_start(os.getpid())}"
    tags = {_NAME_TAG: name, _HOST_TAG: socket.gethostname()}
    tags |= {PROCESS_TAG: process, SETTINGS_TAG: settings}
    if retried is not None:
        root = retried.tags.get("dagster/root_run_id", retried.run_id)
        tags |= {"dagster/parent_run_id": retried.run_id, "dagster/root_run_id": root}
        tags["dagster/is_resume_retry"] = "true"
    return tags


def unfinished(
    instance: dg.DagsterInstance, name: str
) -> tuple[list[dg.DagsterRun], list[dg.DagsterRun]]:
    """Unfinished runs of this name on this computer: of a live process, and killed; newest first."""
    import dagster as dg

    here = {_NAME_TAG: name, _HOST_TAG: socket.gethostname()}
    held: list[dg.DagsterRun] = []
    killed: list[dg.DagsterRun] = []
    for run in instance.get_runs(dg.RunsFilter(tags=here)):
        if not run.is_finished:
            pid, _, start = run.tags[PROCESS_TAG].partition(" ")
            (held if is_running(int(pid), start) else killed).append(run)
    return held, killed
