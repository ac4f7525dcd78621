"""MLflow runs of jobs, and registered versions at Weights & Biases: offline, off, and online with a
stand-in."""

import contextlib
import http.server
import threading
import types

import pytest
import requests
from mlflow.exceptions import MlflowException

from roma_core.trainer.trackers import WandbConfig
from roma_pipelines.registry.runs import (
    SHORT_S,
    ensure_experiment,
    find_or_create_run,
    limit_requests,
    link_wandb,
    no_answer,
)
from roma_pipelines.registry.store import MlflowSettings, connect


def test_a_job_has_one_run_however_often_it_is_asked_for(client, caplog):
    params = {f"p{i}": i for i in range(150)}
    first = find_or_create_run(client, "roma/vowels", "k1", "finetune", {"a": "b"}, params)
    client.set_terminated(first, "FAILED")
    assert client.get_run(first).info.status == "FAILED"

    changed = {"p0": "other", "new": 1}
    again = find_or_create_run(client, "roma/vowels", "k1", "finetune", {"a": "b"}, changed)
    other = find_or_create_run(client, "roma/vowels", "k2", "finetune", {}, {})

    assert again == first != other
    run = client.get_run(first)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "finetune"
    assert run.data.params == {k: str(v) for k, v in params.items()} | {"new": "1"}
    assert "these differ now: {'p0': ('0', 'other')}" in caplog.text
    assert run.data.tags["roma.job_key"] == "k1" and run.data.tags["a"] == "b"


def test_artifacts_of_an_experiment_are_in_the_store(client, store_root):
    experiment = ensure_experiment(client, "roma/vowels")
    assert experiment.artifact_location == (store_root / "artifacts" / "roma__vowels").as_uri()


def test_bad_names_and_a_deleted_experiment_are_named(client):
    for name in ("it's", "a b", "../x", "", "a//b"):
        with pytest.raises(ValueError, match="expected letters"):
            find_or_create_run(client, name, "k", "n", {}, {})
        with pytest.raises(ValueError, match="job key"):
            find_or_create_run(client, "e", name, "n", {}, {})
    client.delete_experiment(ensure_experiment(client, "gone").experiment_id)
    with pytest.raises(RuntimeError, match=r"'gone' was deleted; restore it with .*-x 1"):
        ensure_experiment(client, "gone")


FACTS = {"roma.manifest_sha256": "abc"}


TRAINER = {"project_name": "waves", "entity_name": "team"}


@pytest.fixture
def link(client, tmp_path):
    """Links version 1 of a model at W&B."""
    client.create_registered_model("waves")
    client.create_model_version("waves", (tmp_path / "model").as_uri())
    return lambda config, folder: link_wandb(client, config, TRAINER, "waves", "1", FACTS, folder)


def test_wandb_off_touches_nothing(link, tmp_path):
    assert link(WandbConfig.from_values({"mode": "disabled"}), tmp_path / "x") == "off"
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_offline_the_reference_is_left_for_sync(link, tmp_path):
    assert link(WandbConfig.from_values({"mode": "offline"}), tmp_path) == "left for sync"
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_online_a_reference_with_its_checksum_is_linked_into_the_registry(
    link, client, tmp_path, monkeypatch
):
    import wandb

    calls = []
    logged = types.SimpleNamespace(wait=lambda: calls.append("uploaded"))
    run = types.SimpleNamespace(
        log_artifact=lambda artifact, aliases: calls.append(artifact) or logged,
        link_artifact=lambda artifact, target, aliases: calls.append((artifact, target, aliases)),
    )
    began = {}
    monkeypatch.setattr(
        wandb, "init", lambda **how: began.update(how) or contextlib.nullcontext(run)
    )
    config = WandbConfig.from_values({"mode": "online", "api_key": "x" * 40})

    assert link(config, tmp_path) == "linked"

    artifact, uploaded, linked = calls
    assert (began["project"], began["entity"]) == ("waves", "team")
    assert uploaded == "uploaded"
    assert linked == (logged, "wandb-registry-model/waves", ["mlflow-1"])
    assert artifact.metadata == FACTS | {"mlflow_tracking_uri": client.tracking_uri}
    (entry,) = artifact.manifest.entries.values()
    assert entry.ref == "models:/waves/1"


def test_a_version_is_linked_once_and_a_failure_is_tried_again(link, tmp_path, monkeypatch):
    import wandb

    def fails(**_):
        raise OSError("no route")

    run = types.SimpleNamespace(
        log_artifact=lambda artifact, aliases: types.SimpleNamespace(wait=lambda: None),
        link_artifact=lambda artifact, target, aliases: None,
    )
    online = WandbConfig.from_values({"mode": "online", "api_key": "x" * 40})
    monkeypatch.setattr(wandb, "init", fails)
    assert link(WandbConfig.from_values({"mode": "disabled"}), tmp_path) == "off"
    assert link(online, tmp_path) == "failed: no route"
    monkeypatch.setattr(wandb, "init", lambda **_: contextlib.nullcontext(run))
    assert link(online, tmp_path) == "linked"
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("linked twice"))
    assert link(online, tmp_path) == "linked"


@pytest.fixture
def overloaded(monkeypatch):
    """Address of a server that answers 503 to everything."""

    class Overloaded(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(503)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Overloaded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", address)
        yield address
        server.shutdown()


def test_an_overloaded_server_counts_as_one_that_does_not_answer(overloaded, store_root):
    limit_requests(SHORT_S)
    client = connect(MlflowSettings(), store_root)

    with pytest.raises(MlflowException) as caught:
        client.get_experiment_by_name("x")

    reason = "too many 503 error responses"
    assert no_answer(caught.value) == f"the MLflow server {overloaded} does not answer ({reason})"


def test_an_error_of_a_server_that_answers_is_its_own(client):
    with pytest.raises(MlflowException) as caught:
        try:
            requests.get("http://127.0.0.1:9/bucket", timeout=1)
        except requests.ConnectionError as error:
            raise MlflowException("the artifact store is away") from error
    assert no_answer(caught.value) == ""
    assert no_answer(ValueError("no such version")) == ""
