"""The Rotary Masked Autoencoder: configurations, both models, presets. Imports torch on first use."""

from roma_core import lazy_attributes

_WHERE = {
    "EncoderConfig": "roma_core.model.config",
    "RoMAForPreTrainingConfig": "roma_core.model.config",
    "RoMAForClassificationConfig": "roma_core.model.config",
    "get_encoder_size": "roma_core.model.config",
    "Encoder": "roma_core.model.encoder",
    "RoMAForPreTraining": "roma_core.model.pretraining",
    "RoMAForClassification": "roma_core.model.prediction",
    "PackedBatch": "roma_core.model.packing",
}
__all__ = list(_WHERE)
__getattr__ = lazy_attributes(__name__, _WHERE)
