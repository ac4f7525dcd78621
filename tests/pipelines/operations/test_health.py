import json
import os

import dagster as dg
from click.testing import CliRunner

from roma_pipelines.cli import main


def health(*arguments):
    result = CliRunner().invoke(main, ["health", "--json", *arguments])
    return result.exit_code, {one["name"]: one for one in json.loads(result.output)}


def test_a_new_installation_is_well_but_for_its_daemon(storage):
    code, found = health()
    assert code == 0
    assert {name: one["status"] for name, one in found.items()} == {
        "disk": "ok",
        "jobs": "ok",
        "experiments": "ok",
        "MLflow store": "ok",
        "Dagster store": "ok",
        "daemon": "warning",
        "failures": "ok",
    }
    assert health("--strict")[0] == 1


def test_a_job_without_a_watcher_and_a_failed_run_are_named(storage, instance, job):
    job("a", how="open")

    @dg.asset
    def noun():
        raise ValueError("no")

    dg.materialize([noun], instance=instance, raise_on_error=False)
    code, found = health()
    assert code == 0
    assert found["jobs"]["status"] == "warning" and "a" * 20 in found["jobs"]["detail"]
    assert found["failures"]["detail"].startswith("1 in the last day")


def test_a_silent_daemon_is_an_error(storage, instance):
    from dagster._daemon.types import DaemonHeartbeat

    for kind in instance.get_required_daemon_types():
        instance.add_daemon_heartbeat(DaemonHeartbeat(1.0, kind, None, []))
    code, found = health()
    assert code == 1
    assert "is `up` running?" in found["daemon"]["detail"]


def test_a_store_that_is_no_database_hides_no_other_part(storage):
    (storage.mlflow / "mlflow.db").write_text("rubbish, long enough to be no header of a database")
    code, found = health()
    assert code == 1
    assert found["MLflow store"]["status"] == "error"
    assert "no SQLite database" in found["MLflow store"]["detail"]
    assert found["Dagster store"]["status"] == "ok"


def test_an_unreachable_database_is_reported_without_its_password(storage, monkeypatch):
    monkeypatch.setenv("ROMA_STORAGE_DATABASE_URL", "postgresql://u:geheim@127.0.0.1:1/d")
    monkeypatch.setenv("PGPASSWORD", "")
    code, found = health()
    assert code == 1
    assert found["Dagster store"]["status"] == "error"
    assert "geheim" not in json.dumps(found)
    os.environ.pop("PGPASSWORD", None)
