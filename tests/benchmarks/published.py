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
from roma_core.model.positions import BASE, pairs_per_axis


class PublishedRotation(nn.Module):
    """Cosine and sine of every axis, built anew in each forward and shared by the layers of a stack.

    As published, the timescales are parameters, so that gradients flow through every angle.
    """

    def __init__(self, head_width: int, n_axes: int, p: float) -> None:
        super().__init__()
        self.timescales = nn.ParameterList()
        for pairs in pairs_per_axis(head_width, n_axes):
            k = torch.arange(pairs)
            timescale = torch.where(k < int(p * 2 * pairs) // 2, BASE ** (k / pairs), torch.inf)
            self.timescales.append(nn.Parameter(timescale))

    def forward(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``(B, D, S)`` → per axis cosine and sine ``(B, 1, S, pairs)``."""
        angles = [
            positions[:, axis, None, :, None].float() / timescale
            for axis, timescale in enumerate(self.timescales)
        ]
        return [(a.cos(), a.sin()) for a in angles]


def rotate_axes(x: Tensor, tables: list[tuple[Tensor, Tensor]]) -> Tensor:
    """``(B, h, S, w)`` rotated axis by axis."""
    chunks, start = [], 0
    for cos, sin in tables:
        width = 2 * cos.shape[-1]
        first, second = x[..., start : start + width].chunk(2, dim=-1)
        start += width
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        chunks.append(turned.to(x.dtype))
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

    def forward(self, x: Tensor, tables: list[tuple[Tensor, Tensor]], mask: Tensor) -> Tensor:
        h = self.n1(x)
        q, k, v = (
            w(h).unflatten(-1, (self.c.nhead, -1)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        q, k = rotate_axes(q, tables), rotate_axes(k, tables)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        x = x + self.wo(mixed.transpose(1, 2).flatten(-2))
        return x + self.w2(F.silu(self.w1(self.n2(x))))


class PublishedStack(nn.Module):
    def __init__(self, c: EncoderConfig, n_axes: int, p: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PublishedBlock(c) for _ in range(c.depth))
        self.rotation = PublishedRotation(c.head_width, n_axes, p)

    def forward(self, x: Tensor, positions: Tensor, pad_mask: Tensor | None) -> Tensor:
        n = x.shape[1]
        if pad_mask is None:
            mask = torch.zeros(1, n, n, device=x.device)
        else:
            mask = torch.zeros(x.shape[0], 1, n, n, device=x.device)
            mask = mask.masked_fill(pad_mask[:, None, None, :], float("-inf"))
        tables = self.rotation(positions)
        for layer in self.layers:
            x = layer(x, tables, mask)
        return x


class PublishedPretraining(nn.Module):
    """Takes equally many hidden tokens per row, padding among them, as published."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c = ours.config
        self.c = c
        self.projection, self.cls = ours.projection, ours.cls
        self.encoder = PublishedStack(c.encoder_config, c.n_pos_dims, c.p_rope_val)
        self.down = ours.encoder_decoder_proj
        self.mask_token = ours.mask_token
        self.decoder = PublishedStack(c.decoder_config, c.n_pos_dims, c.p_rope_val)
        self.head = ours.head

    def forward(
        self, tokens: Tensor, positions: Tensor, pad_mask: Tensor | None, mask: Tensor
    ) -> Tensor:
        """``(B, N, P)``, ``(B, D, N)``, ``(B, N)`` twice → the loss."""
        b = len(tokens)
        by_token = positions.transpose(1, 2)

        def of(x: Tensor, where: Tensor) -> Tensor:
            return x[where].reshape(b, -1, *x.shape[2:])

        x = torch.cat((self.cls.expand(b, 1, -1), self.projection(of(tokens, ~mask))), 1)
        zero = by_token.new_zeros(b, 1, by_token.shape[2])
        at = torch.cat((zero, of(by_token, ~mask)), 1)
        targets = of(tokens, mask)
        pad = full_pad = None
        if pad_mask is not None:
            no_pad = torch.zeros(b, 1, dtype=torch.bool, device=x.device)
            hidden_pad = of(pad_mask, mask)
            pad = torch.cat((no_pad, of(pad_mask, ~mask)), 1)
            full_pad = torch.cat((pad, hidden_pad), 1)
        x = self.down(self.encoder(x, at.transpose(1, 2), pad))
        m = targets.shape[1]
        x = torch.cat((x, self.mask_token.expand(b, m, -1)), 1)
        at = torch.cat((at, of(by_token, mask)), 1)
        logits = self.head(self.decoder(x, at.transpose(1, 2), full_pad)[:, -m:])
        error = (logits - targets) ** 2
        if pad_mask is not None:
            error = error.masked_fill(hidden_pad[..., None], 0.0)
        return error.mean()


class PublishedClassifier(nn.Module):
    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.c = ours.config
        self.projection, self.cls, self.head = ours.projection, ours.cls, ours.head
        self.encoder = PublishedStack(self.c.encoder_config, self.c.n_pos_dims, self.c.p_rope_val)

    def forward(self, tokens: Tensor, positions: Tensor, pad_mask: Tensor | None) -> Tensor:
        """``(B, N, P)``, ``(B, D, N)``, ``(B, N)`` → ``(B, dim_output)``."""
        b = len(tokens)
        x = torch.cat((self.cls.expand(b, 1, -1), self.projection(tokens)), 1)
        pad = None
        if pad_mask is not None:
            pad = torch.cat((torch.zeros(b, 1, dtype=torch.bool, device=x.device), pad_mask), 1)
        at = torch.cat((positions.new_zeros(b, positions.shape[1], 1), positions), 2)
        return self.head(self.encoder(x, at, pad)[:, 0])


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
