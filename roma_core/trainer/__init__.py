"""The trainer: the loop, its checkpoints, stop requests and loggers. Imports torch on first use."""

from roma_core import lazy_attributes

_WHERE = {
    "Trainer": "roma_core.trainer.trainer",
    "TrainingEnd": "roma_core.trainer.trainer",
    "TrainerConfig": "roma_core.trainer.config",
}
__all__ = list(_WHERE)
__getattr__ = lazy_attributes(__name__, _WHERE)
