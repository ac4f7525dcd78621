"""Where series come from: one module per kind of source, found by its registered name.

A configuration says ``{"kind": "ts", ...}``; ``source_config`` turns it into that kind's class. An
installed package adds kinds by entry points of the group ``roma_core.sources``, each the name of a
kind and a subclass of ``SourceConfig``:

    [project.entry-points."roma_core.sources"]
    our_archive = "our_package.sources:ArchiveConfig"
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from roma_core.data.mistakes import mistakes
from roma_core.data.sources.protocol import RawSeries, Source, SourceConfig, targets_of

GROUP = "roma_core.sources"

_OURS = {
    "generated": "generated:GeneratedConfig",
    "image_folder": "image_folder:ImageFolderConfig",
    "npz": "npz:NpzConfig",
    "package_file": "package_file:PackageFileConfig",
    "parquet": "parquet:ParquetConfig",
    "plasticc": "plasticc:PlasticcConfig",
    "table": "table:TableConfig",
    "ts": "ts:TsConfig",
    "wav_folder": "wav_folder:WavFolderConfig",
}


def kinds() -> dict[str, EntryPoint]:
    """Every kind of source by name: ours, then those of installed packages.

    Raises:
        ValueError: two packages claim one name.
    """
    found = {name: EntryPoint(name, f"{__name__}.{place}", GROUP) for name, place in _OURS.items()}
    for point in entry_points(group=GROUP):
        if point.name in found:
            raise ValueError(
                f"two sources are called {point.name!r}: {found[point.name].value} and "
                f"{point.value}; uninstall one, or ask its author for another name"
            )
        found[point.name] = point
    return found


def kind_class(kind: str) -> type[SourceConfig]:
    """The configuration class of a kind.

    Raises:
        ValueError: there is none, it cannot be imported, or it is no ``SourceConfig``.
    """
    known = kinds()
    if kind not in known:
        closest = difflib.get_close_matches(kind, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"there is no source of kind {kind!r}; the closest is {closest!r}, all are {sorted(known)}"
        )
    try:
        found = known[kind].load()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the source {kind!r} ({known[kind].value}) cannot be used: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, SourceConfig)):
        raise ValueError(
            f"the source {kind!r} ({known[kind].value}) is no subclass of SourceConfig"
        )
    return found


def source_config(values: Any) -> SourceConfig:
    """The configuration of the source that ``values["kind"]`` names.

    Raises:
        ValueError: the kind is missing or unknown, or its class refuses the other values.
    """
    if isinstance(values, SourceConfig):
        return values
    if not isinstance(values, Mapping) or "kind" not in values:
        raise ValueError(f"a source is a mapping with a 'kind', one of {sorted(kinds())}")
    kind = kind_class(str(values["kind"]))
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError("; ".join(mistakes(error, kind))) from None


__all__ = [
    "GROUP",
    "RawSeries",
    "Source",
    "SourceConfig",
    "kind_class",
    "kinds",
    "source_config",
    "targets_of",
]
