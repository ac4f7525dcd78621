"""Infer a source's settings from files, and take the statistics that other settings are chosen by."""

from __future__ import annotations

import json
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roma_core.data.cleaning import RepairOptions, SeriesCleaner
from roma_core.data.manifest import Repairs
from roma_core.schema import AxisScaleFit, DataError
from roma_core.sources.base import SPLIT_WORDS, Source
from roma_core.sources.folders import IMAGE_ENDINGS, files_below, is_deep
from roma_core.sources.npz import read_arrays
from roma_core.sources.table_files import TableFile, connect

_USUAL_NAMES = {
    "object": ("object", "object_id", "objectid", "series", "series_id", "id", "star_id", "uid", "oid"),
    "time": ("time", "t", "mjd", "jd", "timestamp", "datetime", "date", "seconds", "hours", "step", "frame"),
    "label": ("label", "class", "target", "y", "label_id", "class_id"),
    "group": ("group", "group_id"),
    "split": ("split",),
    "quantity": ("band", "passband", "filter", "channel", "sensor", "variable", "parameter", "feature"),
}  # fmt: skip
"""Usual names of columns by role, in lower case, the most specific first."""

_ROW_NUMBERS = re.compile(r"(Unnamed: \d+|__index_level_\d+__|)$")  # as pandas names its index
_CSV = re.compile(r"\.(txt|tsv|csv|csv\.gz|csv\.zst)$", re.IGNORECASE)
_MAX_CATEGORIES = 64
_DATES = "dates as numbers"
_MAX_IMAGES = 200  # of a folder, whose colours are looked at


@dataclass(frozen=True)
class ColumnRoles:
    """Columns that the user named; None and empty are inferred."""

    object: str | None = None
    time: str | None = None
    axes: tuple[str, ...] = ()  # besides time
    channels: tuple[str, ...] = ()
    label: str | None = None
    group: str | None = None
    split: str | None = None


@dataclass
class InferredSource:
    """Settings of a source, and sentences on how they were inferred."""

    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


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
    if len(paths) == 1 and paths[0].is_dir():
        return _folder(paths[0])
    if objects is not None and endings - {".parquet", ".csv"}:
        raise DataError("a table of objects goes with long tables, in Parquet or CSV, only")
    if endings == {".ts"}:
        return _ts(paths)
    if endings == {".npz"} and len(paths) == 1:
        return _npz(paths[0])
    if endings in ({".parquet"}, {".csv"}):
        return _table(paths, roles, objects)
    raise DataError(
        f"the kind of {', '.join(path.name for path in paths[:4])} is not known: expected .ts, .csv (or "
        f".csv.gz, .csv.zst) or .parquet files, one .npz file, or a folder of images or WAV files "
        f"with a sub-folder per class. Any other source is described in a YAML file"
    )


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
    columns = {key: [{"name": name, "unit": "1"} for name in names[key]] for key in names}
    found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    return InferredSource({"kind": "npz", "file": str(path), **columns}, [f"arrays {found}"])


