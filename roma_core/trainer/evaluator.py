"""An evaluation in the middle of a training: which metrics, of which weights.

Evaluation on every process: each takes its share, the table is put together once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from roma_core.model.packing import PackedBatch
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.dataloader import Collate, MapStyle, load
from roma_core.trainer.distributed import ALONE, HostGroup, Interrupted
from roma_core.trainer.step import Learner

KeepGoing = Callable[[], bool]
"""Asked before every batch; False gives the evaluation up."""


def to_the_end() -> bool:
    return True


@dataclass(frozen=True)
class Outputs:
    """What a classifier said about a data set, in the order of its samples.

    n counts samples; for a head on every token their real tokens, sample after sample.

    Attributes:
        logits: ``(n, dim_output)`` float32.
        labels: ``(n,)`` int64 or ``(n, dim_output)`` float, or None.
        loss: mean over the n, or NaN without labels.
    """

    logits: NDArray[np.float32]
    labels: NDArray[Any] | None
    loss: float


def _batches(
    dataset: MapStyle, collate: Collate, batch_size: int, ranks: HostGroup
) -> Iterator[PackedBatch]:
    mine = np.arange(ranks.rank, len(dataset), ranks.size)
    parts = np.array_split(mine, -(-len(mine) // batch_size)) if len(mine) else []
    return load(dataset, [(0, part) for part in parts], collate, workers=0, pin=False)


def _gather(value: Any, given_up: bool, ranks: HostGroup) -> list[Any]:
    """The values of all processes, or :class:`Interrupted` on all if one has given up."""
    gathered = ranks.gather((value, given_up))
    if any(gave_up for _, gave_up in gathered):
        raise Interrupted
    return [value for value, _ in gathered]


@torch.no_grad()
def classify(
    model: RoMAForClassification,
    dataset: MapStyle,
    collate: Collate,
    batch_size: int,
    ranks: HostGroup = ALONE,
    keep_going: KeepGoing = to_the_end,
) -> Outputs:
    """Run the classifier over a data set. Every process gets the whole table.

    The model is the bare one, not its distributed wrapper: processes may have different numbers of
    batches.

    Raises:
        Interrupted: on every process, if ``keep_going`` was False on one.
    """
    model.eval()
    device = model.projection.weight.device
    rows = []
    given_up = False
    for batch in _batches(dataset, collate, batch_size, ranks):
        if given_up := not keep_going():
            break
        logits, loss = model(batch.to(device))
        assert batch.indices is not None  # collate gave them
        labels = None if batch.labels is None else batch.labels.numpy()
        total = float("nan") if loss is None else float(loss) * model.loss_count(batch)
        samples = batch.indices.numpy()
        if model.config.pools == "token":
            samples = samples.repeat(batch.segments.lengths)
        rows.append((samples, logits.float().cpu().numpy(), labels, total))
    table = [row for part in _gather(rows, given_up, ranks) for row in part]
    order = np.concatenate([r[0] for r in table]).argsort(kind="stable")
    labels = None if table[0][2] is None else np.concatenate([r[2] for r in table])[order]
    return Outputs(
        logits=np.concatenate([r[1] for r in table])[order],
        labels=labels,
        loss=sum(r[3] for r in table) / len(order),
    )


@torch.no_grad()
def reconstruction_loss(
    model: RoMAForPreTraining,
    dataset: MapStyle,
    collate: Collate,
    batch_size: int,
    ranks: HostGroup = ALONE,
    keep_going: KeepGoing = to_the_end,
) -> float:
    """Mean loss over all hidden tokens of a data set, with the masks of epoch 0.

    Raises:
        Interrupted: on every process, if ``keep_going`` was False on one.
    """
    model.eval()
    device = model.projection.weight.device
    total = count = 0.0
    given_up = False
    for batch in _batches(dataset, collate, batch_size, ranks):
        if given_up := not keep_going():
            break
        _, loss = model(batch.to(device))
        if loss is not None:
            total += float(loss) * model.loss_count(batch)
            count += model.loss_count(batch)
    sums = _gather((total, count), given_up, ranks)
    return sum(s[0] for s in sums) / max(1.0, sum(s[1] for s in sums))


class Evaluator:
    """Measures a learner on the test set, on all processes together."""

    def __init__(
        self,
        config: TrainerConfig,
        learner: Learner,
        dataset: MapStyle | None,
        ranks: HostGroup,
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
