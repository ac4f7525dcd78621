"""How the figures of a report are drawn: their style, and PNG bytes of at most 64 KiB.

Figures are drawn on the Agg canvas directly: no window system, no global state, usable from any
thread. They are small enough to be embedded in HTML and in asset metadata.
"""

from __future__ import annotations

import io
from typing import Any, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

MAX_BYTES = 64 * 1024
BLUE, ORANGE, GREEN, GREY, INK = "#2f6db3", "#d9652b", "#3f8f5b", "#8a929c", "#22272e"
STYLE: Any = {
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
}


def short(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def new_figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> Figure:
    """A figure of the given size in inches, on the Agg canvas."""
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def legend_above(figure: Figure, columns: int = 4) -> None:
    """One legend of all panels above them, where it covers nothing that is drawn."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(
        named.values(), named.keys(), loc="outside upper center", ncols=min(columns, len(named))
    )


def png_of(figure: Figure) -> bytes:
    """The figure as PNG with a palette, at the highest resolution that stays below MAX_BYTES."""
    for dots_per_inch in (160, 120, 90, 60):
        raw = io.BytesIO()
        figure.savefig(raw, format="png", dpi=dots_per_inch)
        small = io.BytesIO()
        Image.open(raw).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
            small, format="png", optimize=True
        )
        if small.tell() <= MAX_BYTES:
            return small.getvalue()
    raise ValueError(
        f"the plot takes {small.tell()} bytes even at {dots_per_inch} dpi, more than {MAX_BYTES}; "
        f"show fewer series or channels"
    )
