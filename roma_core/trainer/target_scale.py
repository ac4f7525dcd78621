"""Whether targets are of a size that a model can learn. Imports no torch.

A regression learns its targets as they are delivered, and a new head begins near 0 with outputs of unit
size: numbers in the thousands take it thousands of steps to reach, and thousandths are lost in its noise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from roma_core.data.store import StoredDataset

_FAR = 30.0  # times larger or smaller than 1
_MOST_SERIES = 2_000  # looked at, evenly spaced among more


def far_targets(dataset: Path) -> list[str]:
    """A sentence for each target of the train split that is far from unit size, with what to do."""
    stored = StoredDataset(dataset, verify=False)
    train = stored.split("train").indices
    if not len(train):
        return []
    chosen = train[:: -(-len(train) // _MOST_SERIES)]
    found = [targets for i in chosen if (targets := stored.targets(int(i))) is not None]
    targets = np.concatenate(found).astype(np.float64)  # (T, K)
    sentences = []
    for target, mean, std in zip(
        stored.schema.targets, targets.mean(axis=0), targets.std(axis=0), strict=True
    ):
        is_small = 0 < std < 1 / _FAR  # one that never changes is small in no sense
        if abs(mean) > _FAR or std > _FAR or is_small:
            sentences.append(
                f"target {target.name!r} has mean {mean:.4g} and standard deviation {std:.4g} in train, "
                f"and is learnt as it is, which trains badly so far from 0 and 1: let its source give "
                f"(x - {mean:.4g}) / {std or 1:.4g} instead, and build the data set again"
            )
    return sentences
