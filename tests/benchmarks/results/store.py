"""The chosen rows, their experiments, and what is known of their cells so far."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from roma_pipelines.experiment import load_experiment
from roma_pipelines.storage import Storage
from tests.benchmarks.results.benchmarks import Benchmark, Run
from tests.benchmarks.results.runs import Plan, Record, Told, expected_s, read_record
from tests.benchmarks.results.table import put_in_place, row_text


class ResultsStore:
    """Reads records as they are on disk at the moment of asking.

    Raises:
        ValueError: an experiment of a row does not exist, or it or a case of it is wrong.
    """

    def __init__(self, storage: Storage, rows: Mapping[str, Benchmark]) -> None:
        self.storage, self.rows = storage, rows
        self._plans: dict[Run, Plan] = {}
        self._seconds: dict[tuple[str, str], float] = {}
        for name, row in rows.items():
            experiment = load_experiment(row.experiment)
            if experiment.pretrained_from is not None:
                raise ValueError(
                    f"row {name}: {experiment.name} finetunes the encoder of "
                    f"{experiment.pretrained_from}; a row needs an experiment that pretrains its own"
                )
            changed = {case.name: row.changed(experiment, case) for case in row.cases}
            for cell in row.cells():
                trainings = row.trainings_of(row.case(cell.case))
                self._plans[cell] = Plan(
                    cell, changed[cell.case], trainings, row.judged_on, row.seen
                )

    def plan(self, cell: Run) -> Plan:
        """Everything that decides the cell."""
        return self._plans[cell]

    def is_missing(self, cell: Run, again: bool) -> bool:
        """Whether the cell is to be run; with ``again`` also because its settings have changed."""
        return read_record(self.storage, cell) is None or (again and self.is_outdated(cell))

    def is_outdated(self, cell: Run) -> bool:
        """Whether its record was made with other settings than the experiment has now."""
        record = read_record(self.storage, cell)
        return record is not None and record.settings_digest != self._plans[cell].digest

    def expected_s(self, cell: Run, told: Told) -> float:
        """About how long the cell takes, seconds; as long as another seed of its case.

        Builds a data set if nothing else is known of the case.
        """
        of_case = cell.row, cell.case
        if of_case not in self._seconds:
            self._seconds[of_case] = expected_s(self._plans[cell], self.storage, told)
        return self._seconds[of_case]

    def state(self, cell: Run) -> str:
        """The cell in one line."""
        record = read_record(self.storage, cell)
        if record is None:
            return f"{cell.name}: not run"
        shown = [
            f"{metric.replace('_', ' ')} {record.metrics[metric]:.4g}"
            for metric in self.rows[cell.row].metrics
            if metric in record.metrics
        ]
        earlier = " (made with earlier settings)" if self.is_outdated(cell) else ""
        return f"{cell.name}: {', '.join(shown)}{earlier}"

    def write(self, name: str, path: Path) -> None:
        """Put the row's table in its place in the file."""
        row = self.rows[name]
        records: dict[Run, Record] = {}
        for cell in row.cells():
            if (record := read_record(self.storage, cell)) is not None:
                records[cell] = record
        outdated = frozenset(cell for cell in records if self.is_outdated(cell))
        put_in_place(path, name, row_text(row, records, outdated))
