"""Accuracies of past evaluations as an inline drawing (SVG)."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from roma_pipelines.pages.overview import Evaluation

_WIDTH, _HEIGHT, _EDGE = 320.0, 84.0, 10.0


def trend(evaluations: Sequence[Evaluation]) -> Markup:
    """A dot per evaluation with its interval; hollow where the gate refused it."""
    low = min(e.low for e in evaluations)
    high = max(e.high for e in evaluations)
    span = (high - low) or 1.0

    def x(k: int) -> float:
        share = 0.5 if len(evaluations) == 1 else k / (len(evaluations) - 1)
        return _EDGE + share * (_WIDTH - 2 * _EDGE)

    def y(value: float) -> float:
        return _EDGE + (high - value) / span * (_HEIGHT - 2 * _EDGE)

    line = " ".join(f"{x(k):.1f},{y(e.accuracy):.1f}" for k, e in enumerate(evaluations))
    parts = [f'<polyline points="{line}" class="line"/>']
    for k, e in enumerate(evaluations):
        said = f"{e.accuracy:.3f} ({e.low:.3f}–{e.high:.3f})"
        said += {True: ", passed the gate", False: ", refused by the gate", None: ""}[e.passed]
        parts.append(
            f'<g><title>{escape(said)}</title><line x1="{x(k):.1f}" x2="{x(k):.1f}" y1="{y(e.low):.1f}" '
            f'y2="{y(e.high):.1f}" class="range"/><circle cx="{x(k):.1f}" cy="{y(e.accuracy):.1f}" '
            f'r="3.5" class="{"refused" if e.passed is False else "point"}"/></g>'
        )
    last = evaluations[-1]
    label = (
        f"test accuracy of the last {len(evaluations)} evaluations, {last.accuracy:.3f} at the end"
    )
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
