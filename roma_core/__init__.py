"""RoMA, the Rotary Masked Autoencoder: the model, its data, its trainer, its evaluation."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_attributes(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` (PEP 562) that imports names ``where`` they are, on first use."""

    def getter(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(where[name]), name)

    return getter


_WHERE = {
    "EncoderConfig": "roma_core.model.config",
    "RoMAForPreTrainingConfig": "roma_core.model.config",
    "RoMAForClassificationConfig": "roma_core.model.config",
    "get_encoder_size": "roma_core.model.config",
    "RoMAForPreTraining": "roma_core.model.pretraining",
    "RoMAForClassification": "roma_core.model.prediction",
    "RoMAClassifier": "roma_core.estimators",
    "RoMARegressor": "roma_core.estimators",
    "RoMAImputer": "roma_core.estimators",
    "Trainer": "roma_core.trainer.trainer",
    "TrainerConfig": "roma_core.trainer.config",
}
__all__ = list(_WHERE)
__getattr__ = lazy_attributes(__name__, _WHERE)
