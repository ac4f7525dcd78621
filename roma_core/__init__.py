"""RoMA, the Rotary Masked Autoencoder: the model, its data, its trainer, its evaluation."""

from roma_core.lazy import attributes

_WHERE = {
    "EncoderConfig": "roma_core.model.config",
    "RoMAForPreTrainingConfig": "roma_core.model.config",
    "RoMAForClassificationConfig": "roma_core.model.config",
    "get_encoder_size": "roma_core.model.config",
    "RoMAForPreTraining": "roma_core.model.pretraining",
    "RoMAForClassification": "roma_core.model.prediction",
    "Trainer": "roma_core.trainer.trainer",
    "TrainerConfig": "roma_core.trainer.config",
}
__all__ = list(_WHERE)
__getattr__ = attributes(__name__, _WHERE)
