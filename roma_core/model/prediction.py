"""Classification and regression of whole series, or of every token: embed → encode → pool → head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roma_core.model.backbone import Backbone, PaddedModel
from roma_core.model.config import RoMAForClassificationConfig, classifier_config, is_pretraining
from roma_core.model.encoder import Head, initialise, initialise_vectors
from roma_core.model.packing import PackedBatch, scatter
from roma_core.model.pretraining import LOG_VARIANCES, gaussian_nll
from roma_core.model.weights import load_weights, read_weights


class RoMAForClassification(Backbone):
    """The encoder with a head on CLS, on the mean of the tokens, or on every token.

    Call it with padded tensors, or with a :class:`PackedBatch` in place of ``values``.
    """

    config: RoMAForClassificationConfig

    def __init__(self, config: RoMAForClassificationConfig) -> None:
        super().__init__(config)
        self.initialise()
        initialise_vectors(self.cls)
        self.head: Head | None = None
        if self.config.dim_output is not None:
            self.set_outputs(self.config.dim_output)
        self.units: TargetUnits | None = None
        self.loss_fn = _cross_entropy
        if self.config.problem_type == "regression":
            has_variance = self.config.predict_variance
            self.loss_fn = _negative_log_likelihood if has_variance else _mean_squared_error
            if has_variance or self.config.target_scales:
                self.units = TargetUnits(self.config.target_scales, has_variance)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, config: RoMAForClassificationConfig | None = None, **overrides: Any
    ) -> RoMAForClassification:
        """Restore a classifier whole, or start one from a pretraining model's folder.

        Args:
            folder: holds ``model.safetensors`` and ``model_config.json``, ours or published.
            config: the exact configuration, in place of ``overrides``.
            overrides: for a start from pretraining ``dim_output``, ``pooling``, ``head_drop_rate``
                and ``encoder_config`` with dropouts; what is left out comes from the environment,
                else it is 0 or the default. The shape always comes from the checkpoint.

        Raises:
            SettingsError: an override contradicts the checkpoint, or ``dim_output`` is missing.
            FileNotFoundError, ValueError: a file or a tensor is missing, or unknown.
        """
        document, weights = read_weights(folder)
        model = cls(config or classifier_config(document, overrides, Path(folder)))
        model.data_schema = document.get("data_schema")
        load_weights(model, weights, folder, new_head=is_pretraining(document))
        return model

    def set_outputs(self, dim_output: int) -> None:
        """Make a new head with ``dim_output`` outputs."""
        self.config = self.config.model_copy(update={"dim_output": dim_output})
        stack = self.config.encoder_config
        dim_output *= 2 if self.config.predict_variance else 1
        head = Head(stack.d_model, dim_output, self.config.head_drop_rate, stack.layer_norm_eps)
        initialise(head)
        self.head = head.to(self.projection.weight.device)

    def padded(self) -> PaddedModel:
        head = self.require_head()
        in_units = head if self.units is None else nn.Sequential(head, self.units)
        return PaddedModel(self, self.config.pools, in_units)

    def loss_count(self, batch: PackedBatch) -> float:
        """Number of terms in the mean that is the loss of a packed batch: its series, or its tokens."""
        segments = batch.segments
        return float(segments.total if self.config.pools == "token" else segments.count)

    def forward(
        self,
        values: Tensor | PackedBatch,
        positions: Tensor | None = None,
        pad_mask: Tensor | None = None,
        label: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Classify series.

        Args:
            values: ``(B, time, C, height, width)`` float, or a packed batch and nothing else.
            positions: ``(B, D, N)``.
            pad_mask: ``(B, N)`` bool, True at padding.
            label: ``(B,)`` int64 classes, or float targets ``(B, dim_output)`` for regression. With a
                head on every token ``(B, N)`` or ``(B, N, dim_output)``; padding is ignored.
            covariates: ``(B, K)`` numbers and indices of categories, NaN where missing.

        Returns:
            logits: ``(B, dim_output)``; with a head on every token ``(B, N, dim_output)``, zero at
                padding. For a packed batch ``(B, dim_output)`` or ``(T, dim_output)``. Of a regression
                in the units of its targets; with ``predict_variance`` ``dim_output`` means, then as
                many standard deviations.
            loss: mean over series, or over real tokens; None without label.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        head, pooling = self.require_head(), self.config.pools
        if isinstance(values, PackedBatch):
            packed = head(self.features(values, pooling))
            return self._in_units(packed), self._loss(packed, values.labels)
        batch, order, rows = self.pack(values, positions, pad_mask, covariates)
        packed = head(self.features(batch, pooling))
        if pooling != "token":
            logits = packed.new_empty(packed.shape).index_copy(0, order, packed)
            return self._in_units(logits), self._loss(logits, label)
        assert positions is not None
        shape = (len(order), positions.shape[2])
        if label is not None:
            if tuple(label.shape[:2]) != shape:
                raise ValueError(
                    f"label must have one entry per token, shape (batch, tokens) = {shape} in front; "
                    f"got {tuple(label.shape)}"
                )
            label = label.flatten(0, 1)[rows]
        return scatter(self._in_units(packed), rows, shape), self._loss(packed, label)

    def require_head(self) -> Head:
        """The head; raises ValueError if ``dim_output`` is not known yet."""
        if self.head is None:
            raise ValueError(
                "the model has no head: dim_output (the number of classes) was not given. Set it in "
                "RoMAForClassificationConfig, or ROMA_CLASSIFIER_DIM_OUTPUT, or let the trainer count the labels"
            )
        return self.head

    def _in_units(self, outputs: Tensor) -> Tensor:
        return outputs if self.units is None else self.units(outputs)

    def _loss(self, logits: Tensor, label: Tensor | None) -> Tensor | None:
        if label is None:
            return None
        if self.config.problem_type == "regression":
            expected = (*logits.shape[:-1], self.config.dim_output)
            if tuple(label.shape) != expected:
                raise ValueError(
                    f"label must have shape (rows, dim_output) = {expected}, got {tuple(label.shape)}"
                )
            label = label if self.units is None else self.units.standardise(label)
        elif label.shape != logits.shape[:1] or label.dtype != torch.int64:
            raise ValueError(
                f"label must be int64 classes of shape (rows,) = {tuple(logits.shape[:1])}, "
                f"got {label.dtype} of shape {tuple(label.shape)}"
            )
        elif not label.is_cuda and len(label):  # reading a GPU's numbers would wait for it
            wrong = ((label < 0) | (label >= logits.shape[1])).nonzero().flatten().tolist()
            if wrong:
                raise ValueError(
                    f"label must be classes from 0 to {logits.shape[1] - 1} (dim_output={logits.shape[1]}); "
                    f"row {wrong[0]} has {int(label[wrong[0]])}"
                )
        return self.loss_fn(logits, label).mean()


class TargetUnits(nn.Module):
    """Standardised outputs of a regression head → the units of its targets.

    ``(…, K)`` to the same, or means and logarithms of variances ``(…, 2K)`` to means and standard
    deviations.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, scales: Sequence[tuple[float, float]], has_variance: bool) -> None:
        super().__init__()
        self.has_variance = has_variance
        mean, std = torch.tensor(scales or [(0.0, 1.0)]).T  # (K,) each
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, outputs: Tensor) -> Tensor:
        if not self.has_variance:
            return outputs * self.std + self.mean
        mean, log_variance = outputs.chunk(2, dim=-1)
        std = (0.5 * log_variance.clamp(*LOG_VARIANCES)).exp() * self.std
        return torch.cat((mean * self.std + self.mean, std), dim=-1)

    def standardise(self, targets: Tensor) -> Tensor:
        """``(…, K)`` in their units → the numbers that the loss compares."""
        return (targets - self.mean) / self.std


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(exact, label, reduction="none")


def _negative_log_likelihood(outputs: Tensor, label: Tensor) -> Tensor:
    return gaussian_nll(outputs, label).mean(-1)


def _mean_squared_error(logits: Tensor, label: Tensor) -> Tensor:
    return ((logits - label) ** 2).mean(-1)
