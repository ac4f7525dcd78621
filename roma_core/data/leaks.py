"""Content that is in two splits, so that a test would ask what training has answered.

Objects are told apart by id and each has one split; what is left to look for is a group in two
splits, equal content under two ids, and content that is suspiciously near.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from roma_core.data.findings import Finding, finding
from roma_core.data.schema import SPLITS
from roma_core.data.store import StoredDataset

_CONTENT_DECIMALS = 3  # of normalised values and of positions as the model sees them
_BINS = 16
_MOST_ASKED, _MOST_KNOWN = 5_000, 50_000  # series compared, evenly spaced among more
_MOST_NUMBERS = 64  # of a sketch; longer ones are projected
_NEAR = 0.1  # of the usual distance to the nearest series of train


def leaks(dataset: StoredDataset) -> list[Finding]:
    """Errors for what is in two splits, warnings for copies inside one and for near neighbours."""
    return [*_groups(dataset), *_equal(dataset), *_near(dataset)]


def _groups(dataset: StoredDataset) -> list[Finding]:
    if dataset.groups is None:
        return []
    first_of: dict[str, int] = {}
    words = []
    for i, group in enumerate(dataset.groups):
        other = first_of.setdefault(group, i)
        if dataset.splits[other] != dataset.splits[i]:
            words.append(
                f"group {group!r} is in two splits: series {_who(dataset, other)} and "
                f"{_who(dataset, i)}; set split.by to 'group'"
            )
    return finding("group in two splits", "error", words)


def _equal(dataset: StoredDataset) -> list[Finding]:
    """Series that are equal as the model sees them, rounded to 3 decimals.

    Content is compared as stored: two copies of an object with different observations dropped are
    not equal, but near.
    """
    apart: list[str] = []
    together: list[str] = []
    first_with: dict[bytes, int] = {}
    for i in range(len(dataset)):
        sample = dataset.sample(i)
        content = hashlib.sha256()
        for array in (sample["positions"], sample["values"]):
            content.update((np.round(array, _CONTENT_DECIMALS) + 0.0).tobytes())  # -0.0 becomes 0.0
        other = first_with.setdefault(content.digest(), i)
        if other == i:
            continue
        words = (
            f"series {_who(dataset, other)} and {_who(dataset, i)} have equal content: one of them "
            f"must go"
        )
        (together if dataset.splits[other] == dataset.splits[i] else apart).append(words)
    return [
        *finding("equal content in two splits", "error", apart),
        *finding("equal content in one split", "warning", together),
    ]


def _near(dataset: StoredDataset) -> list[Finding]:
    """Series of validation and test that are ten times nearer to one of train than is usual.

    And ten times nearer than they vary: flat series are all alike.
    """
    from sklearn.neighbors import NearestNeighbors

    train = _thinned(dataset.split("train").indices, _MOST_KNOWN)
    asked = _thinned(np.flatnonzero(dataset.splits != SPLITS.index("train")), _MOST_ASKED)
    if len(train) < 2 or len(asked) < 10:  # too few to say what is usual
        return []
    sketches = _sketches(dataset)
    short = _projected(sketches)
    nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(short[train])
    partner = train[nearest.kneighbors(short[asked])[1][:, 0]]
    distance = np.sqrt(((sketches[asked] - sketches[partner]) ** 2).mean(axis=1))
    usual = float(np.median(distance))
    own = sketches[asked].reshape(len(asked), _BINS, -1)
    variation = np.sqrt(((own - own.mean(axis=1, keepdims=True)) ** 2).mean(axis=(1, 2)))
    close = np.flatnonzero(distance < _NEAR * np.minimum(usual, variation))
    words = [
        f"series {_who(dataset, int(asked[k]))} is {distance[k]:.2g} standard deviations from "
        f"{_who(dataset, int(partner[k]))}, where {usual:.2g} is usual: a near copy?"
        for k in close[np.argsort(distance[close])]
    ]
    return finding("near copies in two splits", "warning", words)


def _sketches(dataset: StoredDataset) -> NDArray[np.float32]:
    """Means of the normalised values in 16 equal parts of each series' time: ``(n_series, 16 * C)``.

    A part without observations takes the mean of the series.
    """
    n_channels = len(dataset.schema.channels)
    sketches = np.empty((len(dataset), _BINS, n_channels), dtype=np.float32)
    for i in range(len(dataset)):
        sample = dataset.sample(i)
        time, values = sample["positions"][0], sample["values"][:, :, 0, 0]  # (N,), (N, C)
        low, span = time.min(), np.ptp(time) or 1.0
        part = np.minimum(((time - low) / span * _BINS).astype(np.int64), _BINS - 1)
        counts = np.bincount(part, minlength=_BINS)
        sketches[i] = values.mean(axis=0)
        filled = counts > 0
        for c in range(n_channels):
            sums = np.bincount(part, weights=values[:, c], minlength=_BINS)
            sketches[i, filled, c] = sums[filled] / counts[filled]
    return sketches.reshape(len(dataset), -1)


def _projected(sketches: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shorter vectors with about the same distances, so that many channels cost no more than few."""
    width = sketches.shape[1]
    if width <= _MOST_NUMBERS:
        return sketches
    directions = np.random.default_rng(0).normal(size=(width, _MOST_NUMBERS)).astype(np.float32)
    return sketches @ directions / np.float32(np.sqrt(_MOST_NUMBERS))


def _thinned(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return rows[:: -(-len(rows) // most)] if len(rows) else rows


def _who(dataset: StoredDataset, i: int) -> str:
    return f"{dataset.ids[i]!r} ({SPLITS[dataset.splits[i]]})"
