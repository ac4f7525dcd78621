"""Move the aliases of a registered model, with an audit record of every decision.

    champion    the version that consumers load
    previous    the champion before it; ``rollback`` restores it

All run under the lock of the model. The encoder that was registered with a finetuned model has no gate
of its own: its champion alias follows that model's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, Field

from roma_core.settings import Frozen
from roma_pipelines.registry import versions
from roma_pipelines.registry.gate import GATE_TAG
from roma_pipelines.registry.runs import checked_name
from roma_pipelines.registry.store import LOCK_SUFFIX, ModelLock, model_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS = "champion", "previous"
AUDIT_TAG = "roma.audit."
REJECTED_TAG = "roma.rejected"
NO_CHAMPION = "none"
"""Value of ``COMPARED_TAG`` where there was no champion to compare with."""
_log = logging.getLogger(__name__)


class PromotionRefused(ValueError):
    """The gate or an earlier decision forbids the move; nothing was changed."""


class VersionInUse(ValueError):
    """The version has an alias, was champion before, or is the encoder of a finetuned model."""


class AuditEvent(Frozen):
    """One decision about a version."""

    schema_version: Literal[1] = 1
    at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    action: Literal["promote", "rollback", "reject"]
    version: str  # the new champion, or the rejected version
    replaced: str | None = None  # the champion until then; None if rejected
    # registries that exist hold these two as `who` and `why`
    actor: str = Field(validation_alias=AliasChoices("actor", "who"))
    reason: str = Field(validation_alias=AliasChoices("reason", "why"))
    evidence: dict[str, Any] = Field({})


def audit(client: MlflowClient, name: str) -> list[AuditEvent]:
    """All decisions about a model's versions, the oldest first."""
    tags = client.get_registered_model(name).tags
    keys = sorted(key for key in tags if key.startswith(AUDIT_TAG))
    return [AuditEvent.model_validate_json(tags[key]) for key in keys]


def _record(lock: ModelLock, name: str, **fields: Any) -> AuditEvent:
    event = AuditEvent(**fields)
    content = json.dumps(event.model_dump(), allow_nan=False)
    key = f"{AUDIT_TAG}{len(audit(lock.client, name)) + 1:06d}"
    lock.check()
    lock.client.set_registered_model_tag(name, key, content)
    return event


def promote(
    client: MlflowClient,
    name: str,
    version: str,
    reason: str,
    actor: str,
    evidence: Mapping[str, Any],
    *,
    force: bool = False,
) -> str | None:
    """Make a version the champion, and the present champion ``previous``.

    Repeated after a crash, it completes the move. Promoting the present champion changes nothing
    else. A forced promotion of a rejected version revokes the rejection; the refusal is recorded in
    the evidence (plain JSON). Returns the former champion, None if there was none.

    Raises:
        ValueError: no such model or version, or actor or reason is empty.
        PromotionRefused: it was rejected or rolled back, has not passed the gate, or was compared
            with another champion.
        RegistryBusy: another process holds the lock of the model, or it was lost meanwhile.
    """
    signed = _signed(client, name, actor, reason)
    with model_lock(client, name) as lock:
        found = versions.get_version(client, name, version)
        replaced = _champion(client, name)
        if replaced == version:  # perhaps by a promotion that was interrupted, completed below
            replaced = versions.version_at(client, name, PREVIOUS)
        else:
            refusal = _refusal(client, name, found, replaced)
            if refusal is not None:
                if not force:
                    raise PromotionRefused(refusal)
                evidence = {**evidence, "forced_despite": refusal}
            moved = {"version": version, "replaced": replaced}
            _record(lock, name, action="promote", evidence=evidence, **moved, **signed)
            if replaced is not None:
                lock.set_alias(name, PREVIOUS, replaced)
            lock.set_alias(name, CHAMPION, version)
        _move_encoder_alias(lock, name, version)
        if REJECTED_TAG in found.tags:
            client.delete_model_version_tag(name, version, REJECTED_TAG)
    return replaced


