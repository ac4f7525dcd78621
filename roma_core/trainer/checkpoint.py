"""Resumable checkpoints: whole or not there.

    checkpoints/step-00000500/
        model.safetensors, model_config.json     loadable by ``from_pretrained``
        optimizer.safetensors                    by parameter name
        ema.safetensors                          if averaging is on
        state.json                               position, seed, sizes
        MANIFEST.json                            sha256 of every other file

A checkpoint is written aside, synced, and renamed; only then are old ones pruned. On loading, the
newest whose files match its manifest is taken, and one that does not is named and passed over.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor

from roma_core.files import read_json, sha256_of, sync_folder, write_json

MANIFEST = "MANIFEST.json"
log = logging.getLogger(__name__)


class TrainState(BaseModel):
    """Where a run is; with the weights and the optimiser's state, all there is to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    step: int  # finished optimiser steps
    n_samples: int
    global_batch_size: int
    seed: int
    total_steps: int
    metrics_offset: int  # bytes of metrics.jsonl that belong to the finished steps
    elapsed_s: float  # training time over all attempts
    world_size: int  # of the process group that wrote it; informative
    scaler: dict[str, float] | None = None  # loss scale of fp16


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read."""

    path: Path
    state: TrainState
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first; whatever else lies there is none of ours."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def save_checkpoint(
    folder: Path,
    state: TrainState,
    model: dict[str, Tensor],
    model_config: dict[str, Any],
    optimizer: dict[str, Tensor],
    ema: dict[str, Tensor] | None,
    keep: int | None,
) -> Path:
    """Commit a checkpoint and prune all but the newest ``keep``; called on rank 0 alone.

    Raises:
        OSError: no room or no right to write; earlier checkpoints are untouched.
    """
    final = step_folder(folder, state.step)
    if final.exists() and not damage_of(final):
        return final  # the same step again, after a resume
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    aside = folder / f".{final.name}"
    aside.mkdir()
    try:
        save_file(model, aside / "model.safetensors")
        save_file(optimizer, aside / "optimizer.safetensors")
        if ema is not None:
            save_file(ema, aside / "ema.safetensors")
        write_json(aside / "model_config.json", model_config)
        write_json(aside / "state.json", state.model_dump(mode="json"))
        hashes = {}
        for path in sorted(aside.iterdir()):
            path.chmod(0o644)  # as the JSON files: others on shared storage read checkpoints too
            with path.open("rb") as file:
                os.fsync(file.fileno())
            hashes[path.name] = sha256_of(path)
        write_json(aside / MANIFEST, {"schema_version": 1, "sha256": hashes})
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if final.exists():
        shutil.rmtree(final)  # damaged: it could not be loaded anyway
    aside.replace(final)
    sync_folder(folder)
    if keep is not None:
        for old in committed(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def damage_of(path: Path) -> str:
    """What is wrong with a checkpoint, in words; empty if nothing is."""
    try:
        hashes = read_json(path / MANIFEST, schema_version=1)["sha256"]
        for name, expected in hashes.items():
            if sha256_of(path / name) != expected:
                return f"{name} does not match its sha256"
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return ""


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None if there is none at all.

    Raises:
        ValueError: there are checkpoints and every one is damaged.
    """
    paths = committed(folder)
    for path in reversed(paths):
        if damage := damage_of(path):
            log.warning("checkpoint %s is damaged (%s); trying the one before", path, damage)
            continue
        ema = path / "ema.safetensors"
        return Checkpoint(
            path=path,
            state=TrainState.model_validate(read_json(path / "state.json", schema_version=1)),
            model=load_file(path / "model.safetensors"),
            optimizer=load_file(path / "optimizer.safetensors"),
            ema=load_file(ema) if ema.exists() else None,
        )
    if paths:
        raise ValueError(
            f"all {len(paths)} checkpoints in {folder} are damaged; remove the folder to start again"
        )
    return None
