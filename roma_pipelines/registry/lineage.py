"""Where a version comes from, and what came of a piece of data, a commit or a job.

Forwards: version → MLflow run → Dagster run → jobs → data-set version → commit → lock. Backwards:
any of these identifiers, or its beginning, → versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from roma_core.serving.fetching import MANIFEST_TAG, resolve
from roma_pipelines.registry.audit import audit
from roma_pipelines.registry.decisions import GATE_TAG
from roma_pipelines.registry.versions import COMPARED_TAG, ENCODER_TAG, RUN_ID_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

_IDENTIFIERS = {
    "MLflow run": RUN_ID_TAG,
    "Dagster run": "roma.dagster_run_id",
    "evaluation job": "roma.evaluation_job",
    "finetuning job": "roma.finetuning_job",
    "pretraining job": "roma.pretraining_job",
    "data set": "roma.dataset_digest",
    "configuration": "roma.config_digest",
    "commit": "roma.git_sha",
    "lock": "roma.lock_hash",
    "package": MANIFEST_TAG,
}
_SHORTEST = 6  # characters of an identifier; less would match by accident


@dataclass(frozen=True)
class Lineage:
    """Everything that is known of one version's origin."""

    name: str
    version: str
    facts: dict[str, str]
    decisions: list[str]

    @property
    def is_dirty(self) -> bool:
        """Whether files differed from the commit."""
        return self.facts.get("commit", "").endswith("-dirty")


def lineage_of(client: MlflowClient, uri: str) -> Lineage:
    """The origin of ``models:/NAME@ALIAS``, ``NAME@ALIAS`` or ``NAME/VERSION``.

    Raises:
        FetchError: there is no such model, alias or version.
    """
    found = resolve(client, uri if uri.startswith("models:/") else f"models:/{uri}")
    version = client.get_model_version(found.name, found.version)
    facts = {what: found.tags[tag] for what, tag in _IDENTIFIERS.items() if tag in found.tags}
    aliases = ", ".join(sorted(version.aliases)) or "none"
    facts = {"aliases": aliases, **facts, "gate": _gate(found.tags)}
    if ENCODER_TAG in found.tags:
        facts["encoder"] = f"version {found.tags[ENCODER_TAG]}"
    decisions = [
        f"{e.at} {e.action} by {e.who}: {e.why}"
        for e in audit(client, found.name)
        if found.version in (e.version, e.replaced)
    ]
    return Lineage(found.name, found.version, facts, decisions)


def _gate(tags: Any) -> str:
    return f"{tags.get(GATE_TAG, 'not asked')}, against champion {tags.get(COMPARED_TAG, '?')}"


def versions_from(client: MlflowClient, identifier: str) -> list[tuple[str, str, str]]:
    """Versions of any model whose origin has an identifier that begins like this.

    Returns:
        Name, version and what the identifier is to it, the newest first.

    Raises:
        ValueError: the identifier is too short to mean one thing.
    """
    if len(identifier) < _SHORTEST:
        raise ValueError(
            f"{identifier!r}: at least {_SHORTEST} characters of a job key, run id, data-set "
            f"version, commit or package are needed"
        )
    versions = client.search_model_versions(order_by=["last_updated_timestamp DESC"])
    return [
        (v.name, str(v.version), what)
        for v in versions
        for what, tag in _IDENTIFIERS.items()
        if v.tags.get(tag, "").startswith(identifier)
    ]
