"""Hyperparameter search: an Optuna study whose trials are finetunings, run as jobs on any target.

The first trial has the settings of the file. The value of a trial is the best value of the primary metric
that its training logs of the validation split; the test split is not read. The name of a study has a
digest of what makes trials comparable, so other data, settings of the file or space begin a new one.

A killed search resumes: the keys of its jobs follow from study and trial, the jobs outlive the process
that started them, and it adopts the trials that the study has as running. Imports Optuna only to search.
"""

from __future__ import annotations

import base64
import contextlib
import queue
import threading
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from filelock import FileLock, Timeout
from jinja2 import Environment, PackageLoader, StrictUndefined

from roma_core.data.store import StoredDataset
from roma_core.files import digest_of, write_bytes
from roma_core.job import JobFolder
from roma_core.model.config import WEIGHTS
from roma_core.trainer.job import MODEL_OUTPUT, TrainingJobConfig, validation_metric
from roma_core.trainer.metrics import read_records
from roma_pipelines import storage as storages
from roma_pipelines._compat import adopted_trial
from roma_pipelines.assets.training import run_params, training_config
from roma_pipelines.experiment import ENCODER, Experiment
from roma_pipelines.launching.jobs import Job, all_jobs, hours_of, read_job
from roma_pipelines.launching.launcher import Launcher, Unreachable
from roma_pipelines.launching.spec import JobFailed, job_key
from roma_pipelines.launching.supervisor import Leave, request_cancel, supervise
from roma_pipelines.launching.targets import default_threads, job_spec, roma_command
from roma_pipelines.registry import runs, store
from roma_pipelines.search_space import Tuning, Value, default_space, given_values, sections

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

REPORT = "outputs/report.html"
_BEST = "finetuning.trainer.best_metric"
_FILE = "settings of the file"  # mark of the trial that has them
_POLL_S, _CANCEL_WITHIN_S = 1.0, 120.0
_SAME_FAILURES = 3  # one after the other, which end the search
_N_STARTUP = 5  # random trials before TPE, and completed ones before any is pruned
_N_UNPRUNED = 3  # first evaluations of a trial, which do not prune it


class TuningError(RuntimeError):
    """The search cannot continue or has no result; the message says what to do."""


class _NotRun(TuningError):
    """The target does not take the job of a trial, which says nothing about its settings."""


class Conclusion(NamedTuple):
    """The result of a study."""

    text: str  # a sentence: what the best trial gains over the settings of the file
    best: FrozenTrial
    file: float | None  # value with the settings of the file
    settings: dict[str, Value]  # better ones, by path; empty if those of the file are the best
    rows: list[dict[str, Any]]  # all trials, for people
    page: Path
    history: bytes  # PNG


