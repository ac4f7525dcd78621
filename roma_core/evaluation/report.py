"""The evaluation report, one self-contained HTML file, and the model card, in Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import Field, field_validator

from roma_core.evaluation.classification_metrics import ClassificationMetrics
from roma_core.evaluation.config import Baseline, FactSheet, ServingChecks
from roma_core.evaluation.metrics import (
    LABELS,
    Change,
    MeasuredBaseline,
    PartEstimate,
    ReconstructionMetrics,
    RegressionMetrics,
)
from roma_core.schema import DataSchema
from roma_core.settings import Frozen

AnyMetrics = ClassificationMetrics | RegressionMetrics | ReconstructionMetrics


class Plot(Frozen):
    """A figure with its caption and a text alternative."""

    title: str
    caption: str
    alt: str = Field(min_length=1)
    png: bytes = Field(repr=False)
    svg: str = Field("", repr=False)  # shown in its place, if not empty; trusted
    wide: bool = False  # takes the full width of the page

    @field_validator("png")
    @classmethod
    def _is_png(cls, png: bytes) -> bytes:
        if not png.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"expected the bytes of a PNG file, got {png[:8]!r}…")
        return png


FIGURES = {
    "confusion": (
        "Confusion matrix",
        "Rows are true classes, columns predicted ones; numbers count test series.",
        "Confusion matrix of the test series.",
    ),
    "reliability": (
        "Reliability",
        "Accuracy of predictions by confidence. A calibrated model is on the diagonal.",
        "Accuracy against confidence.",
    ),
    "curves": (
        "ROC and precision-recall curves",
        "Sensitivity against the false-positive rate, and precision against sensitivity, over all "
        "thresholds; dashed: chance. Of more than two classes, each against the rest.",
        "ROC curve and precision-recall curve.",
    ),
    "embedding_map": (
        "Embedding map",
        "The first two principal components of the features of test series: of the pretrained encoder, "
        "which saw no labels, or without one of the model's own. Pointing at a series shows its id, "
        "class and prediction.",
        "Test series on two principal components of their features, coloured by class.",
    ),
    "series": (
        "Three series",
        "Test series at the 10th, 50th and 100th percentile of the error.",
        "True and predicted targets over position, of three test series.",
    ),
    "against_true": (
        "Predicted against true, and residuals",
        "Targets of the test split: predicted against true, exact predictions are on the line; and "
        "predicted minus true, against the true target and against the length of the series.",
        "Predicted against true targets; residuals against targets and lengths.",
    ),
    "by_position": (
        "Error against position",
        "Each point is over observations at neighbouring positions, about equally many.",
        "Root mean squared error against position.",
    ),
    "reconstructions": (
        "Reconstructions",
        "Test series with the observations that were visible to the pretrained model, the hidden ones "
        "and its reconstructions of these.",
        "Visible, hidden and reconstructed observations of some test series.",
    ),
    "groups": (
        "Error by class",
        "Mean squared error of the hidden observations of each class, with 95 % intervals.",
        "Mean squared error by class of the series.",
    ),
}
"""Name of a figure → its title, caption and text alternative."""
_HALF_WIDTH = ("confusion", "reliability", "embedding_map", "by_position")


def plot_of(name: str, png: bytes, svg: str = "") -> Plot:
    """A figure of FIGURES, or the learning curve of ``curve_TRAINING``."""
    training = name.removeprefix("curve_")
    caption = "Metrics by epoch; eval is the validation split; dashed: the weights that were kept."
    curve = (f"Learning curve: {training}", caption, f"Learning curve of the {training}.")
    title, caption, alt = FIGURES.get(name, curve)
    wide = name not in _HALF_WIDTH
    if training != name:
        wide = int.from_bytes(png[16:20]) > 800  # of the header: pixels across, of several panels
    return Plot(title=title, caption=caption, alt=alt, png=png, svg=svg, wide=wide)


class _Content(Frozen):
    """What the report and the model card share."""

    facts: tuple[FactSheet, ...] = ()
    champion_version: str | None = None  # None if there was no champion
    champion_problem: str | None = None  # why it could not be evaluated
    changes: tuple[Change, ...] = ()  # against the champion
    decided_before: int | None = None  # earlier models that this test split has decided about
    baselines: tuple[Baseline, ...] = ()


class ReportContent(_Content):
    """Everything the report of any task shows."""

    title: str
    summary: str  # one or two sentences: the model and the data
    created: str  # date and time, as it should be printed
    metrics: AnyMetrics
    leaks: tuple[str, ...] = ()  # test series that were in the training data
    plots: tuple[Plot, ...] = ()
    limits: tuple[str, ...] = ()  # of the numbers, one per line
    measured_baselines: tuple[MeasuredBaseline, ...] = ()
    serving_checks: ServingChecks | None = None
    not_packaged: str = ""  # why there is no package
    n_observed: tuple[int, ...] = ()  # visible observations, of reconstructions


class CardContent(_Content):
    """Everything a card shows; without ``metrics`` the model was not evaluated by itself."""

    name: str
    kind: Literal["classifier", "regressor", "encoder", "autoencoder"]
    data_schema: DataSchema
    max_length: int
    n_features: int = 0  # of an encoder
    metrics: AnyMetrics | None = None
    lineage: dict[str, str] = Field({})  # identifiers of what the model was made from


METRICS = {
    "classification": {
        "accuracy": ("Accuracy", "fraction of series whose most probable class is the true one"),
        "balanced_accuracy": ("Balanced accuracy", "mean recall of the classes"),
        "macro_f1": ("Macro F1", "mean F1 of the classes"),
        "auroc": ("AUROC", "area under the ROC curve, mean over classes; 0.5 is chance"),
        "average_precision": ("Average precision", "area under the precision-recall curve"),
        "log_loss": ("Log loss", "mean −ln p(true class); lower is better"),
        "brier": (
            "Brier score",
            "mean squared error of the probabilities, summed over more than two classes; lower is better",
        ),
        "calibration_error": ("Calibration error", "mean |accuracy − confidence|; lower is better"),
    },
    "regression": {
        "r2": ("R²", "1 − squared error / variance, mean over targets; 0 is that of their mean"),
        "nrmse": ("Normalised RMSE", "in standard deviations of each target in train"),
        "coverage_95": ("Coverage", "fraction within 1.96 predicted deviations; ideally 0.95"),
        "mse": ("Mean squared error", "per value: over all targets and observations or series"),
        "rmse": ("Root mean squared error", "in the unit of the targets, if they share one"),
        "mae": ("Mean absolute error", "per value"),
    },
    "reconstruction": {
        "r2": ("R²", "1 − squared error / that of the mean of train, of hidden, normalised values"),
        "linear_r2": ("R² of straight lines", "between the visible values of each channel"),
        "gain_r2": ("R² less that of straight lines", "paired: on the same hidden values"),
        "mse": ("Mean squared error", "per hidden value, against the observed values with noise"),
        "rmse": ("Root mean squared error", "in the unit of the data, if its channels share one"),
        "mae": ("Mean absolute error", "per hidden value"),
        "nrmse": ("Normalised RMSE", "errors as fractions of each channel's range in train"),
        "noise_mse": ("Noise", "mean squared error of the values without noise: a lower bound"),
        **{
            f"coverage_{level}": (
                f"Coverage of {level} % intervals",
                f"fraction of values within {width} predicted deviations; ideally {level / 100:g}",
            )
            for level, width in ((50, "0.674"), (80, "1.28"), (95, "1.96"))
        },
        "clean_mse": ("Mean squared error, clean", "against the values without noise"),
        "clean_rmse": ("Root mean squared error, clean", "against the values without noise"),
        "clean_mae": ("Mean absolute error, clean", "against the values without noise"),
        "clean_nrmse": ("Normalised RMSE, clean", "against the values without noise"),
    },
}
"""Task → name of a metric → its label and meaning, in the order of the report."""


def render_report(content: ReportContent) -> str:
    """The report as the text of one HTML file."""
    metrics, values = content.metrics, dict[str, Any]()
    if isinstance(metrics, ClassificationMetrics):
        task, headline = "classification", metrics.primary
        # the strip of accuracies: where it begins, and per cent of its width per unit
        lowest = min([metrics.accuracy.low, *(b.accuracy for b in content.baselines)])
        start = max(0.0, round(lowest - 0.2 * (1 - lowest) - 0.005, 2))
        values = {"scale": {"start": start, "width": 100 / (1 - start)}}
    elif isinstance(metrics, RegressionMetrics):
        task, headline = "regression", metrics.primary
    else:
        task, found, headline = "reconstruction", metrics.overall, metrics.primary
        baselines = {
            "this model": "",
            "straight lines between visible observations": "linear_",
            "mean of the train split": "mean_",
        }
        values = {
            "has_clean": "clean_mse" in found,
            "compared": [
                (label, found[f"{key}mse"], found.get(f"{key}clean_mse"))
                for label, key in baselines.items()
                if f"{key}mse" in found
            ],
            "by_observed": [
                (n, found[f"mse_observed_{n}"], found.get(f"clean_mse_observed_{n}"))
                for n in content.n_observed
            ],
        }
    estimates = metrics.estimates()
    rows = [(*text, estimates[name]) for name, text in METRICS[task].items() if name in estimates]
    values["labels"] = LABELS
    template = _environment(autoescape=True).get_template("report.html.jinja")
    primary = LABELS[metrics.primary_metric]
    values |= {"task": task, "headline": headline, "primary": primary, "rows": rows}
    return template.render(content=content, **values)


def render_page(name: str, content: Mapping[str, Any]) -> str:
    """A page of the report's style, with title, summary and created, as the text of one HTML file."""
    return _environment(autoescape=True).get_template(f"{name}.html.jinja").render(content=content)


