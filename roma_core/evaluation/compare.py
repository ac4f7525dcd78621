"""A model beside the champion on the same series: what changed, and how sure we are of that."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from roma_core.evaluation.metrics import Estimate, PartEstimate, resample_sums
from roma_core.evaluation.predictions import PredictionTable


class Change(BaseModel):
    """One quantity of both models; the difference has a paired 95 % bootstrap interval."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    ours: float
    champion: float
    difference: PartEstimate = Field(
        description="Ours minus the champion's; without an interval if one series is compared."
    )
    n_series: int


def changes(
    ours: PredictionTable, champion: PredictionTable, n_bootstrap: int = 1000
) -> tuple[Change, ...]:
    """Accuracy, log-loss and the recall of every class that has series.

    Raises:
        ValueError: the tables are not about the same series with the same labels.
    """
    if ours.classes != champion.classes or ours.ids != champion.ids:
        raise ValueError("the tables are about other series or classes and cannot be compared")
    if (ours.labels != champion.labels).any():
        raise ValueError("the tables give the same series other labels")
    right, champions_right = (t.correct.astype(np.float64) for t in (ours, champion))
    found = [
        _change("accuracy", right, champions_right, n_bootstrap),
        _change("log-loss", _nll(ours), _nll(champion), n_bootstrap),
    ]
    for k, name in enumerate(ours.classes):
        inside = ours.labels == k
        if inside.any():
            recall = f"recall of {name}"
            found.append(_change(recall, right[inside], champions_right[inside], n_bootstrap))
    return tuple(found)


def _change(
    name: str, ours: NDArray[np.float64], champion: NDArray[np.float64], n_bootstrap: int
) -> Change:
    n = len(ours)
    means = resample_sums((ours - champion)[:, None], n_bootstrap, seed=0)[:, 0] / n
    return Change(
        name=name,
        ours=float(ours.mean()),
        champion=float(champion.mean()),
        difference=PartEstimate.of(
            Estimate(
                value=float((ours - champion).mean()),
                low=float(np.percentile(means, 2.5)),
                high=float(np.percentile(means, 97.5)),
            ),
            n,
        ),
        n_series=n,
    )


def _nll(table: PredictionTable) -> NDArray[np.float64]:
    p = table.probabilities[np.arange(len(table.ids)), table.labels]
    return -np.log(p.clip(np.finfo(np.float64).eps))