def reject(client: MlflowClient, name: str, version: str, reason: str, actor: str) -> None:
    """Exclude a version from promotion and rollback; it stays in the registry.

    If it is ``previous``, the champion before it becomes ``previous``. ValueError as for
    :func:`promote`; PromotionRefused for the champion.
    """
    signed = _signed(client, name, actor, reason)
    with model_lock(client, name) as lock:
        versions.get_version(client, name, version)
        champion = versions.version_at(client, name, CHAMPION)
        if champion == version:
            raise PromotionRefused(
                f"version {version} of {name!r} is the champion; `roma-pipeline rollback {name}` "
                f"restores the one before it"
            )
        event = _record(lock, name, action="reject", version=version, **signed)
        if versions.version_at(client, name, PREVIOUS) == version:
            _set_previous(lock, name, version, champion)
        client.set_model_version_tag(name, version, REJECTED_TAG, f"{event.at} {actor}: {reason}")


def rollback(client: MlflowClient, name: str, *, reason: str, actor: str) -> str:
    """Make ``previous`` the champion again; return its version.

    ``previous`` then becomes the champion before that one, by the audit, so a second rollback goes
    one further back. Rejected and deleted versions are skipped. ValueError without a previous
    champion, and as for :func:`promote`; PromotionRefused if ``previous`` was rejected.
    """
    signed = _signed(client, name, actor, reason)
    with model_lock(client, name) as lock:
        champion = _champion(client, name)
        version = versions.version_at(client, name, PREVIOUS)
        if champion is None or version is None:
            raise ValueError(
                f"model {name!r} has no previous champion to roll back to; make another version the "
                f"champion: roma-pipeline promote {name} VERSION --reason REASON"
            )
        tags = versions.get_version(client, name, version).tags
        if REJECTED_TAG in tags:  # the alias was set by hand: reject moves it
            raise PromotionRefused(
                f"version {version} of {name!r}, the previous champion, was rejected: "
                f"{tags[REJECTED_TAG]}; `roma-pipeline reject {name} {version}` again sets `previous` "
                f"to the one before it"
            )
        if version != champion:  # equal after a crash before the last step
            moved = {"version": version, "replaced": champion}
            _record(lock, name, action="rollback", **moved, **signed)
            lock.set_alias(name, CHAMPION, version)
        _move_encoder_alias(lock, name, version)
        _set_previous(lock, name, version, version)
    return version


def delete_version(client: MlflowClient, name: str, version: str) -> None:
    """Delete a version and its logged model; of its aliases it may have ``candidate`` only.

    MLflow itself would delete other aliases with it, and consumers would find no champion. Raises
    ValueError without such a version; VersionInUse if another alias points to it, the audit names
    it as a former champion, or it is the encoder of an existing version.
    """
    with model_lock(client, name) as lock:
        found = versions.get_version(client, name, version)
        if aliases := sorted(set(found.aliases) - {versions.CANDIDATE}):
            raise VersionInUse(
                f"version {version} of {name!r} is {', '.join(aliases)}; move the alias first"
            )
        events = audit(client, name)
        champions = {e.version for e in events if e.action != "reject"}
        if version in champions | {e.replaced for e in events}:
            raise VersionInUse(
                f"version {version} of {name!r} was champion before; the audit refers to it, so it "
                f"is kept"
            )
        model = name.removesuffix(versions.encoder_name(""))
        wanted = f"name = '{model}' AND tags.`{versions.ENCODER_TAG}` = '{version}'"
        users = client.search_model_versions(wanted) if model != name else []
        if users:
            used = ", ".join(f"version {v.version} of {model!r}" for v in users)
            raise VersionInUse(
                f"version {version} of {name!r} is the encoder of {used}; it is kept as long as "
                f"that version"
            )
        if found.aliases:
            lock.delete_alias(name, versions.CANDIDATE)
        client.delete_model_version(name, version)
        if found.source and found.source.startswith("models:/m-"):
            client.delete_logged_model(found.source.removeprefix("models:/"))


