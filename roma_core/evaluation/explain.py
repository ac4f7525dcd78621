"""Occlusion: how much the prediction of a series changes without the observations of a part of it.

The model takes any set of observations. So those of a window of positions, of a channel or of a
category are left out, and the series is predicted again as the served package predicts any other.
A channel that was never missing in training, and so cannot be left out, is set to its mean in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Literal

import numpy as np

from roma_core.serving.pyfunc_model import denormalise_values
from roma_core.serving.registry_client import series_of
from roma_core.settings import Frozen

_LEAST_P = 1e-300  # its logarithm is finite
_N_FIGURES = 4


class Part(Frozen):
    """A part of a series; ``importance`` is the output of the whole series minus that without the part."""

    kind: Literal["window", "channel", "category"]
    name: str  # of the channel, or of the axis of a window or category
    start: float | None = None  # of a window [start, end), of the last one [start, end]
    end: float | None = None
    category: str | None = None
    without: Literal["left out", "set to its mean"] = "left out"
    n_observations: int
    importance: dict[str, float]

    @property
    def text(self) -> str:
        what = self.category
        if self.start is not None and self.end is not None:
            width = self.end - self.start or 1.0
            digits = 1 - math.floor(math.log10(width))  # two of the width
            what = f"{round(self.start, digits):.15g} to {round(self.end, digits):.15g}"
        how = "" if self.without == "left out" else f"({self.without})"
        return " ".join(filter(None, (self.name, what, how)))


class Explanation(Frozen):
    """The prediction of a series, and how much each part of it contributes."""

    id: str | None
    prediction: str  # in words
    outputs: dict[str, float]  # those explained: log p(class), or the targets in their units
    n_observations: int
    parts: tuple[Part, ...]  # windows by position and categories, then channels


def explain(package: Any, row: Mapping[str, Any], n_windows: int = 20) -> Explanation:
    """Explain the prediction of one series.

    Args:
        package: of a classifier, or of a regressor of whole series, as ``load_package`` returns it.
        row: a series as ``read_series`` yields it: positions and values by name.
        n_windows: windows of equal width on the first axis, at least 2.

    Raises:
        ValueError: the model is of another kind, or the series lies at a single position.
        InvalidSeries: the series does not fit the model.
    """
    of_observations = getattr(package, "per_observation", False)  # its code may be older
    if package.golden_field not in ("probabilities", "targets") or of_observations:
        kind = "regressor of observations" if of_observations else package.kind
        raise ValueError(
            f"expected a classifier or a regressor of whole series, got {kind}; give another --model"
        )
    package.outputs(series_of(package, [row]))  # raises what is wrong with it
    has_value = np.array([[x is not None for x in xs] for xs in row["values"].values()])
    row = _select({"id": None, **row}, has_value.any(axis=0))
    parts, others = zip(*_occluded(package, row, n_windows), strict=True)
    outputs = package.outputs(series_of(package, [row, *filter(None, others)]))  # (1 + n, K)
    if package.golden_field == "probabilities":
        best = int(outputs[0].argmax())
        names = [f"log p({package.classes[best]})"]
        prediction = f"class {package.classes[best]}, probability {outputs[0, best]:.3g}"
        outputs = np.log(np.maximum(outputs[:, [best]], _LEAST_P))
    else:  # predicted deviations may follow the targets
        names = list(package.targets)
        pairs = zip(package.targets.items(), outputs[0], strict=False)
        texts = (f"{name} {x:.5g} {unit}".removesuffix(" 1") for (name, unit), x in pairs)
        prediction = ", ".join(texts)
    whole, *found = (dict(zip(names, values.tolist(), strict=False)) for values in outputs)
    left = iter(found)
    explained = []
    for part, other in zip(parts, others, strict=True):
        without = whole if other is None else next(left)
        importance = {name: whole[name] - without[name] for name in names}
        explained.append(Part(**part, importance=importance))
    n = len(row["positions"][package.axes[0]["name"]])
    fields: Any = {"prediction": prediction, "outputs": whole, "n_observations": n}
    return Explanation(id=row["id"], parts=tuple(explained), **fields)


def _select(row: dict[str, Any], keep: Any) -> dict[str, Any]:
    columns = {
        part: {name: [xs[k] for k in np.flatnonzero(keep)] for name, xs in row[part].items()}
        for part in ("positions", "values")
    }
    return {**row, **columns}


def _occluded(
    package: Any, row: dict[str, Any], n_windows: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Fields of each part, and the series without it; None for a window without observations.

    A part that is all of the series is left out: nothing would remain to predict.
    """
    for number, axis in enumerate(package.axes):
        at, fields = np.array(row["positions"][axis["name"]]), {"name": axis["name"]}
        if axis.get("categories"):
            for one in dict.fromkeys(at.tolist()):
                if not (gone := at == one).all():
                    part = {"kind": "category", "category": str(one), "n_observations": gone.sum()}
                    yield fields | part, _select(row, ~gone)
        elif number == 0:
            edges = np.linspace(at.min(), at.max(), n_windows + 1)
            if edges[0] == edges[-1]:
                raise ValueError(f"expected several positions, all are at {axis['name']} {at[0]:g}")
            window = np.clip(np.searchsorted(edges, at, "right") - 1, 0, n_windows - 1)
            for k in range(n_windows):
                part = {"kind": "window", "start": edges[k], "end": edges[k + 1]}
                n = int((window == k).sum())
                yield (
                    fields | part | {"n_observations": n},
                    _select(row, window != k) if n else None,
                )
    for k, channel in enumerate(package.channels):
        name, values = channel["name"], row["values"]
        n = sum(x is not None for x in values.get(name, ()))
        rest = {other: xs for other, xs in values.items() if other != name}
        part = {"kind": "channel", "name": name, "n_observations": n}
        if not package.may_miss:
            constant = {**rest, name: [_mean(package, k)] * n}
            yield part | {"without": "set to its mean"}, {**row, "values": constant}
        elif n and any(x is not None for xs in rest.values() for x in xs):
            yield part, {**row, "values": rest}