def render_card(content: CardContent) -> str:
    """The card as Markdown; text from outside is escaped in its cells."""
    estimates = {} if content.metrics is None else content.metrics.estimates()
    task = {"regressor": "regression", "autoencoder": "reconstruction"}.get(content.kind)
    names = METRICS[task or "classification"]
    rows = [(label, estimates[name]) for name, (label, _) in names.items() if name in estimates]
    template = _environment(autoescape=False).get_template("model_card.md.jinja")
    return template.render(content=content, rows=rows, labels=LABELS)


def _environment(autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("roma_core.evaluation", ""),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name, spec in _FORMATS.items():
        environment.filters[name] = partial(_number, spec=spec)
        environment.filters[f"{name}_interval"] = partial(_interval, spec=spec)
    environment.filters |= {"base64": lambda data: base64.b64encode(data).decode(), "cell": _cell}
    environment.tests["significant"] = lambda e: e.low is not None and (e.low > 0 or e.high < 0)
    return environment


_FORMATS = {"fixed": ".3f", "number": ".4g", "signed": "+z.3f"}


def _number(x: float | None, spec: str) -> str:
    """``0.012``, ``+0.012``, ``0.003412``; a dash for None."""
    return "–" if x is None else format(x, spec).replace("-", "−")


def _interval(x: PartEstimate | tuple[float, float] | None, spec: str) -> str:
    """``0.976–0.997``, ``−0.012 to +0.003``; a dash if there is none."""
    low, high = (x.low, x.high) if isinstance(x, PartEstimate) else x or (None, None)
    if low is None or high is None:
        return "–"
    return f"{_number(low, spec)}{' to ' if '+' in spec else '–'}{_number(high, spec)}"


def _cell(text: object) -> str:
    """Text of a table's cell: on one line, with Markdown and HTML markup escaped."""
    line = " ".join(str(text).split()) or "–"
    return re.sub(r"[\\`*_\[\]<|]", r"\\\g<0>", line)