def open_study(storage: storages.Storage, name: str) -> optuna.Study:
    """The study of this name in the installation's database, created if missing."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    lock: contextlib.AbstractContextManager[object]
    if (url := storages.database_url()) is None:
        folder = storage.root / "tuning"
        folder.mkdir(exist_ok=True)
        uri, lock = f"sqlite:///{folder / 'studies.db'}", FileLock(folder / ".create.lock")
    else:
        storages.ensure_schemas(url, storages.TUNING_SCHEMA)
        uri = storages.schema_url(url, storages.TUNING_SCHEMA)
        lock = storages.advisory_lock(url, "tuning schema")
    with lock:  # Optuna creates its tables without one
        kept = optuna.storages.RDBStorage(uri)
    pruner = optuna.pruners.MedianPruner(_N_STARTUP, _N_UNPRUNED)
    return optuna.create_study(
        study_name=name, storage=kept, pruner=pruner, direction="maximize", load_if_exists=True
    )


@dataclass
class Search:
    """A search of an experiment's settings on one version of its data.

    Raises ValueError if its trials could not be compared.
    """

    experiment: Experiment
    dataset: Path
    storage: storages.Storage
    say: Callable[[str], None]
    launcher: Callable[[str, str | None], Launcher]  # of a target and profile
    holder: Mapping[str, Any] = field(default_factory=dict)  # facts for lease.json
    on_interrupt: Callable[[BaseException], Leave] = lambda error: "detach"  # as of Supervisor

    def __post_init__(self) -> None:
        self._running: dict[int, optuna.Trial] = {}
        self._active: set[JobFolder] = set()  # their jobs are supervised here
        self._ended: queue.Queue[tuple[int, Exception | None]] = queue.Queue()
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # of encoders
        self._stopping, self.hours = False, 0.0
        # reasons of the newest trials here, back to one with a value
        self._failures: list[str] = []
        self.plain = self.experiment.model_copy(update={"tuning": None})
        self.tuning = self.experiment.tuning or Tuning()
        self.space = self.tuning.space or default_space(self.plain)
        last = {path: path.rpartition(".")[2] for path in self.space}
        self.names = last if len({*last.values()}) == len(last) else {path: path for path in last}
        if problems := Tuning(space=self.space).problems(self.plain, self.plain.with_settings):
            raise ValueError("\n".join(problems))
        stored = StoredDataset(self.dataset, verify=False)
        if self.plain.task == "classification" and not any(
            stored.split("train").class_counts.values()
        ):
            raise ValueError(f"{self.dataset} has no labelled training series; trials need classes")
        metric, self.reason, is_defined = validation_metric(
            self.dataset, self.plain.task, self.plain.primary_metric
        )
        self.metric, self.n_validation = f"eval/{metric}", len(stored.split("validation"))
        if not is_defined:
            raise ValueError(
                f"{metric} cannot compare trials: the {self.n_validation} validation series of "
                f"{self.dataset} have less than two different classes or targets; increase "
                f"dataset.validation_fraction"
            )
        comparable: dict[str, Any] = {"data": stored.manifest.digest, "metric": self.metric}
        comparable["space"] = {
            path: one.model_dump(mode="json") for path, one in self.space.items()
        }
        trained = {"task", "pretraining", "pretrained_from", "finetuning"}
        comparable["settings"] = self.plain.model_dump(mode="json", include=trained)
        shared, self._shared = f"{self.plain.pretrained_from}/{ENCODER}", None
        if self.plain.pretrained_from is not None:
            self._shared = self._weights(lambda job: job.asset == shared)
            if self._shared is None:
                raise ValueError(f"there are no weights of {shared}; materialise it first")
            comparable["encoder"] = self._shared.parts[-3]
        self.name = f"{self.plain.name}-{digest_of(comparable)[:12]}"
        self.asset = f"{self.plain.name}/tuning_study"
        self.folder = self._folder("study")
        of = self.plain.resources.of
        self.has_gpus = of("finetuning").gpus_per_node + of("pretraining").gpus_per_node > 0
        self.unit = "GPU-hours" if self.has_gpus else "CPU-hours"

    def _folder(self, what: str) -> JobFolder:
        """Of the study itself, of a trial's job, or of an encoder's."""
        return JobFolder(self.storage.jobs / job_key(self.asset, f"{self.name} {what}"))

    def run(self) -> Conclusion:
        """Run trials until the budget is used up; those that a killed search left come first.

        Raises TuningError if another process runs the study, or no trial has a value.
        """
        store.check_access(store.MlflowSettings())
        self.folder.outputs.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder.path / ".search.lock").acquire(timeout=0)
        except Timeout:
            raise TuningError(f"another process runs the study {self.name}; wait for it") from None
        with lock:
            self.study, n = open_study(self.storage, self.name), self.tuning.trials
            left = [trial.number for trial in self._trials() if trial.state.name == "RUNNING"]
            self.say(
                f"study {self.name}: {self.metric} of {self.n_validation} validation series "
                f"({self.reason}); {len(self._trials())} of {n} trials were started, {len(left)} are unfinished"
            )
            about = {"metric": self.metric, "space": ", ".join(self.space)}
            run = self._mlflow_run(self.folder, self.name, about)
            run.update(lambda _: run.record)
            self._count_hours()
            try:
                for number in left:
                    self._start(number)
                while (more := self._may_start()) or self._running:
                    if more and len(self._running) < self.tuning.parallel:
                        self._start()
                    else:
                        self._wait()
                found = self._conclude()
            except BaseException as error:
                self._leave(error)
                if isinstance(error, TuningError):
                    run.update(lambda _: run.record.model_copy(update={"status": "FAILED"}))
                raise
            end = {"status": "FINISHED", "ended_at": time.time(), "artifacts": {REPORT: ""}}
            end["results"] = {f"best_{self.metric}": found.best.value}
            run.update(lambda _: run.record.model_copy(update=end))
        return found

    def _trials(self) -> list[FrozenTrial]:
        """All trials that were started."""
        found = self.study.get_trials(deepcopy=False)
        return [trial for trial in found if trial.state.name != "WAITING"]

    def _count_hours(self) -> None:
        jobs = [one for one in all_jobs(self.storage.jobs) if one.lease.get("study") == self.name]
        self.hours = sum(hours_of(j) for j in jobs if j.spec.gpus_per_node or not self.has_gpus)

    def _may_start(self) -> bool:
        limit = self.tuning.hours
        if len(self._failures) >= _SAME_FAILURES and len({*self._failures}) == 1:
            if not self._running:
                self.say(f"{len(self._failures)} trials in a row failed alike; the search ends")
            return False
        return len(self._trials()) < self.tuning.trials and (limit is None or self.hours < limit)

    def _start(self, number: int | None = None) -> None:
        """Start the next trial, or continue the one of this number."""
        from optuna.samplers import TPESampler

        study, given = self.study, given_values(self.plain, self.space)
        trials = study.get_trials(deepcopy=False)
        if not any(_FILE in one.user_attrs for one in trials):
            known = {self.names[path]: value for path, value in given.items()}
            study.enqueue_trial(known, user_attrs={_FILE: True})
        # each trial has a seed: with one for all, a resumed search would repeat its first trials
        seed = zlib.crc32(f"{self.name} {len(trials) if number is None else number}".encode())
        study.sampler = TPESampler(n_startup_trials=_N_STARTUP, seed=seed)
        trial = study.ask() if number is None else adopted_trial(study, number)
        is_file = _FILE in trial.user_attrs
        paths = given if is_file else self.space  # of the file, the rest is at its defaults
        drawn = {path: self.space[path].suggest(trial, self.names[path], path) for path in paths}
        values = {} if is_file else drawn
        self.say(f"trial {trial.number}: {self.describe(values) or _FILE}")
        trial.set_user_attr("settings", values)
        self._running[trial.number] = trial
        arguments = (trial.number, values, "pruned" in trial.user_attrs)
        threading.Thread(target=self._run, args=arguments, daemon=True).start()

    def describe(self, values: Mapping[str, Value]) -> str:
        """``base_lr 0.00123, depth 4``."""
        return ", ".join(f"{self.names[path]} {value}" for path, value in values.items())

    # -- in the thread of a trial ------------------------------------------------------------

    def _run(self, number: int, values: Mapping[str, Value], was_pruned: bool) -> None:
        error, name = None, f"trial {number}"
        try:
            job = read_job(self._folder(name).path)
            # killed before the study had its end
            if job and (job.status == "failed" or (was_pruned and job.status == "cancelled")):
                raise TuningError(str(job.records[-1].end and job.records[-1].end.reason))
            # a file may choose weights by another metric, such as the loss
            given = sections(self.plain, {**values, _BEST: self.metric, f"{_BEST}_mode": "max"})
            experiment = self.plain.with_settings(**given)
            weights = self._shared
            if weights is None and experiment.pretraining is not None:
                weights = self._encoder(experiment, name)
            config = training_config(experiment, "finetune", self.dataset, weights)
            self._supervise("finetune", experiment, config, name)
        except Exception as caught:
            error = caught
        self._ended.put((number, error))

    def _encoder(self, experiment: Experiment, name: str) -> Path:
        """Weights of the encoder: of a job with the same configuration, or newly trained."""
        config = training_config(experiment, "pretrain", self.dataset)
        digest = digest_of(config.model_dump(mode="json"))
        size = experiment.resources.of("pretraining")
        same = (digest, size.world_size)
        with self._locks[digest]:  # the trials that need the same one wait for it
            if weights := self._weights(
                lambda job: (job.spec.config_digest, job.spec.world_size) == same
            ):
                return weights
            self.say(f"{name}: pretrains an encoder")
            folder = self._supervise("pretrain", experiment, config, f"encoder {digest}")
            return folder / MODEL_OUTPUT

    def _weights(self, fits: Callable[[Job], bool]) -> Path | None:
        """Weights of the newest completed training that fits."""
        jobs = (
            job for job in all_jobs(self.storage.jobs) if job.status == "completed" and fits(job)
        )
        found = (job.folder.path / MODEL_OUTPUT for job in jobs)
        return next((path for path in found if (path / WEIGHTS).exists()), None)

    def _supervise(
        self,
        command: Literal["pretrain", "finetune"],
        experiment: Experiment,
        config: TrainingJobConfig,
        name: str,
    ) -> Path:
        """Run a job to its end, or adopt it, with its MLflow run; its folder."""
        folder, document = self._folder(name), config.model_dump(mode="json")
        of = experiment.resources.of
        resources = of("pretraining" if command == "pretrain" else "finetuning")
        if resources.threads_per_process is None:  # the trials share the cores
            n_processes = resources.world_size * self.tuning.parallel
            threads = default_threads(resources.target, n_processes)
            resources = resources.model_copy(update={"threads_per_process": threads})
        about = (folder.path.name, roma_command(command, folder.path), digest_of(document))
        spec = job_spec(resources.target, resources, *about)
        run = self._mlflow_run(folder, f"{name[:20]} of {self.name}", run_params(config))
        accepted = threading.Event()

        def on_poll(state: object) -> None:
            if not accepted.is_set():
                accepted.set()
                run.update(lambda _: run.record)

        options = {"on_poll": on_poll, "max_attempts": resources.max_attempts}
        options["holder"] = {**self.holder, "asset_key": self.asset, "study": self.name}
        options["environment"] = run.environment(resources.target)
        if self._stopping:
            raise _NotRun("the search was interrupted")
        self._active.add(folder)
        try:
            launcher = self.launcher(resources.target, resources.profile)
            supervise(launcher, folder, spec, document, **options)
        except (ValueError, Unreachable) as error:  # Rejected is one
            raise _NotRun(str(error)) from error
        finally:
            self._active.discard(folder)
            if folder.mlflow_record.exists():
                run.end()
        return folder.path

    def _mlflow_run(self, folder: JobFolder, name: str, params: Mapping[str, Any]) -> runs.JobRun:
        settings, tags = store.MlflowSettings(), {"roma.git_sha": runs.code_version()}
        record = runs.RunRecord(
            experiment=f"{settings.experiment_prefix}/{self.plain.name}",
            name=name,
            tags={"roma.asset": self.asset, "roma.study": self.name, **tags},
            params={key: str(value) for key, value in params.items()},
            parent="" if folder == self.folder else self.folder.path.name,
        )
        return runs.JobRun(self.storage, folder, record, settings, self.say)

    # -- in the thread of the search ---------------------------------------------------------

    def _wait(self) -> None:
        """Report what the running trials log, or record one that has ended."""
        from optuna.trial import TrialState

        try:
            number, error = self._ended.get(timeout=_POLL_S)
        except queue.Empty:
            for trial in self._running.values():
                self._report(trial)
            return
        trial, folder = self._running.pop(number), self._folder(f"trial {number}")
        values, job = self._report(trial, prune=False), read_job(folder.path)
        text = f"{self.metric} {max(values, default=float('nan')):.4f}"
        if isinstance(error, _NotRun):
            raise TuningError(
                f"trial {number} could not start: {error}\nwhen that is mended, the same command "
                f"continues with it"
            ) from error
        if error is None and values:
            self._failures.clear()
            self.study.tell(number, max(values))
        elif job and job.status == "cancelled" and "pruned" in trial.user_attrs:
            self.study.tell(number, state=TrialState.PRUNED)
            text += f", pruned after {len(values)} evaluations"
        else:
            reason = error.outcome.reason if isinstance(error, JobFailed) else str(error)
            if error is None:
                reason = f"it logged no {self.metric}"
            # the files of a job are named by its folder
            self._failures.append(reason.replace(str(folder.path), "…"))
            trial.set_user_attr("reason", reason)
            self.study.tell(number, state=TrialState.FAIL)
            text = f"failed: {reason}"
        if any(one.state is TrialState.COMPLETE for one in self._trials()):
            best = self.study.best_trial
            text += f"; best so far {best.value:.4f} (trial {best.number})"
        self._count_hours()
        limit = "" if self.tuning.hours is None else f" of {self.tuning.hours:g}"
        n = len(self._trials()) - len(self._running)
        text += f"; {n} of {self.tuning.trials} trials, {self.hours:.3g}{limit} {self.unit} used"
        self.say(f"trial {number}: {text}")

    def _report(self, trial: optuna.Trial, prune: bool = True) -> list[float]:
        """Values that a trial has logged; new ones go to the study, which may prune it."""
        folder = self._folder(f"trial {trial.number}")
        logged = (one["metrics"].get(self.metric) for _, one in read_records(folder.metrics))
        values = [value for value in logged if value is not None]
        known = len(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        for step, value in enumerate(values[known:], known):
            trial.report(value, step)
        may_prune = prune and not {_FILE, "pruned"} & trial.user_attrs.keys()
        if may_prune and len(values) > known and trial.should_prune():
            trial.set_user_attr("pruned", True)
            request_cancel(folder, f"the study {self.name}: worse than the median")
        return values

    def _leave(self, error: BaseException) -> None:
        """The search ends early: its jobs run on for the next one, or are cancelled."""
        self._stopping = True
        if self._running and self.on_interrupt(error) == "cancel":
            for folder in list(self._active):
                request_cancel(folder, f"the study {self.name}: interrupted")
            with contextlib.suppress(queue.Empty):
                for _ in self._running:
                    self._ended.get(timeout=_CANCEL_WITHIN_S)

    def _conclude(self) -> Conclusion:
        """Compare the best trial with that of the file, and write the page."""
        values = {t.number: t.value for t in self._trials() if t.state.name == "COMPLETE"}
        if not values:
            known = (t.user_attrs["reason"] for t in self._trials() if "reason" in t.user_attrs)
            reasons = "\n".join(dict.fromkeys(known)) or "none was started"
            raise TuningError(f"no trial of the study {self.name} has a value: {reasons}")
        best, trials = self.study.best_trial, self._trials()
        value, settings = values[best.number] or 0.0, best.user_attrs["settings"]
        file = next((values.get(t.number) for t in trials if _FILE in t.user_attrs), None)
        what = f"{self.metric} of {self.n_validation} validation series"
        text = f"the {_FILE} have no value; {what} is {value:.4f} in trial {best.number}"
        if file is not None and value > file:
            text = f"trial {best.number} beats the {_FILE} by {value - file:.4f}: {what} is "
            text += f"{value:.4f}, and {file:.4f} with those"
        elif file is not None:
            text, settings = f"no trial beats the {_FILE}: {what} is {file:.4f} with them", {}
        rows = [
            {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                self.metric: "–" if trial.value is None else f"{trial.value:.4f}",
                "settings": self.describe(trial.user_attrs["settings"]) or _FILE,
                "reason": trial.user_attrs.get("reason", ""),
                "job": self._folder(f"trial {trial.number}").path.name,
            }
            for trial in trials
        ]
        figures, page = _figures(self.study, self.metric), self.folder.path / REPORT
        loader = PackageLoader("roma_pipelines.pages", ".")
        environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
        images = {title: base64.b64encode(png).decode() for title, png in figures.items()}
        about = {"search": self, "text": text, "rows": rows, "settings": settings, "images": images}
        html = environment.get_template("study.html.jinja").render(about, best=best.number)
        write_bytes(page, html.encode())
        return Conclusion(text, best, file, settings, rows, page, figures["History"])


def _figures(study: optuna.Study, metric: str) -> dict[str, bytes]:
    """PNGs by title: history, parallel coordinates and, if values differ, importances."""
    import matplotlib as mpl

    from roma_core.figures import STYLE, png_of

    mpl.use("agg")  # Optuna draws with pyplot
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    draws: dict[str, Any] = {"History": plots.plot_optimization_history}
    draws["Parallel coordinates"] = plots.plot_parallel_coordinate
    if len({trial.value for trial in study.trials if trial.state.name == "COMPLETE"}) > 1:
        draws["Importances"] = plots.plot_param_importances
    found = {}
    for title, draw in draws.items():
        with mpl.rc_context({**STYLE, "axes.grid": False}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are experimental
            axes = draw(study, target_name=metric)
            axes.set_title("")
            axes.figure.set_size_inches(10, 4.5)
            found[title] = png_of(axes.figure)
            pyplot.close(axes.figure)
    return found
