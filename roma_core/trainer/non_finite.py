"""What to look at when a loss becomes NaN or infinite: the batch, as it was given to the model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save

from roma_core.files import write_bytes
from roma_core.model.packing import PackedBatch


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; the message names the samples of the step."""


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
