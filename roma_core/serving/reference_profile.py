"""What a model's training data looked like, in a few numbers that travel with it.

With ``profile.json`` of a package a consumer sees drift of its own series without the training data:
the population stability index of every channel, of gaps and of lengths, over tenths of the training
distribution. Imports numpy and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 1
_PARTS = 10
Floats = NDArray[np.float64]


def reference_profile(series: Iterable[Mapping[str, Any]], classes: Mapping[str, int]) -> Any:
    """The profile of series as a consumer would send them (``positions`` and ``values``).

    Args:
        classes: class name -> number of series.
    """
    quantities = {}
    for name, numbers in _quantities(series).items():
        edges = _edges(numbers)
        quantities[name] = {
            "edges": edges.tolist(),
            "shares": (_counts(numbers, edges) / len(numbers)).tolist(),
            "n": len(numbers),
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "quantities": quantities,
        "classes": dict(classes),
    }


def drift(profile: Mapping[str, Any], series: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Population stability index by quantity; below 0.1 is called stable, above 0.25 is much.

    Raises:
        ValueError: the profile has another schema_version.
    """
    if profile.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"the profile has schema_version {profile.get('schema_version')!r}, this code reads "
            f"{SCHEMA_VERSION}"
        )
    found = _quantities(series)
    indices = {}
    for name, reference in profile["quantities"].items():
        if name not in found:
            continue
        counts = _counts(found[name], np.array(reference["edges"])) + 0.5
        q = counts / counts.sum()
        counts = np.array(reference["shares"]) * reference["n"] + 0.5
        p = counts / counts.sum()
        indices[name] = float(((q - p) * np.log(q / p)).sum())
    return indices


def _quantities(series: Iterable[Mapping[str, Any]]) -> dict[str, Floats]:
    """``values.NAME``, ``gap.AXIS`` and ``length``, each all numbers of all series."""
    parts: dict[str, list[Floats]] = {}
    for one in series:
        for name, numbers in one["values"].items():
            parts.setdefault(f"values.{name}", []).append(np.asarray(numbers, np.float64))
        n = 0
        for name, numbers in one["positions"].items():
            n = len(numbers)
            parts.setdefault(f"gap.{name}", []).append(np.diff(np.sort(numbers)))
        parts.setdefault("length", []).append(np.array([float(n)]))
    whole = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return {name: numbers for name, numbers in whole.items() if len(numbers)}


def _edges(numbers: Floats) -> Floats:
    """Inner edges of the parts: between few distinct numbers, else tenths."""
    distinct = np.unique(numbers)
    if len(distinct) <= 2 * _PARTS:
        return (distinct[1:] + distinct[:-1]) / 2
    return np.unique(np.quantile(numbers, np.linspace(0, 1, _PARTS + 1)[1:-1]))


def _counts(numbers: Floats, edges: Floats) -> Floats:
    return np.bincount(np.searchsorted(edges, numbers), minlength=len(edges) + 1).astype(np.float64)
