"""What a source of series is, and the registry of sources.

An installed package adds kinds by entry points of the group ``roma_core.sources``, each the name of
a kind and a subclass of ``SourceConfig``: ``our_archive = "our_package.sources:ArchiveConfig"``.
"""

from __future__ import annotations

import codecs
import difflib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from roma_core.files import sha256_of
from roma_core.schema import Channel, Covariate, DataError, Layout, PositionAxis, TargetLevel
from roma_core.settings import Frozen, validation_errors

RecordedSplit = Literal["train", "validation", "test"]
SPLIT_WORDS: dict[str, RecordedSplit] = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation", "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RawSeries:
    """One object as delivered: nothing dropped, nothing normalised.

    In the ``per_channel`` layout the last of D position axes holds the channel's index, and C is 1.
    """

    id: str
    positions: NDArray[np.float64]  # (N, D)
    values: NDArray[np.float32]  # (N, C), NaN where missing
    label: str | None = None
    recorded_split: RecordedSplit | None = None  # the publisher's assignment, where there is one
    group: str | None = None  # shared by the objects of one patient or host; all or none have it
    # (N, K), if the source has targets of observations; (K,) of the whole series
    targets: NDArray[np.float32] | None = None
    # (K,), if the source has covariates: numbers, indices of categories, NaN where missing
    covariates: NDArray[np.float32] | None = None

    def select(self, kept: NDArray[np.bool_]) -> RawSeries:
        """The observations where ``(N,)`` kept is True."""
        targets = self.targets
        if targets is not None and targets.ndim == 2:
            targets = targets[kept]
        positions, values = self.positions[kept], self.values[kept]
        return replace(self, positions=positions, values=values, targets=targets)


class Source:
    """An opened source.

    Attributes:
        axes: names, units and categories, without that of channels; the rest is set by the data set's
            configuration.
        layout: of the observations that ``read`` yields.
        classes: all labels that may come, in the order of their indices; empty without labels.
        targets: numbers that a model may predict, of every observation or, by ``target_level``, of
            every series.
        files: sha256 of every input file, by a name that does not depend on this computer.
    """

    channels: tuple[Channel, ...]
    axes: tuple[PositionAxis, ...]
    classes: tuple[str, ...]
    targets: tuple[Channel, ...] = ()
    target_level: TargetLevel = "observation"
    covariates: tuple[Covariate, ...] = ()
    layout: Layout = "joint"
    files: Mapping[str, str]
    citation: str
    licence: str

    def __init__(self, config: SourceConfig) -> None:
        self.citation, self.licence = config.citation, config.licence

    def read(self) -> Iterator[RawSeries]:
        """Every series, in an order that depends on the files alone; may be called again.

        Raises:
            DataError: the data are malformed; the message names file and place.
        """
        raise NotImplementedError


def trait(source: Any, name: Literal["targets", "target_level", "covariates", "layout"]) -> Any:
    """An attribute of a source, or its default: a plug-in without the base class may lack it."""
    return getattr(source, name, getattr(Source, name))


