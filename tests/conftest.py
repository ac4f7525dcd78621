"""What all tests share: nobody's settings, and an MLflow store that is made once."""

import os
import shutil

import pytest


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