def _signed(client: MlflowClient, name: str, actor: str, reason: str) -> dict[str, str]:
    """Actor and reason for the audit; ValueError if one is empty or there is no such model."""
    signed = {"actor": actor, "reason": reason}
    for field, text in signed.items():
        if not text.strip():
            raise ValueError(f"{field} is empty; the audit must record it")
    require_model(client, name)
    return signed


def require_model(client: MlflowClient, name: str) -> None:
    """Raise ValueError for an invalid name, or one of no model, with the names that there are."""
    from mlflow.exceptions import MlflowException

    checked_name("model", name)
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        existing = {model.name for model in client.search_registered_models()}
        encoders = {versions.encoder_name(one) for one in existing}
        locks = {n for n in existing if n.endswith(LOCK_SUFFIX) or f"{LOCK_SUFFIX}.of." in n}
        names = sorted(existing - encoders - locks)
        listed = (
            f"there are {', '.join(names)}"
            if names
            else "none yet; `roma-pipeline demo` registers one"
        )
        raise ValueError(f"there is no model {name!r}; {listed}") from error


def _champion(client: MlflowClient, name: str) -> str | None:
    champion = versions.version_at(client, name, CHAMPION)
    recorded = [event.version for event in audit(client, name) if event.action != "reject"]
    if recorded and recorded[-1] != champion:
        _log.warning(
            "the champion of %s is version %s, but the audit ends with version %s: that move was "
            "interrupted, or the alias was moved later by hand or by a delayed request",
            *(name, champion, recorded[-1]),
        )
    return champion


def _refusal(
    client: MlflowClient, name: str, version: ModelVersion, champion: str | None
) -> str | None:
    number, tags = str(version.version), version.tags
    this = f"version {number} of {name!r}"
    for event in reversed(audit(client, name)):
        if event.action == "promote" and event.version == number:
            break
        if event.action == "rollback" and event.replaced == number:
            return f"{this} was rolled back at {event.at}: {event.reason}"
    if REJECTED_TAG in tags:
        return f"{this} was rejected: {tags[REJECTED_TAG]}"
    if tags.get(GATE_TAG) != "passed":
        return (
            f"{this} has passed no gate (its tag {GATE_TAG} is {tags.get(GATE_TAG)!r}); "
            f"materialise evaluation_report"
        )
    compared, now = tags.get(versions.COMPARED_TAG, NO_CHAMPION), champion or NO_CHAMPION
    if compared != now:
        return (
            f"{this} was compared with champion {compared}, but the champion is now {now}; "
            f"materialise evaluation_report again to compare with that one"
        )
    return None


def _move_encoder_alias(lock: ModelLock, name: str, version: str) -> None:
    encoder = lock.client.get_model_version(name, version).tags.get(versions.ENCODER_TAG)
    of_encoder = versions.encoder_name(name)
    if encoder is None:  # that of an earlier champion has other features than this one
        if versions.version_at(lock.client, of_encoder, CHAMPION) is not None:
            lock.delete_alias(of_encoder, CHAMPION)
        return
    if versions.find_version(lock.client, of_encoder, encoder) is None:  # serves without
        _log.warning(
            "version %s of %s, the encoder of version %s of %s, was deleted; the champion of the "
            "encoder is unchanged",
            *(encoder, of_encoder, version, name),
        )
        return
    lock.set_alias(of_encoder, CHAMPION, encoder)


def _set_previous(lock: ModelLock, name: str, version: str, champion: str | None) -> None:
    """Set ``previous`` to the champion before ``version``, skipping versions that are deleted,
    rejected or the present champion."""
    before: str | None = version
    for event in reversed(audit(lock.client, name)):
        if event.action == "promote" and event.version == before:
            before = event.replaced
            if before is None:
                break
            found = versions.find_version(lock.client, name, before)
            if before != champion and found is not None and REJECTED_TAG not in found.tags:
                lock.set_alias(name, PREVIOUS, before)
                return
    lock.delete_alias(name, PREVIOUS)
