"""The evaluation report of a regression."""

from __future__ import annotations

from pydantic import Field

from roma_core.evaluation.page import Page, render_page
from roma_core.evaluation.regression_metrics import RegressionMetrics


class RegressionReport(Page):
    """Everything the report shows."""

    metrics: RegressionMetrics
    leaks: tuple[str, ...] = Field(description="Ways in which training may have seen test series.")
    not_served: str = Field(description="Why there is no package.")


def render_regression_report(content: RegressionReport) -> str:
    """The report as the text of one HTML file."""
    metrics = content.metrics
    headline = (
        ("Mean squared error", "per value: over all observations and targets", metrics.mse),
        ("Root of it", "in the unit of the targets, if they share one", metrics.rmse),
        ("Mean absolute error", "per value", metrics.mae),
    )
    return render_page("regression_report.html.jinja", content, headline=headline)
