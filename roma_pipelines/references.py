"""Assets hand each other references: the metadata of a materialisation, not tensors."""

from __future__ import annotations

from typing import Any

import dagster as dg


class MissingUpstream(RuntimeError):
    """An asset this one depends on was never materialised."""


def upstream(context: dg.AssetExecutionContext, key: dg.AssetKey) -> dict[str, Any]:
    """Metadata of the newest materialisation of ``key``, one of this run before all others.

    Raises:
        MissingUpstream: there is none.
    """
    in_run = context.instance.get_records_for_run(
        context.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION
    ).records
    entries = [r.event_log_entry for r in in_run if r.event_log_entry.asset_materialization]
    found = [
        m for e in entries if (m := e.asset_materialization) is not None and m.asset_key == key
    ]
    if not found:
        newest = context.instance.get_latest_materialization_event(key)
        if newest is None or newest.asset_materialization is None:
            raise MissingUpstream(
                f"{key.to_user_string()} was never materialised; materialise it first, or select it too"
            )
        found = [newest.asset_materialization]
    return {name: value.value for name, value in found[-1].metadata.items()}