def _table(paths: Sequence[Path], roles: ColumnRoles, objects: Path | None) -> InferredSource:
    database = connect(Path(tempfile.gettempdir()))
    tables = [TableFile(path, database) for path in paths]
    path, kinds = paths[0], tables[0].kinds
    if len(kinds) == 1:
        raise DataError(
            f"{path}: its only column is {next(iter(kinds))!r}; expected at least an object, a time and "
            f"a value, separated by commas, semicolons, tabs or bars"
        )
    given = [roles.object, roles.time, *roles.axes, *roles.channels]
    if missing := [name for name in given if name is not None and name not in kinds]:
        raise DataError(f"{path} has no column {missing[0]!r}; it has {list(kinds)}")
    odd = {
        name: "row numbers"
        for name in kinds
        if _ROW_NUMBERS.match(name) and kinds[name] != "date" and name not in given
    }
    columns = [name for name in kinds if name not in odd]
    lists = [name for name in columns if kinds[name] == "list"]
    single = [name for name in columns if name not in lists]

    def role(name: str, given: str | None, candidates: Sequence[str]) -> str:
        found = given if given is not None else _named_like(name, candidates)
        if found is not None:
            return found
        raise DataError(
            f"{path}: no {name} column found among {list(candidates)}; expected a name such as "
            f"{_USUAL_NAMES[name][0]!r}: pass --{name} COLUMN"
        )

    marks = tables[0].marks  # of our own exports
    marked_axes, targets, covariates = (
        [name for name in columns if marks.get(name, {}).get("role") == what]
        for what in ("axis", "target", "covariate")
    )
    object_ = role("object", roles.object, single if lists else columns)
    rest = [name for name in columns if name != object_]
    dates = [name for name in lists or rest if kinds[name] == "date"]
    one_date = dates[0] if len(dates) == 1 and not _named_like("time", rest) else None
    time = role("time", roles.time or next(iter(marked_axes), one_date), lists or rest)
    if kinds[time] == "number" and _oddity(tables[0].first_numbers(time)) == _DATES:
        raise DataError(f"{path}: {time!r} holds {_DATES}; convert them to 2024-03-31 or days")
    known = [name for name in (single if lists else rest) if name not in (object_, time)]
    if objects is not None:
        known = [name for name in TableFile(objects, database).names if name != object_]
    metadata = {}
    for key in ("label", "group", "split"):
        named = getattr(roles, key)
        if named is not None and named not in known:
            raise DataError(f"--{key} {named}: there is no such column among {known}")
        if found := named or _named_like(key, known):
            metadata[key] = found
    taken = {time, *targets, *covariates, *([] if objects else metadata.values())}
    rest = [name for name in lists or rest if name not in taken]

    def column(name: str) -> dict[str, Any]:
        mark = marks.get(name, {})
        found: dict[str, Any] = {"column": name}
        if "categories" in mark:
            found |= {"categories": json.loads(mark["categories"])}
            found |= {"unknown": True} if "unknown" in mark else {}
        elif unit := mark.get("unit"):
            found |= {"unit": unit}
        return found | ({"name": "time"} if _ROW_NUMBERS.match(name) else {})

    axes = [column(time)]
    named_axes = roles.axes or tuple(name for name in marked_axes if name != time)
    for name in named_axes or [n for n in rest if not lists and n not in roles.channels]:
        if kinds[name] == "text":
            axes.append({"column": name, "categories": _categories(tables, name)})
        elif name in named_axes or name.lower() in _USUAL_NAMES["quantity"]:
            axes.append(column(name))
    taken |= {axis["column"] for axis in axes}
    numeric = ("list",) if lists else ("number", "date")
    channels = list(roles.channels)
    if not channels:
        channels = [n for n in rest if n not in taken and kinds[n] in numeric]
        numbers = [name for name in channels if kinds[name] == "number"]
        odd |= {n: what for n in numbers if (what := _oddity(tables[0].first_numbers(n)))}
        channels = [name for name in channels if name not in odd]
    if not channels:
        raise DataError(
            f"{path}: no column is left for the values; name them with --channel COLUMN"
        )

    shared = {"axes": axes, "channels": [column(n) for n in channels], "metadata": metadata}
    shared |= {"targets": [column(n) for n in targets]} if targets else {}
    shared |= {"covariates": [column(n) for n in covariates]} if covariates else {}
    config: dict[str, Any] = {
        "kind": "parquet" if lists else "table",
        "files": list(map(str, paths)),
    }
    config |= {"id": object_, **shared} if lists else {"columns": {"object": object_, **shared}}
    if objects is not None:
        config["objects"] = {"file": str(objects), "object": object_}
    shown = channels[:8] + ["…"] * (len(channels) > 8)
    used = {object_, *taken, *channels, *metadata.values(), *odd}
    unused = [name for name in columns if name not in used]
    found_metadata = ", ".join(f"{key}: {name}" for key, name in metadata.items())
    notes = [
        f"a row per {'series' if lists else 'observation'}; objects: {object_}; positions: "
        f"{', '.join(axis['column'] for axis in axes)}; values: {', '.join(shown)}",
        found_metadata or "no metadata of objects",
        f"targets: {', '.join(targets)}" * bool(targets),
        f"covariates: {', '.join(covariates)}" * bool(covariates),
        f"not used: {', '.join(unused)}" * bool(unused),
        *(f"not used: {what} in {name!r}" for name, what in odd.items()),
    ]
    return InferredSource(config, [note for note in notes if note])


