"""Where test series lie among the features of the pretrained encoder, in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from roma_core.evaluation.drawing import STYLE, new_figure, png_of, short
from roma_core.evaluation.page import Plot

_MOST_POINTS = 2000  # more would hide each other
_LEGEND = 20  # classes; more have no colours of their own


def embedding_map(
    features: NDArray[np.float32], labels: NDArray[np.int64], classes: Sequence[str]
) -> Plot:
    """Two principal components of features ``(n, D)`` of series with labels ``(n,)``."""
    step = -(-len(features) // _MOST_POINTS)
    features, labels = features[::step], labels[::step]
    points, shares = principal_components(features)
    return Plot(
        title="Embedding map",
        caption="Test series among the features of the pretrained encoder, which has seen no label: "
        "the two directions in which they vary most. Classes that lie apart here are easily told.",
        alt="Test series on two principal components of their features, coloured by class.",
        png=_drawn(points, shares, labels, classes),
    )


def principal_components(
    features: NDArray[np.float32],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The first two of ``(n, D)``: places ``(n, 2)``, and their shares of all variance ``(2,)``.

    The larger side of each component is positive, so that equal features give equal maps.
    """
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    left, size, right = np.linalg.svd(centred, full_matrices=False)
    points, shares = np.zeros((len(features), 2)), np.zeros(2)
    for k in range(min(2, len(size))):
        sign = np.sign(right[k, np.abs(right[k]).argmax()]) or 1.0
        points[:, k] = sign * left[:, k] * size[k]
        shares[k] = size[k] ** 2 / max((size**2).sum(), np.finfo(np.float64).tiny)
    return points, shares


def _drawn(
    points: NDArray[np.float64],
    shares: NDArray[np.float64],
    labels: NDArray[np.int64],
    classes: Sequence[str],
) -> bytes:
    colours = mpl.colormaps["tab10" if len(classes) <= 10 else "tab20"]
    with mpl.rc_context(STYLE):
        figure = new_figure(6.4, 4.6)
        axes = figure.subplots()
        for k, name in enumerate(classes):
            mine = points[labels == k]
            if len(mine):
                axes.scatter(
                    mine[:, 0], mine[:, 1], s=14, color=colours(k % colours.N), alpha=0.75, linewidths=0,
                    label=short(name),
                )  # fmt: skip
        axes.set_xlabel(f"first component, {shares[0]:.0%} of the variance")
        axes.set_ylabel(f"second, {shares[1]:.0%}")
        if len(classes) <= _LEGEND:
            figure.legend(loc="outside right upper", markerscale=1.6)
        return png_of(figure)
