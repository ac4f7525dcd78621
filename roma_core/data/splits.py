"""Which split an object belongs to, for ever.

By default the split is a pure function of the data set's name, the object's id (or its group's), the
publisher's assignment if there is one, and the shares. It looks at no other object, so a new
delivery only adds objects and a model is never tested on what an earlier one was trained on.

A stratified split looks at the class, and at how many objects of it came before, so it is exact to
about one object per class. It moves none, because an object that is in an earlier version keeps the
split it has there (see ``assignment.py``); only new objects are shared out, whatever the order of
delivery. A split by time looks at an object's last observation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from roma_core.data.schema import Split
from roma_core.hashing import unit_interval
from roma_core.schema import DataError

if TYPE_CHECKING:
    from typing import Self

    from roma_core.sources.base import RawSeries

_GOLDEN = 0.6180339887498949  # multiples of it fill the unit interval most evenly


class SplitOptions(BaseModel):
    """How objects are shared out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: Literal["object", "group", "time"] = Field(
        "object",
        description="'group' keeps objects of one group together; 'time' trains on series that end "
        "before validation_from and tests on those that end after test_from.",
    )
    stratified: bool = Field(
        False,
        description="The same shares of every class, exactly. Objects of an earlier version in the same "
        "folder of data sets keep their split.",
    )
    folds: int | None = Field(None, ge=2, description="Cross-validation: number of test folds.")
    fold: int = Field(0, ge=0, description="The fold that is the test split; counts from 0.")
    validation_from: float | None = Field(
        None, description="Time, on the first axis, at which validation begins; by: time."
    )
    test_from: float | None = Field(None, description="Time at which test begins; by: time.")

    @model_validator(mode="after")
    def _options_fit_together(self) -> Self:
        if (self.by == "time") != (self.test_from is not None):
            raise ValueError("by: time and test_from need each other")
        if self.validation_from is not None and self.test_from is None:
            raise ValueError("validation_from needs by: time and test_from")
        if (
            self.validation_from is not None
            and self.test_from is not None
            and self.validation_from > self.test_from
        ):
            raise ValueError("validation_from must not come after test_from: train, then validate")
        if self.by == "time" and (self.stratified or self.folds):
            raise ValueError("by: time takes neither stratified nor folds; the clock decides")
        if self.by == "group" and self.stratified:
            raise ValueError("a group may hold several classes: use either by: group or stratified")
        if self.fold >= (self.folds or 1):
            raise ValueError(f"fold {self.fold} is not among the {self.folds or 1} folds from 0")
        return self


class Splitter:
    """Gives every series of a data set its split, in the order they come.

    Attributes:
        known: splits that objects have already, by id; for a stratified split only.
        seen: objects of each class so far, those that are known among them.
    """

    def __init__(
        self, dataset: str, options: SplitOptions, validation_fraction: float, test_fraction: float
    ) -> None:
        self.dataset, self.options = dataset, options
        self.validation_fraction, self.test_fraction = validation_fraction, test_fraction
        self.known: Mapping[str, Split] = {}
        self.seen: Counter[str] = Counter()

    def of(self, series: RawSeries) -> Split:
        """The split of one series.

        Raises:
            DataError: the rule needs a group or a label that the series does not have.
        """
        options = self.options
        if series.id in self.known:
            return self.known[series.id]
        if options.by == "time":
            return self._by_time(float(series.positions[:, 0].max()))
        if options.by == "group" and series.group is None:
            raise DataError(
                f"series {series.id!r} has no group, but the data set is split by group; give the "
                f"source a group column, or split by object"
            )
        if options.stratified:
            u = self._stratified(series)
        else:
            key = series.group if options.by == "group" else series.id
            u = unit_interval(f"{self.dataset}:{key}")
        if options.folds is not None:
            fold, u = divmod(u * options.folds, 1)
            if fold == options.fold:
                return "test"
            return "validation" if u < self.validation_fraction else "train"
        return split_at(u, series.recorded_split, self.validation_fraction, self.test_fraction)

    def _stratified(self, series: RawSeries) -> float:
        if series.label is None:
            raise DataError(f"series {series.id!r} has no label, but the split is stratified")
        k = self.seen[series.label]
        self.seen[series.label] += 1
        return (unit_interval(f"{self.dataset}:{series.label}") + k * _GOLDEN) % 1

    def _by_time(self, end: float) -> Split:
        assert self.options.test_from is not None
        if end >= self.options.test_from:
            return "test"
        later = self.options.validation_from
        return "validation" if later is not None and end >= later else "train"

    def rule_text(self) -> str:
        """The rule in words, for the manifest."""
        options, v, t = self.options, self.validation_fraction, self.test_fraction
        if options.by == "time":
            assert options.test_from is not None
            later = (
                options.test_from if options.validation_from is None else options.validation_from
            )
            return (
                f"by the last observation: test from {options.test_from:.10g}, validation from "
                f"{later:.10g}, train before"
            )
        by = f"sha256 of '<data set>:<{'group' if options.by == 'group' else 'id'}>'"
        if options.stratified:
            by = "class and order of delivery"
        if options.folds is not None:
            return (
                f"fold {options.fold} of {options.folds} is test, {v:g} of each other fold "
                f"validation; by {by}"
            )
        return rule_text(v, t, by)


def split_at(
    u: float,
    recorded: Literal["train", "test"] | None,
    validation_fraction: float,
    test_fraction: float,
) -> Split:
    """The split of an object whose place in the unit interval is ``u``.

    Args:
        u: in ``[0, 1)``, uniform over the objects.
        recorded: the publisher's assignment. "test" stays test; "train" may become validation.
        validation_fraction: expected share of the objects outside test that go to validation.
        test_fraction: expected share of the objects without an assignment that go to test.
    """
    if recorded == "test":
        return "test"
    if recorded is None:
        if u < test_fraction:
            return "test"
        u = (u - test_fraction) / (1 - test_fraction)  # uniform again among those left
    return "validation" if u < validation_fraction else "train"


def split_of(
    dataset: str,
    object_id: str,
    recorded: Literal["train", "test"] | None,
    validation_fraction: float,
    test_fraction: float,
) -> Split:
    """The split of one object by its id: ``split_at`` its hash; another data set shuffles anew."""
    return split_at(
        unit_interval(f"{dataset}:{object_id}"), recorded, validation_fraction, test_fraction
    )


def rule_text(
    validation_fraction: float, test_fraction: float, by: str = "sha256 of '<data set>:<id>'"
) -> str:
    """The default rule in words."""
    return (
        f"recorded test stays test; of recorded train, {validation_fraction:g} goes to validation; "
        f"without a record, {test_fraction:g} goes to test and {validation_fraction:g} of the rest to "
        f"validation; by {by}"
    )
