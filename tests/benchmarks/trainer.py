"""What the trainer costs beside forward, backward and optimiser, and how long a start takes.

    python -m tests.benchmarks.trainer [--steps 12] [--batch 32] [--starts 3]

The workload has the shape of PLAsTiCC's light curves: lengths 47…352, 2 channels (flux and its
error), 2 axes (time and band), width 192, 6 layers, decoder 2 layers, half of the tokens hidden.
The values are generated.

Overhead is the share of a training's CPU time, evaluation aside, that is not spent in forward,
backward, clipping or the optimiser: order, loading, collating, moving, reductions, logging, stop
requests. Checkpoints are measured apart: none between the first and the last step, then one every
fourth step, written in the loop and beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

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


def training(folder: Path, steps: int, batch: int, in_background: bool | None) -> dict[str, float]:
    """Train; seconds from the first step to the last by wall and by CPU, and of the steps themselves.

    ``in_background`` None writes no checkpoint between them.
    """
    from roma_core import (
        EncoderConfig,
        RoMAForPreTraining,
        RoMAForPreTrainingConfig,
        Trainer,
        TrainerConfig,
    )
    from roma_core.trainer.step import TrainStep

    model = RoMAForPreTraining(
        RoMAForPreTrainingConfig(
            encoder_config=EncoderConfig(d_model=192, nhead=3, depth=6),
            decoder_config=EncoderConfig(d_model=192, nhead=3, depth=2),
            tubelet_size=(1, 1, 1),
            n_channels=2,
            n_pos_dims=2,
            mask_ratio=0.5,
        )
    )
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
        trainer = Trainer(
            TrainerConfig(
                epochs=1,
                batch_size=batch,
                save_every=10**6 if in_background is None else STEPS_BETWEEN_SAVES,
                background_checkpoints=bool(in_background),
                checkpoint_dir=folder / "checkpoints",
            )
        )
        trainer.train(LightCurves(steps * batch), None, model)
    finally:
        TrainStep.__call__ = step  # type: ignore[method-assign]
    total = {clock: last[clock] - first[clock] for clock in inside}
    return {f"{clock}_step": inside[clock] for clock in inside} | {
        f"{clock}_total": total[clock] for clock in inside
    }


IMPORTS = "import torch, accelerate"
START = """
import sys, time
from pathlib import Path
from roma_core.trainer.step import TrainStep
step = TrainStep.__call__
def first(self, number, *a):
    result = step(self, number, *a)
    if number == 0:
        print("FIRST", time.time(), flush=True)
    return result
TrainStep.__call__ = first
from tests.benchmarks.trainer import training
training(Path(sys.argv[1]), 2, 2, True)
"""


def start_up(folder: Path) -> tuple[float, float]:
    """Seconds of a process that imports torch and accelerate, and of one until its first step ended."""
    began = time.time()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    imports = time.time() - began
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", START, str(folder)], check=True, capture_output=True, text=True
    )
    (line,) = [s for s in done.stdout.splitlines() if s.startswith("FIRST")]
    return imports, float(line.split()[1]) - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--starts", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pairs = [start_up(root / f"start-{k}") for k in range(arguments.starts)]
        imports, first = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"start: torch and accelerate imported in {imports:.2f} s, first step after {first:.2f} s, "
            f"difference {statistics.median(b - a for a, b in pairs):.2f} s (goal: at most 2)"
        )
        found: dict[bool | None, list[dict[str, float]]] = {None: [], False: [], True: []}
        for k, where in enumerate([*found, *found]):
            found[where].append(
                training(root / f"run-{k}", arguments.steps, arguments.batch, where)
            )
        names = {
            None: "no checkpoint",
            False: f"checkpoints in the loop, every {STEPS_BETWEEN_SAVES} steps",
            True: f"checkpoints beside the loop, every {STEPS_BETWEEN_SAVES} steps",
        }
        for where, runs in found.items():
            share = {
                clock: statistics.median(1 - r[f"{clock}_step"] / r[f"{clock}_total"] for r in runs)
                for clock in ("cpu", "wall")
            }
            per_step = statistics.median(r["wall_step"] for r in runs) / (arguments.steps - 1)
            print(
                f"{names[where]}: "
                f"{per_step * 1000:.0f} ms a step, overhead {share['cpu']:.2%} of CPU time, "
                f"{share['wall']:.2%} of wall time (goal: below 3 % )"
            )
        print(json.dumps({"starts": pairs, "runs": {str(k): v for k, v in found.items()}}))


if __name__ == "__main__":
    main()
