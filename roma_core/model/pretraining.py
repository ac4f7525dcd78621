"""Masked autoencoding: embed → mask → encode the visible → decode all → compare the hidden."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from roma_core.model.backbone import Backbone, PaddedModel
from roma_core.model.config import RoMAForPreTrainingConfig, is_pretraining, stored_fields
from roma_core.model.encoder import Encoder, Head, OutputRows, initialise_vectors
from roma_core.model.masking import draw_mask
from roma_core.model.packing import (
    MaskedTokens,
    PackedBatch,
    Segments,
    check_inputs,
    check_positions,
    pack_tokens,
    unpack,
)
from roma_core.model.positions import origin, to_model_positions
from roma_core.model.weights import load_weights, read_weights
from roma_core.schema import DataSchema, Normaliser

LOG_VARIANCES = (-14.0, 14.0)  # deviations of 1e-3 … 1e3 are wide enough


@dataclass(frozen=True)
class Reconstruction:
    """Predicted tubelets, whose numbers run time, height, width, channel, the last one fastest."""

    mean: Tensor  # (B, Q, P) float; for tubelets of one step, (B, Q, C)
    std: Tensor | None  # likewise, the predicted deviation; None if the model predicts no variance

    def denormalised(self, schema: DataSchema, positions: Tensor) -> Reconstruction:
        """The same in the units of the data; deviations to first order for nonlinear transforms.

        ``positions`` are the ``(B, D, Q)`` that were asked for.
        """
        width, n_channels = self.mean.shape[-1], schema.n_values
        if width % n_channels:
            raise ValueError(
                f"tubelets of {width} numbers do not hold whole observations of {n_channels} channels"
            )
        normaliser = Normaliser(schema)

        def by_channel(x: Tensor) -> Tensor:
            return x.detach().float().cpu().unflatten(-1, (-1, n_channels))

        at = positions.detach().double().cpu().transpose(1, 2)[:, :, None].numpy()  # (B, Q, 1, D)
        mean = torch.from_numpy(normaliser.denormalise(by_channel(self.mean).numpy(), at))
        std = None
        if self.std is not None:
            slope = torch.from_numpy(normaliser.slope(by_channel(self.mean).numpy(), at))
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
        self.decoder_categories = self.category_embedding(decoder)
        self.decoder = Encoder(decoder)
        self.decoder_rotary, self.decoder_sinusoidal = self._position_embeddings(decoder)
        self.head = Head(
            decoder.d_model,
            self.config.tubelet_width * (2 if self.config.predict_variance else 1),
            self.config.head_drop_rate,
            decoder.layer_norm_eps,
        )
        squared_error = partial(F.mse_loss, reduction="none")
        self.loss_fn = gaussian_nll if self.config.predict_variance else squared_error
        self.initialise()
        # not zeros, as published: the norm that follows has a slope of 1/√eps = 1e6 there
        initialise_vectors(self.mask_token, self.cls)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, config: RoMAForPreTrainingConfig | None = None, **overrides: Any
    ) -> RoMAForPreTraining:
        """Restore a model from a folder of ours or of the published package.

        Args:
            folder: holds ``model.safetensors`` and ``model_config.json``.
            config: the exact configuration, in place of ``overrides``.
            overrides: configuration fields to change; the shapes must stay.

        Raises:
            FileNotFoundError, ValueError: a file or a tensor is missing, or unknown.
        """
        document, weights = read_weights(folder)
        if not is_pretraining(document):
            raise ValueError(
                f"{folder} holds a classifier, which has no decoder; expected a pretraining model"
            )
        fields = stored_fields(document) | overrides
        model = cls(config or RoMAForPreTrainingConfig.from_values(fields))
        model.data_schema = document.get("data_schema")
        load_weights(model, weights, folder)
        return model

    def loss_count(self, batch: PackedBatch) -> float:
        """Number of terms in the mean that is the loss of a packed batch: its hidden tokens.

        With ``missing_values`` the hidden numbers that were observed, divided by P.
        """
        if batch.masked is None:
            return 0.0
        n_targets = batch.masked.n_targets
        return float(batch.masked.hidden.total if n_targets is None else n_targets)

    def forward(
        self,
        values: Tensor | PackedBatch,
        positions: Tensor | None = None,
        pad_mask: Tensor | None = None,
        label: Tensor | None = None,
        mask: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Reconstruct hidden tokens.

        Args:
            values: ``(B, time, C, height, width)`` float, or a packed batch and nothing else.
            positions: ``(B, D, N)``.
            pad_mask: ``(B, N)`` bool, True at padding.
            label: accepted and ignored, so that both models take the same items.
            mask: ``(B, N)`` bool, True where hidden; padding in it is ignored. None draws a mask
                of ``mask_ratio`` from torch's generator.
            covariates: ``(B, K)`` numbers and indices of categories, NaN where missing.

        Returns:
            logits: ``(B, M, P)``; row m belongs to the m-th hidden real token of its series in
                ascending index, those hidden in part included, M is the largest count; rows past a
                series' own count are zero. For a packed batch ``(H, P)``. None if nothing is hidden.
            loss: mean over the numbers of hidden real tokens, of those that were observed; None if
                nothing is hidden.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        order: Tensor | None = None
        if isinstance(values, PackedBatch):
            batch = values
        else:
            batch, order, rows = self.pack(values, positions, pad_mask, covariates)
            if mask is not None:
                assert positions is not None
                shape = (len(order), positions.shape[2])
                if mask.dtype != torch.bool or tuple(mask.shape) != shape:
                    raise ValueError(
                        f"mask must be bool of shape (batch, tokens) = {shape}, True where hidden; "
                        f"got {mask.dtype} of shape {tuple(mask.shape)}"
                    )
                batch = batch.with_mask(mask.reshape(-1)[rows], self.config.missing_values)
        self.check_packed(batch)
        if batch.masked is None:
            batch = draw_mask(batch, self.config, int(torch.randint(2**31, ())), epoch=0)
        masked = batch.masked
        assert masked is not None
        if order is not None and 0 in masked.visible.lengths:
            n_visible = zip(order.tolist(), masked.visible.lengths, strict=True)
            hidden = [b for b, n in n_visible if not n]
            raise ValueError(
                f"mask hides every real token of series {sorted(hidden)}; "
                f"at least one token of each must stay visible"
            )
        if masked.hidden.total == 0:
            return None, None
        outputs = self.predict_hidden(batch, masked)
        targets = batch.tokens[masked.hidden_rows]
        if self.config.normalize_targets:
            mean, deviation = _tubelet_statistics(targets)
            targets = (targets - mean) / deviation
        targets = targets.to(outputs.dtype)
        if self.config.missing_values:
            missing = targets.isnan()
            losses = self.loss_fn(outputs, targets.masked_fill(missing, 0)).masked_fill(missing, 0)
            loss = losses.sum() / (~missing).sum()
        else:
            loss = self.loss_fn(outputs, targets).mean()
        logits = outputs[:, : self.config.tubelet_width]
        return (logits if order is None else unpack(logits, masked.hidden, order)), loss

    def reconstruct(
        self,
        values: Tensor,
        positions: Tensor,
        pad_mask: Tensor | None = None,
        *,
        query_positions: Tensor,
        covariates: Tensor | None = None,
        denormalise: bool = True,
    ) -> Reconstruction:
        """Predict the values at any positions from all observed tokens: interpolation, forecasting.

        As in training, the queries of a series are predicted together, and where an axis subtracts the
        first position, it is the first of tokens and queries.

        Args:
            values, positions, pad_mask, covariates: as for calling the model.
            query_positions: ``(B, D, Q)`` or ``(D, Q)``, of any real type, in the units of ``positions``.
            denormalise: return values in the units of the data, by the ``data_schema`` saved with the
                weights; without a schema they are in the model's units either way.

        Raises:
            TypeError, ValueError: an argument does not fit, or the model has ``absolute`` positions or
                ``normalize_targets``.
        """
        self._check_answers_queries()
        tokens, valid = check_inputs(values, positions, pad_mask, self.config)
        n_series, n_tokens, width = tokens.shape
        queries = query_positions
        queries = queries.expand(n_series, -1, -1) if queries.ndim == 2 else queries
        n_queries = queries.shape[-1]
        check_positions(queries, (n_series, self.config.n_pos_dims, n_queries), "query_positions")
        axes = self.config.position_axes
        both = torch.cat((positions.double(), queries.double()), dim=2)
        real = F.pad(valid, (0, n_queries), value=True)
        batch, order, rows = pack_tokens(
            torch.cat((tokens, tokens.new_zeros(n_series, n_queries, width)), dim=1),
            to_model_positions(both, origin(both, real, axes), axes),
            real,
            self.config,
            covariates,
        )
        is_query = rows % (n_tokens + n_queries) >= n_tokens
        masked = MaskedTokens.of(is_query, batch.segments)
        raw = unpack(self.predict_hidden(batch, masked), masked.hidden, order)  # (B, Q, P or 2P)
        std = None
        if self.config.predict_variance:
            std = (0.5 * raw[..., width:].clamp(*LOG_VARIANCES)).exp()
        result = Reconstruction(raw[..., :width], std)
        if denormalise and self.data_schema is not None:
            return result.denormalised(DataSchema.model_validate(self.data_schema), queries)
        return result

    def _check_answers_queries(self) -> None:
        if self.sinusoidal is not None:
            raise ValueError(
                "reconstruct needs pos_encoding='ropend'; this model encodes the order of tokens alone"
            )
        if self.config.normalize_targets:
            raise ValueError(
                "a model trained with normalize_targets predicts tubelets standardised by their own mean and "
                "deviation, which are unknown at new positions; train with normalize_targets=False"
            )

    def export_reconstruction(self) -> ExportedProgram:
        """:class:`PaddedReconstruction` as a program like that of :meth:`export`.

        Raises:
            ValueError: as :meth:`reconstruct`.
        """
        self._check_answers_queries()
        return self._export(PaddedReconstruction(self.eval()), n_queries=3)

    def reconstruct_hidden(self, batch: PackedBatch, masked: MaskedTokens) -> Tensor:
        """``(H, P)`` predictions of the hidden tokens, by row, in the units of ``batch.tokens``.

        With ``normalize_targets`` they are restored by the statistics of the true tubelets.
        """
        predicted = self.predict_hidden(batch, masked)[:, : self.config.tubelet_width]
        if self.config.normalize_targets:
            mean, deviation = _tubelet_statistics(batch.tokens[masked.hidden_rows])
            return predicted * deviation + mean
        return predicted

    def predict_hidden(self, batch: PackedBatch, masked: MaskedTokens) -> Tensor:
        """The head's ``(H, P)`` (``(H, 2P)`` with variances) for the hidden tokens, by row."""
        drop = self.config.encoder_config.pos_drop_rate
        segments, index = batch.segments, batch.index_in_series
        self.check_packed(batch)
        seen, hidden = masked.visible_rows, masked.hidden
        visible = self.embed_rows(
            batch.tokens[seen], batch.positions[seen], index[seen], masked.visible, batch.covariates
        )
        encoded = visible.layout.segments
        x = F.dropout(visible.rows, drop, self.training)
        x = self.encoder_decoder_proj(self.encoder(x, visible.rotations, encoded))
        x = x.to(visible.rows.dtype)  # the residual stream keeps its precision here, too

        # the decoder has the rows of the encoder and then the mask tokens, series after series
        lengths = [a + b for a, b in zip(encoded.lengths, hidden.lengths, strict=True)]
        full = Segments(lengths, segments.device)
        rows = torch.arange(encoded.total, device=x.device) + hidden.cu_seqlens[encoded.ids]
        hidden_rows = torch.arange(hidden.total, device=x.device)
        hidden_rows = hidden_rows + encoded.cu_seqlens[hidden.ids + 1]
        at = batch.positions.new_zeros(full.total, batch.positions.shape[1])
        at[rows], at[hidden_rows] = visible.positions, batch.positions[masked.hidden_rows]
        mask_tokens = self.mask_token.to(x.dtype).expand(hidden.total, -1)
        if self.decoder_sinusoidal is not None:
            sines = self.decoder_sinusoidal(index[masked.hidden_rows])
            mask_tokens = mask_tokens + sines.to(x.dtype)
        if self.decoder_categories is not None:  # what the token is that is to be reconstructed
            mask_tokens = mask_tokens + self.decoder_categories(batch.positions[masked.hidden_rows])
        mask_tokens = F.dropout(mask_tokens, drop, self.training)
        y = x.new_empty(full.total, x.shape[1])
        y = y.index_copy(0, rows, x).index_copy(0, hidden_rows, mask_tokens)
        rotations = None if self.decoder_rotary is None else self.decoder_rotary(at)
        return self.head(self.decoder(y, rotations, full, OutputRows(hidden_rows, hidden)))


