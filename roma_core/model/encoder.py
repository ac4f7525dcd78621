"""The Transformer stack, encoder and decoder alike: pre-norm, bidirectional, no bias, no last norm.

Works on packed rows. The last block computes only the rows that somebody reads (hidden tokens in
pretraining, CLS in classification), and everything before it all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roma_core.model.attention import packed_attention, padded_attention
from roma_core.model.config import EncoderConfig
from roma_core.model.linear import linear, linear_silu
from roma_core.model.norm import RMSNorm
from roma_core.model.rotary import rotate
from roma_core.model.segments import Segments

Rotations = Tensor | None  # (T, 1, w // 2, 2) float32: cosine and sine of every pair


@dataclass(frozen=True)
class Rows:
    """Some rows of a packed row, series after series."""

    index: Tensor  # (R,) int64
    segments: Segments


@functools.cache
def _compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a block, compiled once for the blocks of all models."""
    # training and evaluation, encoder and decoder, with and without 16 bits: each is a variant
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 64)
    return torch.compile(method, dynamic=True)


class Attention(nn.Module):
    """The token-wise halves of self-attention: one product makes q, k and v, another mixes heads."""

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

    def queries_keys_values(
        self, x: Tensor, rotations: Rotations, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(…, d)`` → rotated q and k, and v, each ``(…, h, w)``.

        With ``(R,)`` int64 ``rows`` of a packed x, q is made for these rows alone.
        """
        nhead = self.config.nhead
        if rows is None:
            qk, v = self._heads(linear(x, self.qkv.weight)).split((2 * nhead, nhead), dim=-2)
            q, k = self._positioned(qk, rotations).chunk(2, dim=-2)
            return q, k, v
        w_q, w_kv = self.qkv.weight.split((self.width, 2 * self.width))
        q = self._heads(linear(x[rows], w_q))
        k, v = self._heads(linear(x, w_kv)).chunk(2, dim=-2)
        q = self._positioned(q, None if rotations is None else rotations[rows])
        return q, self._positioned(k, rotations), v

    def mix(self, heads: Tensor) -> Tensor:
        """``(…, h, w)`` → ``(…, d)``."""
        mixed = linear(heads.flatten(-2), self.out.weight)
        return F.dropout(mixed, self.config.attn_proj_drop_rate, self.training)


class Block(nn.Module):
    """Attention and MLP, each on a normalised input and added to the residual stream.

    ``before`` and ``after`` are what happens to every token on its own; attention stands between
    them. They are the regions that :meth:`Encoder.compile_regions` compiles.
    """

    def __init__(self, config: EncoderConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.layer_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.layer_norm_eps)
        self.w1 = nn.Linear(config.d_model, config.mlp_width, bias=False)
        self.w2 = nn.Linear(config.mlp_width, config.d_model, bias=False)
        self.hidden_drop_rate = config.hidden_drop_rate
        self.attn_drop_rate = config.attn_drop_rate
        self.drop_path_rate = drop_path_rate
        self.compiles = False

    def before(
        self, x: Tensor, rotations: Rotations, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(…, d)`` → q, k, v of ``(…, h, w)``; q for ``rows`` alone if they are given."""
        return self.attention.queries_keys_values(self.attention_norm(x), rotations, rows)

    def after(
        self, x: Tensor, heads: Tensor, scales: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """``(…, d)`` and attention's ``(…, h, w)`` → ``(…, d)``; ``scales`` are drop path's."""
        branch = self.attention.mix(heads)
        x = x + (branch if scales is None else branch * scales[0])
        branch = linear(linear_silu(self.ffn_norm(x), self.w1.weight), self.w2.weight)
        branch = F.dropout(branch, self.hidden_drop_rate, self.training)
        return x + (branch if scales is None else branch * scales[1])

    def _drop_path(self, segments: Segments) -> tuple[Tensor, Tensor] | None:
        """For each branch ``(T, 1)``: 0 for the series that skip it, the others make up for it."""
        if not self.training or self.drop_path_rate == 0:
            return None
        keep = 1 - self.drop_path_rate
        kept = torch.rand(2, segments.count, device=segments.device) < keep
        attention, mlp = (kept / keep)[:, segments.ids, None]
        return attention, mlp

    def forward(
        self, x: Tensor, rotations: Rotations, segments: Segments, rows: Rows | None = None
    ) -> Tensor:
        """``(T, d)`` → ``(T, d)``, or ``(R, d)`` with ``rows``."""
        index = None if rows is None else rows.index
        before, after = Block.before, Block.after
        if self.compiles:
            before, after = _compiled(before), _compiled(after)
        q, k, v = before(self, x, rotations, index)
        queried = segments if rows is None else rows.segments
        dropout = self.attn_drop_rate if self.training else 0.0
        heads = packed_attention(q, k, v, queried, segments, dropout)
        return after(self, x if index is None else x[index], heads, self._drop_path(queried))

    def forward_padded(self, x: Tensor, rotations: Rotations, valid: Tensor) -> Tensor:
        """``(B, S, d)`` → ``(B, S, d)`` with ``(B, S)`` bool ``valid``; inference only."""
        return self.after(x, padded_attention(*self.before(x, rotations), valid))


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
            rotations: ``(T, 1, w // 2, 2)`` float32, cosine and sine; None rotates nothing.
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

    def compile_regions(self) -> None:
        """Compile what happens to every token on its own, once for all layers and lengths.

        Attention stays one operator between the regions, so lengths never cause a recompilation.
        The first step after this takes from seconds to a minute; see ``tests/benchmarks/model.py``
        for what it buys. Calling it again does nothing. Copies of the model compile, too.
        """
        for block in self.layers:
            assert isinstance(block, Block)
            block.compiles = True

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
        self.norm = RMSNorm(width, eps)
        self.linear = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.drop(x)))


_VECTOR_STD = 0.02


def initialise(module: nn.Module) -> None:
    """The declared start of every model: biases 0, gains 1, and matrices by their inputs.

    A matrix of n inputs is drawn from N(0, 1/(3n)) cut at two σ, about the spread of the framework's
    own start. The published σ of 0.02 is meant for widths of many hundreds: a narrow model takes
    hundreds of steps to grow out of it.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            std = (3 * part.in_features) ** -0.5
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def initialise_vectors(*vectors: nn.Parameter | None) -> None:
    """CLS and mask vectors: N(0, 0.02²) cut at two σ; None is one that the model does without."""
    for vector in vectors:
        if vector is not None:
            nn.init.trunc_normal_(vector, std=_VECTOR_STD, a=-2 * _VECTOR_STD, b=2 * _VECTOR_STD)
