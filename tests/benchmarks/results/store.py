"""The chosen benchmarks, their experiments, and what is known of their runs so far."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from roma_pipelines.experiment import load_experiment
from roma_pipelines.storage import Storage
from tests.benchmarks.results.benchmarks import Benchmark, Run
from tests.benchmarks.results.runs import Log, Plan, Record, expected_s, read_record
from tests.benchmarks.results.table import put_in_place, section_text


class ResultsStore:
    """Reads records as they are on disk at the moment of asking.

    Raises:
        ValueError: an experiment of a benchmark does not exist, or it or a case of it is wrong.
    """

    def __init__(self, storage: Storage, benchmarks: Mapping[str, Benchmark]) -> None:
        self.storage, self.benchmarks = storage, benchmarks
        self._plans: dict[Run, Plan] = {}
        self._seconds: dict[tuple[str, str, bool], float] = {}
        for name, benchmark in benchmarks.items():
            experiment = load_experiment(benchmark.experiment)
            if experiment.pretrained_from is not None:
                raise ValueError(
                    f"benchmark {name}: {experiment.name} finetunes the encoder of "
                    f"{experiment.pretrained_from}; a benchmark needs an experiment that pretrains its own"
                )
            changed = {case.name: benchmark.changed(experiment, case) for case in benchmark.cases}
            for run in benchmark.runs():
                case = benchmark.case(run.case)
                trainings = benchmark.trainings_of(case, changed[run.case])
                self._plans[run] = Plan(
                    run,
                    changed[run.case],
                    trainings,
                    benchmark.evaluated_on,
                    benchmark.n_observed,
                    benchmark.encoder_seed(changed[run.case]),
                )
        self._encoders = {
            plan.encoder
            for run, plan in self._plans.items()
            if read_record(storage, run) is not None and not self.is_outdated(run)
        }

    def plan(self, run: Run) -> Plan:
        """Everything that decides the run."""
        return self._plans[run]

    def is_missing(self, run: Run, rerun_stale: bool) -> bool:
        """Whether the run is to be run; with ``rerun_stale`` also because its settings have changed."""
        return read_record(self.storage, run) is None or (rerun_stale and self.is_outdated(run))

    def is_outdated(self, run: Run) -> bool:
        """Whether its record was made with other settings than the experiment has now."""
        record = read_record(self.storage, run)
        return record is not None and record.settings_digest != self._plans[run].digest

    def expected_s(self, run: Run, log: Log) -> float:
        """About how long the run takes, seconds; as long as another seed of its case.

        Builds a data set if nothing else is known of the case. An encoder of several runs counts once: for
        the first one that is asked about, or for none if a run with it was recorded.
        """
        plan = self._plans[run]
        has_encoder = plan.encoder in self._encoders
        self._encoders.add(plan.encoder)
        of_case = run.benchmark, run.case, has_encoder
        if of_case not in self._seconds:
            self._seconds[of_case] = expected_s(plan, self.storage, log, has_encoder)
        return self._seconds[of_case]

    def state(self, run: Run) -> str:
        """The run in one line."""
        record = read_record(self.storage, run)
        if record is None:
            return f"{run.name}: not run"
        shown = [
            f"{metric.replace('_', ' ')} {record.metrics[metric]:.4g}"
            for metric in self.benchmarks[run.benchmark].metrics
            if metric in record.metrics
        ]
        earlier = " (made with earlier settings)" if self.is_outdated(run) else ""
        return f"{run.name}: {', '.join(shown)}{earlier}"

    def write(self, name: str, path: Path) -> None:
        """Put the benchmark's table in its place in the file."""
        benchmark = self.benchmarks[name]
        records: dict[Run, Record] = {}
        for run in benchmark.runs():
            if (record := read_record(self.storage, run)) is not None:
                records[run] = record
        outdated = frozenset(run for run in records if self.is_outdated(run))
        put_in_place(path, name, section_text(benchmark, records, outdated))
