"""A real MLflow server with authentication: registry, jobs, and the error for a wrong password."""

import importlib.util
import os
import urllib.parse

import dagster as dg
import pytest

from roma_core.serving.registry_client import fetch, resolve
from roma_pipelines.registry.promotion import promote
from roma_pipelines.registry.store import MlflowSettings, StoreError, answers, connect
from roma_pipelines.registry.versions import aliases_without_mlflow, version_at
from roma_pipelines.storage import Storage, prepare_instance
from tests import forked
from tests.pipelines import tiny
from tests.pipelines.registry.conftest import registered_as, served

pytestmark = pytest.mark.slow
PASSWORD = "secret: p@ss/word %41"


@pytest.fixture(scope="module")
def guarded(store_template, tmp_path_factory):
    """Address of a server with one user, ``admin``."""
    if importlib.util.find_spec("flask_wtf") is None:
        say = pytest.fail if os.environ.get("ROMA_TEST_REQUIRE_ALL") == "1" else pytest.skip
        say("needs flask-wtf, as mlflow[auth] does")
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "mlflow.db").write_bytes(store_template.read_bytes())
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/users.db\n"
        "admin_username = admin\n"
        "auth_cache_ttl_seconds = 600\n"  # else every request computes the password's slow hash
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    command = [
        *("server", "--app-name", "basic-auth", "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--artifacts-destination", (folder / "artifacts").as_uri()),
    ]
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "not a secret here",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with served(command, folder, "/health", **environment) as address:
        yield address


@pytest.fixture
def known(guarded, tmp_path, monkeypatch):
    """Settings that the server accepts, all from a file."""
    file = tmp_path / "known.env"
    file.write_text(
        f"ROMA_MLFLOW_TRACKING_URI={guarded}\n"
        f"ROMA_MLFLOW_USERNAME=admin\nROMA_MLFLOW_PASSWORD='{PASSWORD}'\n"
    )
    monkeypatch.setenv("ROMA_ENV_FILE", str(file))
    return guarded


def refused(storage, *command):
    """Output of a command that the server refuses."""
    environment = os.environ | {"ROMA_STORAGE_ROOT": str(storage.root)}
    done = forked.run("roma_pipelines.cli", *command, environment=environment)
    assert done.returncode == 1
    return done.stdout + done.stderr


def test_a_version_is_registered_promoted_and_fetched(known, storage, toy_package, tmp_path):
    assert aliases_without_mlflow(MlflowSettings(), storage.mlflow) == {}
    client = connect(MlflowSettings(), storage.mlflow)
    version = registered_as(client, toy_package, "toy", "1" * 20)

    promote(client, "toy", version, reason="first", actor="tester", evidence={})

    assert version_at(client, "toy", "champion") == version
    aliases = aliases_without_mlflow(MlflowSettings(), storage.mlflow)
    assert aliases["toy"]["champion"] == version
    assert fetch(client, resolve(client, "models:/toy@champion"), tmp_path / "cache").is_dir()
    assert not (storage.mlflow / "artifacts").exists()


def test_a_job_logs_as_the_user_and_no_file_has_the_password(known, storage, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    sections = tiny.attributes(data, pretraining={"trainer": {"epochs": 1, "batch_size": 16}})
    job = tiny.definitions(sections).resolve_implicit_global_asset_job_def()
    prepare_instance(Storage.open())
    with dg.DagsterInstance.get() as instance:
        done = job.execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey(["waves", noun]) for noun in tiny.ASSET_NAMES[:2]],
        )
        (event,) = done.asset_materializations_for_node("waves__pretrained_encoder")

    client = connect(MlflowSettings(), storage.mlflow)
    run = client.get_run(event.metadata["mlflow_run_id"].value)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] > 0
    (log,) = storage.jobs.glob("*/attempts/1/log")
    assert "mlflow:" not in log.read_text()  # the job's own tracker was accepted
    files = [path for path in storage.root.rglob("*") if path.is_file()]
    assert files
    for file in files:
        assert PASSWORD.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "wrong, too"}, "the user 'admin'"),
        ({"ROMA_MLFLOW_USERNAME": "ada", "ROMA_MLFLOW_PASSWORD": "wrong, too"}, "the user 'ada'"),
        ({}, "a request without a user"),
    ],
)  # fmt: skip
def test_a_wrong_password_is_one_sentence(guarded, storage, monkeypatch, variables, says):
    monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", guarded)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(StoreError, match=f"{guarded} refuses {says} .401: .*ROMA_MLFLOW_PASSWORD"):
        connect(MlflowSettings(), storage.mlflow)

    said = refused(storage, "rollback", "toy", "--reason", "x")
    assert f"refuses {says}" in said and "Traceback" not in said and "wrong, too" not in said


def test_a_training_is_refused_before_there_is_a_job(guarded, storage, tmp_path, monkeypatch):
    monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", guarded)
    monkeypatch.setenv("ROMA_MLFLOW_USERNAME", "admin")
    monkeypatch.setenv("ROMA_MLFLOW_PASSWORD", "wrong, too")
    sections = tiny.attributes(tmp_path)
    job = tiny.definitions(sections).resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.get() as instance:
        done = job.execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey(["waves", noun]) for noun in tiny.ASSET_NAMES[:2]],
            raise_on_error=False,
        )

    (failure,) = [event for event in done.all_events if event.is_step_failure]
    said = failure.step_failure_data.user_failure_data.description
    assert "refuses the user 'admin' (401" in said
    assert list(storage.jobs.iterdir()) == []


def test_credentials_in_the_url_are_checked_as_others(guarded, storage):
    def at(address, password):
        uri = address.replace("://", f"://admin:{urllib.parse.quote(password, safe='')}@")
        return MlflowSettings.from_values({"tracking_uri": uri})

    connect(at(guarded, PASSWORD), storage.mlflow).search_experiments()
    with pytest.raises(StoreError, match=f"{guarded} refuses the user 'admin'") as refusal:
        connect(at(guarded, "wrong"), storage.mlflow)
    assert "wrong" not in str(refusal.value)
    assert answers(at(guarded, PASSWORD)) and not answers(at("http://127.0.0.1:9", PASSWORD))


def test_a_user_name_without_a_password_is_refused(storage, monkeypatch):
    monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("ROMA_MLFLOW_USERNAME", "ada")

    with pytest.raises(StoreError, match="USERNAME is set, MLFLOW_TRACKING_PASSWORD is not"):
        connect(MlflowSettings(), storage.mlflow)


def test_a_token_with_a_line_break_is_refused_and_not_repeated(storage, monkeypatch):
    monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cr3t\n")

    with pytest.raises(StoreError, match="without a line break") as refusal:
        connect(MlflowSettings(), storage.mlflow)
    assert "s3cr3t" not in str(refusal.value)


def test_a_user_name_alone_is_no_error_without_a_server(storage, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "left over")

    connect(MlflowSettings(), storage.mlflow)
