"""Resumable checkpoints: whole or not there.

    checkpoints/step-00000500/
        model.safetensors, model_config.json     loadable by ``from_pretrained``
        optimizer.safetensors                    by parameter name
        ema.safetensors                          if averaging is on
        state.json                               position, seed, sizes
        MANIFEST.json                            sha256 of every other file

A checkpoint is written aside, synced, and renamed; only then are old ones pruned: the newest stay,
and the best besides. On loading, the newest whose files match its manifest is taken, and one that
does not is named and passed over.

Which evaluation was the best, and when to stop waiting for a better one. Pure functions.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from roma_core.files import read_json, sha256_of, sync_folder, write_json

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class EarlyStopping:
    """How the watched metric went so far.

    Attributes:
        best: its best value; None before the first evaluation.
        evaluations_since: evaluations since then that brought no better one.
    """

    best: float | None = None
    evaluations_since: int = 0

    def after(self, value: float, mode: Mode, min_delta: float = 0.0) -> EarlyStopping:
        """The course with one more evaluation; a value that is not finite never is the best."""
        if is_better(value, self.best, mode, min_delta):
            return EarlyStopping(value, 0)
        return EarlyStopping(self.best, self.evaluations_since + 1)

    def is_exhausted(self, patience: int | None) -> bool:
        """True when ``patience`` evaluations in a row brought nothing better; None never ends."""
        return patience is not None and self.evaluations_since >= patience


def is_better(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """True if ``value`` beats ``best`` by more than ``min_delta``; anything finite beats None."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta


def kept_steps(
    steps: dict[int, float | None], newest: int | None, best: int, mode: Mode
) -> set[int]:
    """The checkpoints to keep.

    Args:
        steps: step of every checkpoint, with the watched metric measured there, or None.
        newest: how many of the newest to keep; None keeps all.
        best: how many of the best to keep besides; of equal ones the older.
        mode: whether a small or a large metric is good.
    """
    if newest is None:
        return set(steps)
    sign = 1 if mode == "min" else -1
    scored = [(sign * v, step) for step, v in steps.items() if v is not None and math.isfinite(v)]
    return set(sorted(steps)[-newest:]) | {step for _, step in sorted(scored)[:best]}


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
    metrics_offset: int = 0  # bytes of metrics.jsonl that belong to the finished steps
    elapsed_s: float  # training time over all attempts
    world_size: int  # of the process group that wrote it; informative
    first_world_size: int | None = None  # of the one that began the run
    settings: dict[str, Any] = {}  # every field of the trainer's configuration
    scaler: dict[str, float] | None = None  # loss scale of fp16
    window_steps: int = 0  # steps that no record of the training loss covers yet
    window_loss: float = 0.0  # and the sum of their losses
    evaluation: dict[str, float] = {}  # measured at this very step; empty without
    evaluation_due: bool = False  # a stop request came before it ended
    best: float | None = None  # of best_metric so far
    evaluations_since_best: int = 0


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds; nothing in it may change while it is written."""

    state: TrainState
    model: dict[str, Tensor]
    model_config: dict[str, Any]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read."""

    path: Path
    state: TrainState
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the ``newest`` (None: all), and the ``best`` by a metric."""

    newest: int | None
    best: int = 0
    metric: str = "eval/loss"
    mode: Mode = "min"

    def prune(self, folder: Path) -> None:
        paths = {int(path.name[5:]): path for path in committed(folder)}
        values = {step: self._value_of(path) for step, path in paths.items()}
        for step in set(paths) - kept_steps(values, self.newest, self.best, self.mode):
            shutil.rmtree(paths[step])

    def _value_of(self, path: Path) -> float | None:
        try:
            return state_of_checkpoint(path).evaluation.get(self.metric)
        except (OSError, ValueError):
            return None  # damaged; it goes when it is old


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first; whatever else lies there is none of ours."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def state_of_checkpoint(path: Path) -> TrainState:
    """The position a checkpoint holds."""
    return TrainState.model_validate(read_json(path / "state.json", schema_version=1))


def save_checkpoint(folder: Path, content: Content, retention: Retention) -> Path:
    """Commit a checkpoint and prune; called on rank 0 alone.

    Raises:
        OSError: no room or no right to write; earlier checkpoints are untouched.
    """
    state = content.state
    final = step_folder(folder, state.step)
    if final.exists() and not damage_of(final):
        found = state_of_checkpoint(final)
        if found.evaluation == state.evaluation and not found.evaluation_due:
            return final  # the same step again, after a resume
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    aside = folder / f".{final.name}"
    aside.mkdir()
    try:
        save_file(content.model, aside / "model.safetensors")
        save_file(content.optimizer, aside / "optimizer.safetensors")
        if content.ema is not None:
            save_file(content.ema, aside / "ema.safetensors")
        write_json(aside / "model_config.json", content.model_config)
        write_json(aside / "state.json", state.model_dump(mode="json"))
        hashes = {}
        for path in sorted(aside.iterdir()):
            path.chmod(0o644)  # as the JSON files: others on shared storage read checkpoints too
            with path.open("rb") as file:
                os.fsync(file.fileno())
            hashes[path.name] = sha256_of(path)
        write_json(aside / MANIFEST, {"schema_version": 1, "sha256": hashes})
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"checkpoint {final} could not be written ({error}); earlier ones are untouched. Make room "
            f"there and start the same run again: it goes on from the newest"
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if final.exists():  # damaged, or saved before its evaluation ended: the one before is as good
        shutil.rmtree(final)
    aside.replace(final)
    sync_folder(folder)
    retention.prune(folder)
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
        return _read(path)
    if paths:
        raise ValueError(
            f"all {len(paths)} checkpoints in {folder} are damaged; remove the folder to start again"
        )
    return None


def load_best(folder: Path, metric: str, mode: Mode) -> Checkpoint | None:
    """The undamaged checkpoint with the best ``metric``, or None if none was evaluated."""
    scored = {
        path: value
        for path in committed(folder)
        if not damage_of(path)
        and (value := state_of_checkpoint(path).evaluation.get(metric)) is not None
    }
    if not scored:
        return None
    choose = min if mode == "min" else max
    return _read(choose(scored, key=scored.__getitem__))  # of equal ones the oldest


def _read(path: Path) -> Checkpoint:
    ema = path / "ema.safetensors"
    return Checkpoint(
        path=path,
        state=state_of_checkpoint(path),
        model=load_file(path / "model.safetensors"),
        optimizer=load_file(path / "optimizer.safetensors"),
        ema=load_file(ema) if ema.exists() else None,
    )
