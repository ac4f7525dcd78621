"""One pass over a source that is not built yet: how much there is, how long, how spread.

What stands in a ``Survey`` is what settings are chosen by; a built data set has a ``DataProfile``.

What somebody's files probably are: paths, and the columns that were named → a source's settings.
"""

from __future__ import annotations

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
from roma_core.schema import DataError
from roma_core.sources.base import Source

_NAMES = {
    "object": ("object", "object_id", "objectid", "series", "series_id", "id", "star_id", "uid", "oid"),
    "time": ("time", "t", "mjd", "jd", "timestamp", "datetime", "date", "seconds", "hours", "step", "frame"),
    "label": ("label", "class", "target", "y", "label_id", "class_id"),
    "group": ("group", "group_id"),
    "split": ("split",),
}  # fmt: skip
"""Usual names of columns by role, in lower case, the most telling first."""

_CATEGORICAL = (
    "band",
    "passband",
    "filter",
    "channel",
    "sensor",
    "variable",
    "parameter",
    "feature",
)
"""Usual names of a column that says which quantity a row measures."""

_MOST_CATEGORIES = 64
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Roles:
    """Columns that were named; None and empty are guessed."""

    object: str | None = None
    time: str | None = None
    axes: tuple[str, ...] = ()  # besides time
    channels: tuple[str, ...] = ()
    label: str | None = None
    group: str | None = None
    split: str | None = None


@dataclass
class Guess:
    """Settings of a source, and how they came about."""

    source: dict[str, Any]
    said: list[str] = field(default_factory=list)


def guess_source(paths: Sequence[Path], roles: Roles, objects: Path | None = None) -> Guess:
    """What kind of source the files are, and which column is what.

    Args:
        paths: files of one kind, or one folder; patterns are expanded by the caller.
        objects: a second table with a row per object, for long tables.

    Raises:
        DataError: there is no such file, the kind is not known, or a column cannot be guessed.
    """
    if missing := [path for path in paths if not path.exists()]:
        raise DataError(f"there is no file {missing[0]} (from {Path.cwd()})")
    endings = {_ending(path) for path in paths if path.is_file()}
    if len(paths) == 1 and paths[0].is_dir():
        return _folder(paths[0])
    if objects is not None and endings - {"parquet", "csv"}:
        raise DataError("a table of objects goes with long tables, in Parquet or CSV, only")
    if endings == {"ts"}:
        return _ts(paths)
    if endings == {"npz"} and len(paths) == 1:
        return _npz(paths[0])
    if endings in ({"parquet"}, {"csv"}):
        return _table(paths, roles, objects)
    raise DataError(
        f"cannot tell what {', '.join(path.name for path in paths[:4])} are: expected .ts, .csv or "
        f".parquet files, one .npz file, or a folder of pictures or WAV files with a sub-folder per "
        f"class. Any other source is described in a YAML file"
    )


def _ending(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-2:] == [".csv", ".gz"] or suffixes[-1:] == [".txt"]:
        return "csv"
    return suffixes[-1][1:] if suffixes else ""


def _folder(folder: Path) -> Guess:
    found = sorted({path.suffix.lower() for path in folder.rglob("*") if path.is_file()})
    if ".wav" in found:
        return Guess(
            {"kind": "wav_folder", "folder": str(folder)},
            ["sounds, a sub-folder per class; patches of their log-mel spectrograms"],
        )
    if not set(found) & set(_PICTURES):
        raise DataError(
            f"{folder} holds neither pictures ({', '.join(_PICTURES)}) nor .wav files, but "
            f"{', '.join(found) or 'nothing'}; name the files, or a pattern such as '{folder}/*.parquet'"
        )
    side, colours, shape = _picture_size(folder)
    patch = next(
        (size for size in (16, 8, 4) if min(shape) >= 8 * size), 2 if min(shape) >= 8 else 1
    )
    return Guess(
        {"kind": "image_folder", "folder": str(folder), "patch": patch, "colours": colours},
        [f"pictures, a sub-folder per class; {side}, so patches are {patch} pixels wide"],
    )


def _picture_size(folder: Path) -> tuple[str, str, tuple[int, int]]:
    from PIL import Image

    first = next(p for p in sorted(folder.rglob("*")) if p.suffix.lower() in _PICTURES)
    try:
        with Image.open(first) as image:
            width, height = image.size
            colours = "grey" if image.mode in ("1", "L", "I;16", "I", "F") else "rgb"
    except OSError as error:
        raise DataError(f"{first} is no picture: {error}") from error
    return f"the first is {width} × {height}", colours, (width, height)


