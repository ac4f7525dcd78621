"""The evaluation report of a classifier."""

from __future__ import annotations

from pydantic import Field

from roma_core.evaluation.comparison import Change
from roma_core.evaluation.facts import Baseline
from roma_core.evaluation.measured import Measured
from roma_core.evaluation.metrics import Metrics
from roma_core.evaluation.page import Page, render_page

METRIC_NAMES = {
    "accuracy": ("Accuracy", "share of series whose most probable class is the true one"),
    "balanced_accuracy": ("Balanced accuracy", "mean recall of the classes"),
    "macro_f1": ("Macro F1", "mean F1 of the classes"),
    "log_loss": ("Log-loss", "mean −ln p(true class); lower is better"),
    "calibration_error": (
        "Calibration error",
        "mean |accuracy − confidence| over 15 bins of equal mass, top label; lower is better",
    ),
}


class ReportContent(Page):
    """Everything the report shows."""

    metrics: Metrics
    champion_version: str | None = Field(None, description="None if there was no champion.")
    champion_problem: str | None = Field(None, description="Why it could not be evaluated.")
    changes: tuple[Change, ...] = Field((), description="Against the champion.")
    measured: Measured | None = None
    decided_before: int | None = Field(
        None, description="Models that this test split has decided about before."
    )
    baselines: tuple[Baseline, ...] = ()


def render_report(content: ReportContent) -> str:
    """The report as the text of one HTML file."""
    metrics = [(*METRIC_NAMES[n], e) for n, e in content.metrics.estimates().items()]
    return render_page("report.html.jinja", content, metrics=metrics, scale=_scale(content))


def _scale(content: ReportContent) -> dict[str, float]:
    """Where the strip of accuracies begins, and how wide a unit of accuracy is, in per cent."""
    lowest = min([content.metrics.accuracy.low, *(b.accuracy for b in content.baselines)])
    start = max(0.0, round(lowest - 0.2 * (1 - lowest) - 0.005, 2))
    return {"start": start, "width": 100 / (1 - start)}
