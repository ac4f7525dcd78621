"""The training loop, on Accelerate: one process or many, one script everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from roma_core.job import Attempt
from roma_core.model.classification import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.batches import MapStyle
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.loop import TrainingEnd, TrainingRun
from roma_core.trainer.losses import labels_of
from roma_core.trainer.non_finite import NonFiniteLoss
from roma_core.trainer.stopping import StopRequests

__all__ = ["NonFiniteLoss", "Trainer", "TrainingEnd"]


class Trainer:
    """Trains either model; resumes by itself from the newest checkpoint of ``checkpoint_dir``.

    Start the same script with ``python``, ``accelerate launch`` or ``torchrun``.
    """

    def __init__(self, config: TrainerConfig | type[TrainerConfig] | None = None) -> None:
        self.config = config() if isinstance(config, type) else config or TrainerConfig()
        self._evaluate_callback: Callable[..., Any] | None = None
        self._post_train_hook: Callable[..., Any] | None = None

    def set_evaluate_callback(self, callback: Callable[..., Any]) -> None:
        """``callback(model, train_loss, test_dataset)`` runs after each evaluation, on every process.

        If it returns a dictionary of numbers, they are logged as ``eval/…`` too.
        """
        self._evaluate_callback = callback

    def set_post_train_hook(self, hook: Callable[..., Any]) -> None:
        """``hook(model, run, device)`` runs once after a completed training, on rank 0.

        ``run`` is the folder of the run.
        """
        self._post_train_hook = hook

    def train(
        self,
        train_dataset: MapStyle,
        test_dataset: MapStyle | None,
        model: RoMAForPreTraining | RoMAForClassification,
        *,
        folder: Path | None = None,
        attempt: Attempt | None = None,
        what: str = "train",
    ) -> TrainingEnd:
        """Train to the end, or until a stop request.

        Args:
            train_dataset, test_dataset: items as :class:`~roma_core.trainer.batches.MapStyle` says.
            model: moved to this process's device and trained in place.
            folder: of the run; ``metrics.jsonl`` goes there. ``checkpoint_dir`` by default.
            attempt: where to beat and to look for a stop file, if a launcher watches.
            what: name of the training in progress messages.

        Raises:
            NonFiniteLoss: with the ids of the samples.
            ValueError: data, checkpoint and configuration do not fit each other.
        """
        if len(train_dataset) == 0:
            raise ValueError("train_dataset is empty; there is nothing to train on")
        if isinstance(model, RoMAForClassification) and model.head is None:
            model.set_outputs(int(labels_of(train_dataset).max()) + 1)
        with StopRequests(attempt.stop if attempt else None) as stops:
            run = TrainingRun(
                self.config,
                train_dataset,
                test_dataset,
                model,
                folder,
                attempt,
                what,
                stops,
                self._evaluate_callback,
            )
            end = run.run()
        if end.status == "completed" and self._post_train_hook and run.accelerator.is_main_process:
            self._post_train_hook(model, run.folder, run.accelerator.device)
        return end
