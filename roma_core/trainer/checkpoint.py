"""Resumable checkpoints, each written completely or not at all.

    checkpoints/step-00000500/
        model.safetensors, model_config.json     loadable by ``from_pretrained``
        optimizer.safetensors                    by parameter name
        ema.safetensors                          if weights are averaged
        state.json                               step, seed, sizes
        MANIFEST.json                            sha256 of every other file

A checkpoint is written to a temporary folder, synced, and renamed; only then are old ones pruned: the
newest stay, and the best besides. Loading takes the newest whose files match its manifest; one that
does not is skipped with a warning.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from roma_core.files import read_json, sha256_of, sync_folder, write_json
from roma_core.job import committed
from roma_core.settings import Frozen
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.distributed import SINGLE_PROCESS, HostGroup
from roma_core.trainer.trackers import RunLogger

Tensors = dict[str, dict[str, Tensor]]
"""``model``, ``optimizer`` and, if weights are averaged, ``ema``: full CPU tensors by name."""

MANIFEST = "MANIFEST.json"
log = logging.getLogger(__name__)


class TrainState(Frozen):
    """Position and counters of a run; everything besides its tensors that resuming needs."""

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
    settings: dict[str, Any] = Field(default_factory=dict)  # of the trainer, every field
    scaler: dict[str, float] | None = None  # loss scale of fp16
    window_steps: int = 0  # steps that no record of the training loss covers yet
    window_loss: float = 0.0  # and the sum of their losses
    evaluation: dict[str, float] = Field(default_factory=dict)  # at this very step
    evaluation_due: bool = False  # a stop request came before it ended
    best: float | None = None  # of best_metric so far
    evaluations_since_best: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read."""

    path: Path
    state: TrainState
    tensors: Tensors


def read_state(path: Path) -> TrainState:
    """The state of a checkpoint, without its tensors."""
    return TrainState.model_validate(read_json(path / "state.json", schema_version=1))


def kept(steps: dict[int, float | None], config: TrainerConfig) -> set[int]:
    """The steps to keep, given ``best_metric`` at every checkpoint or None; of equal ones the older."""
    if config.max_checkpoints is None:
        return set(steps)
    sign = 1 if config.best_metric_mode == "min" else -1
    finite = {s: sign * v for s, v in steps.items() if v is not None and math.isfinite(v)}
    best = sorted(finite, key=lambda step: (finite[step], step))[: config.keep_best]
    return {*sorted(steps)[-config.max_checkpoints :], *best}


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


def load_newest(folder: Path, group: HostGroup = SINGLE_PROCESS) -> Checkpoint | None:
    """The newest undamaged checkpoint, which rank 0 chooses, or None without any.

    Raises ValueError if there are checkpoints and every one is damaged.
    """

    def newest() -> Path | None:
        paths = committed(folder)
        for path in reversed(paths):
            if not (damage := damage_of(path)):
                return path
            log.warning("checkpoint %s is damaged (%s); trying the one before", path, damage)
        if paths:
            raise ValueError(
                f"all {len(paths)} checkpoints in {folder} are damaged; remove the folder to start again"
            )
        return None

    path = group.call(newest, group.is_main)[0]
    return None if path is None else _load(path)


def load_best(config: TrainerConfig, group: HostGroup = SINGLE_PROCESS) -> Checkpoint | None:
    """The undamaged checkpoint with the best ``best_metric``, or None if none was evaluated."""

    def best() -> Path | None:
        sound = [path for path in committed(config.checkpoint_dir) if not damage_of(path)]
        scores = {path: read_state(path).evaluation.get(config.best_metric) for path in sound}
        scored = {path: score for path, score in scores.items() if score is not None}
        choose = min if config.best_metric_mode == "min" else max
        return choose(scored, key=scored.__getitem__, default=None)  # of equal ones the oldest

    path = group.call(best, group.is_main)[0]
    return None if path is None else _load(path)


def _load(path: Path) -> Checkpoint:
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return Checkpoint(path, read_state(path), tensors)


class Checkpointer:
    """Writes the checkpoints of one run, one at a time and in order. Use it as a context manager.

    The error of a write in the background is raised by the next call.
    """

    def __init__(self, config: TrainerConfig, logger: RunLogger, group: HostGroup) -> None:
        self.config, self.logger, self.group = config, logger, group
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(wait=True)  # after an error, the write in progress still ends

    def save(self, state: TrainState, tensors: Tensors, model_config: dict[str, Any]) -> None:
        """Begin to write a checkpoint on rank 0; trackers then get the metrics up to now.

        The tensors must be copies: they are read while training continues. Raises OSError if the
        checkpoint before could not be written: no space, or no permission.
        """
        if not self.group.is_main:
            return
        self._finish()
        offset = self.logger.metrics_log.offset
        state = state.model_copy(update={"metrics_offset": offset})

        def write() -> None:
            self.logger.metrics_log.sync()
            self._commit(state, tensors, model_config)
            self.logger.trackers.committed(offset)

        self._pending = self._thread.submit(write)
        if not self.config.background_checkpoints:
            self._finish()

    def check(self) -> None:
        """Raise the error of a write that has ended, without waiting for one in progress."""
        if self._pending is not None and self._pending.done():
            self._finish()

    def wait(self) -> None:
        """Every process waits until the last checkpoint is committed."""
        self._finish()
        self.group.gather(None)

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _commit(self, state: TrainState, tensors: Tensors, model_config: dict[str, Any]) -> None:
        """Write a checkpoint completely or not at all, then remove those that are not kept."""
        folder = self.config.checkpoint_dir
        final = folder / f"step-{state.step:08d}"
        if final.exists() and not damage_of(final):
            found = read_state(final)
            if found.evaluation == state.evaluation and not found.evaluation_due:
                return  # the same step again, after a resume
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover)
        temporary = folder / f".{final.name}"
        temporary.mkdir()
        try:
            for kind, named in tensors.items():
                save_file(named, temporary / f"{kind}.safetensors")
            write_json(temporary / "model_config.json", model_config)
            write_json(temporary / "state.json", state.model_dump(mode="json"))
            hashes = {}
            for path in sorted(temporary.iterdir()):
                path.chmod(0o644)  # others on shared storage read checkpoints too
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                hashes[path.name] = sha256_of(path)
            write_json(temporary / MANIFEST, {"schema_version": 1, "sha256": hashes})
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not isinstance(error, OSError | SafetensorError):
                raise
            raise OSError(
                f"checkpoint {final} could not be written ({error}); earlier ones are untouched. Free space "
                f"there and start the same run again: it resumes from the newest"
            ) from error
        if final.exists():  # damaged, or saved before its evaluation: the one before is as good
            shutil.rmtree(final)
        temporary.replace(final)
        sync_folder(folder)
        paths = {int(path.name[5:]): path for path in committed(folder)}
        scores: dict[int, float | None] = dict.fromkeys(paths)
        for step, path in paths.items():
            with suppress(OSError, ValueError):  # a damaged one is removed when it is old
                scores[step] = read_state(path).evaluation.get(self.config.best_metric)
        for step in set(paths) - kept(scores, self.config):
            shutil.rmtree(paths[step])
