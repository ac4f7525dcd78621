"""The model card: what somebody must know before using a model, made of facts alone. Markdown.

It travels inside the package and is the description of the registered version.
"""

from __future__ import annotations

from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict

from roma_core.data.schema import DataSchema
from roma_core.evaluation.comparison import Change
from roma_core.evaluation.facts import Baseline, FactSheet
from roma_core.evaluation.metrics import Metrics
from roma_core.evaluation.page import difference_interval, interval, signed
from roma_core.evaluation.report import METRIC_NAMES


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