def _oddity(numbers: NDArray[np.float64]) -> str:
    """What numbers are if no measurements: row numbers from 0 or 1, dates like 20240331, nothing."""
    if len(numbers) == 0:
        return "nothing"
    first = numbers - np.arange(len(numbers))
    if len(numbers) >= 10 and first[0] in (0, 1) and (first == first[0]).all():
        return "row numbers"
    year, month, day = numbers // 10_000, numbers // 100 % 100, numbers % 100
    is_month = (year >= 1900) & (year < 2100) & (month >= 1) & (month <= 12)
    return _DATES if (is_month & np.isin(day, range(1, 32))).all() else ""


def _named_like(role: str, columns: Sequence[str]) -> str | None:
    by_name = {column.lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in _USUAL_NAMES[role] if name in by_name), None)


def _categories(tables: Sequence[TableFile], column: str) -> list[str]:
    found: set[str] = set()
    for table in tables:
        found |= set(filter(None, table.words(column, _MAX_CATEGORIES + 2)))
        if len(found) > _MAX_CATEGORIES:
            raise DataError(
                f"{table.path}: the text column {column!r} holds more than {_MAX_CATEGORIES} words, too "
                f"many for a position; name the class with --label and the values with --channel"
            )
    return sorted(found)


_SAMPLED = 200_000  # observations that quantiles are taken from
_LENIENT = RepairOptions(unsorted="sort", duplicates="first", not_finite="drop", empty="drop")


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
    has_groups: bool
    channels: tuple[ChannelStatistics, ...]
    axes: tuple[AxisStatistics, ...]
    repairs: Repairs | None


def source_statistics(source: Source) -> SourceStatistics:
    """Read a source once; unsorted, duplicate and infinite observations are counted, not refused.

    Raises:
        DataError: there is no series, or one has a wrong shape or an unknown label.
    """
    cleaner = SeriesCleaner(source, _LENIENT)
    sample: list[NDArray[np.float32]] = []  # values of every step-th series
    step, n_sampled = 1, 0
    classes: Counter[str] = Counter(dict.fromkeys(source.classes, 0))
    splits: Counter[str] = Counter()
    steps = [AxisScaleFit() for _ in source.axes]
    max_abs = np.zeros(len(source.axes))
    varies = np.zeros(len(source.channels), dtype=bool)
    lengths, has_groups = array("q"), False
    for series in cleaner:
        lengths.append(len(series.values))
        classes.update(filter(None, [series.label]))
        splits.update(filter(None, [series.recorded_split]))
        has_groups |= series.group is not None
        varies |= (series.values != series.values[:1]).any(axis=0)
        if (len(lengths) - 1) % step == 0:
            sample.append(series.values.copy())
            n_sampled += len(series.values)
        if n_sampled > _SAMPLED and len(sample) > 1:
            sample, step = sample[::2], 2 * step
            n_sampled = sum(map(len, sample))
        max_abs = np.maximum(max_abs, np.abs(series.positions).max(axis=0))
        for k, fit in enumerate(steps):
            fit.add(series.positions[:, k])
    if not lengths:
        raise DataError("the source has no series")
    values = np.concatenate(sample)
    low, median, high = np.quantile(values.astype(np.float64), (0.25, 0.5, 0.75), axis=0)  # (C,)
    far = np.abs(values - median).max(axis=0)
    return SourceStatistics(
        n_series=len(lengths),
        n_single=lengths.count(1),
        n_observations=sum(lengths),
        max_length=max(lengths),
        classes=dict(classes),
        recorded_splits=dict(splits),
        has_groups=has_groups,
        channels=tuple(
            ChannelStatistics(channel.name, float(high - low), float(far), bool(changes))
            for channel, low, high, far, changes in zip(
                source.channels, low, high, far, varies, strict=True
            )
        ),
        axes=tuple(
            AxisStatistics(axis.name, fit.gap(), fit.span(0.5), float(most))
            for axis, fit, most in zip(source.axes, steps, max_abs, strict=True)
        ),
        repairs=cleaner.repairs(),
    )
