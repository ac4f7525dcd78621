"""The loss a classifier is trained with, where it differs from the one it is judged by.

Label smoothing and class weights shape the gradients only; evaluation uses the model's own loss, so
``eval/loss`` compares between runs whatever they were trained with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from roma_core.model.classification import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.batches import MapStyle
from roma_core.trainer.config import TrainerConfig

Loss = Callable[[Tensor, Tensor], Tensor]
log = logging.getLogger(__name__)


def training_loss(
    model: RoMAForPreTraining | RoMAForClassification, config: TrainerConfig, dataset: MapStyle
) -> Loss:
    """The model's own loss, or cross entropy with smoothing and weights.

    Raises:
        ValueError: the model does not classify, or the weights do not fit its classes.
    """
    wishes = {
        "label_smoothing": config.label_smoothing > 0,
        "class_weights": config.class_weights is not None,
    }
    wished = [name for name, wish in wishes.items() if wish]
    if not wished:
        return model.loss_fn
    if isinstance(model, RoMAForPreTraining):
        # one .env serves both trainings, so this is no error
        log.warning("pretraining has no classes and takes no notice of %s", " and ".join(wished))
        return model.loss_fn
    if model.config.problem_type != "classification":
        raise ValueError(
            f"{' and '.join(wished)} are for classification, but problem_type is "
            f"{model.config.problem_type}; unset them"
        )
    n_classes = model.config.dim_output
    assert n_classes is not None  # the trainer has counted them
    weights = None
    if config.class_weights is not None:
        counts = np.bincount(labels_of(dataset), minlength=n_classes)
        weights = class_weights(config.class_weights, counts)

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        each = F.cross_entropy(
            logits.float(), label, reduction="none", label_smoothing=config.label_smoothing
        )
        return each if weights is None else each * weights.to(each.device)[label]

    return loss


def class_weights(wanted: str | list[float], counts: NDArray[np.int64]) -> Tensor:
    """Weight of every class, ``(n_classes,)`` float32, scaled to a mean of 1 over the series.

    A loss that is a mean over series then keeps its size, and does not depend on which series share
    a batch.

    Args:
        wanted: ``inverse_frequency``, or one number per class.
        counts: ``(n_classes,)`` training series of each class.

    Raises:
        ValueError: as many numbers as classes are needed, and a weight above 0 for what occurs.
    """
    if isinstance(wanted, str):
        weights = 1.0 / np.maximum(counts, 1)
    else:
        if len(wanted) != len(counts):
            raise ValueError(
                f"class_weights has {len(wanted)} numbers, but there are {len(counts)} classes; "
                f"give one per class, in the order of the data set's classes"
            )
        weights = np.asarray(wanted, dtype=np.float64)
    mean = float((weights * counts).sum() / counts.sum())
    if mean == 0:
        raise ValueError("class_weights are 0 for every class that occurs in the training set")
    return torch.tensor(weights / mean, dtype=torch.float32)


def labels_of(dataset: Any) -> NDArray[np.int64]:
    """The class of every item, or of every token of every item, ``(n,)``.

    Raises:
        ValueError: an item has no label.
    """
    items = map(dataset.__getitem__, range(len(dataset)))
    labels = [np.atleast_1d(np.asarray(item["label"])) for item in items if "label" in item]
    if len(labels) < len(dataset):
        raise ValueError(
            f"only {len(labels)} of {len(dataset)} training items have a label, but the classes "
            f"must be counted (dim_output was not given, or class_weights was)"
        )
    return np.concatenate(labels).astype(np.int64)
