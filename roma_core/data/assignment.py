"""Which split the versions that are there already gave each object.

A stratified split is exact, so it depends on what came before; what keeps an object where it was is
this record of it, whatever the order of a new delivery.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from roma_core.data.columns import MANIFEST, read_manifest, record_of
from roma_core.data.errors import DataError
from roma_core.data.schema import SPLITS, Split
from roma_core.files import read_json

_SMALL = ("ids.json", "splits.npy", "labels.npy")


@dataclass
class Assignment:
    """The split of every object known so far, by id, and how many objects each class has."""

    splits: dict[str, Split] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)


def earlier_assignment(home: Path, split_rule: str) -> Assignment:
    """What the versions in ``home`` that were split by the same rule say, the newest last.

    Raises:
        DataError: a version's small files are damaged, so it cannot be trusted to say it.
    """
    manifests = [m for m in home.glob(f"*/{MANIFEST}") if not m.parent.name.startswith(".")]
    known = Assignment()
    for path in sorted(manifests, key=lambda m: m.stat().st_mtime_ns):
        folder, manifest = path.parent, read_manifest(path.parent)
        if manifest.split_rule != split_rule or "labels.npy" not in manifest.files:
            continue
        for name in _SMALL:
            if not (folder / name).is_file() or record_of(folder / name) != manifest.files[name]:
                raise DataError(
                    f"{folder / name} is damaged or missing; the split is stratified, and an earlier "
                    f"version is needed to leave objects where they are: restore it from a backup, or "
                    f"remove {folder} if no model was trained on it"
                )
        classes = manifest.data_schema.classes
        columns = (np.load(folder / name).tolist() for name in _SMALL[1:])
        for name, split, label in zip(read_json(folder / _SMALL[0]), *columns, strict=True):
            known.seen[classes[label]] += name not in known.splits
            known.splits[name] = SPLITS[split]
    return known
