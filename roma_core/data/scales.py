"""A scale for positions, taken from the train split where the configuration asks for ``auto``.

The fastest rotation of the model turns one radian per scale; with the default frequencies the
slowest of three quarters of them turns one radian per 1,000 scales. So the scale is the typical gap
between observations, unless the series are so long that the slowest rotation would turn round on
the way: then it is their span / 6,000, at the price of detail.
"""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

_TURN = 6000.0  # scales that the slowest rotation needs for most of a turn


class ScaleFit:
    """Typical gap and span of one axis, over series that are shown one after the other."""

    def __init__(self) -> None:
        self._gaps = array("d")  # the median gap of each series
        self._spans = array("d")

    def add(self, positions: NDArray[np.float64]) -> None:
        """``(N,)`` positions of one series on the axis, in any order."""
        gaps = np.diff(np.sort(positions))
        gaps = gaps[gaps > 0]
        if len(gaps):
            self._gaps.append(float(np.median(gaps)))
            self._spans.append(float(gaps.sum()))

    def scale(self) -> float:
        """The scale, to two digits, so that a few more series do not change it; 1 without gaps."""
        if not self._gaps:
            return 1.0
        gap = float(np.median(np.frombuffer(self._gaps)))
        span = float(np.quantile(np.frombuffer(self._spans), 0.95))
        return float(f"{max(gap, span / _TURN):.2g}")