def _mean(package: Any, channel: int) -> float:
    """Of the training data, over the groups of normalisation if there are some."""
    n_groups = len(package.normalisation) // len(package.channels)
    zeros = np.zeros((n_groups, len(package.channels)))
    means, _ = denormalise_values(zeros, package.normalisation, np.arange(n_groups))
    return float(means[:, channel].mean())


def render_explanation(explanation: Explanation, row: Mapping[str, Any], model: str) -> str:
    """One self-contained HTML file: the series shaded by importance, and a table of its parts."""
    from roma_core.evaluation.plots import importance_figure
    from roma_core.evaluation.report import Plot, render_page

    windows = [part for part in explanation.parts if part.kind == "window"]
    channels = [part for part in explanation.parts if part.kind == "channel"]
    plots = []
    for name in list(explanation.outputs)[:_N_FIGURES]:
        spans: Any = [(part.start, part.end, part.importance[name]) for part in windows]
        sizes = {part.name: part.importance[name] for part in channels}
        caption = (
            f"Importance for {name}: windows that raise it are blue, those that lower it orange; all "
            f"are pale where no window reaches a twentieth of the most important channel."
        )
        png = importance_figure(row, windows[0].name, spans, sizes)
        plots.append(Plot(title=name, caption=caption, alt=caption, png=png))
    content = {
        "title": f"Explanation of series {explanation.id or ''}".strip(),
        "summary": f"{model} predicts {explanation.prediction}. The importance of a part is the output of "
        f"the whole series minus that without the part.",
        "created": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "plots": plots,
        "outputs": explanation.outputs,
        "parts": explanation.parts,
    }
    return render_page("explanation", content)