class SourceConfig(Frozen):
    """Base of all source configurations; ``kind`` is the registered name."""

    kind: str
    citation: str = Field("", description="How to cite the data.")
    licence: str = Field("", description="Licence of the data.")

    def open(self, cache: Path) -> Source:
        """Check the data, after fetching what is missing into the folder ``cache``.

        Raises:
            DataError: the data is missing, damaged or not what the configuration says.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement open")


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """sha256 of every file by its name; by its path below their common folder if two share a name.

    Raises:
        DataError: a file is missing, or is listed twice.
    """
    paths = [*paths]
    for path in paths:
        if not path.is_file():
            raise DataError(f"there is no file {path} (from {Path.cwd()})")
    if len({path.absolute() for path in paths}) < len(paths):
        raise DataError(f"a file is listed twice among {', '.join(map(str, paths[:8]))}")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        top = os.path.commonpath([path.absolute() for path in paths])
        names = [path.absolute().relative_to(top).as_posix() for path in paths]
    return dict(zip(names, map(sha256_of, paths), strict=True))


def text_encoding(path: Path, start: bytes) -> str:
    """Encoding of a text file by its first bytes: UTF-16 by its mark, UTF-8, or else Latin-1.

    The last comes with a warning; DataError if it is no text, or in a further encoding.
    """
    is_utf_16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if "\0" in start.decode("utf-16" if is_utf_16 else "latin-1", errors="ignore"):
        raise DataError(f"{path} holds NUL characters, so it is no text; save it as UTF-8")
    if is_utf_16:
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        if any(0x80 <= byte < 0xA0 for byte in start):  # control characters in Latin-1
            raise DataError(f"{path} is no UTF-8, perhaps Windows-1252; save it as UTF-8") from None
        warnings.warn(f"{path} is not UTF-8 text; it is read as Latin-1", stacklevel=2)
        return "latin-1"
    return "utf-8-sig"


class MetadataColumns(Frozen):
    """Columns, or arrays, with one value per object; each may be absent."""

    label: str | None = Field(None, description="Column of the class.")
    group: str | None = None
    """Column of what must stay in one split: patient, host."""
    split: str | None = None
    """Column of the publisher's split: train, validation or test."""
    classes: tuple[str, ...] | None = None
    """All classes in the order of their indices; None takes those found, sorted. List them where a
    delivery may bring new ones."""
    class_names: dict[str, str] = Field({}, description="Word in the column → name of the class.")

    def columns(self) -> list[str]:
        return [name for name in (self.label, self.group, self.split) if name is not None]

    def metadata(self, cells: Sequence[str | None], name: str) -> dict[str, Any]:
        """``label``, ``group`` and ``recorded_split`` of an object from texts, as ``columns()``.

        Raises:
            DataError: a cell is empty, or a split has another name than ``SPLIT_WORDS``.
        """
        found: dict[str | None, str | None] = dict(zip(self.columns(), cells, strict=True))
        for column, cell in found.items():
            if not cell:
                raise DataError(
                    f"{name} has nothing in column {column!r}; fill it, or leave the object out"
                )
        label, group, split = (found.get(column) for column in (self.label, self.group, self.split))
        if split and split.lower() not in SPLIT_WORDS:
            raise DataError(f"{name} has the split {split!r}; expected train, validation or test")
        label = label and self.class_names.get(label, label)
        recorded = SPLIT_WORDS[split.lower()] if split else None
        return {"label": label, "group": group, "recorded_split": recorded}

    def all_classes(self, labels: Iterable[str | None]) -> tuple[str, ...]:
        """The declared classes, or those of the labels found, numbers in numeric order."""
        if self.label is None:
            return ()
        if self.classes is not None:
            return self.classes
        names = {self.class_names.get(label, label) for label in labels if label}
        return tuple(sorted(names, key=lambda w: (0, int(w), w) if w.isdigit() else (1, 0, w)))


_OURS = {
    "synthetic": "synthetic:SyntheticConfig", "image_folder": "folders:ImageFolderConfig",
    "npz": "npz:NpzConfig", "package_file": "packaged:PackageFileConfig",
    "parquet": "tables:ParquetConfig", "plasticc": "packaged:PlasticcConfig",
    "table": "tables:TableConfig", "ts": "ts:TsConfig", "wav_folder": "folders:WavFolderConfig",
}  # fmt: skip


def kinds() -> dict[str, EntryPoint]:
    """Every kind of source by name: ours, then those of installed packages.

    Raises:
        ValueError: two packages claim one name.
    """
    group = "roma_core.sources"
    found = {name: EntryPoint(name, f"{group}.{path}", group) for name, path in _OURS.items()}
    for point in entry_points(group=group):
        if point.name in found:
            raise ValueError(
                f"two sources are called {point.name!r}: {found[point.name].value} and "
                f"{point.value}; uninstall one, or ask its author for another name"
            )
        found[point.name] = point
    return found


def source_config(values: Any) -> SourceConfig:
    """The configuration of the source that ``values["kind"]`` names.

    Raises:
        ValueError: the kind is missing, unknown or cannot be imported, or its class refuses the
            other values.
    """
    if isinstance(values, SourceConfig):
        return values
    known = kinds()
    if not isinstance(values, Mapping) or "kind" not in values:
        raise ValueError(f"a source is a mapping with a 'kind', one of {sorted(known)}")
    kind = str(values["kind"])
    if kind not in known:
        closest = difflib.get_close_matches(kind, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"there is no source of kind {kind!r}; the closest is {closest!r}, all are {sorted(known)}"
        )
    where = f"the source {kind!r} ({known[kind].value})"
    try:
        found = known[kind].load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where} cannot be used: {error}") from error
    if not (isinstance(found, type) and issubclass(found, SourceConfig)):
        raise ValueError(f"{where} is no subclass of SourceConfig")
    try:
        return found.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError("; ".join(map(str, validation_errors(error, found)))) from None
