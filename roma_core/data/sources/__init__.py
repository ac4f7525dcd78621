"""Where series come from: one module per kind of source, found by its registered name.

A configuration says ``{"kind": "ts", ...}``; ``source_config`` turns it into that kind's class.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from roma_core.data.sources.package_file import PackageFileConfig
from roma_core.data.sources.protocol import RawSeries, Source, SourceConfig
from roma_core.data.sources.ts import TsConfig

KINDS: dict[str, type[SourceConfig]] = {
    "package_file": PackageFileConfig,
    "ts": TsConfig,
}


def source_config(values: Any) -> SourceConfig:
    """The configuration of the source that ``values["kind"]`` names.

    Raises:
        ValueError: the kind is missing or unknown, or its class refuses the other values.
    """
    if isinstance(values, SourceConfig):
        return values
    if not isinstance(values, Mapping) or "kind" not in values:
        raise ValueError(f"a source is a mapping with a 'kind', one of {sorted(KINDS)}")
    kind = str(values["kind"])
    if kind not in KINDS:
        closest = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"there is no source of kind {kind!r}; the closest is {closest!r}, all are {sorted(KINDS)}"
        )
    return KINDS[kind].model_validate(dict(values))


__all__ = ["KINDS", "RawSeries", "Source", "SourceConfig", "source_config"]
