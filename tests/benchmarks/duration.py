"""How well the estimated cost of a training fits this computer.

    python -m tests.benchmarks.duration

Measures the CPU time of steps (collating, forward, backward, clipping, AdamW) of both trainings at several
widths, depths and lengths of series, on one thread, and prints it next to what
``roma_core.trainer.defaults`` expects, with their ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from roma_core.model.config import (
    EncoderConfig,
    RoMAForClassificationConfig,
    RoMAForPreTrainingConfig,
)
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.dataloader import Collate
from roma_core.trainer.defaults import DatasetSize, cost_s
from tests.benchmarks.timing import Clock

_REPEATS = 7
_SHAPES = (  # width, layers, observations of a series, series of a batch
    (32, 2, 50, 20),
    (64, 4, 15, 16),
    (64, 4, 100, 20),
    (64, 4, 400, 10),
    (128, 6, 100, 20),
    (256, 6, 20, 32),
    (256, 6, 100, 20),
    (512, 6, 100, 10),
)


def main() -> None:
    torch.set_num_threads(1)
    clock = Clock("cpu", 1)
    print(f"training    width layers length   measured   expected  expected/measured, {clock}")
    for width, depth, length, n in _SHAPES:
        stack = EncoderConfig(d_model=width, nhead=width // 16, depth=depth)
        shape = {"encoder_config": stack, "use_cls": False, "tubelet_size": (1, 1, 1)}
        shape |= {"n_channels": 4, "n_pos_dims": 1}
        decoder = stack.model_copy(update={"depth": 1})
        config = RoMAForPreTrainingConfig.from_values(
            shape | {"decoder_config": decoder, "mask_ratio": 0.5}
        )
        classifier = RoMAForClassificationConfig.from_values(shape | {"dim_output": 3})
        trainer = TrainerConfig.from_values({"epochs": 1, "batch_size": n})
        size = DatasetSize(n_series=n, n_observations=n * length, n_channels=4)
        for name, model, expected in (
            (
                "pretraining",
                RoMAForPreTraining(config),
                cost_s("pretraining", config, trainer, size),
            ),
            (
                "finetuning",
                RoMAForClassification(classifier),
                cost_s("finetuning", config, trainer, size),
            ),
        ):
            found = clock.interleaved({name: _step(model, length, n)}, _REPEATS)[name].median
            print(
                f"{name:<12}{width:>5}{depth:>7}{length:>7}{found * 1e3:>8.1f} ms{expected * 1e3:>8.1f} ms"
                f"{expected / found:>8.2f}",
                flush=True,
            )


def _step(model: Any, length: int, n: int) -> Callable[[], None]:
    rng = np.random.default_rng(0)
    items = [
        (
            0,
            k,
            {
                "values": rng.normal(size=(length, 4, 1, 1)).astype(np.float32),
                "positions": np.arange(length, dtype=np.float32)[None],
                "label": k % 3,
            },
        )
        for k in range(n)
    ]
    collate = Collate(model.config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(collate(items))[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
