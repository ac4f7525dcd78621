"""The report on a pretraining model's reconstructions."""

from __future__ import annotations

from pydantic import Field

from roma_core.evaluation.page import Page, render_page
from roma_core.evaluation.reconstruction_metrics import ReconstructionMetrics

MEANINGS = {
    "mse": "mean squared error per hidden value, against what was observed, noise and all",
    "rmse": "its root, in the unit of the data, if its channels share one",
    "mae": "mean absolute error per hidden value",
    "nrmse": "root mean square of the errors as shares of each channel's range in train",
    "noise_mse": "mean squared error of the values without noise: the noise nobody can predict",
    "coverage_95": "share of values within 1.96 predicted deviations; 0.95 is right",
}


class ReconstructionReport(Page):
    """Everything the report shows."""

    metrics: ReconstructionMetrics
    seen: tuple[int, ...] = ()
    leaks: tuple[str, ...] = Field((), description="Ways in which training may have seen them.")


def render_reconstruction_report(content: ReconstructionReport) -> str:
    """The report as the text of one HTML file."""
    found = content.metrics.estimates
    own = [
        (name, meaning_of(name), found[name])
        for name in ("mse", "rmse", "mae", "nrmse", "noise_mse", "coverage_95")
        if name in found
    ]
    clean = [
        (f"clean_{name}", meaning_of(f"clean_{name}"), found[f"clean_{name}"])
        for name in ("mse", "rmse", "mae", "nrmse")
        if f"clean_{name}" in found
    ]
    has_clean = "clean_mse" in found
    others = [
        (label, found[f"{key}mse"], found.get(f"{key}clean_mse"))
        for label, key in (
            ("this model", ""),
            ("straight lines between seen observations", "linear_"),
            ("mean of the train split", "mean_"),
        )
        if f"{key}mse" in found
    ]
    seen = [(n, found[f"mse_seen_{n}"], found.get(f"clean_mse_seen_{n}")) for n in content.seen]
    return render_page(
        "reconstruction_report.html.jinja",
        content,
        headline=own + clean,
        others=others,
        seen=seen,
        has_clean=has_clean,
    )


def meaning_of(name: str) -> str:
    """A metric in words."""
    if name.startswith("clean_"):
        of_noisy = MEANINGS[name.removeprefix("clean_")]
        return of_noisy.replace("against what was observed, noise and all", "without the noise")
    return MEANINGS[name]
