"""Removing a version, where nobody needs it any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from roma_pipelines.registry.audit import audit
from roma_pipelines.registry.lock import model_lock
from roma_pipelines.registry.promotion import the_version
from roma_pipelines.registry.versions import ENCODER_TAG, encoder_name

if TYPE_CHECKING:
    from mlflow import MlflowClient


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
