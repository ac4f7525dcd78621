"""Pictures in the metadata of materialisations.

Dagster's page shows Markdown of fewer than 1000 characters at once, and longer texts after a click. A PNG
is longer; the drawings here, SVGs of few elements, are short enough.
"""

from __future__ import annotations

import base64
import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import dagster as dg

_MAX_CHARACTERS = 999
_BLUE, _ORANGE, _GREY = "#26b", "#d62", "#888"
_WIDTH, _HEIGHT = 150, 62  # pixels of a panel of curves
Metadata = dict[str, dg.MetadataValue[Any]]


def picture(png: bytes, alt: str) -> dg.MetadataValue[Any]:
    """Metadata value with a PNG, which the page shows after a click."""
    return dg.MetadataValue.md(f"![{alt}](data:image/png;base64,{base64.b64encode(png).decode()})")


def _drawing(alt: str, width: float, height: float, lines: list[str], texts: list[str]) -> str:
    """Markdown with an SVG of lines below texts; on white, as the page may be dark."""
    svg = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:.0f}' height='{height:.0f}' style="
        f"'background:#fff;font:11px sans-serif;fill:none'>{''.join(lines)}<g fill='#333'>{''.join(texts)}</g></svg>"
    )
    return f"![{alt}](<data:image/svg+xml,{quote(svg, safe=' /:=;,-()' + chr(39))}>)"


def _text(x: float, y: float, text: str, colour: str = "") -> str:
    fill = f" fill='{colour}'" if colour else ""
    return f"<text x='{x:.0f}' y='{y:.0f}'{fill}>{html.escape(text, quote=False)}</text>"


def _line(points: Sequence[tuple[float, float]], colour: str, more: str = "") -> str:
    """A line through points, a dash at a single one; steps are relative, as that is shorter."""
    at = [(round(x), round(y)) for x, y in points]
    steps = " ".join(f"{b[0] - a[0]} {b[1] - a[1]}" for a, b in itertools.pairwise(at))
    path = f"M{at[0][0]} {at[0][1]}l{steps.replace(' -', '-') or '3 0'}"
    return f"<path stroke='{colour}'{more} d='{path}'/>"


def _summary(drawings: Iterable[str]) -> Metadata:
    """``summary_plot``: the first that is short enough; nothing, if none is."""
    short = next((one for one in drawings if len(one) <= _MAX_CHARACTERS), None)
    return {} if short is None else {"summary_plot": dg.MetadataValue.md(short)}


