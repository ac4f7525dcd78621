import os
import sqlite3
import tarfile
import threading
from pathlib import Path

import dagster as dg
import pytest
from click.testing import CliRunner

from roma_pipelines.cli import main
from roma_pipelines.operations import backup
from roma_pipelines.operations.backup import BackupError, restore_backup, verify, write_backup
from roma_pipelines.registry.runs import find_or_create_run
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.storage import DATABASE_VARIABLE, Storage, prepare_instance


@pytest.fixture
def installation(storage, tmp_path):
    """A root with a history, a registered model with an artifact, and a job."""
    fill(storage, tmp_path)
    return storage


def fill(storage, tmp_path):
    prepare_instance(storage)

    @dg.asset
    def noun() -> dg.MaterializeResult:
        return dg.MaterializeResult(metadata={"answer": 42})

    with dg.DagsterInstance.get() as instance:
        assert dg.materialize([noun], instance=instance).success
    client = connect(MlflowSettings(), storage.mlflow)
    run = find_or_create_run(client, "roma/waves", "0" * 20, "a run", {}, {})
    (tmp_path / "model.txt").write_text("weights")
    client.log_artifact(run, str(tmp_path / "model.txt"))
    client.create_registered_model("waves")
    client.create_model_version("waves", f"{client.get_run(run).info.artifact_uri}/model.txt", run)
    client.set_registered_model_alias("waves", "champion", "1")
    job = storage.jobs / ("a" * 20)
    (job / "checkpoints" / "step-1").mkdir(parents=True)
    (job / "checkpoints" / "step-1" / "model").write_text("large")
    (job / "result.json").write_text("{}")


def what_is_there(root, monkeypatch, tmp_path):
    """Metadata of the asset, and the champion's bytes."""
    import mlflow

    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(root))
    monkeypatch.delenv("DAGSTER_HOME")
    storage = Storage.open()
    prepare_instance(storage)
    with dg.DagsterInstance.get() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("noun"))
    client = connect(MlflowSettings(), storage.mlflow)
    source = client.get_model_version_by_alias("waves", "champion").source
    file = mlflow.artifacts.download_artifacts(source, dst_path=str(tmp_path / "fetched"))
    return event.asset_materialization.metadata["answer"].value, Path(file).read_text()


def test_a_backup_brings_back_history_and_models_at_another_place(
    installation, tmp_path, monkeypatch
):
    file = tmp_path / "b.tar"
    write_backup(installation, file)
    installation.root.rename(tmp_path / "lost")

    assert restore_backup(file, tmp_path / "elsewhere") == str(installation.root)

    assert what_is_there(tmp_path / "elsewhere", monkeypatch, tmp_path) == (42, "weights")
    job = tmp_path / "elsewhere" / "jobs" / ("a" * 20)
    assert (job / "result.json").exists() and not (job / "checkpoints").exists()


@pytest.mark.parametrize("place", [".", "jobs", "backups"])
def test_a_backup_in_the_root_holds_neither_itself_nor_earlier_ones(installation, place):
    folder = installation.root / place
    folder.mkdir(exist_ok=True)
    (folder / ".roma-backup-killed").mkdir()
    (folder / ".roma-backup-killed" / "copy.db").write_bytes(b"half")
    with tarfile.open(installation.root / "of a user.tar", "w") as tar:
        tar.add(installation.root / "layout.json")

    write_backup(installation, folder / "first.tar")
    write_backup(installation, folder / "second.tar")

    assert members(folder / "second.tar") == members(folder / "first.tar")
    assert "of a user.tar" in members(folder / "first.tar")
    assert not any(
        "roma-backup" in name or "tmp" in name for name in members(folder / "second.tar")
    )
    assert not any(
        name.endswith(("first.tar", "second.tar")) for name in members(folder / "second.tar")
    )


def members(file):
    with tarfile.open(file) as tar:
        return {name.removeprefix("root/") for name in tar.getnames()}


def test_only_folders_of_the_root_are_left_out_not_all_of_their_names(installation, tmp_path):
    root, job = installation.root, f"jobs/{'a' * 20}"
    kept = [
        "mlflow/artifacts/1/checkpoints/w",
        "mlflow/artifacts/1/logs/w",
        "datasets/clusters/0/manifest.json",
        "datasets/cache/0/manifest.json",
        f"{job}/outputs/checkpoints/w",
    ]
    left_out = [
        "cache/w",
        "clusters/s/poll.json",
        "logs/w",
        "dagster/logs/w",
        f"{job}/checkpoints/w",
    ]
    for name in kept + left_out:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("content")
    write_backup(installation, tmp_path / "b.tar", with_datasets=True)
    found = members(tmp_path / "b.tar")
    assert set(kept) <= found and not set(left_out) & found


