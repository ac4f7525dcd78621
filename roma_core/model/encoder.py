"""The Transformer stack, encoder and decoder alike: pre-norm, bidirectional, no bias, no last norm.

Works on packed rows. The last block computes only the rows that somebody reads (hidden tokens in
pretraining, CLS in classification), and everything before it all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roma_core.model.attention import packed_attention, padded_attention
from roma_core.model.config import EncoderConfig
from roma_core.model.rotary import rotate
from roma_core.model.segments import Segments

Rotations = Tensor | None  # (T, 1, w // 2) complex64


@dataclass(frozen=True)
class Rows:
    """Some rows of a packed row, series after series."""

    index: Tensor  # (R,) int64
    segments: Segments


class Attention(nn.Module):
    """Multi-head self-attention with rotated queries and keys; one product makes q, k and v."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.nhead * config.head_width
        self.qkv = nn.Linear(config.d_model, 3 * self.width, bias=False)
        self.out = nn.Linear(self.width, config.d_model, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_width))

    def _positioned(self, x: Tensor, rotations: Rotations) -> Tensor:
        if rotations is not None:
            x = rotate(x, rotations)
        return F.dropout(x, self.config.pos_drop_rate, self.training)

    def forward(
        self, x: Tensor, rotations: Rotations, segments: Segments, rows: Rows | None
    ) -> Tensor:
        """``(T, d)`` → ``(T, d)``, or ``(R, d)`` for the queries at ``rows`` alone."""
        if rows is None:
            heads = self._heads(self.qkv(x))  # (T, 3h, w)
            qk, v = heads.split((2 * self.config.nhead, self.config.nhead), dim=-2)
            q, k = self._positioned(qk, rotations).chunk(2, dim=-2)
            q_segments = segments
        else:
            w_q, w_kv = self.qkv.weight.split((self.width, 2 * self.width))
            q = self._heads(F.linear(x[rows.index], w_q))
            k, v = self._heads(F.linear(x, w_kv)).chunk(2, dim=-2)
            q_segments = rows.segments
            q = self._positioned(q, None if rotations is None else rotations[rows.index])
            k = self._positioned(k, rotations)
        dropout = self.config.attn_drop_rate if self.training else 0.0
        mixed = packed_attention(q, k, v, q_segments, segments, dropout)  # (R, h, w)
        return F.dropout(
            self.out(mixed.flatten(-2)), self.config.attn_proj_drop_rate, self.training
        )

    def forward_padded(self, x: Tensor, rotations: Rotations, valid: Tensor) -> Tensor:
        """``(B, S, d)`` → ``(B, S, d)`` with ``(B, S)`` bool ``valid``; inference only."""
        q, k, v = self._heads(self.qkv(x)).chunk(3, dim=-2)
        if rotations is not None:
            q, k = rotate(q, rotations), rotate(k, rotations)
        return self.out(padded_attention(q, k, v, valid).flatten(-2))


class Block(nn.Module):
    """Attention and MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, config: EncoderConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_eps)
        self.w1 = nn.Linear(config.d_model, config.mlp_width, bias=False)
        self.w2 = nn.Linear(config.mlp_width, config.d_model, bias=False)
        self.hidden_drop_rate = config.hidden_drop_rate
        self.drop_path_rate = drop_path_rate

    def _mlp(self, x: Tensor) -> Tensor:
        x = self.w2(F.silu(self.w1(self.ffn_norm(x))))
        return F.dropout(x, self.hidden_drop_rate, self.training)

    def _drop_path(self, branch: Tensor, segments: Segments) -> Tensor:
        """Leave the branch out for some series; the others make up for it."""
        if not self.training or self.drop_path_rate == 0:
            return branch
        keep = 1 - self.drop_path_rate
        kept = torch.rand(segments.count, device=branch.device) < keep  # (B,)
        return branch * (kept / keep)[segments.ids, None].to(branch.dtype)

    def forward(
        self, x: Tensor, rotations: Rotations, segments: Segments, rows: Rows | None = None
    ) -> Tensor:
        """``(T, d)`` → ``(T, d)``, or ``(R, d)`` with ``rows``."""
        branch = self.attention(self.attention_norm(x), rotations, segments, rows)
        if rows is not None:
            x, segments = x[rows.index], rows.segments
        x = x + self._drop_path(branch, segments)
        return x + self._drop_path(self._mlp(x), segments)

    def forward_padded(self, x: Tensor, rotations: Rotations, valid: Tensor) -> Tensor:
        x = x + self.attention.forward_padded(self.attention_norm(x), rotations, valid)
        return x + self._mlp(x)


class Encoder(nn.Module):
    """A stack of blocks."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        last = max(config.depth - 1, 1)
        self.layers = nn.ModuleList(
            Block(config, config.drop_path_rate * i / last) for i in range(config.depth)
        )

    def forward(
        self, x: Tensor, rotations: Rotations, segments: Segments, rows: Rows | None = None
    ) -> Tensor:
        """Encode packed rows.

        Args:
            x: ``(T, d)``.
            rotations: ``(T, 1, w // 2)`` complex64; None rotates nothing.
            segments: the series of the T rows.
            rows: the rows to return; None returns all.

        Returns:
            ``(T, d)``, or ``(R, d)`` with ``rows``.
        """
        if not len(self.layers):
            return x if rows is None else x[rows.index]
        *body, last = self.layers
        for layer in body:
            x = layer(x, rotations, segments)
        return last(x, rotations, segments, rows)

    def forward_padded(self, x: Tensor, rotations: Rotations, valid: Tensor) -> Tensor:
        """``(B, S, d)`` → ``(B, S, d)``; for export and for comparison, not for training."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            x = layer.forward_padded(x, rotations, valid)
        return x


class Head(nn.Module):
    """Dropout, norm, linear: what every output goes through."""

    def __init__(self, width: int, n_outputs: int, drop_rate: float, eps: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop_rate)
        self.norm = nn.RMSNorm(width, eps=eps)
        self.linear = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.drop(x)))


_STD = 0.02


def initialise(module: nn.Module) -> None:
    """The declared start of every model: matrices from N(0, 0.02²) cut at two σ, biases 0, gains 1."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=_STD, a=-2 * _STD, b=2 * _STD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def initialise_vectors(*vectors: nn.Parameter | None) -> None:
    """CLS and mask vectors start like matrices; None is a vector that the model does without."""
    for vector in vectors:
        if vector is not None:
            nn.init.trunc_normal_(vector, std=_STD, a=-2 * _STD, b=2 * _STD)