def curves(records: Sequence[Mapping[str, Any]], metric: str | None, kept: int | None) -> Metadata:
    """Losses, and a validation ``metric``, by epoch; dashed at the step whose weights were ``kept``."""
    epochs = {record["step"]: record["epoch"] for record in records}
    panels = [("loss", {"train/loss": _BLUE, "eval/loss": _ORANGE})]
    panels += [(metric.removeprefix("eval/"), {metric: _ORANGE})] if metric else []

    def draw(n: int) -> str:
        lines, left, last = list[str](), 40, max(epochs.values(), default=1)
        texts = [_text(134, 12, "train", _BLUE), _text(164, 12, "validation", _ORANGE)]
        for title, names in panels:
            found = {
                colour: [(r["epoch"], r["metrics"][name]) for r in records if name in r["metrics"]]
                for name, colour in names.items()
            }
            values = [y for points in found.values() for _, y in points] or [0]
            low, high = min(values), max(values)
            is_log = title == "loss" and low > 0
            scale = math.log if is_log else float
            per_unit = (_HEIGHT - 4) / ((scale(high) - scale(low)) or 1)
            for colour, points in found.items():
                thin = points[:: -(-len(points) // n)][:-1] + points[-1:] if points else []
                y = [20 + (scale(high) - scale(value)) * per_unit for _, value in thin]
                x = [left + _WIDTH * epoch / last for epoch, _ in thin]
                lines += [_line([*zip(x, y, strict=True)], colour)] if thin else []
            texts += [_text(left, 12, f"{title}, log scale" if is_log else title)]
            texts += [_text(left - 38, y, f"{v:.3g}") for y, v in ((24, high), (_HEIGHT + 18, low))]
            if kept in epochs:
                at = left + _WIDTH * epochs[kept] / last
                lines.append(_line([(at, 18), (at, _HEIGHT + 18)], _GREY, " stroke-dasharray='3'"))
            left += _WIDTH + 50
        mark = "; dashed: weights kept" if kept in epochs else ""
        texts.append(_text(40, _HEIGHT + 34, f"epochs 0-{last:g}{mark}"))
        return _drawing("learning curve", left - 40, _HEIGHT + 40, lines, texts)

    return _summary(map(draw, range(50, 3, -2)))


def bars(alt: str, sizes: Mapping[str, float], limits: Sequence[float], unit: str) -> Metadata:
    """The largest sizes as bars, in another colour above the larger of the dashed ``limits``."""
    largest = sorted(sizes.items(), key=lambda one: -one[1])[:8]
    scale = 150 / max([size for _, size in largest] + [1.4 * max(limits)])

    def draw(n: int) -> str:
        lines, texts = [], [_text(4, 18 * n + 14, unit)]
        for k, (name, size) in enumerate(largest[:n]):
            y, colour = 18 * k + 9, _ORANGE if size > max(limits) else _BLUE
            lines.append(_line([(150, y), (150 + scale * size, y)], colour, " stroke-width='9'"))
            label = name if len(name) < 22 else f"{name[:20]}..."
            texts.append(_text(4, y + 4, f"{label} {size:.2g}"))
        for x in (150 + scale * limit for limit in limits):
            lines.append(_line([(x, 0), (x, 18 * n)], _GREY, " stroke-dasharray='3'"))
        return _drawing(alt, 310, 18 * n + 20, lines, texts)

    return _summary(map(draw, range(len(largest), 0, -1)))


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Metadata:
    """A confusion matrix, darker where a larger fraction of the true class (row) is."""
    shades: dict[int, str] = {}  # quarter of the row -> squares, as lines as thick as long
    for i, row in enumerate(counts):
        for k, count in enumerate(row):
            if count:
                quarter = math.ceil(4 * count / sum(row))
                shades[quarter] = f"{shades.get(quarter, '')}M{12 * k} {12 * i + 6}h11"
    side = 12 * len(counts)
    lines = [
        f"<path stroke='{_BLUE}' opacity='{quarter / 4}' stroke-width='11' d='{path}'/>"
        for quarter, path in sorted(shades.items())
    ]
    names = [_text(side + 4, 12 * i + 10, name[:24]) for i, name in enumerate(classes)]
    given = [_text(0, side + 13, "row: true class; column: predicted")]
    return _summary(
        _drawing("confusion matrix", max(side + 150, 200), side + 18, lines, texts)
        for texts in (names + given, given)
    )


def against_true(name: str, pairs: Sequence[Sequence[float]]) -> Metadata:
    """Predicted against true values of one quantity, by pairs of true and predicted."""
    values = [value for pair in pairs for value in pair] or [0]
    low, scale = min(values), 120 / ((max(values) - min(values)) or 1)
    points = [((x - low) * scale, 126 - (y - low) * scale) for x, y in pairs]
    texts = [_text(0, 142, f"{name[:24]}: predicted against true")]

    def draw(n: int) -> str:
        thin = points[:: -(-len(points) // n) or 1]
        dots = "".join(f"M{x + 4:.0f} {y:.0f}h0" for x, y in thin)
        dots = f"<path stroke='{_BLUE}' stroke-width='4' stroke-linecap='round' d='{dots}'/>"
        lines = [_line([(4, 126), (124, 6)], _GREY), dots]
        return _drawing("predicted against true values", 260, 146, lines, texts)

    return _summary(map(draw, range(80, 10, -5)))
