"""Series from ``.ts`` files, the text format of the UEA and UCR archives.

A header of ``@`` lines, then one series per line: channels separated by ``:``, numbers by ``,``, the
class or the regression target last; ``?`` is a missing number, NaN. Lengths may differ between series.
Positions are the indices of the numbers: 0, 1, 2, …
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from roma_core.schema import Channel, DataError, PositionAxis
from roma_core.settings import Frozen
from roma_core.sources import base

_START = 1 << 20  # bytes by which the encoding is recognised


class TsFormat(Frozen):
    """Names and units, which a ``.ts`` file does not have."""

    kind: Literal["ts"] = "ts"
    axis: str = Field("step", description="Name of the position axis.")
    axis_unit: str = Field("step", description="Unit of the position axis.")
    channels: tuple[str, ...] | None = None
    """Names of the channels, in file order; None gives c01, c02, …"""
    channel_unit: str = Field("1", description="Unit of all channels; '1' for a pure number.")
    target: Channel = Field(
        Channel(name="target", unit="1"),
        exclude_if=lambda target: target == Channel(name="target", unit="1"),
        description="Name and unit of the target of a regression file (@targetLabel true).",
    )


class TsFile(Frozen):
    """One file and the split its publisher made it for."""

    path: Path = Field(description="Absolute, or relative to the working directory.")
    split: base.RecordedSplit | None = None


class TsConfig(base.SourceConfig):
    """``.ts`` files on this computer."""

    kind: Literal["ts"] = "ts"
    files: tuple[TsFile, ...] = Field(min_length=1)
    format: TsFormat = TsFormat()

    def open(self, cache: Path) -> TsSource:
        hashes = base.hash_files(file.path for file in self.files)
        return TsSource(self, self.files, self.format, hashes)


@dataclass(frozen=True)
class _Header:
    n_channels: int | None  # None where the header has none
    length: int | None  # of every series; None where lengths may differ
    classes: tuple[str, ...]  # empty without labels
    has_target: bool
    encoding: str
    n_lines: int


class TsSource(base.Source):
    """Series of ``.ts`` files that agree in channels and classes.

    Ids are ``<split or file name>-0001`` and so on, in the order of the lines, so a file may grow
    at its end without renaming anything.
    """

    def __init__(
        self,
        config: base.SourceConfig,
        files: tuple[TsFile, ...],
        format: TsFormat,
        hashes: Mapping[str, str],
    ) -> None:
        super().__init__(config)
        self.file_list, self.files = files, hashes
        self._headers = [_read_header(file.path) for file in files]
        self.classes = self._headers[0].classes
        for file, header in zip(files, self._headers, strict=True):
            has_target = self._headers[0].has_target
            if set(header.classes) != set(self.classes) or header.has_target != has_target:
                raise DataError(
                    f"{file.path} has the classes {header.classes}, {files[0].path} has "
                    f"{self.classes}; files of one data set must agree, also in having a target"
                )
        header = self._headers[0]
        if header.has_target:
            self.targets, self.target_level = (format.target,), "series"
        _, first = next(_lines(files[0].path, header.encoding, header.n_lines), (0, None))
        if first is None:
            raise DataError(f"{files[0].path} has no series after @data")
        n_channels = first.count(":") + (0 if self.classes or self.targets else 1)
        names = format.channels or tuple(f"c{k + 1:02d}" for k in range(n_channels))
        if len(names) != n_channels:
            given = f"the configuration names {len(names)}: {names}"
            raise DataError(f"{files[0].path} has {n_channels} channels, {given}")
        self.channels = tuple(Channel(name=name, unit=format.channel_unit) for name in names)
        self.axes = (PositionAxis(name=format.axis, unit=format.axis_unit),)

    def read(self) -> Iterator[base.RawSeries]:
        counter: Counter[str] = Counter()
        for file, header in zip(self.file_list, self._headers, strict=True):
            prefix = file.split or file.path.stem
            for n_line, line in _lines(file.path, header.encoding, header.n_lines):
                values, last = self._parse(line, header, where := f"{file.path}, line {n_line}")
                targets = np.array(_numbers(last, where), np.float32) if self.targets else None
                counter[prefix] += 1
                yield base.RawSeries(
                    id=f"{prefix}-{counter[prefix]:04d}",
                    positions=np.arange(len(values), dtype=np.float64)[:, None],  # (N, 1)
                    values=values,
                    label=last if self.classes else None,
                    targets=targets,
                    recorded_split=file.split,
                )

    def _parse(self, line: str, header: _Header, where: str) -> tuple[NDArray[np.float32], str]:
        parts = line.split(":")
        last = parts.pop().strip() if self.classes or self.targets else ""
        if self.classes and last not in self.classes:
            raise DataError(f"{where}: class {last!r} is not in the header's {self.classes}")
        expected = header.n_channels or len(self.channels)
        if len(parts) != expected or expected != len(self.channels):
            raise DataError(f"{where}: expected {len(self.channels)} channels, got {len(parts)}")
        columns = [_numbers(part, where) for part in parts]
        lengths = {len(column) for column in columns}
        if len(lengths) != 1:
            raise DataError(f"{where}: channels differ in length: {sorted(lengths)}")
        if header.length is not None and lengths != {header.length}:
            raise DataError(
                f"{where}: {lengths.pop()} numbers a channel, the header says {header.length}"
            )
        with np.errstate(over="ignore"):  # too large for float32: inf, which is refused later
            return np.array(columns, dtype=np.float64).T.astype(np.float32, order="C"), last


def _numbers(text: str, where: str) -> list[float]:
    try:
        return [*map(float, text.replace("?", "nan").split(","))]
    except ValueError as error:  # could not convert string to float: 'x'
        raise DataError(f"{where}: {str(error).partition(': ')[2]} is not a number") from None


def _lines(path: Path, encoding: str, after: int = 0) -> Iterator[tuple[int, str]]:
    """Numbered lines after such a number, without comments and empty lines."""
    try:
        with path.open(encoding=encoding) as file:
            for n_line, line in enumerate(file, start=1):
                if n_line > after and (text := line.strip()) and text[0] not in "#%":
                    yield n_line, text
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in {encoding}: {error}") from error


def _read_header(path: Path) -> _Header:
    words: dict[str, list[str]] = {}
    with path.open("rb") as file:
        encoding = base.text_encoding(path, file.read(_START))
    for n_line, text in _lines(path, encoding):
        if not text.startswith("@"):
            raise DataError(
                f"{path}, line {n_line}: expected an @ line of the header, or @data before the series"
            )
        key, *rest = text[1:].split()
        if key.lower() == "data":
            break
        words[key.lower()] = rest
    else:
        raise DataError(f"{path} has no @data line; it is not a .ts file, or it was cut short")
    true = {key for key, rest in words.items() if rest and rest[0].lower() == "true"}
    if "timestamps" in true:
        raise DataError(f"{path} has time stamps (@timeStamps true), which this reader cannot take")
    classes = tuple(words["classlabel"][1:]) if "classlabel" in true else ()
    if "classlabel" in true and (not classes or len(set(classes)) != len(classes)):
        raise DataError(f"{path}: @classLabel true must list every class once, got {classes}")
    numbers: dict[str, int] = {}
    for key in ("dimensions", *(["serieslength"] if "equallength" in true else [])):
        if (found := words.get(key)) is not None:
            if len(found) != 1 or not found[0].isdigit():
                raise DataError(f"{path}: @{key} must be one whole number, got {found}")
            numbers[key] = int(found[0])
    return _Header(
        numbers.get("dimensions"),
        numbers.get("serieslength"),
        classes,
        "targetlabel" in true,
        encoding,
        n_line,
    )
