"""Data: sources → ragged store on disk → samples.

    config = DatasetConfig.from_yaml("dataset.yaml")
    path = build_dataset(config, root=Path("datasets"), cache=Path("cache"))
    train = StoredDataset(path).split("train")

Names are imported on first use; nothing here needs torch.
"""

from roma_core import lazy_attributes

_WHERE = {
    "DataError": "roma_core.schema",
    "DataProfile": "roma_core.data.profile",
    "DatasetConfig": "roma_core.data.config",
    "StoredDataset": "roma_core.data.store",
    "Subset": "roma_core.data.store",
    "build_dataset": "roma_core.data.build",
    "plot_profile": "roma_core.data.profile",
    "profile_dataset": "roma_core.data.profile",
}
__all__ = list(_WHERE)
__getattr__ = lazy_attributes(__name__, _WHERE)
