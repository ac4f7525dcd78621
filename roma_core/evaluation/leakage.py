"""Leakage: test series that were in the training data. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from roma_core.data.quality import find_leakage
from roma_core.data.store import StoredDataset, Subset
from roma_core.files import digest_of, read_json


def split_digest(test: Subset) -> str:
    """Identifies the objects of a split, in whatever version of the data they are."""
    return digest_of(sorted(test.dataset.ids[i] for i in test.indices))[:16]


class LeakageReport(NamedTuple):
    """Sentences on test series that were, or may have been, in the training data."""

    refused: tuple[str, ...]  # they block a promotion
    allowed: tuple[str, ...]  # ``leakage: warn`` of the data set allows them


def check_leakage(dataset: StoredDataset, trained_on: Sequence[Path]) -> LeakageReport:
    """A sentence for each way in which test series were in the training data, and for each training
    data set that no longer exists.

    Groups and equal content are compared within ``dataset``, object ids with every other version of
    the data in ``trained_on``, which the encoder and the classifier were trained on.
    """
    within = [finding for finding in find_leakage(dataset) if finding.check.endswith(" two splits")]
    found = [line for f in within if f.severity == "error" for line in f.lines()]
    allowed = [line for f in within if f.severity == "warning" for line in f.lines()]
    tested = [dataset.ids[i] for i in dataset.split("test").indices]
    for path in sorted({path.resolve() for path in trained_on} - {dataset.path.resolve()}):
        if not path.exists():
            found.append(
                f"unknown, because the training data {path} no longer exist; build them again (equal "
                f"input gives an equal version), or train again"
            )
            continue
        before = StoredDataset(path)
        rows = np.concatenate([before.split(name).indices for name in ("train", "validation")])
        learnt = {before.ids[i] for i in rows}
        if both := [one for one in tested if one in learnt]:
            found.append(
                f"{len(both)} test objects, such as {both[0]!r}, were in train or validation of "
                f"{path} when this model was trained"
            )
    return LeakageReport(tuple(found), tuple(allowed))


def training_datasets(weights: Path) -> tuple[Path, ...]:
    """The data sets that weights of a run, and those it started from, were trained on.

    Empty for weights that are not ``outputs/model`` in the folder of a run: their data are unknown.
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
            break  # a file of another program
        found[Path(document["dataset"])] = None
        start = Path(document["weights"]) if document.get("weights") else None
    return tuple(found)
