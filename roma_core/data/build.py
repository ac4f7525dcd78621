"""Building a data set: one builder at a time, aside, and under its final name only when whole.

The folder appears under its digest; equal input finds the folder that is already there.

Which split the versions that are there already gave each object.
A scale for positions, taken from the train split where the configuration asks for ``auto``.
What a build made, in a few lines: realised shares of the splits, and repairs.
The files of a data set from a source: check → split → drop → columns → normalisation → manifest.
"""

from __future__ import annotations

import errno
import logging
import shutil
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from operator import length_hint
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from roma_core.data import cleaning as dropping
from roma_core.data.cleaning import SeriesCleaner
from roma_core.data.config import AxisOptions, ChannelOptions, DatasetConfig
from roma_core.data.normalisation import Fit
from roma_core.data.schema import SPLITS, Irregularity, Manifest, Provenance, Split
from roma_core.data.splits import Splitter
from roma_core.data.store import (
    MANIFEST,
    GrowingList,
    ShardedColumn,
    damage,
    manifest_digest,
    read_manifest,
    record_of,
    records_of,
    split_counts,
    write_column,
)
from roma_core.files import read_json, sync_folder, write_json
from roma_core.hashing import hash_text
from roma_core.schema import ChannelNormalisation, DataError, DataSchema, Float32, PositionAxis
from roma_core.sources.base import RawSeries, Source, targets_of

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


_TURN = 6000.0  # scales that the slowest rotation needs for most of a turn


class ScaleFit:
    """Typical gap and span of one axis, over series that are shown one after the other."""

    def __init__(self) -> None:
        self._gaps = array("d")  # the median gap of each series
        self._spans = array("d")

    def add(self, positions: NDArray[np.float64]) -> None:
        """``(N,)`` positions of one series on the axis, in any order."""
        gaps = np.diff(np.sort(positions))
        gaps = gaps[gaps > 0]
        if len(gaps):
            self._gaps.append(float(np.median(gaps)))
            self._spans.append(float(gaps.sum()))

    def scale(self) -> float:
        """The scale, to two digits, so that a few more series do not change it; 1 without gaps."""
        if not self._gaps:
            return 1.0
        gap = float(np.median(np.frombuffer(self._gaps)))
        span = float(np.quantile(np.frombuffer(self._spans), 0.95))
        return float(f"{max(gap, span / _TURN):.2g}")


def in_words(manifest: Manifest) -> list[str]:
    """Lines for whoever built the set; shares are of all series."""
    total = sum(count.n_series for count in manifest.counts.values())
    shares = ", ".join(
        f"{split} {count.n_series:,} series ({count.n_series / total:.1%}) with "
        f"{count.n_observations:,} observations"
        for split, count in manifest.counts.items()
    )
    repaired = manifest.repairs.model_dump() if manifest.repairs else {}
    repairs = ", ".join(
        f"{name.replace('_', ' ')} {count:,}" for name, count in repaired.items() if count
    )
    return [shares, *([f"repaired: {repairs}"] if repairs else [])]


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
    arrivals = SeriesCleaner(source, config.repair)
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
            config.name, config.split, config.validation_fraction, config.test_fraction
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


log = logging.getLogger(__name__)


def build_dataset(config: DatasetConfig, root: Path, cache: Path, progress: bool = True) -> Path:
    """Build the data set that ``config`` describes, or find it built.

    Args:
        config: what to build from and how.
        root: the folder ``<root>/<name>/<digest[:12]>/`` is made in.
        cache: folder for what the source fetches.
        progress: show a progress bar on stderr.

    Returns:
        The folder. Equal input gives an equal folder; one that is already there is verified and
        used, or replaced if it is damaged. Only one process at a time builds under a name.

    Raises:
        DataError: the source or a series cannot be used, or the disk is full. Nothing is left behind.
    """
    source = config.source.open(cache)
    home = root / config.name
    aside = home / ".building"
    with _only_builder(home):
        shutil.rmtree(aside, ignore_errors=True)  # of a builder that was killed
        try:
            aside.mkdir()
            manifest = write_dataset(config, source, aside, progress, versions=home)
            return _commit(aside, home / manifest.digest[:12], manifest)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(
                f"no space left while building in {home}; nothing was left behind: free some space "
                f"or choose another folder, then run the same command again"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _only_builder(home: Path) -> Iterator[None]:
    lock = FileLock(home / ".lock")
    patience_s = 0.0
    while not lock.is_locked:
        home.mkdir(parents=True, exist_ok=True)  # again: a builder that failed takes it away
        try:
            lock.acquire(timeout=patience_s)
        except FileNotFoundError:
            continue
        except Timeout:
            if patience_s == 0:
                log.warning("another process is building in %s; waiting for it", home)
            patience_s = 1.0
    try:
        yield
    finally:
        if not any(home.glob(f"*/{MANIFEST}")):  # it failed, and nobody built here before
            (home / ".lock").unlink(
                missing_ok=True
            )  # whoever waits for it notices, and makes it anew
            with suppress(OSError):
                home.rmdir()
        lock.release()


def _commit(aside: Path, target: Path, manifest: Manifest) -> Path:
    if target.exists():
        problems = _problems(target, manifest.digest)
        if not problems:
            log.info("%s is there already", target)
            return target
        warnings.warn(f"{target} is damaged and is replaced: {'; '.join(problems)}", stacklevel=3)
        damaged = target.with_name(f".damaged-{target.name}")
        shutil.rmtree(damaged, ignore_errors=True)
        target.rename(damaged)
        aside.rename(target)
        shutil.rmtree(damaged)
    else:
        aside.rename(target)
    sync_folder(target.parent)
    return target


def _problems(folder: Path, digest: str) -> list[str]:
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return [str(error)]
    if manifest.digest != digest:
        return [f"{MANIFEST} has the digest {manifest.digest}, expected {digest}"]
    return damage(folder, manifest)
