"""What a check of a data set found: how bad, how often, and what it looks like."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

_SHOWN = 5


class Finding(BaseModel):
    """One kind of trouble in one data set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    check: str = Field(description="Name of the check.")
    severity: Literal["error", "warning"]
    count: int = Field(gt=0, description="How many series, files or names it concerns.")
    examples: tuple[str, ...] = Field(description="A sentence each, for the first few of them.")

    def lines(self) -> list[str]:
        """The examples, and how many more there are."""
        more = self.count - len(self.examples)
        return [*self.examples, *([f"… and {more:,} more: {self.check}"] if more > 0 else [])]


def finding(
    check: str, severity: Literal["error", "warning"], examples: Sequence[str], count: int = 0
) -> list[Finding]:
    """A list with one finding, or with none if there is no example."""
    if not examples:
        return []
    return [
        Finding(
            check=check,
            severity=severity,
            count=count or len(examples),
            examples=tuple(examples[:_SHOWN]),
        )
    ]


def as_markdown(findings: Iterable[Finding]) -> str:
    """The findings as a table."""
    rows = [
        f"| {f.severity} | {f.check} | {f.count:,} | {f.examples[0].replace('|', '/')} |"
        for f in findings
    ]
    if not rows:
        return "nothing found"
    return "\n".join(["| severity | check | count | example |", "| --- | --- | --: | --- |", *rows])
