"""What trainings of an experiment took in the last week, against what they may take."""

from __future__ import annotations

import time
from pathlib import Path

from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.job import AttemptRecord, JobSpec
from roma_pipelines.launching.jobs import read_job

WEEK_S = 7 * 86400.0


def over_budget(experiment: Experiment, jobs_root: Path, now: float | None = None) -> str | None:
    """Why no training may begin by itself now; None if one may."""
    limit = experiment.automation.budget_hours_per_week
    if limit is None:
        return None
    kind = "GPU" if experiment.resources.gpus_per_node else "CPU"
    used = hours_used(experiment, jobs_root, now)
    if used < limit:
        return None
    return f"{used:.1f} of {limit:g} {kind}-hours of this week are used"


def hours_used(experiment: Experiment, jobs_root: Path, now: float | None = None) -> float:
    """GPU-hours of attempts that ended in the last 7 days; CPU-hours where there is no GPU."""
    since = (time.time() if now is None else now) - WEEK_S
    total = 0.0
    for path in jobs_root.iterdir():
        try:
            # an attempt's end replaces a file in there; older folders are not read at all
            if (path / "attempts").stat().st_mtime < since:
                continue
            job = read_job(path)
        except (OSError, ValueError):  # being made, being removed, or damaged: health names it
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
