"""Tokens → encoder input, the part that both models share and that finetuning carries over."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from roma_core.model.config import _ModelConfig
from roma_core.model.embedding import Neighbourhood, Projection
from roma_core.model.encoder import Encoder, Rotations, Rows
from roma_core.model.packing import PackedBatch, pack, spread
from roma_core.model.positions import Rotation, SineTable
from roma_core.model.segments import Segments

Pooling = Literal["cls", "mean", "token"]
NO_POSITIONS = "positions are required: one row per axis, shape (batch, n_pos_dims, tokens)"


class Backbone(nn.Module):
    """Projection, CLS, positions and encoder.

    Attributes:
        data_schema: what the data must look like, as JSON; travels with the weights. None for a
            model that was never told.
    """

    def __init__(self, config: _ModelConfig) -> None:
        super().__init__()
        if isinstance(config, type):
            config = config()  # the class instead of an instance: take it with its defaults
        self.config = config
        stack = config.encoder_config
        self.data_schema: dict[str, Any] | None = None
        self.projection = Projection(config.tubelet_width, stack.d_model, config.value_features)
        self.neighbourhood = (
            Neighbourhood(config.tubelet_width, config.n_pos_dims, config.neighbours, stack.d_model)
            if config.neighbours
            else None
        )
        self.cls = nn.Parameter(torch.empty(stack.d_model)) if config.use_cls else None
        self.encoder = Encoder(stack)
        self.rotation = self._rotation_of(stack)
        self.table = self._table_of(stack)

    def _rotation_of(self, stack: Any) -> Rotation | None:
        c = self.config
        return (
            Rotation(stack.head_width, c.n_pos_dims, c.p_rope_val)
            if c.pos_encoding == "ropend"
            else None
        )

    def _table_of(self, stack: Any) -> SineTable | None:
        c = self.config
        return SineTable(c.max_len, stack.d_model) if c.pos_encoding == "absolute" else None

    def initialise_embedding(self) -> None:
        """The declared start of what tokens go through first, after that of every matrix."""
        self.projection.initialise()
        if self.neighbourhood is not None:
            self.neighbourhood.initialise()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``model.safetensors`` and ``model_config.json`` into ``folder``."""
        from roma_core.model.weights import save_pretrained

        save_pretrained(self, folder)

    def compile_regions(self) -> None:
        """Compile the token-wise parts of every stack; see :meth:`Encoder.compile_regions`."""
        for part in self.modules():
            if isinstance(part, Encoder):
                part.compile_regions()

    def pack(
        self, values: Tensor, positions: Tensor, pad_mask: Tensor | None
    ) -> tuple[PackedBatch, Tensor, Tensor]:
        """Padded tensors → packed batch; see :func:`roma_core.model.packing.pack`."""
        return pack(values, positions, pad_mask, self.config)

    def embed(
        self,
        values: Tensor | PackedBatch,
        positions: Tensor | None = None,
        pad_mask: Tensor | None = None,
        pooling: Pooling = "mean",
    ) -> Tensor:
        """Features of the encoder, with every real token visible and before any head.

        They are the last block's output as it is: no norm follows it. In training mode dropout is
        active.

        Args:
            values, positions, pad_mask: as for calling the model.
            pooling: ``mean`` of the real tokens, the ``cls`` token, or every ``token``.

        Returns:
            ``(B, d)``; for ``token`` ``(B, N, d)``, zero at padding. From a packed batch, in its
            order; for ``token`` ``(T, d)``.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if pooling == "cls" and self.cls is None:
            raise ValueError("pooling='cls' reads a token that this model has not: use_cls=False")
        if isinstance(values, PackedBatch):
            return self.features(values, pooling)
        if positions is None:
            raise TypeError(NO_POSITIONS)
        batch, order, rows = self.pack(values, positions, pad_mask)
        packed = self.features(batch, pooling)
        if pooling == "token":
            return spread(packed, rows, tuple(positions.shape[::2]))
        return packed.new_empty(packed.shape).index_copy(0, order, packed)

    def features(self, batch: PackedBatch, pooling: Pooling) -> Tensor:
        """``(B, d)`` pooled, or ``(T, d)``: what a head reads of a packed batch."""
        self.check_packed(batch)
        segments = batch.segments
        if self.table is not None:
            self.table.check_length(segments.longest + int(self.cls is not None))
        x, rotations, inner, token_rows, cls_rows = self.embed_rows(
            batch.tokens, batch.positions, segments.index_in_series, segments
        )
        if pooling == "cls":
            assert cls_rows is not None
            one_each = Segments([1] * segments.count, segments.device)
            return self.encoder(x, rotations, inner, Rows(cls_rows, one_each))
        rows = None if cls_rows is None else Rows(token_rows, segments)
        x = self.encoder(x, rotations, inner, rows)  # (T, d)
        if pooling == "token":
            return x
        sums = x.new_zeros(segments.count, x.shape[1]).index_add(0, segments.ids, x)
        return sums / segments.sizes[:, None].to(x.dtype)

    def check_packed(self, batch: PackedBatch) -> None:
        """Raises ValueError if a batch was made for another model."""
        c = self.config
        width, axes = batch.tokens.shape[1], batch.positions.shape[1]
        if width != c.tubelet_width or axes != c.n_pos_dims:
            raise ValueError(
                f"the batch has tokens of {width} numbers and {axes} position axes, but the model was built "
                f"for tokens of {c.tubelet_width} (tubelet_size={c.tubelet_size} × n_channels={c.n_channels}) "
                f"and n_pos_dims={c.n_pos_dims}; compare the data set's schema with the model's configuration"
            )

    def embed_rows(
        self, tokens: Tensor, positions: Tensor, index: Tensor, segments: Segments
    ) -> tuple[Tensor, Rotations, Segments, Tensor, Tensor | None]:
        """Project some tokens and put CLS in front of each series.

        Args:
            tokens: ``(V, P)``; positions: ``(V, D)``; index: ``(V,)`` place of each in its full series.
            segments: the series of the V rows.

        Returns:
            x ``(V + B, d)`` of the weights' type, rotations, segments with CLS, the rows of x that the
            tokens took, and
            those that CLS took. Without CLS, ``(V, d)``, the segments given, all rows and None.
        """
        # the residual stream keeps its precision; under autocast only products are in 16 bits
        dtype = self.projection.weight.dtype
        tokens = tokens.to(dtype)
        x = self.projection(tokens).to(dtype)
        if self.neighbourhood is not None:
            x = x + self.neighbourhood(tokens, positions, segments.ids).to(dtype)
        if self.table is not None:
            shift = 0 if self.cls is None else 1
            x = x + self.table(index + shift)
        if self.cls is None:
            rows = torch.arange(segments.total, device=x.device)
            return x, self._rotations(positions), segments, rows, None
        places = segments.with_cls
        cls = self.cls if self.table is None else self.cls + self.table.table[0]
        full = x.new_empty(places.segments.total, x.shape[1])
        full = full.index_copy(0, places.token_rows, x)
        full = full.index_copy(0, places.cls_rows, cls.to(x.dtype).expand(segments.count, -1))
        at = positions.new_zeros(places.segments.total, positions.shape[1])
        at = at.index_copy(0, places.token_rows, positions)  # CLS sits at 0 on every axis
        return full, self._rotations(at), places.segments, places.token_rows, places.cls_rows

    def _rotations(self, positions: Tensor) -> Rotations:
        return None if self.rotation is None else self.rotation(positions)
