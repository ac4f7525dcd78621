"""Weights on disk: ``model.safetensors`` + ``model_config.json``, ours and the published package's.

Every tensor is carried, reset or ignored, and the log says which. A missing key is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from roma_core.files import write_bytes, write_json
from roma_core.model.config import CONFIG, WEIGHTS, EncoderConfig, check_files, read_config

log = logging.getLogger(__name__)


def write_weights(folder: Path | str, model: nn.Module, document: dict[str, Any]) -> None:
    """Write the model's weights and its configuration into ``folder``, each file in one step."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # copies, each with memory of its own, which is what the format takes
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    write_bytes(folder / WEIGHTS, save(_without_wrappers(tensors)))
    write_json(folder / CONFIG, document)


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that is saved, by name: parameters, and buffers such as running statistics."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


def read_weights(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of ``model_config.json``, and the tensors by our names.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or of another version.
    """
    folder = Path(folder)
    check_files(folder, CONFIG, WEIGHTS)
    document = read_config(folder)
    weights = _without_wrappers(load_file(folder / WEIGHTS))
    if any(".attention.wq." in key for key in weights):
        weights = convert_published(weights, document)
    return document, weights


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], folder: Path | str, new_head: bool = False
) -> None:
    """Load ``weights``, read from ``folder``, into the model.

    Args:
        new_head: keep the model's own head, and ignore tensors that the model does not have.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    wanted = model.state_dict()
    kept = {key for key in wanted if new_head and key.startswith("head.")}
    carried = [key for key in weights if key in wanted and key not in kept]
    ignored = [key for key in weights if key not in carried]
    for key in carried:
        if weights[key].shape != wanted[key].shape:
            raise ValueError(
                f"{folder}: {key} has shape {tuple(weights[key].shape)}, the configuration beside it asks for "
                f"{tuple(wanted[key].shape)}; they are of two models or two versions; train again"
            )
    if lost := sorted(wanted.keys() - kept - weights.keys()):
        raise ValueError(
            f"{folder}: {WEIGHTS} lacks {', '.join(lost)}; it is incomplete or of another model"
        )
    if ignored and not new_head:
        raise ValueError(f"{folder}: {WEIGHTS} has tensors the model lacks: {', '.join(ignored)}")
    model.load_state_dict({key: weights[key] for key in carried}, strict=False)
    log.info(
        f"{folder}: carried {len(carried)} tensors ({_parts(carried)}); new {len(kept)} ({_parts(kept)}); "
        f"not used {len(ignored)} ({_parts(ignored)})"
    )


def _parts(keys: Iterable[str]) -> str:
    return ", ".join(sorted({key.split(".")[0] for key in keys})) or "nothing"


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("module.").replace("_orig_mod.", ""): v for k, v in tensors.items()}


def convert_published(weights: dict[str, Tensor], document: dict[str, Any]) -> dict[str, Tensor]:
    """Rename published tensors, fuse q, k and v, and reorder the channels of rotated heads."""
    ours: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        fused = ".attention.wk." in key or ".attention.wv." in key
        if fused or key == "zeros" or "pos_embedding." in key:
            continue  # constants are recomputed; wk and wv are fused below
        if ".attention.wq." in key:
            stack = EncoderConfig(**document[key.split(".")[0] + "_config"])
            parts = [weights[key.replace(".wq.", f".{name}.")] for name in ("wq", "wk", "wv")]
            if document["pos_encoding"] == "ropend":
                channels = _published_channels(stack.head_width, document["n_pos_dims"])
                for i in (0, 1):
                    heads = parts[i].unflatten(0, (stack.nhead, stack.head_width))
                    parts[i] = heads[:, channels].flatten(0, 1)
            ours[key.replace(".wq.", ".qkv.")] = torch.cat(parts)
            continue
        key = key.replace(".attention.wo.", ".attention.out.").replace(".feed_forward.", ".")
        key = key.replace("head.head.1.", "head.norm.").replace("head.head.2.", "head.linear.")
        ours[key] = tensor.flatten() if key == "mask_token" else tensor
    return ours


def _published_channels(head_width: int, n_axes: int) -> list[int]:
    """For each channel of our head layout, its index in the published one."""
    chunk = head_width // n_axes
    if head_width % n_axes or chunk % 2:
        raise ValueError(
            f"published weights split a head of width {head_width} into {n_axes} even chunks, which is impossible"
        )
    firsts = [axis * chunk + k for axis in range(n_axes) for k in range(chunk // 2)]
    return [channel for first in firsts for channel in (first, first + chunk // 2)]
