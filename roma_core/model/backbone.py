"""Tokens → encoder output: the part that both models share and that finetuning carries over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from roma_core.model import embedding
from roma_core.model.config import SCHEMA_VERSION, EncoderConfig, RoMAConfig
from roma_core.model.encoder import Encoder, OutputRows, initialise
from roma_core.model.packing import Layout, PackedBatch, Segments, pack, scatter
from roma_core.model.positions import RotaryEmbedding, Rotations, SinusoidalEmbedding
from roma_core.model.weights import write_weights
from roma_core.model.windows import Stem

Pooling = Literal["cls", "mean", "token"]


@dataclass(frozen=True)
class Embedded:
    """The input of the encoder: R prefix rows of each series, then its U tokens: observations or windows."""

    rows: Tensor  # (U + B R, d)
    rotations: Rotations
    layout: Layout  # of the rows
    segments: Segments  # of the tokens alone
    positions: Tensor  # (U + B R, D), 0 of the prefix
    of_observation: Tensor | None  # (T,) int64, the window of each; None: a token each


class Backbone(nn.Module):
    """Projection, CLS, positions and encoder: what both models share and finetuning carries over."""

    loss_fn: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, config: RoMAConfig) -> None:
        super().__init__()
        if isinstance(config, type):
            config = config()  # the class instead of an instance: take it with its defaults
        self.config = config
        stack = config.encoder_config
        self.data_schema: dict[str, Any] | None = None  # DataSchema of the training data, if known
        self.stem = Stem(config) if config.window else None
        n_inputs = config.stem_width if config.window else config.n_inputs
        self.projection = embedding.Projection(n_inputs, stack.d_model, config.value_features)
        self.neighbourhood: embedding.Neighbourhood | None = None
        if config.neighbours:
            self.neighbourhood = embedding.Neighbourhood(config)
        self.categories = self.category_embedding(stack)
        self.covariates = (
            embedding.CovariateEmbedding(config.covariates, stack.d_model)
            if config.covariates
            else None
        )
        self.cls = nn.Parameter(torch.empty(stack.d_model)) if config.use_cls else None
        self.encoder = Encoder(stack)
        self.rotary, self.sinusoidal = self._position_embeddings(stack)

    def _position_embeddings(
        self, stack: EncoderConfig
    ) -> tuple[RotaryEmbedding | None, SinusoidalEmbedding | None]:
        c = self.config
        if c.pos_encoding == "absolute":
            return None, SinusoidalEmbedding(c.max_len, stack.d_model)
        return RotaryEmbedding(stack.head_width, c.rotary_axes, c.p_rope_val), None

    def category_embedding(self, stack: EncoderConfig) -> embedding.CategoryEmbedding | None:
        if not any(self.config.axis_categories):
            return None
        return embedding.CategoryEmbedding(self.config.axis_categories, stack.d_model)

    def initialise(self) -> None:
        """Draw the initial weights of all parts that exist by now."""
        initialise(self)
        for part in self.modules():
            if isinstance(part, embedding.EMBEDDINGS):
                part.initialise()

    def set_loss_fn(self, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Use ``loss_fn(logits, label)``, of one value per row, or in pretraining, of ``(H, P)``
        outputs and targets, ``(H, P)``; with ``predict_variance`` outputs are ``(H, 2P)``, means
        and then logarithms of variances."""
        self.loss_fn = loss_fn

    def config_document(self) -> dict[str, Any]:
        """The content of ``model_config.json``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "class": type(self).__name__,
            "data_schema": self.data_schema,
            **self.config.model_dump(mode="json"),
        }

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``model.safetensors`` and ``model_config.json`` into ``folder``."""
        write_weights(folder, self, self.config_document())

    def export(self) -> ExportedProgram:
        """A program of standard operators from padded tokens to :meth:`embed`'s mean, or to a
        classifier's outputs; it loads wherever torch does. Puts the model into evaluation mode."""
        return self._export(self.eval().padded())

    def _export(self, program: PaddedModel, n_queries: int = 0) -> ExportedProgram:
        c, n_series = self.config, Dim("batch", min=1)
        example = [torch.zeros(2, 5, n) for n in (c.tubelet_width, c.n_pos_dims)]
        example.append(torch.ones(2, 5, dtype=torch.bool))
        shapes = [{0: n_series, 1: Dim("length", min=1)}] * 3
        if n_queries:
            example.append(torch.zeros(2, n_queries, c.n_pos_dims))
            example.append(torch.ones(2, n_queries, dtype=torch.bool))
            shapes += [{0: n_series, 1: Dim("queries", min=1)}] * 2
        if c.covariates:
            example.append(torch.zeros(2, len(c.covariates)))
            shapes.append({0: n_series})
        with torch.no_grad():
            return torch.export.export(program, tuple(example), dynamic_shapes=tuple(shapes))

    def padded(self) -> PaddedModel:
        """What :meth:`export` exports."""
        return PaddedModel(self)

    def compile_regions(self) -> None:
        """Compile the token-wise parts of every stack; see :meth:`Encoder.compile_regions`."""
        for part in self.modules():
            if isinstance(part, Encoder):
                part.compile_regions()

    def pack(
        self,
        values: Tensor,
        positions: Tensor | None,
        pad_mask: Tensor | None,
        covariates: Tensor | None = None,
    ) -> tuple[PackedBatch, Tensor, Tensor]:
        """Padded tensors → packed batch; see :func:`roma_core.model.packing.pack`."""
        if positions is None:
            raise TypeError("positions are required, of shape (batch, n_pos_dims, tokens)")
        return pack(values, positions, pad_mask, self.config, covariates)

    def embed(
        self,
        values: Tensor | PackedBatch,
        positions: Tensor | None = None,
        pad_mask: Tensor | None = None,
        pooling: Pooling = "mean",
        covariates: Tensor | None = None,
    ) -> Tensor:
        """Output of the last block, unnormalised, with every real token visible.

        Args:
            values, positions, pad_mask, covariates: as for calling the model.
            pooling: ``mean`` of the real tokens, the ``cls`` token, or every ``token``.

        Returns:
            ``(B, d)``; for ``token`` ``(B, N, d)``, zero at padding, or ``(T, d)`` of a packed batch.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if pooling == "cls" and self.cls is None:
            raise ValueError("pooling='cls' reads a token that this model lacks: use_cls=False")
        if isinstance(values, PackedBatch):
            return self.features(values, pooling)
        batch, order, rows = self.pack(values, positions, pad_mask, covariates)
        packed = self.features(batch, pooling)
        if pooling == "token":
            assert positions is not None
            return scatter(packed, rows, tuple(positions.shape[::2]))
        return packed.new_empty(packed.shape).index_copy(0, order, packed)

    def features(self, batch: PackedBatch, pooling: Pooling) -> Tensor:
        """``(B, d)`` pooled, or ``(T, d)``: the input of a head, from a packed batch."""
        self.check_packed(batch)
        index = batch.segments.index_in_series
        embedded = self.embed_rows(
            batch.tokens, batch.positions, index, batch.segments, batch.covariates
        )
        x, rotations, layout = embedded.rows, embedded.rotations, embedded.layout
        segments = embedded.segments
        if pooling == "cls":
            cls_rows = layout.prefix_rows[:, 0]
            first = OutputRows(cls_rows, Segments([1] * segments.count, segments.device))
            return self.encoder(x, rotations, layout.segments, first)
        rows = OutputRows(layout.token_rows, segments) if self.config.n_prefix else None
        x = self.encoder(x, rotations, layout.segments, rows)
        if pooling == "token":
            return x if embedded.of_observation is None else x[embedded.of_observation]
        sums = x.new_zeros(segments.count, x.shape[1]).index_add(0, segments.ids, x)
        return sums / segments.sizes[:, None].to(x.dtype)

    def check_packed(self, batch: PackedBatch) -> None:
        """Raises ValueError unless the batch fits this model."""
        c = self.config
        width, axes = batch.tokens.shape[1], batch.positions.shape[1]
        if width != c.tubelet_width or axes != c.n_pos_dims:
            raise ValueError(
                f"the batch has tokens of {width} numbers and {axes} position axes, but the model was built "
                f"for tokens of {c.tubelet_width} (tubelet_size={c.tubelet_size} × n_channels={c.n_channels}) "
                f"and n_pos_dims={c.n_pos_dims}; compare the data set's schema with the model's configuration"
            )
        given = 0 if batch.covariates is None else batch.covariates.shape[1]
        if given != len(c.covariates):
            raise ValueError(
                f"the batch has {given} covariates of each series, but the model was built for "
                f"{len(c.covariates)}; give covariates of shape (batch, {len(c.covariates)}), NaN where missing"
            )
        n_rows = batch.segments.max_seqlen + c.n_prefix
        if self.sinusoidal is not None and n_rows > c.max_len:
            raise ValueError(
                f"a series needs {n_rows} rows of the absolute table, which has max_len={c.max_len}; "
                f"raise max_len or use pos_encoding='ropend'"
            )

    def embed_rows(
        self,
        tokens: Tensor,
        positions: Tensor,
        index: Tensor,
        segments: Segments,
        covariates: Tensor | None,
    ) -> Embedded:
        """Embed some tokens and put CLS and covariates in front of each series.

        From ``(V, P)``, ``(V, D)``, ``(V,)``, the index of each token in its full series, and ``(B, K)``.
        """
        # the residual stream keeps its precision; under autocast only products are in 16 bits
        dtype = self.projection.weight.dtype
        of_observation = None
        if self.stem is None:
            x = embedding.token_vectors(self, tokens.to(dtype), positions, segments.ids)
        else:
            features, windows = self.stem(tokens.to(dtype), positions, segments.ids)
            x = self.projection(features).to(dtype)
            positions, of_observation = windows.positions, windows.of_row
            # waits for a GPU: only positions tell how many windows there are
            lengths = windows.series.bincount(minlength=segments.count).tolist()
            segments = Segments(lengths, segments.device)
        if self.sinusoidal is not None:
            shift = 0 if self.cls is None else 1
            x = x + self.sinusoidal(index + shift)
        layout = segments.with_prefix(self.config.n_prefix)
        prefix = embedding.prefix_tokens(self, segments.count, covariates)
        if prefix is None:
            rotations = self._rotations(positions)
            return Embedded(x, rotations, layout, segments, positions, of_observation)
        n_rows, token_rows = layout.segments.total, layout.token_rows
        full = x.new_empty(n_rows, x.shape[1]).index_copy(0, token_rows, x)
        full = full.index_copy(0, layout.prefix_rows.flatten(), prefix.flatten(0, 1).to(x.dtype))
        at = positions.new_zeros(n_rows, positions.shape[1])
        at = at.index_copy(0, token_rows, positions)  # the prefix is at 0 on every axis
        return Embedded(full, self._rotations(at), layout, segments, at, of_observation)

    def _rotations(self, positions: Tensor) -> Rotations:
        return None if self.rotary is None else self.rotary(positions)


class PaddedModel(nn.Module):
    """Features as :meth:`Backbone.embed` gives them, or a head's outputs, from padded tokens.

    Served programs are exported from it: a key mask takes the place of packed rows.
    """

    def __init__(
        self, model: Backbone, pooling: Pooling = "mean", head: nn.Module | None = None
    ) -> None:
        super().__init__()
        # its parts, not the model: a program saves every parameter that it can reach
        self.projection, self.encoder, self.stem = model.projection, model.encoder, model.stem
        self.neighbourhood, self.categories = model.neighbourhood, model.categories
        self.cls, self.covariates = model.cls, model.covariates
        self.sinusoidal, self.rotary = model.sinusoidal, model.rotary
        self.config = model.config
        self.pooling, self.head = pooling, head or nn.Identity()

    def forward(
        self, values: Tensor, positions: Tensor, valid: Tensor, covariates: Tensor | None = None
    ) -> Tensor:
        """``(B, N, P)`` float32 tokens, ``(B, N, D)`` float32, ``(B, N)`` bool → ``(B, d)``.

        ``covariates`` are ``(B, K)`` float32, of a model that has some. Padding may hold any finite
        number; on an axis with categories, the index of one. With ``pooling="token"``
        ``(B, N, d)``, arbitrary at padding. With a head its outputs take the place of d.
        """
        x, _, real, of_observation = self.encode(values, positions, valid, covariates)
        if self.pooling == "cls":
            return self.head(x[:, 0])
        x, real = x[:, self.config.n_prefix :], real[:, self.config.n_prefix :]
        if self.pooling == "token":
            if of_observation is not None:
                x = x.gather(1, of_observation[..., None].expand(-1, -1, x.shape[2]))
            return self.head(x)
        weight = real[:, :, None].to(x.dtype)
        return self.head((x * weight).sum(1) / weight.sum(1))

    def encode(
        self, values: Tensor, positions: Tensor, valid: Tensor, covariates: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Encoder output ``(B, R + U, d)`` of CLS, covariates and tokens, with positions and valid.

        With ``pooling="cls"`` that of CLS alone, ``(B, 1, d)``. Tokens are the N observations, or
        windows; then the last result is the ``(B, N)`` window of each observation.
        """
        n_series = valid.shape[0]
        series = torch.arange(n_series, device=valid.device)[:, None]
        series = torch.where(valid, series, n_series)  # padding is a series of its own
        of_observation = None
        if self.stem is None:
            x = embedding.token_vectors(self, values, positions, series)  # (B, N, d)
        else:
            x, positions, valid, of_observation = self._windows(values, positions, series)
        if self.sinusoidal is not None:
            shift = 0 if self.cls is None else 1
            x = x + self.sinusoidal.table[shift : shift + x.shape[1]]
        if (prefix := embedding.prefix_tokens(self, x.shape[0], covariates)) is not None:
            first = prefix.shape[1]
            x = torch.cat((prefix, x), dim=1)
            zeros = torch.zeros_like(positions[:, :1]).expand(-1, first, -1)
            positions = torch.cat((zeros, positions), dim=1)
            real = torch.ones_like(valid[:, :1]).expand(-1, first)
            valid = torch.cat((real, valid), dim=1)
        rotations = None if self.rotary is None else self.rotary(positions)
        cls = (slice(None), slice(0, 1)) if self.pooling == "cls" else None
        x = self.encoder.forward_padded(x, rotations, valid, cls)
        return x, positions, valid, of_observation

    def _windows(
        self, values: Tensor, positions: Tensor, series: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(B, U, d)`` windows, positions ``(B, U, 1)``, ``(B, U)`` bool, and ``(B, N)`` int64."""
        assert self.stem is not None
        n_series = series.shape[0]
        features, windows = self.stem(
            values.flatten(0, 1), positions.flatten(0, 1), series.flatten()
        )
        counts = windows.series.new_zeros(n_series + 1)
        counts = counts.index_add(0, windows.series, torch.ones_like(windows.series))
        starts = counts.cumsum(0) - counts
        index = torch.arange(windows.series.shape[0], device=counts.device) - starts[windows.series]
        longest = counts[:-1].max().clamp(min=2).item()  # a program must know that it is not 1
        torch._check(longest >= 2)
        # what is padding goes into a series of its own, which is cut off
        place = windows.series * longest + index.clamp(max=longest - 1)
        x = self.projection(features)
        rows = x.new_zeros((n_series + 1) * longest, x.shape[1]).index_put((place,), x)
        at = windows.positions.new_zeros((n_series + 1) * longest, 1)
        at = at.index_put((place,), windows.positions)
        valid = torch.arange(longest, device=counts.device) < counts[:-1, None]
        shape = (n_series + 1, longest)
        of_observation = index[windows.of_row].unflatten(0, tuple(series.shape))
        of_observation = of_observation.clamp(max=longest - 1)
        return rows.unflatten(0, shape)[:-1], at.unflatten(0, shape)[:-1], valid, of_observation
