"""Which split an object belongs to, for ever.

The split is a pure function of the data set's name, the object's id, the publisher's assignment if
there is one, and the shares. It looks at no other object, so a new delivery only adds objects and a
model is never tested on what an earlier one was trained on.
"""

from __future__ import annotations

from typing import Literal

from roma_core.data.schema import Split
from roma_core.hashing import unit_interval


def split_of(
    dataset: str,
    object_id: str,
    recorded: Literal["train", "test"] | None,
    validation_share: float,
    test_share: float,
) -> Split:
    """The split of one object.

    Args:
        dataset: name of the data set; another name shuffles anew.
        object_id: the object's id, unique in the data set.
        recorded: the publisher's assignment. "test" stays test; "train" may become validation.
        validation_share: expected share of the objects outside test that go to validation.
        test_share: expected share of the objects without an assignment that go to test.
    """
    if recorded == "test":
        return "test"
    u = unit_interval(f"{dataset}:{object_id}")  # uniform in [0, 1)
    if recorded is None:
        if u < test_share:
            return "test"
        u = (u - test_share) / (1 - test_share)  # uniform again among those left
    return "validation" if u < validation_share else "train"


def rule_text(validation_share: float, test_share: float) -> str:
    """The rule in words, for the manifest."""
    return (
        f"recorded test stays test; of recorded train, {validation_share:g} goes to validation; "
        f"without a record, {test_share:g} goes to test and {validation_share:g} of the rest to "
        f"validation; by sha256 of '<data set>:<id>'"
    )
