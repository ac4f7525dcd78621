"""From candidate to champion, and back.

``promote``, ``reject`` and ``rollback`` first write who, why and on what evidence, so no move is
without its record. All of them run under the lock of the model.

    champion    the version that consumers load
    previous    the champion before it; ``rollback`` puts it back

The encoder that was registered with a classifier follows it: it has no gate of its own.

The record of a model's champions: who made which version champion, when, why, on what evidence.
Removing a version, where nobody needs it any more.
"""

from __future__ import annotations

import getpass
import json
import logging
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from roma_pipelines.registry.gate import GATE_TAG
from roma_pipelines.registry.lock import LOCK_SUFFIX, model_lock
from roma_pipelines.registry.runs import checked_name
from roma_pipelines.registry.versions import COMPARED_TAG, ENCODER_TAG, encoder_name, version_at

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

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


CHAMPION, PREVIOUS = "champion", "previous"
REJECTED_TAG = "roma.rejected"
NO_CHAMPION = "none"
"""What ``COMPARED_TAG`` holds where there was no champion to compare with."""
_log = logging.getLogger(__name__)


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
    Promoting the present champion changes nothing else. A rejection that is overruled is taken back.

    Args:
        evidence: plain JSON, such as the gate's decision and the run that asked.
        despite_gate: move it though it was not compared with the present champion; the record says
            so.

    Returns:
        The version that was champion until now, None if there was none.

    Raises:
        ValueError: no such model or version, or nothing is said of who or why.
        NotPromoted: it was rejected or rolled back, has passed no gate, or was compared with
            another champion.
        RegistryBusy: somebody else does not let go of the model.
    """
    require(who, why)
    must_be_known(client, name)
    with model_lock(client, name):
        found = the_version(client, name, version)
        replaced = version_at(client, name, CHAMPION)
        if replaced == version:  # perhaps by a promotion that did not come to its end
            _settle(client, name, found)
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
        _settle(client, name, found)
    return replaced


def reject(client: MlflowClient, name: str, version: str, why: str, who: str) -> None:
    """Say that a version shall not become champion, also by no rollback; it stays in the registry.

    If it is ``previous``, the champion before it takes that place.

    Raises:
        ValueError: no such model or version, or nothing is said of who or why.
        NotPromoted: it is the champion.
    """
    require(who, why)
    must_be_known(client, name)
    with model_lock(client, name):
        the_version(client, name, version)
        champion = version_at(client, name, CHAMPION)
        if champion == version:
            raise NotPromoted(
                f"version {version} of {name!r} is the champion; `roma-pipeline rollback {name}` "
                f"puts the one before it back"
            )
        event = record(client, name, "reject", version, None, who, why, {})
        if version_at(client, name, PREVIOUS) == version:
            _set_previous(client, name, _predecessor(client, name, version, champion))
        client.set_model_version_tag(name, version, REJECTED_TAG, f"{event.at} {who}: {why}")


def rollback(client: MlflowClient, name: str, who: str, why: str) -> str:
    """Put ``previous`` back as champion; return its version.

    ``previous`` then is the champion before that one, as the audit tells, so a second rollback goes
    one further back instead of returning to what was just left. Rejected versions are passed over.

    Raises:
        ValueError: no such model, no previous champion, or nothing is said of who or why.
        NotPromoted: ``previous`` was rejected.
    """
    require(who, why)
    must_be_known(client, name)
    with model_lock(client, name):
        champion = version_at(client, name, CHAMPION)
        version = version_at(client, name, PREVIOUS)
        if champion is None or version is None:
            raise ValueError(f"model {name!r} has no previous champion to go back to")
        tags = the_version(client, name, version).tags
        if REJECTED_TAG in tags:  # by hand or by an earlier release: reject moves the alias
            raise NotPromoted(
                f"version {version} of {name!r}, the previous champion, was rejected: "
                f"{tags[REJECTED_TAG]}; `roma-pipeline reject {name} {version}` again makes the one "
                f"before it the previous one"
            )
        if version != champion:  # equal if a crash came before the last step below
            record(client, name, "rollback", version, champion, who, why, {})
            client.set_registered_model_alias(name, CHAMPION, version)
        _let_encoder_follow(client, name, version)
        _set_previous(client, name, _predecessor(client, name, version, version))
    return version


def must_be_known(client: MlflowClient, name: str) -> None:
    """Refuse a name that no model has.

    Raises:
        ValueError: it is no name, or the registry has no such model.
    """
    from mlflow.exceptions import MlflowException

    checked_name("model", name)
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(f"there is no model {name!r}; {_models(client)}") from error


def _models(client: MlflowClient) -> str:
    """The classifiers there are, in words: encoders follow them, and locks are no models."""
    there = {model.name for model in client.search_registered_models()}
    encoders = {encoder_name(name) for name in there}
    names = sorted(n for n in there - encoders if not n.endswith(LOCK_SUFFIX))
    return f"there are {', '.join(names)}" if names else "none is registered yet"


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


def _settle(client: MlflowClient, name: str, champion: ModelVersion) -> None:
    """What follows the alias of a promoted version: its encoder, and the end of a rejection."""
    _let_encoder_follow(client, name, str(champion.version))
    if REJECTED_TAG in champion.tags:
        client.delete_model_version_tag(name, str(champion.version), REJECTED_TAG)


def _let_encoder_follow(client: MlflowClient, name: str, version: str) -> None:
    encoder = client.get_model_version(name, version).tags.get(ENCODER_TAG)
    if encoder is None:
        return
    if not _exists(client, encoder_name(name), encoder):  # the classifier needs none to serve
        _log.warning(
            "version %s of %s, the encoder of version %s of %s, was deleted; the champion of the "
            "encoder stays what it was",
            *(encoder, encoder_name(name), version, name),
        )
        return
    client.set_registered_model_alias(encoder_name(name), CHAMPION, encoder)


def _set_previous(client: MlflowClient, name: str, version: str | None) -> None:
    if version is None:
        client.delete_registered_model_alias(name, PREVIOUS)
    else:
        client.set_registered_model_alias(name, PREVIOUS, version)


def _predecessor(client: MlflowClient, name: str, version: str, champion: str | None) -> str | None:
    """Whom a version replaced when it was last promoted.

    Who is gone, was rejected or is the champion is passed over.
    """
    events = audit(client, name)
    before: str | None = version
    while before is not None:
        found = (e for e in reversed(events) if e.action == "promote" and e.version == before)
        event = next(found, None)
        if event is not None:  # each step looks further back, so it comes to an end
            events = events[: events.index(event)]
        before = None if event is None else event.replaced
        if before is not None and before != champion and _may_return(client, name, before):
            return before
    return None


def _may_return(client: MlflowClient, name: str, version: str) -> bool:
    return (
        _exists(client, name, version)
        and REJECTED_TAG not in client.get_model_version(name, version).tags
    )


def _exists(client: MlflowClient, name: str, version: str) -> bool:
    try:
        the_version(client, name, version)
    except ValueError:
        return False
    return True


class StillNeeded(ValueError):
    """An alias points to the version, it was champion once, or it is the encoder of a classifier."""


def delete_version(client: MlflowClient, name: str, version: str) -> None:
    """Delete a version and its logged model.

    MLflow itself would drop the aliases with it, and consumers would find no champion.

    Raises:
        ValueError: there is no such version.
        StillNeeded: an alias points to it, the audit names it as a champion of some time, or it is
            the encoder of a classifier that is there.
    """
    with model_lock(client, name):
        found = the_version(client, name, version)
        if found.aliases:
            raise StillNeeded(
                f"version {version} of {name!r} is {', '.join(sorted(found.aliases))}; move the "
                f"alias first"
            )
        champions = {e.version for e in audit(client, name) if e.action != "reject"}
        champions |= {e.replaced for e in audit(client, name) if e.replaced}
        if version in champions:
            raise StillNeeded(
                f"version {version} of {name!r} was champion once; the audit answers for what it "
                f"served, so it stays"
            )
        if users := _classifiers_of(client, name, version):
            raise StillNeeded(
                f"version {version} of {name!r} is the encoder of {', '.join(users)}; it follows its "
                f"classifier, so it stays as long as that"
            )
        client.delete_model_version(name, version)
        if found.source and found.source.startswith("models:/m-"):
            client.delete_logged_model(found.source.removeprefix("models:/"))


def _classifiers_of(client: MlflowClient, name: str, version: str) -> list[str]:
    """The versions of classifiers that were registered with a version of an encoder."""
    classifier = name.removesuffix(encoder_name(""))
    if classifier == name:
        return []
    found = client.search_model_versions(
        f"name = '{classifier}' AND tags.`{ENCODER_TAG}` = '{version}'"
    )
    return [f"version {one.version} of {classifier!r}" for one in found]
