"""What a job used: computers, time, money, and how much of it went into the training."""

from __future__ import annotations

from typing import Any

from roma_pipelines.launching.job import AttemptRecord, JobSpec, Outcome
from roma_pipelines.launching.launcher import Price


def usage(outcome: Outcome, spec: JobSpec, price: Price | None) -> dict[str, Any]:
    """Plain values worth showing on the asset of a completed job.

    ``ran_s`` and ``queued_s`` are sums over all attempts; ``lost_s`` is what attempts ran without
    adding to the training: starting up, and steps behind the last checkpoint before an interruption.
    """
    ran_s = sum(map(_ran_s, outcome.attempts))
    facts: dict[str, Any] = {"ran_s": round(ran_s, 1)}
    facts["queued_s"] = round(sum(map(_queued_s, outcome.attempts)), 1)
    ends = [record.end for record in outcome.attempts if record.end]
    if nodes := sorted({end.nodes for end in ends if end.nodes}):
        facts["nodes"] = ", ".join(nodes)
    if spec.gpus_per_node:
        gpu_hours = ran_s / 3600 * spec.nodes * spec.gpus_per_node
        facts["gpu_hours"] = round(gpu_hours, 4)
        if price is not None:
            facts["cost"] = f"{gpu_hours * price.per_gpu_hour:.2f} {price.currency}"
    trained_s = outcome.result.facts.get("training_s") if outcome.result else None
    if isinstance(trained_s, int | float) and ran_s > 0:
        facts["lost_s"] = round(max(0.0, ran_s - trained_s), 1)
        facts["efficiency"] = round(min(1.0, trained_s / ran_s), 3)
    return facts


def _ran_s(record: AttemptRecord) -> float:
    if record.end is None:
        return 0.0
    if record.end.ran_s is not None:
        return record.end.ran_s
    return record.end.ended_at - (record.submitted_at or record.intended_at)  # nothing queues here


def _queued_s(record: AttemptRecord) -> float:
    if record.end is None or record.end.ran_s is None or record.submitted_at is None:
        return 0.0
    return max(0.0, record.end.ended_at - record.submitted_at - record.end.ran_s)
