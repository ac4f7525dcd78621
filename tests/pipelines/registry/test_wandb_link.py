"""Weights & Biases beside the registry: really offline, off, and online with a stand-in."""

import contextlib
import types

import pytest

from roma_core.trainer.trackers import WandbConfig
from roma_pipelines.registry import runs as wandb_link
from roma_pipelines.registry.runs import link_once, link_version

FACTS = {"roma.manifest_sha256": "abc", "mlflow_tracking_uri": "https://mlflow.example.org"}


def link(config, folder):
    return link_version(config, "waves", "team", "a/b", "3", "models:/a/b/3", FACTS, folder)


def test_off_touches_nothing(tmp_path):
    assert link(WandbConfig.from_values({"mode": "disabled"}), tmp_path / "x") == "off"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_offline_the_reference_is_left_for_sync(tmp_path):
    assert link(WandbConfig.from_values({"mode": "offline"}), tmp_path) == "left for sync"
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_online_a_reference_with_its_checksum_is_linked_into_the_registry(tmp_path, monkeypatch):
    import wandb

    said = []
    logged = types.SimpleNamespace(wait=lambda: said.append("uploaded"))
    run = types.SimpleNamespace(
        log_artifact=lambda artifact, aliases: said.append(artifact) or logged,
        link_artifact=lambda artifact, target, aliases: said.append((artifact, target, aliases)),
    )
    began = {}
    monkeypatch.setattr(
        wandb, "init", lambda **how: began.update(how) or contextlib.nullcontext(run)
    )
    config = WandbConfig.from_values({"mode": "online", "api_key": "x" * 40})

    assert link(config, tmp_path) == "linked"

    artifact, uploaded, linked = said
    assert (began["project"], began["entity"]) == ("waves", "team")
    assert uploaded == "uploaded"
    assert linked == (logged, "wandb-registry-model/a-b", ["mlflow-3"])
    assert artifact.metadata == FACTS
    (entry,) = artifact.manifest.entries.values()
    assert entry.ref == "models:/a/b/3"


def test_a_failure_is_said_and_ends_nothing(tmp_path, monkeypatch):
    import wandb

    def fails(**_):
        raise OSError("no route")

    monkeypatch.setattr(wandb, "init", fails)
    config = WandbConfig.from_values({"mode": "online", "api_key": "x" * 40})
    assert link(config, tmp_path) == "failed: no route"


def test_a_version_is_linked_once_and_a_failure_is_tried_again(client, tmp_path, monkeypatch):
    client.create_registered_model("waves")
    client.create_model_version("waves", (tmp_path / "model").as_uri())
    answers = iter(["off", "failed: no route", "linked"])
    monkeypatch.setattr(wandb_link, "link_version", lambda *_: next(answers))
    trainer = {"project_name": "waves", "entity_name": None}
    said = [
        link_once(client, WandbConfig(), trainer, "waves", "1", FACTS, tmp_path) for _ in range(4)
    ]
    assert said == ["off", "failed: no route", "linked", "linked"]
