"""What all reports have in common: one HTML file that one can send to a colleague.

It needs nothing beside itself: styles are inside, plots are embedded. All text is escaped, so class
names and facts may hold anything.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field, field_validator

from roma_core.evaluation.facts import FactSheet
from roma_core.evaluation.metrics import Estimate, PartEstimate

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
