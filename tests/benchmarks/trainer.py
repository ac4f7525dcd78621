"""What the trainer costs in addition to forward, backward and optimiser, and how long a start takes.

    python -m tests.benchmarks.trainer [--data plasticc/VERSION] [--steps 12] [--starts 3]

With ``--data``, a data set that `roma data build` made of the source in defs/plasticc, the workloads are
pretraining and finetuning of that experiment with its own settings, and its data at width 192, 6 layers,
batches of 32 series. Without, series of PLAsTiCC's lengths (47…352 tokens, 2 channels, 2 axes) are
generated for the last of the three.

Overhead is the share of a training's CPU time, evaluation aside, that is not spent in forward,
backward, clipping or the optimiser: order, loading, collating, moving, reductions, logging, stop
requests. Checkpoints are measured apart: none between the first and the last step, then one every
fourth step, written in the loop and in the background.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[2]
STEPS_BETWEEN_SAVES = 4


class LightCurves:
    """Series like PLAsTiCC's, held in memory."""

    def __init__(self, n: int) -> None:
        rng = np.random.default_rng(0)
        self.items: list[dict[str, Any]] = []
        for _ in range(n):
            length = int(rng.integers(47, 353))
            time_axis = np.sort(rng.uniform(0, 1000, length))
            positions = np.stack([time_axis, rng.integers(0, 6, length)])
            values = rng.normal(size=(length, 2, 1, 1)).astype(np.float32)
            self.items.append({"values": values, "positions": positions.astype(np.float32)})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.items[i]


@dataclass(frozen=True)
class Workload:
    """What is trained: a data set, what makes a model, and the settings of the trainer."""

    name: str
    dataset: Any
    model: Callable[[], Any]
    trainer: dict[str, Any]


def wide(dataset: Any, n_steps: int, name: str, batch: int = 32) -> Workload:
    """Pretraining at width 192 of ``n_steps`` batches of 32 series."""
    from roma_core import EncoderConfig, RoMAForPreTraining, RoMAForPreTrainingConfig

    config = RoMAForPreTrainingConfig(
        encoder_config=EncoderConfig(d_model=192, nhead=3, depth=6),
        decoder_config=EncoderConfig(d_model=192, nhead=3, depth=2),
        tubelet_size=(1, 1, 1),
        n_channels=2,
        n_pos_dims=2,
        mask_ratio=0.5,
    )
    part = _First(dataset, batch * n_steps)
    return Workload(name, part, lambda: RoMAForPreTraining(config), {"batch_size": batch})


def as_shipped(folder: Path, n_steps: int) -> list[Workload]:
    """Pretraining and finetuning as ``defs/plasticc`` has them, of as many series as the steps need."""
    from roma_core import (
        RoMAForClassification,
        RoMAForClassificationConfig,
        RoMAForPreTraining,
        RoMAForPreTrainingConfig,
    )
    from roma_core.data.store import StoredDataset
    from roma_core.trainer.job import data_fields

    dataset = StoredDataset(folder)
    train, schema = dataset.split("train"), dataset.schema
    file = ROOT / "roma_pipelines/defs/plasticc/defs.yaml"
    experiment = yaml.safe_load(file.read_text())["attributes"]
    before, after = experiment["pretraining"], experiment["finetuning"]
    autoencoder = RoMAForPreTrainingConfig(**before["model"] | data_fields(schema))
    stack = before["model"]["encoder_config"] | after["model"]["encoder_config"]
    classifier = RoMAForClassificationConfig(
        **after["model"]
        | data_fields(schema)
        | {"encoder_config": stack, "dim_output": len(schema.classes)}
    )
    mean = float(train.lengths.mean())
    found = []
    for name, stage, model in (
        ("pretraining as shipped", before, lambda: RoMAForPreTraining(autoencoder)),
        ("finetuning as shipped", after, lambda: RoMAForClassification(classifier)),
    ):
        n_series = int(n_steps * stage["trainer"]["tokens_per_batch"] / mean)
        found.append(Workload(name, _First(train, n_series), model, stage["trainer"]))
    return [*found, wide(train, n_steps, "pretraining at width 192")]


class _First:
    """The first ``n`` series of a data set."""

    def __init__(self, dataset: Any, n: int) -> None:
        self.dataset, self.n = dataset, min(n, len(dataset))
        if hasattr(dataset, "lengths"):
            self.lengths = dataset.lengths[: self.n]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.dataset[i]


