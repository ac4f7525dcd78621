"""How far reconstructions are off, and how sure we are of that.

Errors are per value, in the units of the data: a mean over all hidden values of all channels. As for
classifiers, every metric is a function of sums over series, and a bootstrap resample changes only how
often each series counts.

Shapes here:  N series   H hidden observations   C channels   R resamples
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from roma_core.evaluation.metrics import Estimate, PartEstimate, estimated, resample_sums
from roma_core.evaluation.reconstructing import HiddenTable

Floats = NDArray[np.float64]
N_BOOTSTRAP = 1000


class GroupErrors(BaseModel):
    """Series of one class."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    slug: str = Field(description="The name as it is in names of metrics.")
    n_series: int
    mse: PartEstimate = Field(description="Without an interval if there is one series only.")
    clean_mse: PartEstimate | None


class ReconstructionMetrics(BaseModel):
    """What was found, by name.

    ``mse``, ``rmse``, ``mae``       against what was observed, noise and all
    ``clean_…``                      against what would have been observed without noise, where known
    ``noise_mse``                    what the clean values themselves would get
    ``nrmse``, ``clean_nrmse``       root mean square of errors as shares of the channel's range in train
    ``coverage_95``                  share of values within 1.96 predicted deviations
    ``mean_mse``, ``linear_mse``     two baselines: the mean of train, straight lines; ``mean_clean_mse``, …
    ``…_seen_N``                     with only N observations of each series seen
    ``mse_GROUP``, ``clean_mse_GROUP``    of the series of one class
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_series: int = Field(description="With a hidden observation.")
    n_hidden: int = Field(description="Hidden observations.")
    mean_hidden_share: float
    n_bootstrap: int = N_BOOTSTRAP
    estimates: dict[str, Estimate]
    groups: tuple[GroupErrors, ...] = ()

    def document(self) -> dict[str, Any]:
        """``metrics.json``: every estimate by name at the top, so that a row of results can ask for it."""
        head = {
            "schema_version": 1,
            **self.model_dump(mode="json", exclude={"estimates", "groups"}),
        }
        return head | {name: e.model_dump(mode="json") for name, e in self.all().items()}

    def all(self) -> dict[str, Estimate | PartEstimate]:
        """Estimates by name, those of groups among them."""
        found: dict[str, Estimate | PartEstimate] = dict(self.estimates)
        for group in self.groups:
            found[f"mse_{group.slug}"] = group.mse
            if group.clean_mse is not None:
                found[f"clean_mse_{group.slug}"] = group.clean_mse
        return found

    def flat(self) -> dict[str, float]:
        """Numbers for a tracker."""
        return {name: estimate.value for name, estimate in self.all().items()}


def errors(
    table: HiddenTable,
    against: Literal["true", "clean"] = "true",
    ranges: Floats | None = None,
    after: str = "",
) -> dict[str, Estimate]:
    """``mse``, ``rmse`` and ``mae`` of a table, with 95 % intervals over series.

    Args:
        against: ``clean`` gives names that begin so; nothing if the clean values are not known.
        ranges: ``(C,)`` of the channels, for ``nrmse``.
        after: put behind the names.
    """
    truth = table.true if against == "true" else table.clean
    if truth is None:
        return {}
    off = table.predicted.astype(np.float64) - truth  # (H, C)
    scaled = off if ranges is None else off / ranges
    mse, mae, relative = _means(table.series, [off**2, np.abs(off), scaled**2])
    found = {"mse": _estimate(mse), "rmse": _estimate(np.sqrt(mse)), "mae": _estimate(mae)}
    if ranges is not None:
        found["nrmse"] = _estimate(np.sqrt(relative))
    clean = "clean_" if against == "clean" else ""
    return {f"{clean}{name}{after}": estimate for name, estimate in found.items()}


def noise(table: HiddenTable) -> dict[str, Estimate]:
    """``noise_mse``: what no model can go below for long, if the clean values are known."""
    if table.clean is None:
        return {}
    knowing = replace(table, predicted=table.clean)
    return {"noise_mse": errors(knowing)["mse"]}


def coverage(table: HiddenTable) -> dict[str, Estimate]:
    """``coverage_95``: how often a value lies where the model says that 95 % of them do."""
    if table.std is None:
        return {}
    inside = np.abs(table.predicted.astype(np.float64) - table.true) <= 1.96 * table.std
    return {"coverage_95": _estimate(_means(table.series, [inside])[0])}


def by_group(
    table: HiddenTable, labels: NDArray[np.int64], names: tuple[str, ...]
) -> tuple[GroupErrors, ...]:
    """The errors by class.

    Args:
        labels: ``(N,)`` index into ``names`` of every series.
    """
    found = []
    slugs = _slugs(names)
    for k, name in enumerate(names):
        part = table.of(labels == k)
        if len(part.series) == 0:
            continue
        clean = errors(part, "clean").get("clean_mse")
        n_series = len(np.unique(part.series))
        found.append(
            GroupErrors(
                name=name,
                slug=slugs[name],
                n_series=n_series,
                mse=PartEstimate.of(errors(part)["mse"], n_series),
                clean_mse=None if clean is None else PartEstimate.of(clean, n_series),
            )
        )
    return tuple(found)


def _slugs(names: tuple[str, ...]) -> Mapping[str, str]:
    """Names as they may stand in names of metrics, all different."""
    slugs = [re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in names]
    twice = {slug for slug in slugs if slugs.count(slug) > 1 or not slug}
    return {
        name: f"{slug}_class{k}" if slug in twice else slug
        for k, (name, slug) in enumerate(zip(names, slugs, strict=True))
    }


def _means(series: NDArray[np.int64], values: list[NDArray[Any]]) -> list[Floats]:
    """For each of ``values (H, C)`` its mean per value, of all series and of R resamples: ``(1 + R,)``."""
    of, index = np.unique(series, return_inverse=True)
    columns = [np.bincount(index, v.sum(axis=1), minlength=len(of)) for v in values]
    counts = np.bincount(index, minlength=len(of)) * values[0].shape[1]
    sums = np.stack([*columns, counts], axis=1).astype(np.float64)  # (N, V + 1)
    drawn = np.concatenate([sums.sum(axis=0)[None], resample_sums(sums, N_BOOTSTRAP, seed=0)])
    return list((drawn[:, :-1] / drawn[:, -1:]).T)


def _estimate(numbers: Floats) -> Estimate:
    """Of the value, followed by its resamples."""
    return estimated(numbers[:1], numbers[1:])