class PaddedReconstruction(PaddedModel):
    """What :meth:`RoMAForPreTraining.reconstruct` predicts, from padded tokens and queries, for export."""

    config: RoMAForPreTrainingConfig

    def __init__(self, model: RoMAForPreTraining) -> None:
        super().__init__(model, "token", model.head)
        self.encoder_decoder_proj, self.mask_token = model.encoder_decoder_proj, model.mask_token
        self.decoder, self.decoder_categories = model.decoder, model.decoder_categories
        self.decoder_rotary = model.decoder_rotary

    def forward(  # type: ignore[override]
        self,
        values: Tensor,
        positions: Tensor,
        valid: Tensor,
        queries: Tensor,
        query_valid: Tensor,
        covariates: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Means ``(B, Q, P)``, and with ``predict_variance`` variances ``(B, Q, P)``.

        ``queries`` are ``(B, Q, D)`` float32 like ``positions``, ``query_valid`` ``(B, Q)`` bool; the
        others are as in :class:`PaddedModel`, ``values`` NaN where missing. Queries of a series are
        predicted together, as the hidden tokens of training are; outputs at padding are arbitrary.
        """
        x, positions, valid, _ = self.encode(values, positions, valid, covariates)
        x = self.encoder_decoder_proj(x)
        mask_tokens = self.mask_token.expand(*query_valid.shape, -1)
        if self.decoder_categories is not None:
            mask_tokens = mask_tokens + self.decoder_categories(queries)
        assert self.decoder_rotary is not None
        rotations = self.decoder_rotary(torch.cat((positions, queries), dim=1))
        valid = torch.cat((valid, query_valid), dim=1)
        y = self.decoder.forward_padded(torch.cat((x, mask_tokens), dim=1), rotations, valid)
        outputs = self.head(y[:, x.shape[1] :])
        if not self.config.predict_variance:
            return outputs
        mean, log_variance = outputs.chunk(2, dim=-1)
        return mean, log_variance.clamp(*LOG_VARIANCES).exp()


def gaussian_nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """``(H, 2P)`` means and log variances, ``(H, P)`` → ``(H, P)``, without the constant."""
    exact = outputs if outputs.dtype == torch.float64 else outputs.float()
    mean, log_variance = exact.chunk(2, dim=-1)
    log_variance = log_variance.clamp(*LOG_VARIANCES)
    return 0.5 * (log_variance + (targets - mean) ** 2 / log_variance.exp())


def _tubelet_statistics(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (unbiased, floored) deviation ``(…, 1)`` of each ``(…, P)`` tubelet."""
    mean = targets.mean(-1, keepdim=True)
    return mean, (targets.var(-1, keepdim=True) + 1e-6).sqrt()