def training(folder: Path, workload: Workload, in_background: bool | None) -> dict[str, float]:
    """Train; seconds from the first step to the last by wall and by CPU, and of the steps themselves.

    ``in_background`` None writes no checkpoint between them.
    """
    from roma_core import Trainer, TrainerConfig
    from roma_core.trainer.step import TrainStep

    model = workload.model()
    inside = {"cpu": 0.0, "wall": 0.0}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    step = TrainStep.__call__

    def timed(self: TrainStep, number: int, *arguments: Any) -> Any:
        here = {"cpu": time.process_time(), "wall": time.perf_counter()}
        result = step(self, number, *arguments)
        now = {"cpu": time.process_time(), "wall": time.perf_counter()}
        if number == 0:
            first.update(now)  # what comes before and in the first step is start-up
        else:
            for clock in inside:
                inside[clock] += now[clock] - here[clock]
            last.update(now)
        return result

    TrainStep.__call__ = timed  # type: ignore[method-assign]
    try:
        changes = {
            "epochs": 1,
            "save_every": 10**6 if in_background is None else STEPS_BETWEEN_SAVES,
            "background_checkpoints": bool(in_background),
            "checkpoint_dir": folder / "checkpoints",
        }
        end = Trainer(TrainerConfig(**workload.trainer | changes)).train(
            workload.dataset, None, model
        )
    finally:
        TrainStep.__call__ = step  # type: ignore[method-assign]
    total = {clock: last[clock] - first[clock] for clock in inside}
    return (
        {"steps": end.step - 1.0}
        | {f"{clock}_step": inside[clock] for clock in inside}
        | {f"{clock}_total": total[clock] for clock in inside}
    )


START = """
import os, sys
from pathlib import Path
from roma_core.trainer.step import TrainStep
step = TrainStep.__call__
def first(*arguments):
    step(*arguments)
    os._exit(0)
TrainStep.__call__ = first
from tests.benchmarks.trainer import LightCurves, training, wide
training(Path(sys.argv[1]), wide(LightCurves(4), 2, "start", batch=2), True)
"""


def start_up(folder: Path) -> dict[str, float]:
    """CPU seconds of a process that imports torch and accelerate, and of one that does a first step.

    On a quiet computer they are wall seconds: nothing in them waits.
    """
    return {
        "imports": cpu_seconds("import torch, accelerate"),
        "first step": cpu_seconds(START, str(folder)),
    }


def cpu_seconds(*code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", *code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--starts", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.data is None:
        curves = LightCurves(arguments.steps * 32)
        workloads = [wide(curves, arguments.steps, "generated, pretraining at width 192")]
    else:
        workloads = as_shipped(arguments.data, arguments.steps)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        starts = [start_up(root / f"start-{k}") for k in range(arguments.starts)]
        if starts:
            imports, first = (statistics.median(s[k] for s in starts) for k in starts[0])
            print(
                f"start, CPU time: torch and accelerate imported in {imports:.2f} s, first step after "
                f"{first:.2f} s: {first - imports:.2f} s more (goal: at most 2)"
            )
        found: dict[str, dict[bool | None, list[dict[str, float]]]] = {}
        for workload in workloads:
            runs: dict[bool | None, list[dict[str, float]]] = {None: [], False: [], True: []}
            found[workload.name] = runs
            for k, where in enumerate([*runs, *runs]):
                runs[where].append(training(root / f"{workload.name}-{k}", workload, where))
            print(f"{workload.name}:")
            for where, measured in runs.items():
                print(f"  {summary(where, measured)}", flush=True)
        print(json.dumps({"starts": starts, "runs": _with_text_keys(found)}))


def summary(where: bool | None, runs: list[dict[str, float]]) -> str:
    """One line: how long a step takes, and the share of the rest."""
    names = {
        None: "no checkpoint",
        False: f"checkpoints in the loop, every {STEPS_BETWEEN_SAVES} steps",
        True: f"checkpoints in the background, every {STEPS_BETWEEN_SAVES} steps",
    }
    share = {
        clock: statistics.median(1 - r[f"{clock}_step"] / r[f"{clock}_total"] for r in runs)
        for clock in ("cpu", "wall")
    }
    per_step = statistics.median(r["wall_step"] / r["steps"] for r in runs)
    return (
        f"{names[where]}: {per_step * 1000:.0f} ms a step, overhead {share['cpu']:.2%} of CPU time, "
        f"{share['wall']:.2%} of wall time (goal: below 3 %)"
    )


def _with_text_keys(found: dict[str, dict[bool | None, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {str(k): v for k, v in runs.items()} for name, runs in found.items()}


if __name__ == "__main__":
    main()
