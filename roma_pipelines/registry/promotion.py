"""From candidate to champion, and back.

``promote``, ``reject`` and ``rollback`` first write who, why and on what evidence, so no move is
without its record. All of them run under the lock of the model.

    champion    the version that consumers load
    previous    the champion before it; ``rollback`` puts it back

The encoder that was registered with a classifier follows it: it has no gate of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from roma_pipelines.registry.audit import audit, record, require
from roma_pipelines.registry.decisions import GATE_TAG
from roma_pipelines.registry.lock import model_lock
from roma_pipelines.registry.runs import checked_name
from roma_pipelines.registry.versions import (
    COMPARED_TAG,
    ENCODER_TAG,
    encoder_name,
    version_at,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS = "champion", "previous"
REJECTED_TAG = "roma.rejected"
NO_CHAMPION = "none"
"""What ``COMPARED_TAG`` holds where there was no champion to compare with."""


class NotPromoted(ValueError):
    """The gate or an earlier decision stands against it; nothing was moved."""


def promote(
    client: MlflowClient,
    name: str,
    version: str,
    why: str,
    who: str,
    evidence: Mapping[str, Any],
    *,
    despite_gate: bool = False,
) -> str | None:
    """Make a version the champion, and the present champion ``previous``.

    The record is written before the aliases move; asked again after a crash, the move is finished.
    Promoting the present champion changes nothing.

    Args:
        evidence: plain JSON, such as the gate's decision and the run that asked.
        despite_gate: move it though it was not compared with the present champion; the record says
            so.

    Returns:
        The version that was champion until now, None if there was none.

    Raises:
        ValueError: no such version, or nothing is said of who or why.
        NotPromoted: it was rejected or rolled back, has passed no gate, or was compared with
            another champion.
        RegistryBusy: somebody else does not let go of the model.
    """
    require(who, why)
    checked_name("model", name)
    with model_lock(client, name):
        found = the_version(client, name, version)
        replaced = version_at(client, name, CHAMPION)
        if replaced == version:
            return version_at(client, name, PREVIOUS)
        against = _left_behind(client, name, version) or _what_stands_against(name, found, replaced)
        if against is not None and not despite_gate:
            raise NotPromoted(against)
        if against is not None:
            evidence = {**evidence, "despite": against}
        record(client, name, "promote", version, replaced, who, why, evidence)
        if replaced is not None:
            client.set_registered_model_alias(name, PREVIOUS, replaced)
        client.set_registered_model_alias(name, CHAMPION, version)
        _let_encoder_follow(client, name, version)
    return replaced


def reject(client: MlflowClient, name: str, version: str, why: str, who: str) -> None:
    """Say that a version shall not become champion; it stays in the registry.

    Raises:
        ValueError: no such version, or nothing is said of who or why.
        NotPromoted: it is the champion.
    """
    require(who, why)
    checked_name("model", name)
    with model_lock(client, name):
        the_version(client, name, version)
        if version_at(client, name, CHAMPION) == version:
            raise NotPromoted(
                f"version {version} of {name!r} is the champion; `roma-pipeline rollback {name}` "
                f"puts the one before it back"
            )
        event = record(client, name, "reject", version, None, who, why, {})
        client.set_model_version_tag(name, version, REJECTED_TAG, f"{event.at} {who}: {why}")


def rollback(client: MlflowClient, name: str, who: str, why: str) -> str:
    """Put ``previous`` back as champion; return its version.

    ``previous`` then is the champion before that one, as the audit tells, so a second rollback goes
    one further back instead of returning to what was just left.

    Raises:
        ValueError: there is no previous champion, or nothing is said of who or why.
    """
    require(who, why)
    checked_name("model", name)
    with model_lock(client, name):
        champion = version_at(client, name, CHAMPION)
        version = version_at(client, name, PREVIOUS)
        if champion is None or version is None:
            raise ValueError(f"model {name!r} has no previous champion to go back to")
        if version != champion:  # equal if a crash came before the last step below
            record(client, name, "rollback", version, champion, who, why, {})
            client.set_registered_model_alias(name, CHAMPION, version)
        _let_encoder_follow(client, name, version)
        before = _predecessor(client, name, version)
        if before is None:
            client.delete_registered_model_alias(name, PREVIOUS)
        else:
            client.set_registered_model_alias(name, PREVIOUS, before)
    return version


def the_version(client: MlflowClient, name: str, version: str) -> ModelVersion:
    """The registered version.

    Raises:
        ValueError: there is none.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        raise ValueError(f"model {name!r} has no version {version!r}: {error.message}") from error


def _what_stands_against(name: str, version: ModelVersion, champion: str | None) -> str | None:
    tags = version.tags
    if REJECTED_TAG in tags:
        return f"version {version.version} of {name!r} was rejected: {tags[REJECTED_TAG]}"
    if tags.get(GATE_TAG) != "passed":
        return (
            f"version {version.version} of {name!r} has passed no gate (its tag {GATE_TAG} is "
            f"{tags.get(GATE_TAG)!r}); materialise evaluation_report"
        )
    compared = tags.get(COMPARED_TAG, NO_CHAMPION)
    if compared != (champion or NO_CHAMPION):
        return (
            f"version {version.version} of {name!r} was compared with champion {compared}, but the "
            f"champion is now {champion or NO_CHAMPION}; materialise evaluation_report again to "
            f"compare with that one"
        )
    return None


def _left_behind(client: MlflowClient, name: str, version: str) -> str | None:
    """The rollback that ended the version's last time as champion, if one did."""
    for event in reversed(audit(client, name)):
        if event.action == "promote" and event.version == version:
            return None
        if event.action == "rollback" and event.replaced == version:
            return f"version {version} of {name!r} was rolled back at {event.at}: {event.why}"
    return None


def _let_encoder_follow(client: MlflowClient, name: str, version: str) -> None:
    encoder = client.get_model_version(name, version).tags.get(ENCODER_TAG)
    if encoder is not None:
        client.set_registered_model_alias(encoder_name(name), CHAMPION, encoder)


def _predecessor(client: MlflowClient, name: str, version: str) -> str | None:
    """Whom a version replaced when it was last promoted; who is gone is passed over."""
    events = audit(client, name)
    before: str | None = version
    while before is not None:
        found = (e for e in reversed(events) if e.action == "promote" and e.version == before)
        event = next(found, None)
        if event is not None:  # each step looks further back, so it comes to an end
            events = events[: events.index(event)]
        before = None if event is None else event.replaced
        if before is not None and _exists(client, name, before):
            return before
    return None


def _exists(client: MlflowClient, name: str, version: str) -> bool:
    try:
        the_version(client, name, version)
    except ValueError:
        return False
    return True
