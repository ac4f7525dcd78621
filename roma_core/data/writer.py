"""Writes the series of a source into the columns of a data set, and its manifest."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from roma_core.data.cleaning import SeriesCleaner, check_dropped, keep_mask
from roma_core.data.config import AxisOptions, DatasetConfig
from roma_core.data.layout import choose_layout, melt, pivot
from roma_core.data.manifest import (
    MANIFEST,
    SPLITS,
    ColumnFiles,
    Irregularity,
    Manifest,
    Provenance,
    Repairs,
    large_columns,
    records_of,
    shard_name,
    split_counts,
    write_column,
)
from roma_core.data.splits import Splitter
from roma_core.files import read_json, write_json
from roma_core.hashing import hash_text
from roma_core.schema import (
    CHANNEL_AXIS,
    AxisScaleFit,
    ChannelFit,
    ChannelTransform,
    Covariate,
    DataError,
    DataSchema,
    Float32,
    Float64,
    PositionAxis,
    Target,
    channel_axis,
)
from roma_core.settings import validation_errors
from roma_core.sources.base import RawSeries, Source, trait

log = logging.getLogger(__name__)

_CHUNK = 1 << 16  # observations held in memory at a time when fitting
_SHARD = 1 << 26  # observations in one file of values or positions


def state_file(aside: Path) -> Path:
    """The state of an unfinished build, beside its folder; a pickle, which only a build writes."""
    return aside.with_name(f"{aside.name}.state")


class DatasetWriter:
    """Appends series to the columns of a data set, then writes its manifest.

    The columns are complete when ``files`` closes them, without an error.

    Raises:
        DataError: the configuration has options for axes or channels that the source lacks.
    """

    def __init__(
        self, config: DatasetConfig, source: Source, files: ColumnFiles, state: Any = None
    ) -> None:
        """``state`` is that of an earlier writer, whose files ``files`` continue."""
        self.config, self.source, self.files, self.folder = config, source, files, files.folder
        if state is None:
            self._begin()
        else:
            vars(self).update(state)
        self._append_id = files.texts("ids.json")
        if covariates := trait(source, "covariates"):
            self._append_covariates = files.column("covariates.npy", np.float32, len(covariates))
        if (targets := self._schema.targets) and self._schema.target_level == "series":
            self._append_targets = files.column("targets.npy", np.float32, len(targets))
        if self._has_groups:
            self._append_group = files.texts("groups.json")
        for shard in range(len(self._shards) + 1):
            self._open_shard(shard)

    def state(self) -> dict[str, Any]:
        """All but the files, and what describes the input."""
        kept = ("config", "source", "files", "folder")
        return {k: v for k, v in vars(self).items() if k not in kept and k[:7] != "_append"}

    def _begin(self) -> None:
        config, source = self.config, self.source
        split = config.split
        if split.stratified and not source.classes:
            warnings.warn(
                f"split.stratified: the source of {config.name} has no classes to stratify by; its objects "
                f"are split by a hash of their ids instead",
                stacklevel=3,
            )
            split = split.model_copy(update={"stratified": False})
        self.splitter = Splitter(
            config.name, split, config.validation_fraction, config.test_fraction
        )
        axes = [axis.name for axis in source.axes]
        channels = [channel.name for channel in source.channels]
        for what, names in (("axes", axes), ("channels", channels)):
            if unknown := sorted(getattr(config, what).keys() - set(names)):
                raise DataError(
                    f"{what} {unknown} in the configuration are not in the source; it has {names}"
                )
        layout, reason = choose_layout(config.layout, source, SeriesCleaner(source, config.repair))
        log.info("%s: layout %s (%s)", config.name, layout, reason)
        options = [config.axes.get(name, AxisOptions()) for name in axes]
        all_axes = [_with_options(*both) for both in zip(source.axes, options, strict=True)]
        self._scales = {
            k: AxisScaleFit()
            for k, o in enumerate(options)
            if o.scale == "auto" and not all_axes[k].n_embedded
        }
        normalise_by = config.normalise_by
        if layout == "per_channel":
            if normalise_by is not None:
                raise DataError(
                    f"normalise_by: the per_channel layout ({reason}) has a normalisation of every channel, "
                    f"not of {normalise_by!r}; leave it out, or set layout to 'joint'"
                )
            if CHANNEL_AXIS in axes:
                raise DataError(
                    f"the axis {CHANNEL_AXIS!r} has the name of the axis of channels in the per_channel "
                    f"layout; give it another name"
                )
            all_axes.append(channel_axis(source.channels))
            normalise_by = CHANNEL_AXIS
        self._schema = DataSchema(
            channels=source.channels,
            axes=tuple(all_axes),
            layout=layout,
            normalise_by=normalise_by,
            covariates=trait(source, "covariates"),
            classes=source.classes,
            targets=tuple(Target(name=t.name, unit=t.unit) for t in trait(source, "targets")),
            target_level=trait(source, "target_level"),
            normalisation=(),
        )
        self._fit = _channel_fit(self._schema, config)
        targets = [f"target {target.name!r}" for target in self._schema.targets]
        n = len(targets)
        self._target_fit = ChannelFit(targets, [ChannelTransform()] * n, n) if n else None
        self._unfitted: list[tuple[Float32, Float64, Float32]] = []  # train, not fitted yet
        self._n_unfitted = 0
        self._seen = {split: [set[int]() for _ in all_axes] for split in SPLITS}  # categories
        self._missing_values = False
        self._n_kept = 0  # of what `_lengths_before` counts
        self._class_index = {name: k for k, name in enumerate(source.classes)}
        self._labels, self._splits = array("q"), array("b")
        self._lengths, self._lengths_before = array("q"), array("q")
        self._id_hashes = array("Q")
        self._has_groups: bool | None = None
        self._shards: list[int] = []  # first series of every further file
        self.n_observations = self._n_in_shard = 0  # in all files, and in the current ones

    def _open_shard(self, shard: int) -> None:
        self._append = {
            name: self.files.column(shard_name(name, shard), dtype, width)
            for name, (dtype, width) in large_columns(self._schema).items()
        }

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, series: RawSeries) -> None:
        """Append one cleaned series."""
        config = self.config
        split = self.splitter.assign(series)
        if config.drop_rate > 0:
            series = self._dropped(series)
        columns = {name: getattr(series, name) for name in self._append}
        positions, values, targets = series.positions, series.values, columns.get("targets")
        if self._schema.layout != trait(self.source, "layout"):
            if self._schema.layout == "per_channel":
                positions, values, rows = melt(positions, values)
            else:
                n_channels = len(self.source.channels)
                positions, values, rows = pivot(positions, values, n_channels, targets)
            columns = {name: column[rows] for name, column in columns.items()}
            columns |= {"positions": positions, "values": values}
        if self._n_in_shard + len(values) > _SHARD and self._n_in_shard:
            self._shards.append(len(self))
            self._open_shard(len(self._shards))
            self._n_in_shard = 0
        self._n_in_shard += len(values)
        self.n_observations += len(values)
        for name, column in columns.items():
            self._append[name](column)
        self._append_id(series.id)
        if series.covariates is not None and self._schema.covariates:
            self._append_covariates(series.covariates[None])
        if series.targets is not None and targets is None:
            self._append_targets(series.targets[None])
        self._missing_values = self._missing_values or bool(np.isnan(values).any())
        if self._has_groups is None:
            self._has_groups = series.group is not None
            if self._has_groups:
                self._append_group = self.files.texts("groups.json")
        if self._has_groups != (series.group is not None):
            raise DataError(
                f"series {series.id!r} has the group {series.group!r}, others are different: all "
                f"series have a group, or none"
            )
        if series.group is not None:
            self._append_group(series.group)
        self._id_hashes.append(hash_text(series.id))
        self._splits.append(SPLITS.index(split))
        self._lengths.append(len(values))
        if series.label is not None:
            self._labels.append(self._class_index[series.label])
        for k, axis in enumerate(self._schema.axes):
            if axis.categories:
                self._seen[split][k].update(np.unique(positions[:, k]).astype(int).tolist())
        if split == "train":
            for k, scale in self._scales.items():
                scale.add(positions[:, k])
            if values.base is not None:
                values = values.copy()  # frees a chunk of the source
            needs_positions = self._schema.normalise_by is not None
            fitted = positions if needs_positions else positions[:0]
            targets = np.empty((0, 0), np.float32)
            if series.targets is not None:
                targets = series.targets.reshape(-1, len(self._schema.targets))
            self._unfitted.append((values, fitted, targets))
            self._n_unfitted += len(values)
            if self._n_unfitted >= _CHUNK:
                self._update_fit()

    def _dropped(self, series: RawSeries) -> RawSeries:
        """Without the observations, or the values, that ``drop_rate`` leaves out; each is counted."""
        config = self.config

        def keep(n: int, name: str) -> NDArray[np.bool_]:
            kept = keep_mask(n, config.drop_rate, config.drop_seed, name)  # (N,)
            self._lengths_before.append(n)
            self._n_kept += int(kept.sum())
            return kept

        if config.drop_by == "observation":
            return series.select(keep(len(series.values), series.id))
        values = series.values.copy()
        for k, channel in enumerate(self.source.channels):
            if trait(self.source, "layout") == "joint":
                column, rows = k, np.flatnonzero(~np.isnan(values[:, k]))
            else:
                column, rows = 0, np.flatnonzero(series.positions[:, -1] == k)
            if len(rows):  # the same draws in either layout
                values[rows[~keep(len(rows), f"{series.id}/{channel.name}")], column] = np.nan
        observed: Any = np.isfinite(values).any(axis=1)
        return dataclasses.replace(series, values=values).select(observed)

    def _update_fit(self) -> None:
        if self._unfitted:
            values, positions, targets = map(np.concatenate, zip(*self._unfitted, strict=True))
            self._fit.add(values, positions)
            if self._target_fit is not None:
                self._target_fit.add(targets, positions)
        self._unfitted, self._n_unfitted = [], 0

    def finish(self, repairs: Repairs | None) -> Manifest:
        """Write the small columns and the manifest; after the ``with`` block.

        Raises:
            DataError: an id came twice, train is empty, or subsampling dropped a wrong number.
        """
        config, source, folder = self.config, self.source, self.folder
        hashes = np.array(self._id_hashes, dtype=np.uint64)
        distinct, first = np.unique(hashes, return_index=True)
        if n_repeated := len(hashes) - len(distinct):
            row = int(np.setdiff1d(np.arange(len(hashes)), first)[0])
            raise DataError(
                f"two series have the id {read_json(folder / 'ids.json')[row]!r}; ids must be unique "
                f"({n_repeated} series have one that came before)"
            )
        lengths = np.array(self._lengths, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        splits = np.array(self._splits, dtype=np.int8)
        write_column(folder / "offsets.npy", offsets)
        write_column(folder / "splits.npy", splits)
        if source.classes:
            labels = np.array(self._labels, dtype=np.int64)
            in_train = set(labels[splits == SPLITS.index("train")].tolist())
            unseen = [name for k, name in enumerate(source.classes) if k not in in_train]
            if unseen:
                text = f"no series of the classes {unseen} is in the train split"
                warnings.warn(text, stacklevel=2)
            write_column(folder / "labels.npy", labels)
        self._update_fit()
        axes = list(self._schema.axes)
        for k, scale in self._scales.items():
            axes[k] = axes[k].model_copy(update={"scale": scale.scale()})
        absent = [self._unseen(k) for k in range(len(axes))]
        normalisation = self._fit.result()
        for k, (axis, lacking) in enumerate(zip(axes, absent, strict=True)):
            if lacking and axis.unknown:
                axes[k] = self._without(k, lacking)
                if axis.name == self._schema.normalise_by:
                    rows = np.arange(len(normalisation)).reshape(len(axis.categories) + 1, -1)
                    kept = np.delete(rows, lacking, axis=0).ravel()
                    normalisation = tuple(normalisation[row] for row in kept)
        fitted = {
            "axes": tuple(axes),
            "missing_values": self._missing_values,
            "covariates": _fitted_covariates(folder, trait(source, "covariates"), splits),
            "normalisation": normalisation,
        }
        if self._target_fit is not None:
            scales = zip(self._schema.targets, self._target_fit.result(), strict=True)
            fitted["targets"] = tuple(
                target.model_copy(update={"mean": scale.mean, "std": scale.std})
                for target, scale in scales
            )
        schema = self._schema.model_copy(update=fitted)
        before = np.array(self._lengths_before, dtype=np.int64)
        irregularity = None
        if config.drop_rate:
            irregularity = Irregularity(
                drop_rate=config.drop_rate,
                seed=config.drop_seed,
                n_observations_before=int(before.sum()),
                n_dropped=check_dropped(config.drop_rate, before, self._n_kept),
            )
        manifest = Manifest(
            schema_version=4 if schema.targets else 3 if schema.needs_version_3 else 1,
            name=config.name,
            data_schema=schema,
            counts=split_counts(offsets, splits),
            shards=tuple(self._shards),
            split_rule=self.splitter.rule_text(),
            irregularity=irregularity,
            repairs=repairs,
            leakage=config.leakage,
            provenance=Provenance(
                source=config.source.model_dump_json(),
                files=dict(source.files),
                citation=source.citation,
                licence=source.licence,
            ),
            files=records_of(folder),
            digest="",
        )
        manifest = manifest.model_copy(update={"digest": manifest.computed_digest()})
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
        return manifest

    def _unseen(self, k: int) -> list[int]:
        """Categories of axis k that train lacks.

        Raises:
            DataError: validation or test has one, which the model could not know.
        """
        axis, (train, *others) = self._schema.axes[k], (seen[k] for seen in self._seen.values())
        lacking = [j for j in range(len(axis.categories)) if j not in train]
        if not lacking or axis.name == CHANNEL_AXIS:
            return []
        names = ", ".join(axis.categories[j] for j in lacking)
        known = ", ".join(axis.categories[j] for j in sorted(train) if j < len(axis.categories))
        if axis.n_embedded and not axis.unknown and set().union(*others) & set(lacking):
            raise DataError(
                f"axis {axis.name!r}: validation or test has categories that the train split lacks, "
                f"{names}; it has {known}: leave such observations out, change the split, or set "
                f"unknown: true for the axis in the source"
            )
        then = "they count as unknown" if axis.unknown else "the model cannot learn about it"
        text = f"no observation of {axis.name} {names} is in the train split; {then}"
        warnings.warn(text, stacklevel=3)
        return lacking

    def _without(self, k: int, lacking: list[int]) -> PositionAxis:
        """Axis k without some categories, which become ``unknown`` in the columns."""
        axis = self._schema.axes[k]
        kept = [name for j, name in enumerate(axis.categories) if j not in lacking]
        names = (*axis.categories, "")  # the last is unknown already
        index = np.array([kept.index(n) if n in kept else len(kept) for n in names], np.float64)
        state_file(self.folder).unlink(missing_ok=True)  # it was of the columns as they are now
        for shard in range(len(self._shards) + 1):
            path = self.folder / shard_name("positions", shard)
            positions = np.load(path, mmap_mode="r+")
            positions[:, k] = index[positions[:, k].astype(np.int64)]
            positions.flush()
        changes = {"categories": tuple(kept), "unit": f"index of {', '.join(kept)}"}
        return axis.model_copy(update=changes)


def _with_options(axis: PositionAxis, options: AxisOptions) -> PositionAxis:
    """The axis of a source with its options; ``scale: auto`` is fitted later."""
    changes = options.model_dump(exclude={"scale"} if options.scale == "auto" else set())
    if options.encoding == "auto":
        changes["encoding"] = "embedding" if axis.categories else "rotary"
    try:
        return PositionAxis.model_validate(axis.model_dump() | changes)
    except ValidationError as error:
        problems = "; ".join(map(str, validation_errors(error, PositionAxis)))
        raise DataError(f"axes.{axis.name}: {problems}") from None


def _channel_fit(schema: DataSchema, config: DatasetConfig) -> ChannelFit:
    """For one number of an observation after the other, in every group of ``normalise_by``."""
    channels = [channel.name for channel in schema.channels]
    transforms = [config.channels.get(name, ChannelTransform()) for name in channels]
    names = [f"channel {name!r}" for name in channels]
    by = schema.normalise_by
    if by is None:
        return ChannelFit(names, transforms, schema.n_values)
    known = {axis.name: k for k, axis in enumerate(schema.axes) if axis.encoding == "embedding"}
    if by not in known:
        raise DataError(
            f"normalise_by: {by!r} is no axis with categories and encoding 'embedding'; there are "
            f"{sorted(known) or 'none'}"
        )
    grouping = schema.axes[known[by]]
    if by != CHANNEL_AXIS:
        categories = grouping.categories + ("unknown",) * grouping.unknown
        names = [f"{name} of {by} {one!r}" for one in categories for name in names]
        transforms *= len(categories)
    return ChannelFit(names, transforms, schema.n_values, known[by], grouping.unknown)


def _fitted_covariates(
    folder: Path, covariates: tuple[Covariate, ...], splits: NDArray[np.int8]
) -> tuple[Covariate, ...]:
    """The covariates with mean and std over the objects of train.

    Raises:
        DataError: one is missing for every object of train, or of a category that train lacks.
    """
    if not covariates:
        return ()
    is_train = splits == SPLITS.index("train")
    everywhere = np.load(folder / "covariates.npy").astype(np.float64)
    fitted = []
    for k, covariate in enumerate(covariates):
        known, of_others = (
            column[~np.isnan(column)]
            for column in (everywhere[is_train, k], everywhere[~is_train, k])
        )
        if not len(known):
            raise DataError(
                f"the covariate {covariate.name!r} is missing for every object of the train split, so that "
                f"nothing can be learned from it; leave it out"
            )
        if covariate.categories and len(unseen := np.setdiff1d(of_others, known)):
            there, here = (
                ", ".join(covariate.categories[int(j)] for j in np.unique(indices))
                for indices in (unseen, known)
            )
            raise DataError(
                f"covariate {covariate.name!r}: validation or test has categories that the train split "
                f"lacks, {there}; it has {here}: leave those objects out, change the split, or list the "
                f"words under missing_values of the source"
            )
        if not covariate.categories:
            std = float(known.std())
            if std == 0:
                warnings.warn(
                    f"the covariate {covariate.name!r} never changes in the train split; its std is set to 1",
                    stacklevel=3,
                )
            changes = {"mean": float(f"{known.mean():.10g}"), "std": float(f"{std or 1.0:.10g}")}
            covariate = covariate.model_copy(update=changes)
        fitted.append(covariate)
    return tuple(fitted)