def _ts(paths: Sequence[Path]) -> Guess:
    files, said = [], []
    for path in sorted(paths, key=lambda path: path.stem.lower().endswith("test")):
        file: dict[str, Any] = {"path": str(path)}
        for split in ("train", "test"):
            if path.stem.lower().endswith(split):
                file["split"] = split
        files.append(file)
        said.append(f"{path.name}: {file.get('split', 'no recorded split')}")
    recorded = [file for file in files if "split" in file]
    if recorded and len(recorded) < len(files):
        raise DataError(
            "some of the .ts files end in TRAIN or TEST and some do not; either all must or none"
        )
    if len(recorded) == 1:
        recorded[0].pop("split")  # half of a pair alone: it is shared out anew
        said = [f"{paths[0].name} alone: its series are shared out anew"]
    return Guess({"kind": "ts", "files": files}, said)


def _npz(path: Path) -> Guess:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            shapes = {name: file[name].shape for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for name in ("values", "positions"):
        if name not in shapes:
            raise DataError(
                f"{path} has the arrays {sorted(shapes)}; expected 'values' and 'positions', and "
                f"'labels' to learn from"
            )
    flat = "offsets" in shapes
    n_channels = shapes["values"][-1] if len(shapes["values"]) > (1 if flat else 2) else 1
    wide = len(shapes["positions"]) > (1 if flat else 2)
    n_axes = shapes["positions"][-1] if wide else 1
    axes = [{"name": "time" if k == 0 else f"axis{k}", "unit": "1"} for k in range(n_axes)]
    channels = [{"name": f"c{k + 1:02d}", "unit": "1"} for k in range(n_channels)]
    return Guess(
        {"kind": "npz", "file": str(path), "axes": axes, "channels": channels},
        [f"arrays {', '.join(f'{name} {shape}' for name, shape in shapes.items())}"],
    )


# tables -----------------------------------------------------------------------------------------


def _table(paths: Sequence[Path], roles: Roles, objects: Path | None) -> Guess:
    columns = _columns(paths[0])
    lists = [name for name, kind in columns.items() if kind == "list"]
    for name in [roles.object, roles.time, *roles.axes, *roles.channels]:
        if name is not None and name not in columns:
            raise DataError(f"{paths[0]} has no column {name!r}; it has {list(columns)}")
    if lists:
        return _row_per_series(paths, columns, lists, roles)
    return _row_per_observation(paths, columns, roles, objects)


def _row_per_series(
    paths: Sequence[Path], columns: dict[str, str], lists: list[str], roles: Roles
) -> Guess:
    time = _role("time", roles.time, lists, paths[0])
    axes = [time, *roles.axes]
    channels = list(roles.channels) or [name for name in lists if name not in axes]
    single = [name for name in columns if name not in lists]
    name = _role("object", roles.object, single, paths[0])
    facts = _facts(roles, [column for column in single if column != name])
    source = {
        "kind": "parquet",
        "files": [str(path) for path in paths],
        "id": name,
        "axes": [{"column": column} for column in axes],
        "channels": [{"column": column} for column in _some(channels, paths[0])],
        "facts": facts,
    }
    return Guess(source, _said("a row per series", name, axes, channels, facts, columns))


def _row_per_observation(
    paths: Sequence[Path], columns: dict[str, str], roles: Roles, objects: Path | None
) -> Guess:
    name = _role("object", roles.object, list(columns), paths[0])
    rest = [column for column in columns if column != name]
    time = _role("time", roles.time, rest, paths[0])
    rest.remove(time)
    known = rest if objects is None else [c for c in _columns(objects) if c != name]
    facts = _facts(roles, known)
    if objects is None:
        rest = [column for column in rest if column not in facts.values()]
    axes: list[dict[str, Any]] = [{"column": time}]
    further = roles.axes or tuple(
        column
        for column in rest
        if column not in roles.channels
        and (columns[column] == "text" or column.lower() in _CATEGORICAL)
    )
    for column in further:
        axis: dict[str, Any] = {"column": column}
        if columns.get(column) == "text":
            axis["categories"] = _categories(paths, column)
        axes.append(axis)
    taken = {axis["column"] for axis in axes}
    channels = list(roles.channels) or [column for column in rest if column not in taken]
    source: dict[str, Any] = {
        "kind": "table",
        "files": [str(path) for path in paths],
        "columns": {
            "object": name,
            "axes": axes,
            "channels": [{"column": column} for column in _some(channels, paths[0])],
            "facts": facts,
        },
    }
    if objects is not None:
        source["objects"] = {"file": str(objects), "object": name}
    all_axes = [axis["column"] for axis in axes]
    return Guess(source, _said("a row per observation", name, all_axes, channels, facts, columns))


def _columns(path: Path) -> dict[str, str]:
    """Name → ``number``, ``text`` or ``list``, as the beginning of the file shows."""
    import pyarrow as pa
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    if not path.exists():
        raise DataError(f"there is no file {path} (from {Path.cwd()})")
    try:
        if _ending(path) == "parquet":
            schema = pq.read_schema(path)
        else:
            with csv.open_csv(path) as reader:
                schema = reader.schema
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    found = {}
    for column in schema:
        kind = column.type
        if (
            pa.types.is_list(kind)
            or pa.types.is_large_list(kind)
            or pa.types.is_fixed_size_list(kind)
        ):
            found[column.name] = "list"
        elif (
            pa.types.is_string(kind)
            or pa.types.is_large_string(kind)
            or pa.types.is_dictionary(kind)
        ):
            found[column.name] = "text"
        else:
            found[column.name] = "number"
    if len(found) == 1 and any(mark in next(iter(found)) for mark in ";\t|"):
        raise DataError(
            f"{path} seems to divide its columns by something else than a comma: its only column is "
            f"{next(iter(found))!r}; save it with commas, or as Parquet"
        )
    return found


def _role(role: str, given: str | None, columns: Sequence[str], path: Path) -> str:
    if given is not None:
        return given
    by_name = {column.lower(): column for column in reversed(columns)}
    for name in _NAMES[role]:
        if name in by_name:
            return by_name[name]
    raise DataError(
        f"{path}: none of the columns {list(columns)} is called {_NAMES[role][0]!r} or the like; say "
        f"which one it is with --{role} COLUMN"
    )


def _facts(roles: Roles, columns: Sequence[str]) -> dict[str, str]:
    facts = {}
    for role in ("label", "group", "split"):
        given = getattr(roles, role)
        if given is not None and given not in columns:
            raise DataError(f"--{role} {given}: there is no such column among {list(columns)}")
        by_name = {column.lower(): column for column in reversed(columns)}
        found = given or next((by_name[n] for n in _NAMES[role] if n in by_name), None)
        if found is not None:
            facts[role] = found
    return facts


def _some(channels: list[str], path: Path) -> list[str]:
    if not channels:
        raise DataError(
            f"{path}: no column is left for the values; name them with --channel COLUMN"
        )
    return channels


def _categories(paths: Sequence[Path], column: str) -> list[str]:
    from roma_core.sources.columns import batches, words

    found: set[str] = set()
    for path in paths:
        for batch in batches(path, [column], [column], 1 << 18):
            found.update(filter(None, words(batch.column(0).unique())))
            if len(found) > _MOST_CATEGORIES:
                raise DataError(
                    f"{path}: the text column {column!r} holds more than {_MOST_CATEGORIES} words; it "
                    f"is no position. Say with --label what the class is, and with --channel which "
                    f"columns are values"
                )
    return sorted(found)


def _said(
    shape: str,
    name: str,
    axes: Sequence[str],
    channels: Sequence[str],
    facts: dict[str, str],
    columns: dict[str, str],
) -> list[str]:
    used = {name, *axes, *channels, *facts.values()}
    left = [column for column in columns if column not in used]
    shown = list(channels[:8]) + (["…"] if len(channels) > 8 else [])
    said = [
        f"{shape}; objects: {name}; positions: {', '.join(axes)}; values: {', '.join(shown)}",
        ", ".join(f"{role}: {column}" for role, column in facts.items()) or "no facts of objects",
    ]
    if left:
        said.append(f"not used: {', '.join(left)}")
    return said


_SAMPLE = 200_000  # observations that quantiles are taken from
_LENIENT = RepairOptions(unsorted="sort", duplicates="first", not_finite="drop", empty="drop")


@dataclass(frozen=True)
class ChannelSurvey:
    """Quantiles of the values of one channel as delivered.

    Attributes:
        spread: distance of the quartiles.
        reach: largest distance from the median.
        varies: whether it changes within any series; a channel that never does is a fact of the
            object and no measurement.
    """

    name: str
    median: float
    spread: float
    reach: float
    varies: bool


@dataclass(frozen=True)
class AxisSurvey:
    """Positions on one axis.

    Attributes:
        gap: median distance of neighbouring different positions; 0 if a series never has two.
        span: median distance from a series' smallest to its largest.
        farthest: largest absolute position.
    """

    name: str
    gap: float
    span: float
    farthest: float


@dataclass(frozen=True)
class Survey:
    """What a source holds."""

    n_series: int
    n_observations: int
    longest: int
    classes: dict[str, int]
    recorded_splits: dict[str, int]  # empty if the publisher made none
    has_groups: bool
    channels: tuple[ChannelSurvey, ...]
    axes: tuple[AxisSurvey, ...]
    repairs: Repairs | None

    @property
    def mean_length(self) -> float:
        return self.n_observations / self.n_series


def survey(source: Source) -> Survey:
    """Read a source once; unsorted, doubled and infinite observations are counted, not refused.

    Raises:
        DataError: there is no series, or one has a wrong shape or an unknown label.
    """
    arriving = SeriesCleaner(source, _LENIENT)
    channels, axes = len(source.channels), len(source.axes)
    sample = _Sample(channels)
    classes: Counter[str] = Counter(dict.fromkeys(source.classes, 0))
    splits: Counter[str] = Counter()
    gaps, spans = [array("d") for _ in range(axes)], [array("d") for _ in range(axes)]
    farthest = np.zeros(axes)
    varies = np.zeros(channels, dtype=bool)
    n = total = longest = grouped = 0
    for series in arriving:
        n, total, longest = n + 1, total + len(series.values), max(longest, len(series.values))
        classes.update(filter(None, [series.label]))
        splits.update(filter(None, [series.recorded_split]))
        grouped += series.group is not None
        varies |= (series.values != series.values[:1]).any(axis=0)
        sample.add(series.values)
        farthest = np.maximum(farthest, np.abs(series.positions).max(axis=0))
        for k in range(axes):
            steps = np.diff(np.unique(series.positions[:, k]))
            gaps[k].append(float(np.median(steps)) if len(steps) else 0.0)
            spans[k].append(float(steps.sum()))
    if n == 0:
        raise DataError("the source has no series")
    return Survey(
        n_series=n,
        n_observations=total,
        longest=longest,
        classes=dict(classes),
        recorded_splits=dict(splits),
        has_groups=grouped > 0,
        channels=tuple(
            _channel(channel.name, sample.values()[:, k], bool(varies[k]))
            for k, channel in enumerate(source.channels)
        ),
        axes=tuple(
            AxisSurvey(axis.name, _median(gaps[k]), _median(spans[k]), float(farthest[k]))
            for k, axis in enumerate(source.axes)
        ),
        repairs=arriving.repairs(),
    )


class _Sample:
    """Every so many-th observation; half are let go whenever there are too many."""

    def __init__(self, n_channels: int) -> None:
        self._kept: list[NDArray[np.float32]] = []
        self._step, self._n, self._phase = 1, 0, 0
        self._width = n_channels

    def add(self, values: NDArray[np.float32]) -> None:
        chosen = values[self._phase :: self._step]
        self._phase = (self._phase - len(values)) % self._step
        self._kept.append(chosen.copy())
        self._n += len(chosen)
        if self._n > _SAMPLE:
            self._kept = [self.values()[::2]]
            self._n, self._step = len(self._kept[0]), self._step * 2

    def values(self) -> NDArray[np.float32]:
        if not self._kept:
            return np.empty((0, self._width), np.float32)
        self._kept = [np.concatenate(self._kept)]
        return self._kept[0]


def _channel(name: str, values: NDArray[np.float32], varies: bool) -> ChannelSurvey:
    low, median, high = np.quantile(values.astype(np.float64), (0.25, 0.5, 0.75))
    reach = float(np.abs(values - median).max())
    return ChannelSurvey(name, float(median), float(high - low), reach, varies)


def _median(numbers: array[float]) -> float:
    found = np.frombuffer(numbers)
    found = found[found > 0]
    return float(np.median(found)) if len(found) else 0.0
