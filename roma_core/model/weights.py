"""Weights on disk: ``model.safetensors`` + ``model_config.json``, ours and the published package's.

Nothing is loaded silently: every tensor of the file is carried, reset or ignored, and the report
says which. A key that should be there and is not is an error.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from roma_core.files import read_json, write_bytes, write_json
from roma_core.model.backbone import Backbone
from roma_core.model.config import (
    EncoderConfig,
    RoMAForClassificationConfig,
    RoMAForPreTrainingConfig,
    classifier_config,
    is_pretraining,
    settings_of,
)
from roma_core.model.positions import published_channels
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining

WEIGHTS = "model.safetensors"
CONFIG = "model_config.json"
SCHEMA_VERSION = 1

M = TypeVar("M", RoMAForPreTraining, RoMAForClassification)


@dataclass
class TransferReport:
    """What became of every tensor."""

    folder: Path
    carried: list[str] = field(default_factory=list)
    reset: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def names(keys: list[str]) -> str:
            return ", ".join(sorted({k.split(".")[0] for k in keys})) or "nothing"

        return (
            f"{self.folder}: carried {len(self.carried)} tensors ({names(self.carried)}); "
            f"new {len(self.reset)} ({names(self.reset)}); not used {len(self.ignored)} ({names(self.ignored)})"
        )


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The learned tensors by name, on CPU, without wrapper prefixes, each with memory of its own."""
    return {
        name.removeprefix("module.").replace("_orig_mod.", ""): tensor.detach()
        .cpu()
        .contiguous()
        .clone()
        for name, tensor in model.state_dict().items()
    }


def config_document(model: Backbone) -> dict[str, Any]:
    """What ``model_config.json`` holds."""
    return {
        "schema_version": SCHEMA_VERSION,
        "class": type(model).__name__,
        "data_schema": model.data_schema,
        **model.config.model_dump(mode="json"),
    }


def save_pretrained(model: Backbone, folder: Path | str) -> None:
    """Write weights and configuration into ``folder``, each file in one step."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / WEIGHTS, save(state_of(model)))
    write_json(folder / CONFIG, config_document(model))


def _read(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; expected a folder with {WEIGHTS} and {CONFIG}, such as checkpoints/step-…"
            )
    document = read_json(folder / CONFIG)
    version = document.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{folder / CONFIG} has schema_version {version}, this software reads {SCHEMA_VERSION}"
        )
    weights = load_file(folder / WEIGHTS)
    weights = {k.removeprefix("module.").replace("_orig_mod.", ""): v for k, v in weights.items()}
    if any(".attention.wq." in key for key in weights):
        weights = _from_published(weights, document)
    return document, weights


def _from_published(weights: dict[str, Tensor], document: dict[str, Any]) -> dict[str, Tensor]:
    """Rename published tensors, fuse q, k and v, and reorder the channels of rotated heads."""
    ours: dict[str, Tensor] = {}
    rotary = document["pos_encoding"] == "ropend"
    for key, tensor in weights.items():
        if (
            key == "zeros"
            or "pos_embedding." in key
            or ".attention.wk." in key
            or ".attention.wv." in key
        ):
            continue  # constants, recomputed; wk and wv are fused below
        if ".attention.wq." in key:
            stack = EncoderConfig(**document[key.split(".")[0] + "_config"])
            parts = [weights[key.replace(".wq.", f".{name}.")] for name in ("wq", "wk", "wv")]
            if rotary:
                channels = published_channels(stack.head_width, document["n_pos_dims"])
                for i in (0, 1):
                    heads = parts[i].unflatten(0, (stack.nhead, stack.head_width))
                    parts[i] = heads[:, channels].flatten(0, 1)
            ours[key.replace(".wq.", ".qkv.")] = torch.cat(parts)
            continue
        key = key.replace(".attention.wo.", ".attention.out.").replace(".feed_forward.", ".")
        key = key.replace("head.head.1.", "head.norm.").replace("head.head.2.", "head.linear.")
        ours[key] = tensor.flatten() if key == "mask_token" else tensor
    return ours


def _load(model: M, weights: dict[str, Tensor], report: TransferReport, may_reset: str = "") -> M:
    wanted = model.state_dict()
    for key, tensor in weights.items():
        if key not in wanted or (may_reset and key.startswith(may_reset)):
            report.ignored.append(key)
        elif tensor.shape != wanted[key].shape:
            raise ValueError(
                f"{report.folder}: {key} has shape {tuple(tensor.shape)}, the configuration beside it asks for "
                f"{tuple(wanted[key].shape)}; the two files do not belong together"
            )
        else:
            report.carried.append(key)
    missing = set(wanted) - set(report.carried)
    report.reset = sorted(key for key in missing if may_reset and key.startswith(may_reset))
    if lost := sorted(missing - set(report.reset)):
        raise ValueError(
            f"{report.folder}: {WEIGHTS} lacks {', '.join(lost)}; it is incomplete or of another model"
        )
    model.load_state_dict({k: weights[k] for k in report.carried}, strict=False)
    print(report, file=sys.stderr)
    return model


def load_pretraining(folder: Path | str, **overrides: Any) -> RoMAForPreTraining:
    """Restore a pretraining model whole. See :meth:`RoMAForPreTraining.from_pretrained`."""
    document, weights = _read(folder)
    if not is_pretraining(document):
        raise ValueError(
            f"{folder} holds a classifier, which has no decoder; a pretraining model was asked for"
        )
    config = RoMAForPreTrainingConfig.from_values(settings_of(document) | overrides)
    model = RoMAForPreTraining(config)
    model.data_schema = document.get("data_schema")
    report = TransferReport(Path(folder))
    _load(model, weights, report)
    if report.ignored:
        raise ValueError(
            f"{folder}: {WEIGHTS} has tensors no part takes: {', '.join(report.ignored)}"
        )
    return model


def load_classifier(folder: Path | str, **overrides: Any) -> RoMAForClassification:
    """Restore a classifier whole, or start one from a pretraining model's encoder.

    See :meth:`RoMAForClassification.from_pretrained`.
    """
    document, weights = _read(folder)
    config = classifier_config(document, overrides, Path(folder))
    return _classifier(config, document, weights, Path(folder))


def start_classifier(
    folder: Path | str, config: RoMAForClassificationConfig
) -> RoMAForClassification:
    """A classifier of exactly this configuration with the weights of ``folder``."""
    document, weights = _read(folder)
    return _classifier(config, document, weights, Path(folder))


def _classifier(
    config: RoMAForClassificationConfig,
    document: dict[str, Any],
    weights: dict[str, Tensor],
    folder: Path,
) -> RoMAForClassification:
    model = RoMAForClassification(config)
    model.data_schema = document.get("data_schema")
    report = TransferReport(folder)
    transfers = is_pretraining(document)
    _load(model, weights, report, may_reset="head." if transfers else "")
    if report.ignored and not transfers:
        raise ValueError(
            f"{folder}: {WEIGHTS} has tensors no part takes: {', '.join(report.ignored)}"
        )
    return model
