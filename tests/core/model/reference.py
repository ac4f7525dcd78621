"""The published model written plainly from its description: padded tensors, no packing, no fusion.

Works on weights in the published layout, so that it shares nothing with the code under test. Hidden
tokens stay in their places and are merely never attended to, which gives visible tokens what they
would get if the hidden ones were taken out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def random_weights(document, generator):
    """A published checkpoint's tensors for this configuration, none of them neutral."""
    enc, dec = document["encoder_config"], document.get("decoder_config")
    p = math.prod(document["tubelet_size"]) * document["n_channels"]
    shapes = {"projection.weight": (enc["d_model"], p), "projection.bias": (enc["d_model"],)}
    if document["use_cls"]:
        shapes["cls"] = (enc["d_model"],)
    for name, stack in (("encoder", enc), ("decoder", dec)):
        if stack is None:
            continue
        d, width = stack["d_model"], stack["nhead"] * (stack["d_model"] // stack["nhead"])
        f = stack.get("dim_feedforward") or round(stack.get("mlp_ratio", 4.0) * d)
        for i in range(stack["depth"]):
            at = f"{name}.layers.{i}."
            shapes |= {f"{at}attention_norm.weight": (d,), f"{at}ffn_norm.weight": (d,)}
            shapes |= {f"{at}attention.w{c}.weight": (width, d) for c in "qkv"}
            shapes[f"{at}attention.wo.weight"] = (d, width)
            shapes[f"{at}feed_forward.w1.weight"] = (f, d)
            shapes[f"{at}feed_forward.w2.weight"] = (d, f)
    outputs, last = (p, dec["d_model"]) if dec else (document["dim_output"], enc["d_model"])
    if dec:
        shapes["encoder_decoder_proj.weight"] = (dec["d_model"], enc["d_model"])
        shapes["encoder_decoder_proj.bias"] = (dec["d_model"],)
        shapes["mask_token"] = (1, 1, dec["d_model"])
    shapes |= {"head.head.1.weight": (last,), "head.head.2.weight": (outputs, last)}
    shapes["head.head.2.bias"] = (outputs,)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = 0.8 + 0.3 * noise if len(shape) == 1 else 1.5 / shape[-1] ** 0.5 * noise
    weights["zeros"] = torch.zeros(1)
    return weights


def tubelets(values, size):
    """``(B, T, C, H, W)`` → ``(B, N, P)``, one number at a time."""
    b, t, c, h, w = values.shape
    p1, p2, p3 = size
    out = values.new_zeros(b, (t // p1) * (h // p2) * (w // p3), p1 * p2 * p3 * c)
    for n_t in range(t // p1):
        for y in range(h // p2):
            for x in range(w // p3):
                n = (n_t * (h // p2) + y) * (w // p3) + x
                for i in range(p1):
                    for j in range(p2):
                        for k in range(p3):
                            e = ((i * p2 + j) * p3 + k) * c
                            out[:, n, e : e + c] = values[
                                :, n_t * p1 + i, :, y * p2 + j, x * p3 + k
                            ]
    return out


def norm(x, gain, eps=1e-12):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def rotated(x, positions, p):
    """``(B, S, h, w)`` by ``(B, D, S)``: axis by axis, first halves against second halves."""
    n_axes = positions.shape[1]
    a = x.shape[-1] // n_axes
    chunks = []
    for axis in range(n_axes):
        first, second = x[..., axis * a : (axis + 1) * a].chunk(2, dim=-1)
        k = torch.arange(a // 2)
        timescale = (10000.0 ** (2 * k.double() / a)).float()
        timescale[int((p * a) // 2) :] = torch.inf
        angle = positions[:, axis, :, None, None].float() / timescale
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        chunks += [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(chunks, -1)


def sine_rows(n, width, dtype):
    index = torch.arange(n, dtype=torch.float64)[:, None]
    rate = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return (
        torch.stack(((index * rate).sin(), (index * rate).cos()), -1).flatten(1).float().to(dtype)
    )


def stack(weights, name, config, document, x, positions, keys):
    """A stack over ``(B, S, d)``; ``keys`` ``(B, S)`` bool are those that may be attended to."""
    nhead = config["nhead"]
    for i in range(config["depth"]):
        w = {
            k.removeprefix(f"{name}.layers.{i}."): v
            for k, v in weights.items()
            if f"{name}.layers.{i}." in k
        }
        h = norm(x, w["attention_norm.weight"])
        q, k, v = (
            F.linear(h, w[f"attention.w{c}.weight"]).unflatten(-1, (nhead, -1)) for c in "qkv"
        )
        if document["pos_encoding"] == "ropend":
            q, k = (
                rotated(q, positions, document["p_rope_val"]),
                rotated(k, positions, document["p_rope_val"]),
            )
        scores = torch.einsum("bqhw,bkhw->bhqk", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~keys[:, None, None, :], -torch.inf)
        mixed = torch.einsum("bhqk,bkhw->bqhw", scores.softmax(-1), v).flatten(-2)
        x = x + F.linear(mixed, w["attention.wo.weight"])
        inner = F.silu(F.linear(norm(x, w["ffn_norm.weight"]), w["feed_forward.w1.weight"]))
        x = x + F.linear(inner, w["feed_forward.w2.weight"])
    return x


def head(weights, x):
    x = norm(x, weights["head.head.1.weight"])
    return F.linear(x, weights["head.head.2.weight"], weights["head.head.2.bias"])


def _encoded(weights, document, values, positions, valid, visible):
    """Encoder output, positions and real rows, CLS in front if there is one."""
    tokens = tubelets(values, document["tubelet_size"])
    tokens = tokens.masked_fill(~valid[..., None], 0.0)
    x = F.linear(tokens, weights["projection.weight"], weights["projection.bias"])
    b, _, d = x.shape
    if document["use_cls"]:
        x = torch.cat((weights["cls"].expand(b, 1, d), x), 1)
        positions = torch.cat((positions.new_zeros(b, positions.shape[1], 1), positions), 2)
        one = torch.ones(b, 1, dtype=torch.bool)
        valid, visible = torch.cat((one, valid), 1), torch.cat((one, visible), 1)
    if document["pos_encoding"] == "absolute":
        x = x + sine_rows(x.shape[1], d, x.dtype)
    config = document["encoder_config"]
    return (
        tokens,
        stack(weights, "encoder", config, document, x, positions, visible),
        positions,
        valid,
    )


def pretraining(weights, document, values, positions, pad_mask, mask):
    """Predictions ``(H, P)`` of hidden real tokens, row by row, and the mean loss over them."""
    valid = ~pad_mask
    hidden = mask & valid
    tokens, x, at, real = _encoded(weights, document, values, positions, valid, valid & ~hidden)
    x = F.linear(x, weights["encoder_decoder_proj.weight"], weights["encoder_decoder_proj.bias"])
    masks = weights["mask_token"].flatten().expand(*hidden.shape, -1)
    if document["pos_encoding"] == "absolute":
        masks = masks + sine_rows(hidden.shape[1], x.shape[-1], x.dtype)
    n_cls = int(document["use_cls"])
    x = torch.cat((x[:, :n_cls], torch.where(hidden[..., None], masks, x[:, n_cls:])), 1)
    x = stack(weights, "decoder", document["decoder_config"], document, x, at, real)
    logits = head(weights, x[:, n_cls:])[hidden]
    targets = tokens[hidden]
    if document.get("normalize_targets"):
        targets = (targets - targets.mean(-1, keepdim=True)) / (
            targets.var(-1, keepdim=True) + 1e-6
        ).sqrt()
    return logits, ((logits - targets) ** 2).mean()


def classification(weights, document, values, positions, pad_mask, label):
    """Logits ``(B, dim_output)`` and the mean cross-entropy."""
    valid = ~pad_mask
    _, x, _, _ = _encoded(weights, document, values, positions, valid, valid)
    if document["use_cls"]:
        pooled = x[:, 0]
    else:
        pooled = (x * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
    logits = head(weights, pooled)
    return logits, F.cross_entropy(logits, label)
