"""Building a data set: source → drop → split → columns on disk → normalisation → manifest.

Series pass through one at a time, so memory does not grow with the data. The folder appears under
its final name, which is its digest, only when it is whole; equal input finds the folder that is
already there.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from roma_core.data import dropping, normalisation, splits
from roma_core.data.checks import checked
from roma_core.data.columns import (
    MANIFEST,
    GrowingColumn,
    damage,
    manifest_digest,
    read_manifest,
    record_of,
    split_counts,
    write_column,
)
from roma_core.data.config import AxisOptions, ChannelOptions, DatasetConfig
from roma_core.data.errors import DataError
from roma_core.data.schema import (
    SPLITS,
    ChannelNormalisation,
    DataSchema,
    Irregularity,
    Manifest,
    PositionAxis,
    Provenance,
)
from roma_core.data.sources import Source
from roma_core.files import sync_folder, write_bytes, write_json

log = logging.getLogger(__name__)

_CHUNK = 1 << 18  # observations held in memory at a time when fitting


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
    home.mkdir(parents=True, exist_ok=True)
    aside = home / ".building"
    with _only_builder(home):
        shutil.rmtree(aside, ignore_errors=True)  # of a builder that was killed
        try:
            aside.mkdir()
            manifest = _write(config, source, aside, progress)
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
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("another process is building in %s; waiting for it", home)
        lock.acquire()
    try:
        yield
    finally:
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


@dataclass
class _Rows:
    """What is known of each series, in stored order."""

    ids: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    splits: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    lengths_before: list[int] = field(default_factory=list)  # before the drop


def _write(config: DatasetConfig, source: Source, folder: Path, progress: bool) -> Manifest:
    """Write all files of the data set into an empty folder and return its manifest."""
    axes = _with_options(source, config.axes)
    transforms = _transforms(source, config.channels)
    rows = _write_observations(config, source, folder, progress)

    offsets = np.concatenate([[0], np.cumsum(rows.lengths)]).astype(np.int64)
    split_column = np.array(rows.splits, dtype=np.int8)
    write_column(folder / "offsets.npy", offsets)
    write_column(folder / "splits.npy", split_column)
    if source.classes:
        labels = np.array(rows.labels, dtype=np.int64)
        _warn_of_unseen_classes(labels, split_column, source.classes)
        write_column(folder / "labels.npy", labels)
    write_bytes(folder / "ids.json", json.dumps(rows.ids, ensure_ascii=False).encode())

    values = np.load(folder / "values.npy", mmap_mode="r", allow_pickle=False)
    chunks = _train_chunks(values, offsets, split_column)
    fitted = normalisation.fit(chunks, source.channels, transforms)
    before = np.array(rows.lengths_before, dtype=np.int64)
    irregularity = Irregularity(
        drop_rate=config.drop_rate,
        seed=config.drop_seed,
        n_observations_before=int(before.sum()),
        n_dropped=dropping.assert_dropped(config.drop_rate, before, int(offsets[-1])),
    )
    manifest = Manifest(
        name=config.name,
        data_schema=DataSchema(
            channels=source.channels, axes=axes, classes=source.classes, normalisation=fitted
        ),
        counts=split_counts(offsets, split_column),
        split_rule=splits.rule_text(config.validation_share, config.test_share),
        irregularity=irregularity if config.drop_rate > 0 else None,
        provenance=Provenance(
            source=config.source.model_dump_json(),
            files=dict(source.files),
            citation=source.citation,
            licence=source.licence,
        ),
        files={path.name: record_of(path) for path in sorted(folder.iterdir())},
        digest="",
    )
    manifest = manifest.model_copy(update={"digest": manifest_digest(manifest)})
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def _write_observations(
    config: DatasetConfig, source: Source, folder: Path, progress: bool
) -> _Rows:
    rows = _Rows()
    index_of = {name: k for k, name in enumerate(source.classes)}
    bar = tqdm(
        checked(source), desc=f"building {config.name}", unit=" series", disable=not progress
    )
    with (
        GrowingColumn(folder / "values.npy", np.float32, len(source.channels)) as values,
        GrowingColumn(folder / "positions.npy", np.float64, len(source.axes)) as positions,
    ):
        for series in bar:
            n = len(series.values)
            stays = dropping.kept(n, config.drop_rate, config.drop_seed, series.id)  # (N,)
            values.append(series.values[stays])
            positions.append(series.positions[stays])
            split = splits.split_of(
                config.name,
                series.id,
                series.recorded_split,
                config.validation_share,
                config.test_share,
            )
            rows.ids.append(series.id)
            rows.splits.append(SPLITS.index(split))
            rows.lengths.append(int(stays.sum()))
            rows.lengths_before.append(n)
            if series.label is not None:
                rows.labels.append(index_of[series.label])
    if not rows.ids:
        raise DataError(f"the source of {config.name} has no series: {config.source!r}")
    return rows


def _with_options(source: Source, options: dict[str, AxisOptions]) -> tuple[PositionAxis, ...]:
    _refuse_unknown(options, [axis.name for axis in source.axes], "axes")
    return tuple(
        axis.model_copy(update=options.get(axis.name, AxisOptions()).model_dump())
        for axis in source.axes
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


def _train_chunks(
    values: NDArray[np.float32], offsets: NDArray[np.int64], split_column: NDArray[np.int8]
) -> Iterator[NDArray[np.float32]]:
    """Train observations ``(n, C)``, a bounded number at a time."""
    is_train = split_column == SPLITS.index("train")
    for start in range(0, len(values), _CHUNK):
        stop = min(start + _CHUNK, len(values))
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        last = int(np.searchsorted(offsets, stop, side="left"))
        edges = np.clip(offsets[first : last + 1], start, stop)
        yield values[start:stop][np.repeat(is_train[first:last], edges[1:] - edges[:-1])]


def _warn_of_unseen_classes(
    labels: NDArray[np.int64], split_column: NDArray[np.int8], classes: Sequence[str]
) -> None:
    in_train = set(labels[split_column == SPLITS.index("train")].tolist())
    if unseen := [name for k, name in enumerate(classes) if k not in in_train]:
        warnings.warn(f"no series of the classes {unseen} is in the train split", stacklevel=2)
