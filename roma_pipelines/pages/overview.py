"""What there is to say about every experiment at this moment; reads and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from roma_core.files import read_json
from roma_pipelines.experiment import NOUNS, Experiment
from roma_pipelines.launching.jobs import Job, all_jobs
from roma_pipelines.storage import Storage

if TYPE_CHECKING:
    from mlflow import MlflowClient

_EVALUATIONS = 20  # in the trend
_RUNS_LOOKED_AT = 200
_RUNS_SHOWN = 5
_ALIASES = ("champion", "previous", "candidate")


@dataclass(frozen=True)
class Asset:
    """One of an experiment's assets.

    Attributes:
        made_at: of its newest materialisation, seconds since the epoch; None if there is none.
    """

    noun: str
    path: str  # in Dagster's addresses
    made_at: float | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation report.

    Attributes:
        job: key of the job that made it; None if its folder is gone.
        passed: what its gate said; None if nothing is known.
    """

    made_at: float
    accuracy: float
    low: float
    high: float
    job: str
    passed: bool | None
    objections: tuple[str, ...]


@dataclass(frozen=True)
class Version:
    """A registered version that an alias points to."""

    alias: str
    version: str
    made_at: float


@dataclass(frozen=True)
class Run:
    """A Dagster run that made, or tried to make, assets of the experiment."""

    id: str
    status: str
    started_at: float | None
    ended_at: float | None


@dataclass(frozen=True)
class View:
    """An experiment; ``problem`` is set if its file cannot be used."""

    name: str
    description: str = ""
    problem: str = ""
    assets: tuple[Asset, ...] = ()
    versions: tuple[Version, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()  # the newest last
    runs: tuple[Run, ...] = ()  # the newest first
    jobs: tuple[Job, ...] = field(default=(), repr=False)  # that wait or run

    @property
    def last_made_at(self) -> float:
        """When any of its assets was made, seconds since the epoch; 0 if none ever was."""
        return max((asset.made_at or 0.0 for asset in self.assets), default=0.0)

    @property
    def has_champion(self) -> bool:
        return any(version.alias == "champion" for version in self.versions)


def overview(
    experiments: Mapping[str, Experiment | str],
    storage: Storage,
    instance: dg.DagsterInstance,
    client: MlflowClient,
) -> list[View]:
    """A view of every experiment, the one that was at work last in front.

    Args:
        experiments: by name; a text says why one cannot be used.
    """
    records = instance.get_run_records(limit=_RUNS_LOOKED_AT)
    waiting = [job for job in all_jobs(storage.jobs) if job.open_attempt is not None]
    usable = [
        experiment for experiment in experiments.values() if isinstance(experiment, Experiment)
    ]
    made_at = _made_at(usable, instance)
    views = [
        View(name, problem=experiment)
        if isinstance(experiment, str)
        else View(
            name=name,
            description=experiment.description,
            assets=_assets(experiment, made_at),
            versions=_versions(client, name),
            evaluations=_evaluations(experiment, instance),
            runs=_runs(name, records),
            jobs=tuple(job for job in waiting if job.asset.startswith(f"{name}/")),
        )
        for name, experiment in experiments.items()
    ]
    return sorted(views, key=lambda view: (-view.last_made_at, view.name))


def _made_at(
    experiments: Iterable[Experiment], instance: dg.DagsterInstance
) -> dict[dg.AssetKey, float]:
    """When each asset was last materialised, those that were; one question for all."""
    keys = [experiment.key(noun) for experiment in experiments for noun in NOUNS]
    entries = [record.asset_entry for record in instance.get_asset_records(keys)]
    return {
        entry.asset_key: entry.last_materialization.timestamp
        for entry in entries
        if entry.last_materialization is not None
    }


def _assets(experiment: Experiment, made_at: Mapping[dg.AssetKey, float]) -> tuple[Asset, ...]:
    keys = {noun: experiment.key(noun) for noun in NOUNS}
    return tuple(Asset(noun, "/".join(key.path), made_at.get(key)) for noun, key in keys.items())


def _evaluations(experiment: Experiment, instance: dg.DagsterInstance) -> tuple[Evaluation, ...]:
    records = instance.fetch_materializations(
        experiment.key("evaluation_report"), limit=_EVALUATIONS
    ).records
    found = []
    for record in reversed(records):
        materialisation = record.asset_materialization
        if materialisation is None or "job_folder" not in materialisation.metadata:
            continue
        folder = Path(str(materialisation.metadata["job_folder"].value))
        if (evaluation := _evaluation(folder, record.timestamp)) is not None:
            found.append(evaluation)
    return tuple(found)


def _evaluation(folder: Path, made_at: float) -> Evaluation | None:
    """From its job folder; None if that was removed."""
    metrics, gate = folder / "outputs" / "metrics.json", folder / "outputs" / "gate.json"
    if not metrics.exists():
        return None
    accuracy = read_json(metrics)["accuracy"]
    checks: list[dict[str, Any]] = read_json(gate)["checks"] if gate.exists() else []
    return Evaluation(
        made_at=made_at,
        accuracy=accuracy["value"],
        low=accuracy["low"],
        high=accuracy["high"],
        job=folder.name,
        passed=all(check["passed"] for check in checks) if gate.exists() else None,
        objections=tuple(check["explanation"] for check in checks if not check["passed"]),
    )


def _versions(client: MlflowClient, name: str) -> tuple[Version, ...]:
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return ()
        raise
    return tuple(
        Version(
            alias,
            str(aliases[alias]),
            client.get_model_version(name, aliases[alias]).creation_timestamp / 1000,
        )
        for alias in _ALIASES
        if alias in aliases
    )


def _runs(name: str, records: Iterable[dg.RunRecord]) -> tuple[Run, ...]:
    of_it = [
        record
        for record in records
        if any(key.path[0] == name for key in record.dagster_run.asset_selection or ())
    ]
    return tuple(
        Run(
            record.dagster_run.run_id,
            record.dagster_run.status.value,
            record.start_time,
            record.end_time,
        )
        for record in of_it[:_RUNS_SHOWN]
    )
