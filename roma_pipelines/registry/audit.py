"""The record of a model's champions: who made which version champion, when, why, on what evidence.

Each event is a tag of the registered model, written before the aliases move and never changed.
"""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from mlflow import MlflowClient

AUDIT_TAG = "roma.audit."
Action = Literal["promote", "rollback", "reject"]


class AuditEvent(BaseModel):
    """One decision about a version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    at: str = Field(description="UTC, ISO 8601.")
    action: Action
    version: str = Field(description="The champion from now on; the version that is rejected.")
    replaced: str | None = Field(description="The champion until now; None for a rejection.")
    who: str
    why: str
    evidence: dict[str, Any] = {}


def audit(client: MlflowClient, name: str) -> list[AuditEvent]:
    """All decisions about a model's versions, the oldest first."""
    tags = client.get_registered_model(name).tags
    keys = sorted(key for key in tags if key.startswith(AUDIT_TAG))
    return [AuditEvent.model_validate_json(tags[key]) for key in keys]


def record(
    client: MlflowClient,
    name: str,
    action: Action,
    version: str,
    replaced: str | None,
    who: str,
    why: str,
    evidence: Mapping[str, Any],
) -> AuditEvent:
    """Append an event; the caller holds the lock of the model."""
    event = AuditEvent(
        at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        action=action,
        version=version,
        replaced=replaced,
        who=who,
        why=why,
        evidence=json.loads(json.dumps(evidence, allow_nan=False)),
    )
    number = len(audit(client, name)) + 1
    client.set_registered_model_tag(name, f"{AUDIT_TAG}{number:06d}", event.model_dump_json())
    return event


def require(who: str, why: str) -> None:
    """Refuse a decision that nobody answers for.

    Raises:
        ValueError: nothing is said of who or why.
    """
    for field, text in (("who", who), ("why", why)):
        if not text.strip():
            raise ValueError(f"{field} is empty; the audit needs to know it")


def whoever_this_is() -> str:
    """``user@host`` of this process."""
    return f"{getpass.getuser()}@{socket.gethostname()}"
