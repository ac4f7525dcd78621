import contextlib
import multiprocessing
import os
import sqlite3

import pytest

from roma_pipelines.registry import store
from roma_pipelines.registry.store import DATABASE, MlflowSettings, StoreError, ensure_store
from tests.time_limits import within


def execute(path, *statements):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = [connection.execute(statement).fetchall() for statement in statements]
        connection.commit()
    return rows[-1]


def revision(path):
    return execute(path, "SELECT version_num FROM alembic_version")[0][0]


def files(root):
    return {p.name for p in root.iterdir() if not p.name.endswith(".lock")}


def test_a_new_store_is_complete_and_keeps_to_its_folder(store_template):
    assert files(store_template.parent) == {DATABASE}
    artifacts = execute(store_template, "SELECT artifact_location FROM experiments")
    assert artifacts == [((store_template.parent / "artifacts" / "0").as_uri(),)]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_store_that_is_ready_is_not_touched(store_root):
    before = (store_root / DATABASE).stat()

    uri = ensure_store(store_root)

    assert uri == f"sqlite:///{store_root / DATABASE}"
    assert (store_root / DATABASE).stat() == before


def test_processes_that_start_together_build_one_store(tmp_path, store_template, monkeypatch):
    """A slow build stands in for MLflow's; fork shares the patch with the children."""
    log = tmp_path / "builds"

    def build(database, backup=None):
        with log.open("a") as file:
            file.write("x")
        database.write_bytes(store_template.read_bytes())

    monkeypatch.setattr(store, "_build", build)
    start = multiprocessing.get_context("fork")
    processes = [start.Process(target=ensure_store, args=(tmp_path / "state",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(within(60))

    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "x"


def test_a_crash_while_building_leaves_nothing_in_the_way(tmp_path, store_template, monkeypatch):
    """The first attempt dies before the rename; the second finds its left-over file."""
    root = tmp_path / "state"
    root.mkdir()
    (root / f".{DATABASE}.building").write_bytes(b"half a database")
    (root / f".{DATABASE}.building-journal").write_bytes(b"half a journal")

    def upgrade_tables(uri, root):
        path = uri.removeprefix("sqlite:///")
        assert not os.path.exists(path)  # noqa: PTH110
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(store_template.read_bytes())

    monkeypatch.setattr(store, "_upgrade_tables", upgrade_tables)

    ensure_store(root)

    assert files(root) == {DATABASE}
    assert revision(root / DATABASE) == revision(store_template)


def test_a_half_migrated_file_without_runs_is_set_aside(store_root, store_template, monkeypatch):
    execute(store_root / DATABASE, "CREATE TABLE _alembic_tmp_latest_metrics (x INT)")
    monkeypatch.setattr(store, "_build", lambda db: db.write_bytes(store_template.read_bytes()))

    ensure_store(store_root)

    assert files(store_root) == {DATABASE, f"{DATABASE}.broken"}
    assert revision(store_root / DATABASE) == revision(store_template)


def test_a_half_migrated_file_with_runs_is_an_error(store_root):
    database = store_root / DATABASE
    execute(
        database,
        "INSERT INTO runs (run_uuid, experiment_id) VALUES ('r1', 0)",
        "DROP TABLE alembic_version",
    )
    before = database.read_bytes()
    with pytest.raises(StoreError, match="half-migrated by a crash and holds 1 runs"):
        ensure_store(store_root)
    assert database.read_bytes() == before


def test_an_older_store_is_upgraded_and_kept(store_root):
    """The newest step is undone by alembic itself, so the upgrade that follows is a real one."""
    import sqlalchemy
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config

    database = store_root / DATABASE
    head = revision(database)
    execute(database, "INSERT INTO runs (run_uuid, experiment_id) VALUES ('r1', 0)")
    config = _get_alembic_config(f"sqlite:///{database}")
    engine = sqlalchemy.create_engine(f"sqlite:///{database}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        try:
            command.downgrade(config, "-1")
        except NotImplementedError:
            pytest.skip("the newest step of this MLflow cannot be undone")
    engine.dispose()
    old = revision(database)
    assert old != head

    ensure_store(store_root)

    assert revision(database) == head
    assert execute(database, "SELECT run_uuid FROM runs") == [("r1",)]
    assert revision(store_root / f"{DATABASE}.{old}.backup") == old


def test_an_older_store_in_use_is_not_upgraded(store_root, monkeypatch):
    database = store_root / DATABASE
    monkeypatch.setattr(store, "_inspect", lambda _: ("older", "abc"))
    monkeypatch.setattr(store, "_build", lambda *_: pytest.fail("built"))
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0.1}))
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another process uses it"):
            ensure_store(store_root)


def test_a_newer_store_is_refused(store_root):
    execute(store_root / DATABASE, "UPDATE alembic_version SET version_num = 'from the future'")
    with pytest.raises(StoreError, match=r"revision from the future, which MLflow 3\.\S+ does not"):
        ensure_store(store_root)


def test_another_file_and_an_impossible_path_are_refused(tmp_path):
    (tmp_path / DATABASE).write_bytes(b"this is a text file" * 100)
    with pytest.raises(StoreError, match="no SQLite database"):
        ensure_store(tmp_path)
    with pytest.raises(StoreError, match="cannot be named"):
        ensure_store(tmp_path / "what?")


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert MlflowSettings().tracking_uri == "http://localhost:5000"
    assert MlflowSettings().experiment_prefix == "roma"
