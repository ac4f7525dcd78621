"""The evaluation report of a classifier.

What all reports have in common: one HTML file that one can send to a colleague.
The report on a pretraining model's reconstructions.
The evaluation report of a regression.
The model card: what somebody must know before using a model, made of facts alone. Markdown.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field, field_validator

from roma_core.evaluation.compare import Change
from roma_core.evaluation.config import Baseline, FactSheet, ServingChecks
from roma_core.evaluation.metrics import Estimate, Metrics, PartEstimate, RegressionMetrics
from roma_core.evaluation.reconstruction import ReconstructionMetrics
from roma_core.schema import DataSchema

_PNG_START = b"\x89PNG\r\n\x1a\n"


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


class Page(_Document):
    """What every report shows; each adds its findings."""

    schema_version: Literal[1] = 1
    title: str
    summary: str = Field(description="One or two sentences: what was trained on what.")
    created: str = Field(description="Date and time, as it should be printed.")
    split: str = Field("test", description="Which series were judged.")
    plots: tuple[Plot, ...] = ()
    facts: tuple[FactSheet, ...] = ()
    limits: tuple[str, ...] = Field((), description="What the numbers do not say; one per line.")


def render_page(template: str, content: Page, **values: Any) -> str:
    """The text of one HTML file, by a template that extends ``page.html.jinja``."""
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
    environment.filters["number"] = lambda x: "–" if x is None else number(x)
    environment.filters["signed"] = signed
    environment.filters["difference_interval"] = difference_interval
    environment.tests["sure"] = is_sure
    return environment.get_template(template).render(content=content, **values)


def number(x: float) -> str:
    """Four digits of a number of any size: ``0.003412``, ``200.3``."""
    return f"{x:.4g}".replace("-", "−")


def interval(estimate: Estimate) -> str:
    """``0.976–0.997``"""
    return f"{estimate.low:.3f}–{estimate.high:.3f}"


def difference_interval(difference: PartEstimate) -> str:
    """``−0.012 to +0.034``; a dash if there is none."""
    if difference.low is None or difference.high is None:
        return "–"
    return f"{signed(difference.low)} to {signed(difference.high)}"


def is_sure(difference: PartEstimate) -> bool:
    """Whether its interval sets it apart from zero."""
    if difference.low is None or difference.high is None:
        return False
    return difference.low > 0 or difference.high < 0


def signed(x: float) -> str:
    """``+0.012``, ``−0.012``; never a negative zero."""
    return f"{round(x, 3) + 0.0:+.3f}".replace("-", "−")


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
    measured: ServingChecks | None = None
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


class CardContent(BaseModel):
    """Everything a card says; without ``metrics`` the model was not judged by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["classifier", "encoder"]
    data_schema: DataSchema
    max_length: int
    n_features: int | None = None
    facts: tuple[FactSheet, ...] = ()
    metrics: Metrics | None = None
    changes: tuple[Change, ...] = ()
    champion_version: str | None = None
    champion_problem: str | None = None
    baselines: tuple[Baseline, ...] = ()
    decided_before: int | None = None
    lineage: dict[str, str] = {}


def render_card(content: CardContent) -> str:
    """The card as Markdown; what comes from outside cannot break out of its cell."""
    environment = Environment(  # Markdown: nothing here is HTML
        loader=PackageLoader("roma_core.evaluation", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    environment.filters["share"] = lambda x: "–" if x is None else f"{x:.3f}"
    environment.filters["pair"] = lambda x: "–" if x is None else f"{x[0]:.3f}–{x[1]:.3f}"
    environment.filters["interval"] = interval
    environment.filters["signed"] = signed
    environment.filters["difference_interval"] = difference_interval
    metrics = content.metrics
    named = [] if metrics is None else [
        (METRIC_NAMES[name][0], estimate) for name, estimate in metrics.estimates().items()
    ]  # fmt: skip
    return environment.get_template("model_card.md.jinja").render(content=content, named=named)


def _cell(text: object) -> str:
    """Text of a table's cell: on one line, without what Markdown or HTML would take for markup."""
    line = " ".join(str(text).split()) or "–"
    for character in "\\`*_[]<|":
        line = line.replace(character, f"\\{character}")
    return line
