"""Which series decide about a model, and whether training may have seen them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roma_core.data.quality import find_leakage
from roma_core.data.store import StoredDataset, Subset
from roma_core.files import digest_of, read_json


def split_digest(test: Subset) -> str:
    """Stands for the objects of a split: a later version of the data with the same ones has it too."""
    return digest_of(sorted(test.dataset.ids[i] for i in test.indices))[:16]


def seen_in_training(dataset: StoredDataset, trained_on: Sequence[Path]) -> tuple[str, ...]:
    """A sentence for each way in which training may have seen what is in test; empty if none.

    Args:
        dataset: whose test split decides.
        trained_on: the versions of the data that the encoder and the classifier were trained on.
    """
    found = [line for f in find_leakage(dataset) if f.severity == "error" for line in f.lines()]
    tested = [dataset.ids[i] for i in dataset.split("test").indices]
    for path in sorted({path.resolve() for path in trained_on} - {dataset.path.resolve()}):
        if not path.exists():
            found.append(f"{path}, which training read, is no longer there to compare with")
            continue
        before = StoredDataset(path)
        rows = np.concatenate([before.split(name).indices for name in ("train", "validation")])
        learnt = {before.ids[i] for i in rows}
        if both := [one for one in tested if one in learnt]:
            found.append(
                f"{len(both)} test objects, such as {both[0]!r}, were in train or validation of "
                f"{path} when this model was trained"
            )
    return tuple(found)


def tell(leaks: Sequence[str]) -> None:
    """Say in the log of an evaluation what :func:`seen_in_training` found."""
    for line in leaks:
        print(f"WARNING: training may have seen what is judged: {line}", flush=True)


def unseen(leaks: Sequence[str]) -> str:
    """What a report says behind "test series"."""
    return "" if leaks else " it never saw"


def data_behind(weights: Path) -> tuple[Path, ...]:
    """The data sets that weights of a run, and those it started from, were trained on.

    Args:
        weights: ``outputs/model`` in the folder of a run.

    Returns:
        None of weights that lie elsewhere: nothing there says what they have seen.
    """
    found: dict[Path, None] = {}
    start: Path | None = weights.absolute()
    visited: set[Path] = set()
    while start is not None and start not in visited:
        visited.add(start)
        config = start.parent.parent / "config.json"
        if start.parent.name != "outputs" or not config.exists():
            break
        document = read_json(config)
        if not isinstance(document, dict) or not isinstance(document.get("dataset"), str):
            break  # another program's
        found[Path(document["dataset"])] = None
        start = Path(document["weights"]) if document.get("weights") else None
    return tuple(found)


def missing_fractions(test: Subset) -> NDArray[np.float64]:
    """``(N,)`` share of observations that are missing between first and last, at the usual pace.

    The usual pace is the median gap between different positions on the first axis, over all series.
    Dropped observations show in it, and so do seasons without any.
    """
    places = [np.unique(test.dataset.raw(int(i))[0][:, 0]) for i in test.indices]
    gaps = np.concatenate([np.diff(one) for one in places])
    if len(gaps) == 0:
        return np.zeros(len(places))
    step = float(np.median(gaps))
    expected = np.array([round((one[-1] - one[0]) / step) + 1 for one in places])
    return np.clip(1 - np.array([len(one) for one in places]) / expected, 0, 1)
