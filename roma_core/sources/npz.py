"""Series from one ``.npz`` file of NumPy arrays.

    values      (n, N, C) or (n, N), or flat (observations, C) with offsets
    positions   (n, N, D) or (n, N), or (N,) for all, or flat (observations, D) with offsets
    targets     as values, with K in the place of C; or, by target_level: series, (n, K) or (n,);
                optional
    offsets     (n + 1,) for flat arrays    or    lengths   (n,) for padded ones
    ids, labels, groups, splits             (n,) text or whole numbers; all optional

The arrays are read whole, so the file has to fit in memory; nothing is unpickled.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from roma_core.schema import Channel, DataError, PositionAxis, TargetLevel
from roma_core.sources import base

_METADATA = {"labels": "label", "groups": "group", "splits": "split"}


class NpzConfig(base.SourceConfig):
    """One ``.npz`` file on this computer."""

    kind: Literal["npz"] = "npz"
    file: Path
    axes: tuple[PositionAxis, ...] = Field(min_length=1, description="Names and units.")
    channels: tuple[Channel, ...] = Field(min_length=1, description="Names and units.")
    targets: tuple[Channel, ...] = Field((), description="Names and units of the array 'targets'.")
    target_level: TargetLevel = Field(
        "observation", exclude_if=lambda level: level == "observation"
    )
    """Whether 'targets' are of every observation, or of every series."""

    def open(self, cache: Path) -> NpzSource:
        return NpzSource(self)


class NpzSource(base.Source):
    """The series of one file, in its order."""

    def __init__(self, config: NpzConfig) -> None:
        super().__init__(config)
        self.axes, self.channels, self.targets = config.axes, config.channels, config.targets
        self.target_level = config.target_level
        self.files = base.hash_files([config.file])
        self._where = str(config.file)
        arrays = read_arrays(config.file)
        if ("targets" in arrays) != bool(config.targets):
            raise DataError(
                f"{config.file} has {'an' if 'targets' in arrays else 'no'} array 'targets', the "
                f"configuration names {len(config.targets) or 'none'}; name them under targets, or "
                f"take the array away"
            )
        self._offsets, self._lengths = arrays.get("offsets"), arrays.get("lengths")
        self._values, self._positions = arrays["values"], arrays["positions"]
        self._targets = arrays.get("targets")
        self._n = self._count_series()
        n_rows = self._n if self.target_level == "series" else len(self._values)
        if self._targets is not None and len(self._targets) != n_rows:
            shapes = f"targets {self._targets.shape} and values {self._values.shape}"
            raise DataError(f"{self._where}: {shapes} must have as many series and observations")
        if self.target_level == "series" and self._targets is not None:
            self._check_numbers(self._targets)
            self._targets = self._targets.reshape(self._n, -1)
        for name in ("lengths", "ids", *_METADATA):
            array = arrays.get(name)
            if array is not None and array.ndim != 1:
                raise DataError(f"{self._where}: {name} must be one row, got shape {array.shape}")
            if array is not None and len(array) != self._n:
                raise DataError(f"{self._where}: {len(array)} {name} of {self._n} series")
        self._ids = _texts(config.file, "ids", arrays.get("ids", np.arange(self._n)))
        cells = {n: _texts(config.file, n, arrays[n]) for n in _METADATA if n in arrays}
        self._cells = list(cells.values())
        self._metadata = base.MetadataColumns(**{_METADATA[name]: name for name in cells})
        self.classes = self._metadata.all_classes(cells.get("labels", ()))

    def __length_hint__(self) -> int:
        return self._n

    def _count_series(self) -> int:
        values, positions, where = self._values, self._positions, self._where
        if values.ndim == 0 or positions.ndim == 0:
            raise DataError(f"{where}: values and positions must be arrays, not single numbers")
        for name, cut in (("offsets", self._offsets), ("lengths", self._lengths)):
            if cut is not None and (cut.ndim != 1 or cut.dtype.kind not in "iu"):
                got = f"{cut.dtype} of shape {cut.shape}"
                raise DataError(f"{where}: {name} must be one row of whole numbers, got {got}")
        if (offsets := self._offsets) is not None:
            if self._lengths is not None:
                raise DataError(
                    f"{where} has offsets and lengths: flat arrays need the one, padded ones the other"
                )
            ends = (offsets[0], offsets[-1]) if len(offsets) else (None, None)
            if (
                ends != (0, len(values))
                or len(values) != len(positions)
                or (offsets[1:] < offsets[:-1]).any()  # a difference of unsigned numbers wraps
            ):
                raise DataError(
                    f"{where}: offsets must rise from 0 to the number of observations; they "
                    f"go from {ends[0]} to {ends[1]} for {len(values)} values and "
                    f"{len(positions)} positions"
                )
            return len(offsets) - 1
        shape = (*values.shape, 1, 1)
        if shape[1] == len(self.channels) != shape[2] == positions.shape[positions.ndim > 1]:
            raise DataError(
                f"{where}: values {values.shape} look like (series, channels, observations), "
                f"expected (series, observations, channels); transpose them"
            )
        if positions.ndim > 1 and positions.shape[:2] != values.shape[:2]:
            shapes = f"values {values.shape} and positions {positions.shape}"
            raise DataError(f"{where}: {shapes} must have as many series and observations")
        lengths = self._lengths
        if lengths is not None and len(lengths):
            least, most = lengths.min(), lengths.max()
            if not 0 <= least <= most <= shape[1]:
                raise DataError(
                    f"{where}: lengths must be from 0 to the {shape[1]} observations of a row; they go "
                    f"from {least} to {most}"
                )
        return len(values)

    def read(self) -> Iterator[base.RawSeries]:
        for i, name in enumerate(self._ids):
            targets = None
            if self._targets is not None and self.target_level == "series":
                targets = self._targets[i].astype(np.float32)
            elif self._targets is not None:
                targets = self._rows(self._targets, i, len(self.targets)).astype(np.float32)
            yield base.RawSeries(
                id=name,
                positions=self._rows(self._positions, i, len(self.axes)).astype(np.float64),
                values=self._rows(self._values, i, len(self.channels)).astype(np.float32),
                targets=targets,
                **self._metadata.metadata(
                    [cells[i] for cells in self._cells], f"{self._where}: series {name!r}"
                ),
            )

    def _check_numbers(self, array: NDArray[Any]) -> None:
        if array.dtype.kind not in "iufb":
            raise DataError(f"{self._where} holds {array.dtype} where numbers are needed")

    def _rows(self, array: NDArray[Any], i: int, width: int) -> NDArray[Any]:
        """The observations of series i: ``(N, width)`` if the array is what it should be."""
        self._check_numbers(array)
        if self._offsets is not None:
            rows = array[int(self._offsets[i]) : int(self._offsets[i + 1])]
        else:
            rows = array if array.ndim == 1 else array[i]  # one grid for all, or one each
        if self._lengths is not None:
            rows = rows[: int(self._lengths[i])]
        return rows[:, None] if rows.ndim == 1 and width == 1 else rows


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz`` file by name; ``values`` and ``positions`` are among them.

    Raises:
        DataError: the file cannot be read, or lacks one of the two.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, NDArray[Any]] = {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}; expected an .npz file of plain arrays (text as "
            f"fixed-width strings, not as objects)"
        ) from error
    if missing := [name for name in ("values", "positions") if name not in arrays]:
        raise DataError(f"{path} has no array {missing[0]!r}; it has {sorted(arrays)}")
    return arrays


def _texts(path: Path, name: str, array: NDArray[Any]) -> list[str]:
    """Bytes decoded, padding removed, whole numbers without '.0', and nothing for NaN."""
    cells = array.tolist()
    if array.dtype.kind == "f":
        if (np.abs(array) > (exact := 2 ** (np.finfo(array.dtype).nmant + 1))).any():
            raise DataError(
                f"{path}: {name} hold whole numbers as {array.dtype}, which is exact up to {exact:,} "
                f"only; write them as integers or text"
            )
        return ["" if x != x else str(int(x) if x.is_integer() else x) for x in cells]
    if array.dtype.kind == "S":
        encoding = base.text_encoding(path, b" ".join(cells))
        cells = [cell.decode(encoding) for cell in cells]
    return [str(cell).strip() for cell in cells]
