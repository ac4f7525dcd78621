"""Masked autoencoding: embed → hide → encode the visible → decode all → compare the hidden.

What the pretraining model says about positions of anybody's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roma_core.model.backbone import NO_POSITIONS, Backbone
from roma_core.model.config import RoMAForPreTrainingConfig
from roma_core.model.encoder import Encoder, Head, Rows, initialise, initialise_vectors
from roma_core.model.packing import (
    MaskedRows,
    PackedBatch,
    check_positions,
    checked,
    pack_tokens,
    unpack,
)
from roma_core.model.positions import placed, start_of
from roma_core.schema import DataSchema, Normaliser


@dataclass(frozen=True)
class Reconstruction:
    """Predicted tubelets.

    Attributes:
        mean: ``(B, Q, P)`` float; the numbers of a tubelet run time, height, width, channel, the last
            one fastest: for tubelets of one step, ``(B, Q, C)``.
        std: likewise, the predicted standard deviation; None if the model predicts no variance.
    """

    mean: Tensor
    std: Tensor | None

    def denormalised(self, schema: DataSchema) -> Reconstruction:
        """The same in the units of the data; deviations to first order where a transform bends."""
        width, n_channels = self.mean.shape[-1], len(schema.channels)
        if width % n_channels:
            raise ValueError(
                f"tubelets of {width} numbers do not hold whole observations of {n_channels} channels"
            )
        normaliser = Normaliser(schema)

        def by_channel(x: Tensor) -> Tensor:
            return x.detach().float().cpu().unflatten(-1, (-1, n_channels))

        mean = torch.from_numpy(normaliser.denormalise(by_channel(self.mean).numpy()))
        std = None
        if self.std is not None:
            slope = torch.from_numpy(normaliser.slope(by_channel(self.mean).numpy()))
            std = (by_channel(self.std) * slope).flatten(-2)
        return Reconstruction(mean.flatten(-2), std)


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
            self.config.tubelet_width * (2 if self.config.predict_variance else 1),
            self.config.head_drop_rate,
            decoder.layer_norm_eps,
        )
        self.loss_fn: Callable[[Tensor, Tensor], Tensor] = (
            _gaussian_nll if self.config.predict_variance else _squared_error
        )
        initialise(self)
        self.initialise_embedding()
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
        """Use ``loss_fn(outputs, targets)``, both ``(H, P)``; it must return them unreduced.

        With ``predict_variance`` outputs are ``(H, 2P)``: means, then logarithms of variances.
        """
        self.loss_fn = loss_fn

    def loss_count(self, batch: PackedBatch) -> float:
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
            raise TypeError(NO_POSITIONS)
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
        return batch.with_drawn_mask(self.config, seed, epoch=0)

    def _reconstruct(self, batch: PackedBatch) -> tuple[Tensor | None, Tensor | None]:
        self.check_packed(batch)
        if batch.masked is None:
            batch = self._with_drawn_mask(batch)
        masked = batch.masked
        assert masked is not None
        if masked.hidden.total == 0:
            return None, None
        outputs = self.outputs_of(batch, masked)
        targets = batch.tokens[masked.hidden_rows]
        if self.config.normalize_targets:
            mean, deviation = tubelet_statistics(targets)
            targets = (targets - mean) / deviation
        loss = self.loss_fn(outputs, targets.to(outputs.dtype)).mean()
        return outputs[:, : self.config.tubelet_width], loss

    def reconstruct(
        self,
        values: Tensor,
        positions: Tensor,
        pad_mask: Tensor | None = None,
        *,
        at: Tensor,
        denormalise: bool = True,
    ) -> Reconstruction:
        """Predict what would be observed at positions of your choice, from all that was observed.

        Every real token is visible. Nothing needs to have been observed at ``at``: interpolation,
        forecasting and other grids are one call. In training mode dropout is active.

        Args:
            values, positions, pad_mask: as for calling the model.
            at: ``(B, D, Q)`` or ``(D, Q)``, of any real type, in the units of ``positions``.
            denormalise: give values in the units of the data, by the ``data_schema`` that came with
                the weights; without a schema they are in the model's units either way.

        Raises:
            TypeError, ValueError: an argument does not fit, or the model cannot do it: the absolute
                variant knows no positions, and with ``normalize_targets`` it predicts only the shape
                of a tubelet, not its level.
        """
        if self.table is not None:
            raise ValueError("reconstruct needs pos_encoding='ropend'; this model counts tokens")
        if self.config.normalize_targets:
            raise ValueError(
                "a model trained with normalize_targets predicts tubelets less their own mean, over their own "
                "deviation, which nobody knows at new positions; train with normalize_targets=False"
            )
        tokens, valid = checked(values, positions, pad_mask, self.config)
        n_series, n_tokens, width = tokens.shape
        at = at.expand(n_series, -1, -1) if at.ndim == 2 else at
        n_asked = at.shape[-1]
        check_positions(at, (n_series, self.config.n_pos_dims, n_asked), "at")
        axes = self.config.position_axes
        start = start_of(positions, valid, axes)
        places = torch.cat((placed(positions, start, axes), placed(at, start, axes)), dim=2)
        batch, order, rows = pack_tokens(
            torch.cat((tokens, tokens.new_zeros(n_series, n_asked, width)), dim=1),
            places,
            F.pad(valid, (0, n_asked), value=True),
        )
        asked = rows % (n_tokens + n_asked) >= n_tokens
        masked = MaskedRows.of(asked, batch.segments)
        raw = unpack(self.outputs_of(batch, masked), masked.hidden, order)  # (B, Q, P or 2P)
        std = (0.5 * raw[..., width:]).exp() if self.config.predict_variance else None
        result = Reconstruction(raw[..., :width], std)
        if denormalise and self.data_schema is not None:
            return result.denormalised(DataSchema.model_validate(self.data_schema))
        return result

    def reconstruct_rows(self, batch: PackedBatch, masked: MaskedRows) -> Tensor:
        """``(H, P)`` predictions of the hidden tokens, in ascending order of rows.

        They are in the units of ``batch.tokens``: standardised ones are put back by the statistics
        of the true tubelets, as pictures of masked autoencoders do.
        """
        predicted = self.outputs_of(batch, masked)[:, : self.config.tubelet_width]
        if self.config.normalize_targets:
            mean, deviation = tubelet_statistics(batch.tokens[masked.hidden_rows])
            return predicted * deviation + mean
        return predicted

    def outputs_of(self, batch: PackedBatch, masked: MaskedRows) -> Tensor:
        """The head's ``(H, P)`` (``(H, 2P)`` with variances) for the hidden tokens, by row."""
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


def _gaussian_nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """``(H, 2P)`` means and log variances, ``(H, P)`` → ``(H, P)``, without the constant."""
    exact = outputs if outputs.dtype == torch.float64 else outputs.float()
    mean, log_variance = exact.chunk(2, dim=-1)
    log_variance = log_variance.clamp(-14.0, 14.0)  # deviations of 1e-3 … 1e3 are wide enough
    return 0.5 * (log_variance + (targets - mean) ** 2 / log_variance.exp())


def tubelet_statistics(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (unbiased, floored) deviation ``(…, 1)`` of each ``(…, P)`` tubelet."""
    mean = targets.mean(-1, keepdim=True)
    return mean, (targets.var(-1, keepdim=True) + 1e-6).sqrt()
