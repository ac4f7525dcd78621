"""The state of Dagster and of MLflow in a real PostgreSQL, by one setting."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import dagster as dg
import pytest

from roma_pipelines.definitions import defs
from roma_pipelines.registry.runs import find_or_create_run
from roma_pipelines.registry.store import MlflowSettings, connect, model_lock
from roma_pipelines.registry.versions import version_at
from roma_pipelines.storage import (
    DATABASE_VARIABLE,
    Storage,
    StorageError,
    connection,
    database_url,
    ensure_schemas,
    prepare_instance,
)
from roma_pipelines.tuning import open_study
from tests.pipelines import tiny
from tests.pipelines.registry.contender import add_rivals, contender, locks


@pytest.fixture
def clean(monkeypatch):
    """What the settings put into the environment goes with the test."""
    for name in ("PGPASSWORD", "DAGSTER_HOME", DATABASE_VARIABLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    for name in ("PGPASSWORD", "DAGSTER_HOME", DATABASE_VARIABLE):
        os.environ.pop(name, None)


@pytest.fixture
def state(postgres, tmp_path, monkeypatch, request, clean):
    """A storage root whose database is new, and configured."""
    name = f"t{abs(hash(request.node.name)) % 10**12}"
    monkeypatch.setenv("ROMA_STORAGE_DATABASE_URL", postgres.create(name))
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "root"))
    return Storage.open()


def tables(schema):
    with connection(database_url()) as session, session.cursor() as cursor:
        cursor.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = %s", [schema])  # fmt: skip
        return {name for (name,) in cursor.fetchall()}


def test_one_setting_keeps_the_state_of_both_and_no_file_has_the_password(state, postgres):
    home = prepare_instance(state)

    @dg.asset
    def noun() -> dg.MaterializeResult:
        return dg.MaterializeResult(metadata={"answer": 42})

    with dg.DagsterInstance.get() as instance:
        assert dg.materialize([noun], instance=instance).success
    client = connect(MlflowSettings(), state.mlflow)
    run_id = find_or_create_run(client, "roma/waves", "0" * 20, "a run", {}, {"lr": 0.1})

    open_study(state, "waves-1").ask()

    assert {"runs", "event_logs", "alembic_version"} <= tables("dagster")
    assert {"studies", "trials", "alembic_version"} <= tables("roma_tuning")
    assert open_study(state, "waves-1").trials[0].state.name == "RUNNING"
    assert {"runs", "registered_models", "alembic_version"} <= tables("mlflow")
    assert not {"runs", "alembic_version"} & tables("public")
    with dg.DagsterInstance.get() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("noun"))
        assert event.asset_materialization.metadata["answer"].value == 42
    assert client.get_run(run_id).info.artifact_uri.startswith(
        (state.mlflow / "artifacts").as_uri()
    )
    assert not list(state.root.rglob("*.db"))
    assert not postgres.is_told_by(client.tracking_uri.encode())
    assert DATABASE_VARIABLE in (home / "dagster.yaml").read_text()
    for file in state.root.rglob("*"):
        if file.is_file():
            assert not postgres.is_told_by(file.read_bytes()), file


def test_the_code_location_loads_in_what_is_started_with_a_database(storage, monkeypatch, clean):
    """The variable that dagster.yaml names is nobody's setting, misspelt; no server is needed."""
    url = "postgresql://roma:geheim@127.0.0.1:1/roma"
    monkeypatch.setenv("ROMA_STORAGE_DATABASE_URL", url)
    monkeypatch.setattr("roma_pipelines.storage.ensure_schemas", lambda url: None)
    prepare_instance(storage)
    assert "search_path" in os.environ[DATABASE_VARIABLE]
    assert defs().assets


def test_a_training_reports_to_postgres_while_it_runs_and_no_file_has_the_password(
    state, tmp_path, postgres
):
    prepare_instance(state)
    sections = tiny.attributes(tmp_path, pretraining={"trainer": {"epochs": 1, "log_every": 1}})
    keys = [dg.AssetKey(["waves", noun]) for noun in ("dataset", "pretrained_encoder")]
    with dg.DagsterInstance.get() as instance:
        job = tiny.definitions(sections).resolve_implicit_global_asset_job_def()
        assert job.execute_in_process(instance=instance, asset_selection=keys).success
        assert instance.get_latest_materialization_event(keys[1])
    client = connect(MlflowSettings(), state.mlflow)
    (run,) = client.search_runs([client.get_experiment_by_name("roma/waves").experiment_id])
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 2
    for file in [*state.jobs.rglob("*"), *state.dagster.rglob("*")]:
        if file.is_file():  # the job had the password by its environment alone
            assert not postgres.is_told_by(file.read_bytes()), file


def test_processes_that_start_together_make_the_tables_once(state):
    script = (
        "from roma_pipelines.registry.store import MlflowSettings, connect\n"
        "from roma_pipelines.storage import Storage\n"
        "client = connect(MlflowSettings(), Storage.open().mlflow)\n"
        "print(len(client.search_experiments()))"
    )

    def start(_):
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(start, range(2)))
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    assert [one.stdout.strip() for one in done] == ["1", "1"]


def test_a_database_that_is_not_there_is_one_sentence_without_the_password(
    state, postgres, monkeypatch
):
    url = os.environ["ROMA_STORAGE_DATABASE_URL"]
    monkeypatch.setenv("ROMA_STORAGE_DATABASE_URL", url.replace("/t", "/nowhere"))
    with pytest.raises(StorageError, match=r"cannot connect to the database .*nowhere") as caught:
        ensure_schemas(database_url())
    assert not postgres.is_told_by(str(caught.value).encode())


@pytest.mark.parametrize("url", ["mysql://u:geheim@h/d", "postgresql://u:geheim@h", "geheim"])
def test_a_url_of_another_kind_is_refused_without_the_password(url, monkeypatch, clean):
    monkeypatch.setenv("ROMA_STORAGE_DATABASE_URL", url)
    with pytest.raises(StorageError, match="expected postgresql://") as caught:
        database_url()
    assert "geheim" not in str(caught.value)


def test_a_history_in_sqlite_is_not_left_behind_unseen(postgres, tmp_path, monkeypatch, clean):
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path))
    storage = Storage.open()
    home = prepare_instance(storage)
    (home / "history").mkdir()
    monkeypatch.delenv("DAGSTER_HOME")
    monkeypatch.setenv("ROMA_STORAGE_DATABASE_URL", postgres.create("later"))
    with pytest.raises(StorageError, match="its history is not migrated"):
        prepare_instance(storage)


def test_state_in_postgres_is_not_forgotten_unseen(state, monkeypatch):
    prepare_instance(state)
    monkeypatch.delenv("DAGSTER_HOME")
    monkeypatch.delenv("ROMA_STORAGE_DATABASE_URL")
    with pytest.raises(StorageError, match="set ROMA_STORAGE_DATABASE_URL again"):
        prepare_instance(state)


def test_a_lock_of_a_model_ends_with_the_connection_that_holds_it(state):
    client = connect(MlflowSettings(), state.mlflow)
    add_rivals(client)
    uri = client.tracking_uri
    with contender(uri, "wait:1") as dead:
        dead.holds()
        with contender(uri, "promote:2") as other:
            dead.kill()
            assert "error" not in other.result()
    assert version_at(client, "rivals", "champion") == "2"
    assert locks(client) == []

    with pytest.raises(StorageError), model_lock(client, "rivals") as lock:
        with connection(database_url()) as session, session.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
            )
        lock.set_alias("rivals", "champion", "3")
    assert version_at(client, "rivals", "champion") == "2"
