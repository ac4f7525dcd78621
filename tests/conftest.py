"""What all tests share: nobody's settings, and an MLflow store that is made once."""

import os
import shutil

import pytest


@pytest.hookimpl(tryfirst=True)  # before the plugin that reads the groups
def pytest_collection_modifyitems(items):
    """Of tests that run side by side, a file stays with one worker, and SLURM with one of them.

    Many files tell one story, and a cluster of two nodes is as much as a worker's share.
    """
    files = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    for path, of_file in files.items():
        on_slurm = any("shared_cluster" in item.fixturenames for item in of_file)
        for item in of_file:
            item.add_marker(pytest.mark.xdist_group("slurm" if on_slurm else str(path)))


@pytest.fixture(autouse=True)
def nobodys_settings(monkeypatch):
    """No test reads the settings, keys or modes of the person who runs it, or leaves any behind."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.upper().startswith(("ROMA", "WANDB")) or name == "MLFLOW_RUN_ID":
            monkeypatch.delenv(name)
    monkeypatch.setenv("ROMA_ENV_FILE", os.devnull)
    yield
    monkeypatch.undo()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def store_template(tmp_path_factory):
    from roma_pipelines.registry.store import DATABASE, ensure_store

    root = tmp_path_factory.mktemp("store")
    ensure_store(root)
    return root / DATABASE


@pytest.fixture
def store_root(store_template, tmp_path):
    """An embedded store of the test's own, copied: creation takes seconds."""
    root = tmp_path / "state"
    root.mkdir()
    shutil.copyfile(store_template, root / store_template.name)
    return root
