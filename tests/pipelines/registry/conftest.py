"""An embedded store per test, copied from one that is created once: creation takes seconds."""

import shutil

import pytest

from roma_pipelines.registry.store import DATABASE, MlflowSettings, connect, ensure_store


@pytest.fixture(scope="session")
def store_template(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    ensure_store(root)
    return root / DATABASE


@pytest.fixture
def store_root(store_template, tmp_path):
    root = tmp_path / "state"
    root.mkdir()
    shutil.copyfile(store_template, root / DATABASE)
    return root


@pytest.fixture
def client(store_root):
    return connect(MlflowSettings.from_values({}), store_root)