def test_what_a_database_names_is_there_if_it_came_while_databases_were_copied(
    installation, tmp_path, monkeypatch
):
    late = installation.mlflow / "artifacts" / "late"

    def copy_then_write(path, copy):
        late.write_text("logged, then named by the database")
        copy_sqlite(path, copy)

    copy_sqlite = backup._copy_sqlite
    monkeypatch.setattr(backup, "_copy_sqlite", copy_then_write)
    write_backup(installation, tmp_path / "b.tar")
    assert "mlflow/artifacts/late" in members(tmp_path / "b.tar")


def test_what_is_kept_elsewhere_is_named(storage, tmp_path, monkeypatch):
    assert backup.kept_elsewhere(storage) == []
    monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", "https://me:geheim@mlflow.example.org")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    printed = CliRunner().invoke(main, ["backup", str(tmp_path / "b.tar")]).output
    assert "NOT INCLUDED: MLflow's runs and models at https://mlflow.example.org" in printed
    assert f"NOT INCLUDED: Dagster's history in DAGSTER_HOME, {home}" in printed
    (home / "dagster.yaml").write_text("run_storage: {module: elsewhere, class: There}")
    assert "(run_storage)" in backup.kept_elsewhere(storage)[1]


def test_a_copy_of_a_database_that_is_written_to_is_whole(installation, tmp_path):
    database = installation.mlflow / "mlflow.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE pairs (n INTEGER, filler TEXT)")
    done = threading.Event()

    def write():
        connection = sqlite3.connect(database, timeout=30)
        while not done.is_set():
            with connection:  # two rows that are always there together
                for n in (0, 1):
                    connection.execute("INSERT INTO pairs VALUES (?, ?)", (n, "x" * 500))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        write_backup(installation, tmp_path / "b.tar")
    finally:
        done.set()
        writer.join()
    restore_backup(tmp_path / "b.tar", tmp_path / "other")
    copy = sqlite3.connect(tmp_path / "other" / "mlflow" / "mlflow.db")
    assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    n = copy.execute("SELECT count(*) FROM pairs").fetchone()[0]
    assert n > 0 and n % 2 == 0


def test_a_backup_that_was_changed_or_cut_is_refused(installation, tmp_path):
    file = tmp_path / "b.tar"
    write_backup(installation, file)
    content = file.read_bytes()
    at = content.index(b"weights")
    file.write_bytes(content[:at] + b"WEIGHTS" + content[at + 7 :])
    with pytest.raises(BackupError, match=r"damaged: .*model\.txt"):
        verify(file)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(BackupError, match="not a complete backup"):
        restore_backup(file, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_nothing_is_overwritten(installation, tmp_path):
    file = tmp_path / "b.tar"
    runner = CliRunner()
    assert "verified" in runner.invoke(main, ["backup", str(file)]).output
    again = runner.invoke(main, ["backup", str(file)])
    assert again.exit_code == 1 and "exists; give another name" in again.output
    into = runner.invoke(main, ["restore", str(file)])
    assert into.exit_code == 1 and "is not empty" in into.output


def test_with_postgres_the_database_comes_along(postgres, tmp_path, monkeypatch):
    for name in ("PGPASSWORD", "DAGSTER_HOME", DATABASE_VARIABLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("ROMA_STORAGE_DATABASE_URL", postgres.create("before"))
    storage = Storage.open()
    fill(storage, tmp_path)
    file = tmp_path / "b.tar"
    write_backup(storage, file)
    assert not postgres.is_told_by(file.read_bytes())
    with pytest.raises(BackupError, match="has tables of an installation"):
        restore_backup(file, tmp_path / "elsewhere")

    monkeypatch.setenv("ROMA_STORAGE_DATABASE_URL", postgres.create("afterwards"))
    restore_backup(file, tmp_path / "elsewhere")

    assert what_is_there(tmp_path / "elsewhere", monkeypatch, tmp_path) == (42, "weights")
    for name in ("PGPASSWORD", "DAGSTER_HOME", DATABASE_VARIABLE):
        os.environ.pop(name, None)
