"""What all figures share: colours, style, labels, and PNG bytes that fit into asset metadata."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from roma_core.schema import Channel, PositionAxis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BYTES = 40 * 1024  # of a picture, which is stored inside asset metadata
BLUE, ORANGE, GREEN, GREY, INK = "#2f6db3", "#d9652b", "#3f8f5b", "#8a929c", "#22272e"
STYLE: Any = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "font.size": 10,
    "text.parse_math": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
}

P = ParamSpec("P")


def as_png(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """Draw in the style of all figures, and return the figure as PNG."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> bytes:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        with rc_context(STYLE):
            figure = draw(*args, **kwargs)
            FigureCanvasAgg(figure)
            return png_of(figure)

    return drawn


def png_of(figure: Figure) -> bytes:
    """The figure as PNG with a palette, at the highest resolution that stays below MAX_BYTES."""
    from PIL import Image

    for dots_per_inch in (160, 120, 90, 60, 40):
        raw, small = io.BytesIO(), io.BytesIO()
        figure.savefig(raw, format="png", dpi=dots_per_inch)
        figure.set_layout_engine("none")  # places are in inches: found once, they stay
        with_palette = Image.open(raw).convert("RGB").quantize(128, dither=Image.Dither.NONE)
        with_palette.save(small, format="png", optimize=True)
        if small.tell() <= MAX_BYTES:
            return small.getvalue()
    raise ValueError(
        f"the plot takes {small.tell()} bytes even at {dots_per_inch} dpi, more than {MAX_BYTES}; "
        f"show fewer series or channels"
    )


def short(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def log_scale(panel: Any) -> None:
    """Of y, with plain labels: no text is mathtext, as names may have dollar signs."""
    from matplotlib.ticker import LogFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(LogFormatter())
    panel.yaxis.set_minor_formatter(LogFormatter())


def label_of(part: PositionAxis | Channel) -> str:
    """``depth (m)``; without the unit of a pure number."""
    return part.name if part.unit in ("1", part.name) else f"{part.name} ({part.unit})"
