"""An evaluation in the middle of a training: which metrics, of which weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from roma_core.model.classification import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.batches import Collate, MapStyle
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.evaluating import KeepGoing, classify, reconstruction_loss
from roma_core.trainer.learner import Learner
from roma_core.trainer.ranks import Ranks


class Evaluator:
    """Measures a learner on the test set, on all processes together."""

    def __init__(
        self,
        config: TrainerConfig,
        learner: Learner,
        dataset: MapStyle | None,
        ranks: Ranks,
        keep_going: KeepGoing,
        callback: Callable[..., Any] | None,
    ) -> None:
        """``keep_going`` is asked before every batch, ``callback`` for metrics of the caller's own."""
        self.config, self.learner, self.ranks = config, learner, ranks
        self.dataset = dataset if dataset is not None and len(dataset) else None
        self.keep_going, self.callback = keep_going, callback

    def measure(self, train_loss: float) -> dict[str, float]:
        """``eval/…`` metrics, the same on every process; none without a test set.

        Raises:
            Interrupted: a stop request ended it.
            ValueError: what ``best_metric`` names was not measured.
        """
        if self.dataset is None:
            return {}
        with self.learner.judged() as model:
            metrics = self._metrics_of(model, self.dataset)
            if self.callback is not None:
                extra = self.callback(model, train_loss, self.dataset) or {}
                metrics |= {f"eval/{name}": float(value) for name, value in extra.items()}
        metrics = self.ranks.gather(metrics)[
            0
        ]  # a callback may differ; all act on the same numbers
        if self.config.best_metric not in metrics:
            raise ValueError(no_such_metric(self.config.best_metric, sorted(metrics)))
        return metrics

    def _metrics_of(
        self, model: RoMAForPreTraining | RoMAForClassification, dataset: MapStyle
    ) -> dict[str, float]:
        arguments = (
            dataset,
            Collate(model.config, self.config.random_seed),
            self.config.batch_size,
            self.ranks,
            self.keep_going,
        )
        if isinstance(model, RoMAForPreTraining):
            return {"eval/loss": reconstruction_loss(model, *arguments)}
        outputs = classify(model, *arguments)
        metrics = {"eval/loss": outputs.loss}
        if outputs.labels is not None and outputs.labels.ndim == 1:
            right = outputs.logits.argmax(1) == outputs.labels
            metrics["eval/accuracy"] = float(right.mean())
        return metrics


def no_such_metric(wanted: str, given: list[str]) -> str:
    return (
        f"best_metric is {wanted}, but an evaluation of this model gives {', '.join(given)}; name one "
        f"of these, or give it in the evaluate callback"
    )
