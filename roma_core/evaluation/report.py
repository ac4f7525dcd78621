"""The evaluation report: one HTML file that one can send to a colleague.

It needs nothing beside itself: styles are inside, plots are embedded. All text is escaped, so class
names and facts may hold anything.
"""

from __future__ import annotations

import base64
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field, field_validator

from roma_core.evaluation.comparison import Change
from roma_core.evaluation.facts import Baseline, FactSheet
from roma_core.evaluation.measured import Measured
from roma_core.evaluation.metrics import Estimate, Metrics

_PNG_START = b"\x89PNG\r\n\x1a\n"
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


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Plot(_Document):
    """A figure with its caption, and in words for those who do not see it."""

    title: str
    caption: str
    alt: str = Field(min_length=1)
    png: bytes = Field(repr=False)
    wide: bool = Field(False, description="Takes the full width of the page.")

    @field_validator("png")
    @classmethod
    def _is_png(cls, png: bytes) -> bytes:
        if not png.startswith(_PNG_START):
            raise ValueError(f"expected the bytes of a PNG file, got {png[:8]!r}…")
        return png


class ReportContent(_Document):
    """Everything the report shows."""

    schema_version: Literal[1] = 1
    title: str
    summary: str = Field(description="One or two sentences: what was trained on what.")
    created: str = Field(description="Date and time, as it should be printed.")
    split: str = Field("test", description="Which series were judged.")
    metrics: Metrics
    champion_version: str | None = Field(None, description="None if there was no champion.")
    champion_problem: str | None = Field(None, description="Why it could not be evaluated.")
    changes: tuple[Change, ...] = Field((), description="Against the champion.")
    measured: Measured | None = None
    decided_before: int | None = Field(
        None, description="Models that this test split has decided about before."
    )
    baselines: tuple[Baseline, ...] = ()
    plots: tuple[Plot, ...] = ()
    facts: tuple[FactSheet, ...] = ()
    limits: tuple[str, ...] = Field((), description="What the numbers do not say; one per line.")


def render_report(content: ReportContent) -> str:
    """The report as the text of one HTML file."""
    environment = Environment(
        loader=PackageLoader("roma_core.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["share"] = lambda x: "–" if x is None else f"{x:.3f}"
    environment.filters["interval"] = interval
    environment.filters["pair"] = lambda x: "–" if x is None else f"{x[0]:.3f}–{x[1]:.3f}"
    environment.filters["signed"] = signed
    metrics = [(*METRIC_NAMES[n], e) for n, e in content.metrics.estimates().items()]
    return environment.get_template("report.html.jinja").render(
        content=content, metrics=metrics, scale=_scale(content)
    )


def interval(estimate: Estimate) -> str:
    """``0.976–0.997``"""
    return f"{estimate.low:.3f}–{estimate.high:.3f}"


def signed(x: float) -> str:
    """``+0.012``, ``−0.012``; never a negative zero."""
    return f"{round(x, 3) + 0.0:+.3f}".replace("-", "−")


def _scale(content: ReportContent) -> dict[str, float]:
    """Where the strip of accuracies begins, and how wide a unit of accuracy is, in per cent."""
    lowest = min([content.metrics.accuracy.low, *(b.accuracy for b in content.baselines)])
    start = max(0.0, round(lowest - 0.2 * (1 - lowest) - 0.005, 2))
    return {"start": start, "width": 100 / (1 - start)}
