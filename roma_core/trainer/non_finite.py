"""Finding a loss that became NaN or infinite, and what to look at then: the batch, as the model got it."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import save

from roma_core.files import write_bytes
from roma_core.model.packing import PackedBatch


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; the message names the samples of the step."""


class Unread:
    """Numbers of steps that are still on the device, where reading each would wait for it."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def add(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """This process's part of a step's loss, and the gradient's norm."""
        self._steps.append((step, loss, norm))

    def read(self) -> list[tuple[int, float, float]]:
        """(step, loss, norm) of every step since the last call, in one wait for the device."""
        if not self._steps:
            return []
        steps, losses, norms = zip(*self._steps, strict=True)
        self._steps = []
        numbers = torch.stack([torch.stack(losses), torch.stack(norms).double()]).tolist()
        return list(zip(steps, *numbers, strict=True))


def refuse(
    folder: Path,
    step: int,
    rank: int,
    micro_batches: list[PackedBatch],
    loss: float = float("nan"),
    norm: float = float("nan"),
) -> NoReturn:
    """End a run whose loss is not finite.

    Raises:
        NonFiniteLoss: always; it names the samples, and the file that their batches were written to.
    """
    path = dump_batches(folder, step, rank, micro_batches, loss, norm)
    ids = [int(i) for batch in micro_batches for i in batch.sample_ids]
    raise NonFiniteLoss(
        f"the loss is not finite in step {step} on process {rank}; sample ids {ids}. "
        f"Look at these series (roma data inspect; the batch is in {path}), lower base_lr, or set "
        f"gradient_clip"
    )


def dump_batches(
    folder: Path, step: int, rank: int, micro_batches: list[PackedBatch], loss: float, norm: float
) -> Path:
    """Write a process's micro-batches of a step; the path of the file.

    ``non_finite/step-…-rank-….safetensors`` holds, for micro-batch i, ``i/tokens`` (T, P),
    ``i/positions`` (T, D), ``i/lengths`` (B,), ``i/sample_ids`` (B,), and where there are any
    ``i/indices`` and ``i/labels``; in pretraining ``i/hidden_rows``. Its metadata say step, loss and
    gradient norm.
    """
    tensors: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(micro_batches):
        parts = {
            "tokens": batch.tokens,
            "positions": batch.positions,
            "lengths": torch.tensor(batch.segments.lengths),
            "sample_ids": batch.sample_ids,
            "indices": batch.indices,
            "labels": batch.labels,
            "hidden_rows": None if batch.masked is None else batch.masked.hidden_rows,
        }
        tensors |= {
            f"{i}/{k}": v.cpu().contiguous().clone() for k, v in parts.items() if v is not None
        }
    path = folder / "non_finite" / f"step-{step:08d}-rank-{rank}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"step": str(step), "loss": str(loss), "grad_norm": str(norm)}
    write_bytes(path, save(tensors, metadata=facts))
    return path
