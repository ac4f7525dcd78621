"""Which settings a run may change when it goes on. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAY_CHANGE = frozenset(
    {
        # how a step is cut; the global batch stays that of the first start
        *("batch_size", "gradient_accumulation_steps", "sharding", "compile"),
        *("num_dataset_workers", "threads"),
        # when something is written or measured
        *("eval_every", "save_every", "log_every", "heartbeat_every_s", "background_checkpoints"),
        *("checkpoint_dir", "max_checkpoints", "keep_best"),
        *("early_stopping_patience", "final_weights"),
        *("run_name", "project_name", "entity_name", "log_wandb"),
    }
)
"""Settings that a run may change when it goes on: order, masks and, up to rounding, the course of the
weights are the same with any value of them."""


def told(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """``base_lr 0.001 → 0.5, epochs 4 → 5``: old and new value by name."""
    return ", ".join(f"{name} {then} → {now}" for name, (then, now) in changed.items())


def what_may_change() -> str:
    return f"A run that goes on may change only {', '.join(sorted(MAY_CHANGE))}"
