"""Data: sources → ragged store on disk → samples.

    config = DatasetConfig.from_yaml("dataset.yaml")
    path = build_dataset(config, root=Path("datasets"), cache=Path("cache"))
    train = StoredDataset(path).split("train")

Names are imported when first used; nothing here needs torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roma_core.data.build import build_dataset
    from roma_core.data.config import DatasetConfig
    from roma_core.data.profile import DataProfile, as_markdown, plot_profile, profile_of
    from roma_core.data.schema import DataError
    from roma_core.data.store import StoredDataset, Subset

_MODULE_OF = {
    "DataError": "schema",
    "DataProfile": "profile",
    "DatasetConfig": "config",
    "StoredDataset": "store",
    "Subset": "store",
    "as_markdown": "profile",
    "build_dataset": "build",
    "plot_profile": "profile",
    "profile_of": "profile",
}

__all__ = [
    "DataError",
    "DataProfile",
    "DatasetConfig",
    "StoredDataset",
    "Subset",
    "as_markdown",
    "build_dataset",
    "plot_profile",
    "profile_of",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
