"""Masked autoencoding: embed → hide → encode the visible → decode all → compare the hidden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roma_core.model.config import RoMAForPreTrainingConfig
from roma_core.model.embedding import Backbone
from roma_core.model.encoder import Encoder, Head, Rows, initialise, initialise_vectors
from roma_core.model.packing import MaskedRows, PackedBatch, unpack


class RoMAForPreTraining(Backbone):
    """The Rotary Masked Autoencoder (arXiv 2505.20535).

    Call it with padded tensors, or with a :class:`PackedBatch` in place of ``values``.
    """

    config: RoMAForPreTrainingConfig

    def __init__(self, config: RoMAForPreTrainingConfig) -> None:
        super().__init__(config)
        stack, decoder = self.config.encoder_config, self.config.decoder_config
        self.encoder_decoder_proj = nn.Linear(stack.d_model, decoder.d_model)
        self.mask_token = nn.Parameter(torch.empty(decoder.d_model))
        self.decoder = Encoder(decoder)
        self.decoder_rotation = self._rotation_of(decoder)
        self.decoder_table = self._table_of(decoder)
        self.head = Head(
            decoder.d_model,
            self.config.tubelet_width,
            self.config.head_drop_rate,
            decoder.layer_norm_eps,
        )
        self.loss_fn: Callable[[Tensor, Tensor], Tensor] = _squared_error
        initialise(self)
        # not zeros, as published: the norm that follows has a slope of 1/√eps = 1e6 there
        initialise_vectors(self.mask_token, self.cls)

    @classmethod
    def from_pretrained(cls, folder: Path | str, **overrides: Any) -> RoMAForPreTraining:
        """Restore a model from a folder of ours or of the published package.

        Args:
            folder: holds ``model.safetensors`` and ``model_config.json``.
            overrides: configuration fields to change; the shapes must stay.

        Raises:
            FileNotFoundError, ValueError: a file or a tensor is missing, or unknown.
        """
        from roma_core.model.weights import load_pretraining

        return load_pretraining(folder, **overrides)

    def set_loss_fn(self, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Use ``loss_fn(logits, targets)``, both ``(H, P)``; it must return them unreduced."""
        self.loss_fn = loss_fn

    @staticmethod
    def loss_count(batch: PackedBatch) -> float:
        """What the loss of a packed batch is a mean over: its hidden tokens."""
        return 0.0 if batch.masked is None else float(batch.masked.hidden.total)

    def forward(
        self,
        values: Tensor | PackedBatch,
        positions: Tensor | None = None,
        pad_mask: Tensor | None = None,
        label: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Reconstruct hidden tokens.

        Args:
            values: ``(B, time, C, height, width)`` float, or a packed batch and nothing else.
            positions: ``(B, D, N)``.
            pad_mask: ``(B, N)`` bool, True at padding.
            label: accepted and ignored, so that both models take the same items.
            mask: ``(B, N)`` bool, True where hidden; padding in it is ignored. None draws a mask
                of ``mask_ratio`` from torch's generator.

        Returns:
            logits: ``(B, M, P)``; row m belongs to the m-th hidden real token of its series in
                ascending index, M is the largest count; rows past a series' own count are zero.
                For a packed batch ``(H, P)``. None if nothing is hidden.
            loss: mean over the numbers of hidden real tokens; None if nothing is hidden.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if isinstance(values, PackedBatch):
            return self._reconstruct(values)
        if positions is None:
            raise TypeError(
                "positions are required: one row per axis, shape (batch, n_pos_dims, tokens)"
            )
        batch, order, rows = self.pack(values, positions, pad_mask)
        if mask is not None:
            shape = (batch.segments.count, positions.shape[2])
            if mask.dtype != torch.bool or tuple(mask.shape) != shape:
                raise ValueError(
                    f"mask must be bool of shape (batch, tokens) = {shape}, True where hidden; "
                    f"got {mask.dtype} of shape {tuple(mask.shape)}"
                )
            batch = batch.with_mask(mask.reshape(-1)[rows])
            blind = [b for b, n in enumerate(batch.masked.visible.lengths) if n == 0]  # type: ignore[union-attr]
            if blind:
                raise ValueError(
                    f"mask hides every real token of series {sorted(order[blind].tolist())}; "
                    f"at least one token of each must stay visible"
                )
        else:
            batch = self._with_drawn_mask(batch)
        logits, loss = self._reconstruct(batch)
        if logits is None or batch.masked is None:
            return None, None
        return unpack(logits, batch.masked.hidden, order), loss

    def _with_drawn_mask(self, batch: PackedBatch) -> PackedBatch:
        seed = int(torch.randint(2**31, ()))
        return batch.with_drawn_mask(self.config.mask_fraction, self.config.mask_strategy, seed, 0)

    def _reconstruct(self, batch: PackedBatch) -> tuple[Tensor | None, Tensor | None]:
        self.check_packed(batch)
        if batch.masked is None:
            batch = self._with_drawn_mask(batch)
        masked = batch.masked
        assert masked is not None
        if masked.hidden.total == 0:
            return None, None
        logits = self.reconstruct_rows(batch, masked)
        targets = batch.tokens[masked.hidden_rows]
        if self.config.normalize_targets:
            targets = standardise_tubelets(targets)
        return logits, self.loss_fn(logits, targets.to(logits.dtype)).mean()

    def reconstruct_rows(self, batch: PackedBatch, masked: MaskedRows) -> Tensor:
        """``(H, P)`` predictions of the hidden tokens, in ascending order of rows."""
        drop = self.config.encoder_config.pos_drop_rate
        segments, index = batch.segments, batch.segments.index_in_series
        if self.table is not None:
            self.table.check_length(segments.longest + int(self.cls is not None))
        seen = masked.visible_rows
        x, rotations, inner, token_rows, cls_rows = self.embed_rows(
            batch.tokens[seen], batch.positions[seen], index[seen], masked.visible
        )
        x = self.encoder(F.dropout(x, drop, self.training), rotations, inner)
        x = self.encoder_decoder_proj(x)

        # every encoder output returns to its place in the full series; the rest are mask tokens
        full = segments if cls_rows is None else segments.with_cls.segments
        full_rows = (
            torch.arange(segments.total, device=x.device)
            if cls_rows is None
            else segments.with_cls.token_rows
        )
        to_full = token_rows.new_empty(inner.total)
        to_full[token_rows] = full_rows[seen]
        at = batch.positions.new_zeros(full.total, batch.positions.shape[1])
        at[full_rows] = batch.positions
        if cls_rows is not None:
            to_full[cls_rows] = segments.with_cls.cls_rows
        hidden_rows = full_rows[masked.hidden_rows]
        mask_tokens = self.mask_token.to(x.dtype).expand(masked.hidden.total, -1)
        if self.decoder_table is not None:
            mask_tokens = mask_tokens + self.decoder_table(index[masked.hidden_rows]).to(x.dtype)
        mask_tokens = F.dropout(mask_tokens, drop, self.training)
        y = x.new_empty(full.total, x.shape[1])
        y = y.index_copy(0, to_full, x).index_copy(0, hidden_rows, mask_tokens)
        rotations = None if self.decoder_rotation is None else self.decoder_rotation(at)
        return self.head(self.decoder(y, rotations, full, Rows(hidden_rows, masked.hidden)))


def _squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits - targets) ** 2


def standardise_tubelets(targets: Tensor) -> Tensor:
    """Each ``(…, P)`` tubelet less its mean, over its (unbiased) deviation."""
    mean = targets.mean(-1, keepdim=True)
    return (targets - mean) / (targets.var(-1, keepdim=True) + 1e-6).sqrt()
