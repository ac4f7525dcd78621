"""Evaluation on every process, each with a part of the data set; and when to stop early."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from roma_core.job import Interrupted
from roma_core.model.packing import PackedBatch
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.dataloader import Collate, MapStyle
from roma_core.trainer.defaults import PrimaryMetric
from roma_core.trainer.distributed import SINGLE_PROCESS, HostGroup

ShouldStop = Callable[[], bool]
"""Called before every batch; True aborts the evaluation."""


@dataclass(frozen=True)
class Outputs:
    """Outputs of a classifier or regressor for a data set, in its order: n samples, or real tokens."""

    logits: NDArray[np.float32]  # (n, dim_output), or (n, 2 dim_output) with deviations
    labels: NDArray[Any] | None  # (n,) int64 or (n, dim_output) float
    loss: float  # mean over the n, or NaN without labels


@torch.no_grad()
def classify(
    model: RoMAForClassification,
    dataset: MapStyle,
    collate: Collate,
    batch_size: int,
    group: HostGroup = SINGLE_PROCESS,
    should_stop: ShouldStop = lambda: False,
) -> Outputs:
    """Run a classifier over a data set. Every process gets the outputs of all samples.

    The model is the bare one, not its distributed wrapper: processes may have different numbers of
    batches. Raises Interrupted on every process, if ``should_stop`` returned True on one.
    """
    model.eval()
    device = model.projection.weight.device

    def rows_of(batch: PackedBatch) -> tuple[Any, ...]:
        logits, loss = model(batch.to(device))
        assert batch.indices is not None  # collate set them
        labels = None if batch.labels is None else batch.labels.numpy()
        total = float("nan") if loss is None else float(loss) * model.loss_count(batch)
        samples = batch.indices.numpy()
        if model.config.pools == "token":
            samples = samples.repeat(batch.segments.lengths)
        return samples, logits.float().cpu().numpy(), labels, total

    table = _on_every_process(rows_of, dataset, collate, batch_size, group, should_stop)
    order = np.concatenate([r[0] for r in table]).argsort(kind="stable")
    labels = None if table[0][2] is None else np.concatenate([r[2] for r in table])[order]
    return Outputs(
        logits=np.concatenate([r[1] for r in table])[order],
        labels=labels,
        loss=sum(r[3] for r in table) / len(order),
    )


def evaluate(
    model: RoMAForPreTraining | RoMAForClassification,
    dataset: MapStyle,
    config: TrainerConfig,
    group: HostGroup,
    should_stop: ShouldStop,
) -> dict[str, float]:
    """``eval/loss`` and, of a classifier, ``eval/accuracy`` and ``best_metric``; of a regressor ``eval/r2``.

    Pretraining has the masks of epoch 0.

    Raises Interrupted on every process, if ``should_stop`` returned True on one.
    """
    collate = Collate(model.config, config.random_seed)
    how = (dataset, collate, config.batch_size, group, should_stop)
    if isinstance(model, RoMAForPreTraining):
        model.eval()
        sums = _on_every_process(functools.partial(_loss_sum, model), *how)
        loss, count = (sum(part) for part in zip(*sums, strict=True))
        return {"eval/loss": loss / count if count else float("nan")}
    outputs = classify(model, *how)
    metrics = {"eval/loss": outputs.loss}
    if model.config.problem_type == "regression" and outputs.labels is not None:
        metrics["eval/r2"] = r2(outputs.labels, outputs.logits[:, : model.config.dim_output])
    elif outputs.labels is not None and outputs.labels.ndim == 1:
        for name in get_args(PrimaryMetric):
            if name == "accuracy" or config.best_metric == f"eval/{name}":
                metrics[f"eval/{name}"] = score(name, outputs.logits, outputs.labels)
    return metrics


def score(name: PrimaryMetric, logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """A metric of ``(n, K)`` logits and ``(n,)`` labels; NaN where it ranks series of one class.

    Means over classes leave out those without series.
    """
    predicted, present = logits.argmax(axis=1), np.unique(labels)
    if name == "accuracy":
        return float((predicted == labels).mean())
    from scipy.special import softmax
    from sklearn import metrics

    if name == "balanced_accuracy":
        return float(metrics.recall_score(labels, predicted, labels=present, average="macro"))
    if name == "macro_f1":
        return float(metrics.f1_score(labels, predicted, average="macro"))
    if len(present) < 2:
        return float("nan")
    area = metrics.roc_auc_score if name == "auroc" else metrics.average_precision_score
    p, ranked = softmax(logits, axis=1), present[-1:] if logits.shape[1] == 2 else present
    return float(np.mean([area(labels == c, p[:, c]) for c in ranked]))


def r2(true: NDArray[Any], predicted: NDArray[Any]) -> float:
    """Mean of R² over the columns of ``(n, K)`` whose true numbers differ; NaN without any."""
    varied = np.ptp(true, axis=0) > 0
    true, predicted = true[:, varied].astype(np.float64), predicted[:, varied]
    errors = ((predicted - true) ** 2).mean(axis=0)
    return float((1 - errors / true.var(axis=0)).mean()) if varied.any() else float("nan")


@torch.no_grad()
def _loss_sum(model: RoMAForPreTraining, batch: PackedBatch) -> tuple[float, float]:
    """Sum of the loss over the hidden tokens of a batch, with its mask, and their number."""
    _, loss = model(batch.to(model.projection.weight.device))
    count = model.loss_count(batch)
    return (0.0, 0.0) if loss is None else (float(loss) * count, count)


def _on_every_process(
    compute: Callable[[PackedBatch], Any],
    dataset: MapStyle,
    collate: Collate,
    batch_size: int,
    group: HostGroup,
    should_stop: ShouldStop,
) -> list[Any]:
    """Results of all batches of all processes; :class:`Interrupted` on all if one should stop."""
    mine = np.arange(group.rank, len(dataset), group.size)
    results, stopped = [], False
    for indices in np.array_split(mine, -(-len(mine) // batch_size)) if len(mine) else []:
        if stopped := should_stop():
            break
        results.append(compute(collate.batch(dataset, indices)))
    gathered = group.gather((results, stopped))
    if any(stopped for _, stopped in gathered):
        raise Interrupted
    return [result for results, _ in gathered for result in results]


def unknown_metric(name: str, known: list[str]) -> str:
    return (
        f"best_metric is {name}, but an evaluation of this model gives {', '.join(known)}; use one of "
        f"these, or return it from the evaluate callback"
    )


@dataclass
class EarlyStopping:
    """Tracks the best value of a metric, and when to stop waiting for a better one."""

    mode: Literal["min", "max"]  # whether a small or a large value is better
    min_delta: float = 0.0  # smallest change that counts as an improvement
    patience: int | None = None  # evaluations in a row without improvement; None never stops
    best: float | None = None
    evaluations_since_best: int = 0

    def update(self, value: float) -> bool:
        """Add an evaluation; True if it is the best so far, which a non-finite value never is."""
        sign = 1 if self.mode == "min" else -1
        if math.isfinite(value) and (
            self.best is None or sign * value < sign * self.best - self.min_delta
        ):
            self.best, self.evaluations_since_best = value, 0
            return True
        self.evaluations_since_best += 1
        return False

    @property
    def should_stop(self) -> bool:
        return self.patience is not None and self.evaluations_since_best >= self.patience
