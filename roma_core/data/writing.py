"""The files of a data set from a source: check → split → drop → columns → normalisation → manifest.

Series pass through one at a time and are forgotten; what stays in memory is a few numbers of each
(split, length, label, a hash of the id), so memory does not grow with the observations.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from operator import length_hint
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from roma_core.data import dropping
from roma_core.data.arriving import Arrivals
from roma_core.data.assignment import earlier_assignment
from roma_core.data.columns import (
    MANIFEST,
    GrowingList,
    ShardedColumn,
    manifest_digest,
    records_of,
    split_counts,
    write_column,
)
from roma_core.data.config import AxisOptions, ChannelOptions, DatasetConfig
from roma_core.data.errors import DataError
from roma_core.data.normalisation import Fit, Float32
from roma_core.data.scales import ScaleFit
from roma_core.data.schema import (
    SPLITS,
    ChannelNormalisation,
    DataSchema,
    Irregularity,
    Manifest,
    PositionAxis,
    Provenance,
)
from roma_core.data.sources import RawSeries, Source, targets_of
from roma_core.data.splits import Splitter
from roma_core.files import read_json, write_json
from roma_core.hashing import hash_text

_CHUNK = 1 << 16  # observations held in memory at a time when fitting
_SHARD = 1 << 26  # observations in one file of values or positions


def write_dataset(
    config: DatasetConfig, source: Source, folder: Path, progress: bool, versions: Path
) -> Manifest:
    """Write all files of the data set into an empty folder and return its manifest.

    ``versions`` is the folder of its other versions; a stratified split asks them for theirs.

    Raises:
        DataError: the source or a series cannot be used.
    """
    rows = _Rows(config, source)
    if config.split.stratified:
        earlier = earlier_assignment(versions, rows.splitter.rule_text())
        rows.splitter.known, rows.splitter.seen = earlier.splits, earlier.seen
    arrivals = Arrivals(source, config.repair)
    bar = tqdm(
        arrivals,
        desc=f"building {config.name}",
        unit=" series",
        total=length_hint(source) or None,
        disable=not progress,
    )
    with ExitStack() as stack:
        rows.open(folder, stack)
        for series in bar:
            rows.add(series)
    if not len(rows):
        raise DataError(
            f"the source of {config.name} ({config.source.kind}) has no series; look into its files: "
            f"{', '.join(source.files) or 'it has none'}"
        )
    rows.close(folder)
    schema = rows.schema()
    manifest = Manifest(
        schema_version=2 if schema.targets else 1,
        name=config.name,
        data_schema=schema,
        counts=split_counts(rows.offsets, rows.splits),
        shards=tuple(rows.shards),
        split_rule=rows.splitter.rule_text(),
        irregularity=rows.irregularity(),
        repairs=arrivals.repairs(),
        provenance=Provenance(
            source=config.source.model_dump_json(),
            files=dict(source.files),
            citation=source.citation,
            licence=source.licence,
        ),
        files=records_of(folder),
        digest="",
    )
    manifest = manifest.model_copy(update={"digest": manifest_digest(manifest)})
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


class _Rows:
    """The columns as they grow, and what the manifest says of them.

    Attributes:
        offsets: ``(n_series + 1,)`` int64, after ``close``.
        splits: ``(n_series,)`` int8 index into ``SPLITS``, after ``close``.
        shards: first series of every further file of values and positions.
    """

    def __init__(self, config: DatasetConfig, source: Source) -> None:
        self.config, self.source = config, source
        self.splitter = Splitter(
            config.name, config.split, config.validation_share, config.test_share
        )
        names = [axis.name for axis in source.axes]
        _refuse_unknown(config.axes, names, "axes")
        self._axis_options = [config.axes.get(name, AxisOptions()) for name in names]
        self._scales = {
            k: ScaleFit() for k, options in enumerate(self._axis_options) if options.scale == "auto"
        }
        self._fit = Fit(source.channels, _transforms(source, config.channels))
        self._waiting: list[Float32] = []  # train observations that are not fitted yet
        self._n_waiting = 0
        self._class_index = {name: k for k, name in enumerate(source.classes)}
        self._labels, self._splits = array("q"), array("b")
        self._lengths, self._lengths_before = array("q"), array("q")
        self._prints = array("Q")  # hashes of the ids
        self._grouped: bool | None = None
        self.shards: list[int] = []
        self._in_file = 0  # observations in the current files

    def __len__(self) -> int:
        return len(self._lengths)

    def open(self, folder: Path, stack: ExitStack) -> None:
        """Begin the columns; they are complete when the stack closes."""
        source = self.source
        self._values = stack.enter_context(
            ShardedColumn(folder, "values", np.float32, len(source.channels))
        )
        self._positions = stack.enter_context(
            ShardedColumn(folder, "positions", np.float64, len(source.axes))
        )
        targets = targets_of(source)
        self._targets = (
            stack.enter_context(ShardedColumn(folder, "targets", np.float32, len(targets)))
            if targets
            else None
        )
        self._ids = stack.enter_context(GrowingList(folder / "ids.json"))
        self._groups = stack.enter_context(GrowingList(folder / "groups.json"))

    def add(self, series: RawSeries) -> None:
        """Append one checked series."""
        config = self.config
        split = self.splitter.of(series)
        positions, values, targets = series.positions, series.values, series.targets
        n = len(values)
        if config.drop_rate > 0:
            stays = dropping.kept(n, config.drop_rate, config.drop_seed, series.id)  # (N,)
            positions, values = positions[stays], values[stays]
            targets = None if targets is None else targets[stays]
        if self._in_file + len(values) > _SHARD and self._in_file:
            self.shards.append(len(self))
            self._in_file = 0
            for column in filter(None, (self._values, self._positions, self._targets)):
                column.next_file()
        self._in_file += len(values)
        self._values.append(values)
        self._positions.append(positions)
        if self._targets is not None:
            assert targets is not None, "arrivals have targets if their source has"
            self._targets.append(targets)
        self._ids.append(series.id)
        self._add_group(series)
        self._prints.append(hash_text(series.id))
        self._splits.append(SPLITS.index(split))
        self._lengths.append(len(values))
        self._lengths_before.append(n)
        if series.label is not None:
            self._labels.append(self._class_index[series.label])
        if split == "train":
            self._learn(positions, values)

    def _add_group(self, series: RawSeries) -> None:
        if self._grouped is None:
            self._grouped = series.group is not None
        if self._grouped != (series.group is not None):
            raise DataError(
                f"series {series.id!r} has the group {series.group!r}, others are different: all "
                f"series have a group, or none"
            )
        if series.group is not None:
            self._groups.append(series.group)

    def _learn(self, positions: NDArray[np.float64], values: Float32) -> None:
        for k, scale in self._scales.items():
            scale.add(positions[:, k])
        self._waiting.append(values if values.base is None else values.copy())  # no view of a chunk
        self._n_waiting += len(values)
        if self._n_waiting >= _CHUNK:
            self._fit_waiting()

    def _fit_waiting(self) -> None:
        if self._waiting:
            self._fit.add(np.concatenate(self._waiting))
        self._waiting, self._n_waiting = [], 0

    def close(self, folder: Path) -> None:
        """Write the small columns; the large ones are on disk."""
        self._refuse_equal_ids(folder)
        if not self._grouped:
            (folder / "groups.json").unlink()
        lengths = np.array(self._lengths, dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.splits = np.array(self._splits, dtype=np.int8)
        write_column(folder / "offsets.npy", self.offsets)
        write_column(folder / "splits.npy", self.splits)
        if self.source.classes:
            labels = np.array(self._labels, dtype=np.int64)
            _warn_of_unseen_classes(labels, self.splits, self.source.classes)
            write_column(folder / "labels.npy", labels)

    def _refuse_equal_ids(self, folder: Path) -> None:
        prints = np.array(self._prints, dtype=np.uint64)
        distinct, first = np.unique(prints, return_index=True)
        if len(distinct) < len(prints):
            row = int(np.setdiff1d(np.arange(len(prints)), first)[0])
            name = read_json(folder / "ids.json")[row]
            raise DataError(
                f"two series have the id {name!r}; ids must be unique ({len(prints) - len(distinct)} "
                f"series have one that came before)"
            )

    def schema(self) -> DataSchema:
        """What the manifest says of the numbers.

        Raises:
            DataError: there was nothing to fit normalisation on.
        """
        self._fit_waiting()
        return DataSchema(
            channels=self.source.channels,
            axes=tuple(self._axis(k, axis) for k, axis in enumerate(self.source.axes)),
            classes=self.source.classes,
            targets=targets_of(self.source),
            normalisation=self._fit.result(),
        )

    def _axis(self, k: int, axis: PositionAxis) -> PositionAxis:
        chosen = self._axis_options[k].model_dump()
        if k in self._scales:
            chosen["scale"] = self._scales[k].scale()
        return axis.model_copy(update=chosen)

    def irregularity(self) -> Irregularity | None:
        """What was dropped on purpose; None if that was not asked for.

        Raises:
            DataError: another number was dropped than asked for.
        """
        rate = self.config.drop_rate
        before = np.array(self._lengths_before, dtype=np.int64)
        n_dropped = dropping.assert_dropped(rate, before, int(self.offsets[-1]))
        if rate == 0:
            return None
        return Irregularity(
            drop_rate=rate,
            seed=self.config.drop_seed,
            n_observations_before=int(before.sum()),
            n_dropped=n_dropped,
        )


def _transforms(
    source: Source, options: dict[str, ChannelOptions]
) -> tuple[ChannelNormalisation, ...]:
    names = [channel.name for channel in source.channels]
    _refuse_unknown(options, names, "channels")
    return tuple(
        ChannelNormalisation(**options.get(n, ChannelOptions()).model_dump(), mean=0.0, std=1.0)
        for n in names
    )


def _refuse_unknown(options: Iterable[str], names: Sequence[str], what: str) -> None:
    if unknown := sorted(set(options) - set(names)):
        raise DataError(
            f"{what} {unknown} in the configuration are not in the source; it has {names}"
        )


def _warn_of_unseen_classes(
    labels: NDArray[np.int64], split_column: NDArray[np.int8], classes: Sequence[str]
) -> None:
    in_train = set(labels[split_column == SPLITS.index("train")].tolist())
    if unseen := [name for k, name in enumerate(classes) if k not in in_train]:
        warnings.warn(f"no series of the classes {unseen} is in the train split", stacklevel=2)
