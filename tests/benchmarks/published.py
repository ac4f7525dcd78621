"""The published formulation, written anew from its description, to measure against.

Padded rows, a dense float mask of −∞ for every head, three projections, rotation per axis with
tables rebuilt in every forward, boolean gathers, the decoder's visible outputs computed and dropped.
It takes our weights, so that both compute the same numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roma_core.model.config import EncoderConfig
from roma_core.model.rotary import BASE, pairs_per_axis


def rotate_axes(x: Tensor, positions: Tensor, p: float) -> Tensor:
    """``(B, h, S, w)`` rotated axis by axis; ``positions`` is ``(B, D, S)``."""
    chunks = []
    start, n_axes, width = 0, positions.shape[1], x.shape[-1]
    for axis, pairs in enumerate(pairs_per_axis(width, n_axes)):
        chunk = x[..., start : start + 2 * pairs]
        start += 2 * pairs
        k = torch.arange(pairs, device=x.device)
        timescale = torch.where(k < int(p * 2 * pairs) // 2, BASE ** (k / pairs), torch.inf)
        angle = positions[:, axis, None, :, None].float() / timescale
        cos, sin = angle.cos(), angle.sin()
        first, second = chunk.chunk(2, dim=-1)
        chunks += [
            torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
        ]
    return torch.cat((*chunks, x[..., start:]), dim=-1)


class PublishedBlock(nn.Module):
    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        width = c.nhead * c.head_width
        self.c = c
        self.n1 = nn.RMSNorm(c.d_model, eps=c.layer_norm_eps)
        self.n2 = nn.RMSNorm(c.d_model, eps=c.layer_norm_eps)
        self.wq, self.wk, self.wv = (nn.Linear(c.d_model, width, bias=False) for _ in range(3))
        self.wo = nn.Linear(width, c.d_model, bias=False)
        self.w1 = nn.Linear(c.d_model, c.mlp_width, bias=False)
        self.w2 = nn.Linear(c.mlp_width, c.d_model, bias=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, p: float) -> Tensor:
        h = self.n1(x)
        q, k, v = (
            w(h).unflatten(-1, (self.c.nhead, -1)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        q, k = rotate_axes(q, positions, p), rotate_axes(k, positions, p)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        x = x + self.wo(mixed.transpose(1, 2).flatten(-2))
        return x + self.w2(F.silu(self.w1(self.n2(x))))


class PublishedStack(nn.Module):
    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PublishedBlock(c) for _ in range(c.depth))

    def forward(self, x: Tensor, positions: Tensor, pad_mask: Tensor, p: float) -> Tensor:
        n = x.shape[1]
        mask = torch.zeros(x.shape[0], 1, n, n, device=x.device)
        mask = mask.masked_fill(pad_mask[:, None, None, :], float("-inf"))
        for layer in self.layers:
            x = layer(x, positions, mask, p)
        return x


class PublishedPretraining(nn.Module):
    """Takes equally many hidden tokens per row, padding among them, as published."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c = ours.config
        self.c = c
        self.projection, self.cls = ours.projection, ours.cls
        self.encoder = PublishedStack(c.encoder_config)
        self.down = ours.encoder_decoder_proj
        self.mask_token = ours.mask_token
        self.decoder = PublishedStack(c.decoder_config)
        self.head = ours.head

    def forward(self, tokens: Tensor, positions: Tensor, pad_mask: Tensor, mask: Tensor) -> Tensor:
        b, _, width = tokens.shape
        p = self.c.p_rope_val
        by_token = positions.transpose(1, 2)
        targets = tokens[mask].reshape(b, -1, width)
        hidden_pad = pad_mask[mask].reshape(b, -1)
        x = self.projection(tokens[~mask].reshape(b, -1, width))
        cls_pad = torch.zeros(b, 1, dtype=torch.bool, device=x.device)
        seen_pad = torch.cat((cls_pad, pad_mask[~mask].reshape(b, -1)), 1)
        zero = by_token.new_zeros(b, 1, by_token.shape[2])
        seen_at = torch.cat((zero, by_token[~mask].reshape(b, -1, by_token.shape[2])), 1)
        x = torch.cat((self.cls.expand(b, 1, -1), x), 1)
        x = self.down(self.encoder(x, seen_at.transpose(1, 2), seen_pad, p))
        m = targets.shape[1]
        x = torch.cat((x, self.mask_token.expand(b, m, -1)), 1)
        at = torch.cat((seen_at, by_token[mask].reshape(b, m, -1)), 1)
        pad = torch.cat((seen_pad, hidden_pad), 1)
        logits = self.head(self.decoder(x, at.transpose(1, 2), pad, p)[:, -m:])
        error = ((logits - targets) ** 2).masked_fill(hidden_pad[..., None], 0.0)
        return error.mean()


class PublishedClassifier(nn.Module):
    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.c = ours.config
        self.projection, self.cls, self.head = ours.projection, ours.cls, ours.head
        self.encoder = PublishedStack(self.c.encoder_config)

    def forward(self, tokens: Tensor, positions: Tensor, pad_mask: Tensor) -> Tensor:
        b = len(tokens)
        x = torch.cat((self.cls.expand(b, 1, -1), self.projection(tokens)), 1)
        pad = torch.cat((torch.zeros(b, 1, dtype=torch.bool, device=x.device), pad_mask), 1)
        at = torch.cat((positions.new_zeros(b, positions.shape[1], 1), positions), 2)
        return self.head(self.encoder(x, at, pad, self.c.p_rope_val)[:, 0])


def copy_blocks(ours: nn.Module, published: PublishedStack, n_axes: int) -> None:
    """Our fused, reordered weights into the published layout."""
    for mine, theirs in zip(ours.layers, published.layers, strict=True):
        c = theirs.c
        order, start = [], 0
        for pairs in pairs_per_axis(c.head_width, n_axes):
            order += [start + 2 * k + half for half in (0, 1) for k in range(pairs)]
            start += 2 * pairs
        order += range(start, c.head_width)
        with torch.no_grad():
            for i, name in enumerate(("wq", "wk", "wv")):
                part = mine.attention.qkv.weight.chunk(3)[i].unflatten(0, (c.nhead, c.head_width))
                part = part[:, order] if i < 2 else part
                getattr(theirs, name).weight.copy_(part.flatten(0, 1))
            theirs.wo.weight.copy_(mine.attention.out.weight)
            for ours_name, theirs_name in (
                ("attention_norm", "n1"),
                ("ffn_norm", "n2"),
                ("w1", "w1"),
                ("w2", "w2"),
            ):
                getattr(theirs, theirs_name).weight.copy_(getattr(mine, ours_name).weight)
