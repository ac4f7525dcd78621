"""Infer a source's settings from files, and take the statistics that other settings are chosen by."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roma_core.data.cleaning import RepairOptions, SeriesCleaner
from roma_core.data.infer_tables import InferredSource, TableInference
from roma_core.data.layout import MAX_TIMES, choose_layout, grid_of, melt, n_times_of
from roma_core.data.manifest import Repairs
from roma_core.data.table_columns import ColumnRoles
from roma_core.schema import AxisScaleFit, DataError, Layout, TargetLevel
from roma_core.sources.base import SPLIT_WORDS, Source, trait
from roma_core.sources.folders import IMAGE_ENDINGS, files_below, is_deep
from roma_core.sources.npz import read_arrays

__all__ = ["ColumnRoles", "SourceStatistics", "infer_source", "source_statistics"]

_PARQUET = re.compile(r"\.parquet$", re.IGNORECASE)
_CSV = re.compile(r"\.(txt|tsv|csv|csv\.gz|csv\.zst)$", re.IGNORECASE)
_MAX_IMAGES = 200  # of a folder, whose colours are looked at


def infer_source(
    paths: Sequence[Path], roles: ColumnRoles, objects: Path | None = None
) -> InferredSource:
    """Infer the kind of source that files of one kind, or one folder, are, and every column's role.

    Args:
        objects: a second table with a row per object, for long tables.

    Raises:
        DataError: there is no such file, the kind is not known, or a role cannot be inferred.
    """
    if missing := [path for path in paths if not path.exists()]:
        raise DataError(f"there is no file {missing[0]} (from {Path.cwd()})")
    endings = {path.suffix.lower() for path in paths if path.is_file()}
    if endings and all(_CSV.search(path.name) for path in paths):
        endings = {".csv"}
    if len(paths) == 1 and paths[0].is_dir() and (tables := _tables_below(paths[0], objects)):
        return TableInference(tables, roles, objects).infer()
    if (paths[0].is_dir() or endings & {".ts", ".npz"}) and roles != ColumnRoles():
        raise DataError(
            f"{paths[0]} has no columns, so leave out the options about them; an .npz file has arrays "
            f"values, positions, labels, targets, groups and splits, a folder a sub-folder per class"
        )
    if paths[0].is_dir() and len(paths) == 1:
        return _folder(paths[0])
    if objects is not None and endings - {".parquet", ".csv"}:
        raise DataError("a table of objects goes with long tables, in Parquet or CSV, only")
    if endings == {".ts"}:
        return _ts(paths)
    if endings == {".npz"} and len(paths) == 1:
        return _npz(paths[0])
    if endings in ({".parquet"}, {".csv"}):
        return TableInference(paths, roles, objects).infer()
    raise DataError(
        f"the kind of {', '.join(path.name for path in paths[:4])} is not known: expected .ts, .csv (or "
        f".csv.gz, .csv.zst) or .parquet files, one .npz file, or a folder of images or WAV files "
        f"with a sub-folder per class, or of tables. Any other source is described in a YAML file"
    )


def _tables_below(folder: Path, objects: Path | None) -> list[Path]:
    """The Parquet or CSV files of a folder and its sub-folders, without the table of objects."""
    files = [path for path in files_below(folder) if path != objects]
    if any(path.suffix.lower() in (".wav", *IMAGE_ENDINGS) for path in files):
        return []
    found = [[path for path in files if form.search(path.name)] for form in (_PARQUET, _CSV)]
    if all(found):
        raise DataError(f"{folder} holds Parquet and CSV files; name those of one kind")
    return found[0] or found[1]


def _folder(folder: Path) -> InferredSource:
    files = files_below(folder)
    found = sorted({path.suffix.lower() for path in files})
    tops = {path.relative_to(folder).parts[0] for path in files}
    note = "a sub-folder per class"
    if tops and {top.lower() for top in tops} <= SPLIT_WORDS.keys():
        note += f" below those of the published splits {', '.join(sorted(tops))}"
    if ".wav" in found:
        note = f"sounds, {note}; patches of their log-mel spectrograms"
        return InferredSource({"kind": "wav_folder", "folder": str(folder)}, [note])
    if not set(found) & set(IMAGE_ENDINGS):
        raise DataError(
            f"{folder} holds neither images ({', '.join(IMAGE_ENDINGS)}) nor .wav files, but "
            f"{', '.join(found) or 'nothing'}; name the files, or a pattern such as '{folder}/*.parquet'"
        )
    from PIL import Image

    paths = [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]
    modes: set[str] = set()
    for path in paths[:: -(-len(paths) // _MAX_IMAGES)]:
        try:
            with Image.open(path) as image:
                modes.add(image.mode)
                if path == paths[0]:
                    width, height = image.size
        except OSError as error:
            raise DataError(f"{path} is no image: {error}") from error
    is_grey = any(map(is_deep, modes)) or modes <= {"1", "L", "LA", "La"}
    colours = "grey" if is_grey else "rgb"
    side = min(width, height)
    patch = next((size for size in (16, 8, 4) if side >= 8 * size), 2 if side >= 8 else 1)
    note = f"images, {note}; the first is {width} × {height}, so patches are {patch} pixels wide"
    config = {"kind": "image_folder", "folder": str(folder), "patch": patch, "colours": colours}
    return InferredSource(config, [note])


def _ts(paths: Sequence[Path]) -> InferredSource:
    files, notes = [], []
    for path in sorted(paths, key=lambda path: path.stem.lower().endswith("test")):
        split = re.search("(train|test)$", path.stem.lower())
        files.append({"path": str(path)} | ({"split": split[0]} if split else {}))
        notes.append(f"{path.name}: {split[0] if split else 'no recorded split'}")
    recorded = [file for file in files if "split" in file]
    if recorded and len(recorded) < len(files):
        raise DataError(
            "some of the .ts files end in TRAIN or TEST and some do not; either all must or none"
        )
    if len(recorded) == 1:
        recorded[0].pop("split")  # one half of a pair
        notes = [f"{paths[0].name} alone: its series are split anew"]
    return InferredSource({"kind": "ts", "files": files}, notes)


def _npz(path: Path) -> InferredSource:
    shapes = {name: array.shape for name, array in read_arrays(path).items()}
    n_leading = 1 if "offsets" in shapes else 2  # dimensions before that of channels or axes

    def width(name: str) -> int:
        return shapes[name][-1] if len(shapes[name]) > n_leading else 1

    names = {
        "axes": ["time", *(f"axis{k}" for k in range(1, width("positions")))],
        "channels": [f"c{k + 1:02d}" for k in range(width("values"))],
    }
    level = {}
    if (of_targets := shapes.get("targets")) is not None:
        n_leading = 1 if of_targets[1:2] != shapes["values"][1:2] or "offsets" in shapes else 2
        n_series = shapes["offsets"][0] - 1 if "offsets" in shapes else shapes["values"][0]
        if of_targets[0] == n_series and n_leading == 1:
            level = {"target_level": "series"}
        names["targets"] = [f"target{k + 1}" for k in range(width("targets"))]
    columns = {key: [{"name": name, "unit": "1"} for name in names[key]] for key in names} | level
    found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    return InferredSource({"kind": "npz", "file": str(path), **columns}, [f"arrays {found}"])


_FAR = 100.0  # quartile distances; channels with values beyond are transformed
_MANY_GAPS = 1e4  # positions farther from zero, in gaps, count from each series' first
_SAMPLED = 200_000  # observations that quantiles are taken from
_TIMED = 200  # series whose times are kept to find a grid
_LENIENT = RepairOptions(unsorted="sort", duplicates="mean", not_finite="drop", empty="drop")


@dataclass(frozen=True)
class ChannelStatistics:
    """Quantiles of the values of one channel as delivered."""

    name: str
    iqr: float  # distance of the quartiles
    max_deviation: float  # largest distance from the median
    varies: bool  # within any series; else it is metadata of the object and no measurement


@dataclass(frozen=True)
class AxisStatistics:
    """Positions on one axis."""

    name: str
    median_gap: float  # between neighbouring different positions; 0 if no series has two
    median_span: float  # from a series' smallest position to its largest
    max_abs: float


@dataclass(frozen=True)
class SourceStatistics:
    """Amounts, classes and spreads of a source."""

    n_series: int
    n_single: int  # of one observation
    n_observations: int
    max_length: int
    classes: dict[str, int]
    recorded_splits: dict[str, int]  # empty if the publisher made none
    classes_of_group: dict[str, set[str | None]]  # empty without groups
    channels: tuple[ChannelStatistics, ...]
    axes: tuple[AxisStatistics, ...]
    repairs: Repairs | None
    layout: Layout  # that `auto` chooses; what is counted is its observations
    layout_reason: str
    grid_fill: float = 0.0  # observed share of the steps of the first axis's grid; 0: no grid
    observed: float = 1.0  # share of the numbers of all observations that is not missing
    targets: tuple[str, ...] = ()
    target_level: TargetLevel = "observation"


def source_statistics(source: Source) -> SourceStatistics:
    """Read a source once; unsorted, duplicate and infinite observations are counted, not refused.

    Raises:
        DataError: there is no series, or one has a wrong shape or an unknown label.
    """
    cleaner = SeriesCleaner(source, _LENIENT)
    given = trait(source, "layout")
    layout, reason = choose_layout("auto", source, cleaner)
    cleaner = SeriesCleaner(source, _LENIENT)
    n_channels = len(source.channels)
    sample: list[tuple[Any, Any]] = []  # channels and values of every step-th series
    step, n_sampled = 1, 0
    classes: Counter[str] = Counter(dict.fromkeys(source.classes, 0))
    splits: Counter[str] = Counter()
    steps = [AxisScaleFit() for _ in source.axes]
    max_abs = np.zeros(len(source.axes))
    varies = np.zeros(n_channels, dtype=bool)
    classes_of_group: dict[str, set[str | None]] = {}
    lengths = array("q")
    n_numbers = n_places = 0
    times: list[NDArray[np.float64]] = []  # on the first axis, of the first series
    n_timed = 0
    for series in cleaner:
        positions, values = series.positions, series.values
        if given == "joint":
            positions, values, _ = melt(positions, values)
        lengths.append(len(values) if layout == "per_channel" else n_times_of(series, given))
        n_numbers += len(values)
        n_places += lengths[-1] * (n_channels if layout == "joint" else 1)
        classes.update(filter(None, [series.label]))
        splits.update(filter(None, [series.recorded_split]))
        if series.group is not None:
            classes_of_group.setdefault(series.group, set()).add(series.label)
        channels, values = positions[:, -1].astype(np.int64), values[:, 0]  # (M,), (M,)
        low, high = np.full(n_channels, np.inf), np.full(n_channels, -np.inf)
        np.minimum.at(low, channels, values)
        np.maximum.at(high, channels, values)
        varies |= low < high
        if (len(lengths) - 1) % step == 0:
            sample.append((channels, values.copy()))
            n_sampled += len(values)
        if n_sampled > _SAMPLED * n_channels and len(sample) > 1:
            sample, step = sample[::2], 2 * step
            n_sampled = sum(len(values) for _, values in sample)
        max_abs = np.maximum(max_abs, np.abs(series.positions[:, : len(steps)]).max(axis=0))
        for k, fit in enumerate(steps):
            fit.add(series.positions[:, k])
        if len(times) < _TIMED and n_timed < MAX_TIMES:
            times.append(series.positions[:, 0].copy())
            n_timed += len(times[-1])
    if not lengths:
        raise DataError("the source has no series")
    channels, values = map(np.concatenate, zip(*sample, strict=True))
    found = []
    for k, channel in enumerate(source.channels):
        x = values[channels == k].astype(np.float64)
        q25, median, q75 = np.quantile(x, (0.25, 0.5, 0.75)) if len(x) else np.zeros(3)
        most = float(np.abs(x - median).max(initial=0))
        found.append(ChannelStatistics(channel.name, float(q75 - q25), most, bool(varies[k])))
    return SourceStatistics(
        n_series=len(lengths),
        n_single=lengths.count(1),
        n_observations=sum(lengths),
        max_length=max(lengths),
        classes=dict(classes),
        recorded_splits=dict(splits),
        classes_of_group=classes_of_group,
        channels=tuple(found),
        axes=tuple(
            AxisStatistics(axis.name, fit.gap(), fit.span(0.5), float(most))
            for axis, fit, most in zip(source.axes, steps, max_abs, strict=True)
        ),
        repairs=cleaner.repairs(),
        layout=layout,
        layout_reason=reason,
        grid_fill=0.0 if (grid := grid_of(times)) is None else grid.fill,
        observed=n_numbers / n_places,
        targets=tuple(target.name for target in trait(source, "targets")),
        target_level=trait(source, "target_level"),
    )


def suggest_options(
    statistics: SourceStatistics, categorical: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], list[str]]:
    """Repairs, axes and channels of a ``DatasetConfig``, with a sentence for each choice.

    ``categorical``: axes whose positions are indices of categories.
    """
    dataset: dict[str, Any] = {}
    reasons: list[str] = []
    if (found := statistics.repairs) is not None:
        n_not_finite = found.observations_not_finite + found.series_without_targets
        for name, setting, count, what in (
            ("not_finite", "drop", n_not_finite, "with an infinite number, or no time or target"),
            ("duplicates", "mean", found.duplicate_observations, "at the position of another"),
            ("empty", "drop", found.empty_series_dropped, "series without values"),
        ):
            if count:
                dataset.setdefault("repair", {})[name] = setting
                reasons.append(
                    f"repair.{name} {setting}: {count:,} {what}; remove the line to raise an error"
                )
    reasons.append(f"layout auto: {statistics.layout}, {statistics.layout_reason}")
    axes = dataset["axes"] = {}
    for axis in statistics.axes:
        if axis.name in categorical:
            reasons.append(f"{axis.name}: categorical; every category has a learned vector")
            continue
        axes[axis.name] = {"scale": "auto"}
        far = max(_MANY_GAPS * axis.median_gap, 3 * axis.median_span)
        if axis.median_gap > 0 and axis.max_abs > far:
            axes[axis.name]["anchor"] = "first"
            reasons.append(
                f"{axis.name}: up to {axis.max_abs:,.10g} with gaps of {axis.median_gap:.3g}, so positions "
                f"count from the first of each series"
            )
    outlying = [c for c in statistics.channels if c.iqr > 0 and c.max_deviation > _FAR * c.iqr]
    for n, channel in enumerate(outlying):
        scale = float(f"{channel.iqr:.2g}")
        chosen = dataset.setdefault("channels", {})
        chosen[channel.name] = {"transform": "arcsinh", "transform_scale": scale}
        if n < 8:
            reasons.append(
                f"{channel.name}: values up to {channel.max_deviation / channel.iqr:,.0f} quartile "
                f"distances from the median, so transform: arcsinh"
            )
    return dataset, reasons
