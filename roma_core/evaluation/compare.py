"""Comparison of a candidate with the champion on the same series, with paired intervals."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from roma_core.evaluation.metrics import Estimate, PartEstimate, nll, sums_with_resamples
from roma_core.evaluation.predictions import Floats, PredictionTable
from roma_core.settings import Frozen


class Change(Frozen):
    """One metric of both models; the difference has a paired 95 % bootstrap interval."""

    name: str
    candidate: float
    champion: float
    difference: PartEstimate = Field(
        description="Candidate minus champion; without an interval for a single series."
    )
    n_series: int


def compare_predictions(
    candidate: PredictionTable, champion: PredictionTable
) -> tuple[Change, ...]:
    """Changes of accuracy, log-loss and the recall of every class that has series.

    Raises:
        ValueError: the tables are not about the same series with the same labels.
    """
    if candidate.classes != champion.classes or candidate.ids != champion.ids:
        raise ValueError("the tables are about other series or classes and cannot be compared")
    if (candidate.labels != champion.labels).any():
        raise ValueError("the tables give the same series other labels")

    def change(name: str, ours: Floats, theirs: Floats) -> Change:
        n = len(ours)
        means = sums_with_resamples((ours - theirs)[:, None])[:, 0] / n
        return Change(
            name=name,
            candidate=float(ours.mean()),
            champion=float(theirs.mean()),
            difference=Estimate.of(means).of_part(n),
            n_series=n,
        )

    correct = [table.correct.astype(np.float64) for table in (candidate, champion)]
    changes = [change("accuracy", *correct), change("log-loss", nll(candidate), nll(champion))]
    for k, name in enumerate(candidate.classes):
        inside = candidate.labels == k
        if inside.any():
            changes.append(change(f"recall of {name}", *(c[inside] for c in correct)))
    return tuple(changes)
