"""Assignment of objects to train, validation and test.

By default the split of an object is a pure function of the data set's name, the object's id (or its
group's), the publisher's assignment if there is one, and the fractions: a new delivery moves no
object, so a model is never tested on objects that an earlier one was trained on. A stratified split
also depends on how many objects of a class came before; objects of an earlier version keep theirs.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from roma_core.data.manifest import MANIFEST, SPLITS, Split, read_manifest, record_of
from roma_core.files import read_json
from roma_core.hashing import unit_interval
from roma_core.schema import DataError
from roma_core.settings import Frozen
from roma_core.sources.base import RawSeries

_GOLDEN = 0.6180339887498949  # multiples of it fill the unit interval most evenly


class SplitOptions(Frozen):
    """How objects are assigned to splits."""

    by: Literal["object", "group", "time"] = "object"
    """'group' keeps objects of one group together; 'time' trains on series that end before
    validation_from and tests on those that end after test_from."""
    stratified: bool = False
    """The same fractions of every class, exactly. Objects of an earlier version in the same folder
    of data sets keep their split."""
    folds: int | None = Field(None, ge=2, description="Cross-validation: number of test folds.")
    fold: int = Field(0, ge=0, description="Index of the fold that is the test split, from 0.")
    validation_from: float | None = None
    """Time, on the first axis, at which validation begins; by: time."""
    test_from: float | None = Field(None, description="Time at which test begins; by: time.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.by == "time") != (self.test_from is not None):
            raise ValueError("by: time and test_from need each other")
        if self.validation_from is not None:
            if self.test_from is None:
                raise ValueError("validation_from needs by: time and test_from")
            if self.validation_from > self.test_from:
                raise ValueError("validation_from must not come after test_from")
        if self.by == "time" and (self.stratified or self.folds):
            raise ValueError("by: time takes neither stratified nor folds")
        if self.by == "group" and self.stratified:
            raise ValueError("a group may hold several classes: use either by: group or stratified")
        if self.fold >= (self.folds or 1):
            raise ValueError(f"fold {self.fold} is not among the {self.folds or 1} folds from 0")
        return self


class Splitter:
    """Assigns every series of a data set to a split, in the order of delivery.

    ``validation_fraction`` is of the objects outside test, ``test_fraction`` of those without a
    recorded split; another name of the ``dataset`` gives another assignment.
    """

    def __init__(
        self, dataset: str, options: SplitOptions, validation_fraction: float, test_fraction: float
    ) -> None:
        self.dataset, self.options = dataset, options
        self.validation_fraction, self.test_fraction = validation_fraction, test_fraction
        self._known: dict[str, Split] = {}  # split by object id, of earlier versions
        self._recorded_validation = False  # whether any series had one
        self._n_of_class: Counter[str] = Counter()  # objects so far, the known ones included

    def restore(self, versions: Path) -> None:
        """Take over the assignments of the versions in a folder that were split by the same rule.

        Only a stratified split needs them; others are pure functions of the object.

        Raises:
            DataError: a file of an earlier version is damaged or missing.
        """
        manifests = [m for m in versions.glob(f"*/{MANIFEST}") if m.parent.name[0] != "."]
        for path in sorted(manifests, key=lambda m: m.stat().st_mtime_ns):
            folder, manifest = path.parent, read_manifest(path.parent)
            same_rule = manifest.split_rule.startswith(self.rule_text())
            if not same_rule or "labels.npy" not in manifest.files:
                continue
            for name in ("ids.json", "splits.npy", "labels.npy"):
                file = folder / name
                if not file.is_file() or record_of(file) != manifest.files[name]:
                    raise DataError(
                        f"{file} is damaged or missing; the split is stratified and needs the "
                        f"assignments of earlier versions: restore the file from a backup, or remove "
                        f"{folder} if no model was trained on it"
                    )
            splits, labels = (np.load(folder / f"{c}.npy").tolist() for c in ("splits", "labels"))
            ids, classes = read_json(folder / "ids.json"), manifest.data_schema.classes
            for object_id, split, label in zip(ids, splits, labels, strict=True):
                self._n_of_class[classes[label]] += object_id not in self._known
                self._known[object_id] = SPLITS[split]

    def assign(self, series: RawSeries) -> Split:
        """The split of one series.

        Raises:
            DataError: the rule needs a group or a label that the series does not have.
        """
        options = self.options
        if series.id in self._known:
            return self._known[series.id]
        if options.by == "time":
            assert options.test_from is not None
            end = float(series.positions[:, 0].max())
            if end >= options.test_from:
                return "test"
            start = options.validation_from
            return "validation" if start is not None and end >= start else "train"
        if options.by == "group" and series.group is None:
            raise DataError(
                f"series {series.id!r} has no group, but the data set is split by group; give the "
                f"source a group column, or split by object"
            )
        if options.stratified:
            if series.label is None:
                raise DataError(f"series {series.id!r} has no label, but the split is stratified")
            k = self._n_of_class[series.label]
            self._n_of_class[series.label] += 1
            u = (unit_interval(f"{self.dataset}:{series.label}") + k * _GOLDEN) % 1
        else:
            key = series.group if options.by == "group" else series.id
            u = unit_interval(f"{self.dataset}:{key}")
        if options.folds is not None:
            fold, u = divmod(u * options.folds, 1)
            if fold == options.fold:
                return "test"
        elif series.recorded_split in ("validation", "test"):
            self._recorded_validation |= series.recorded_split == "validation"
            return series.recorded_split
        elif series.recorded_split is None:
            if u < self.test_fraction:
                return "test"
            u = (u - self.test_fraction) / (1 - self.test_fraction)  # uniform among the rest
        return "validation" if u < self.validation_fraction else "train"

    def rule_text(self) -> str:
        """The rule in words, for the manifest."""
        options, v, t = self.options, self.validation_fraction, self.test_fraction
        if options.by == "time":
            assert options.test_from is not None
            test = options.test_from
            validation = test if options.validation_from is None else options.validation_from
            dates = f"test from {test:.10g}, validation from {validation:.10g}"
            return f"by the last observation: {dates}, train before"
        by = f"sha256 of '<data set>:<{'group' if options.by == 'group' else 'id'}>'"
        if options.stratified:
            by = "class and order of delivery"
        if options.folds is not None:
            fold = f"fold {options.fold} of {options.folds}"
            return f"{fold} is test, {v:g} of each other fold validation; by {by}"
        kept = "; recorded validation stays validation" if self._recorded_validation else ""
        return (
            f"recorded test stays test; of recorded train, {v:g} goes to validation; without a "
            f"record, {t:g} goes to test and {v:g} of the rest to validation; by {by}{kept}"
        )
