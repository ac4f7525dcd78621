"""What tests of operation share: a storage root of the test's own, and one PostgreSQL."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from roma_pipelines.storage import Storage, prepare_instance
from tests.pipelines.real_postgres import Postgres, real_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running server; each test makes a database of its own in it."""
    with real_postgres() as server:
        yield server


@pytest.fixture
def storage(store_template, tmp_path, monkeypatch) -> Iterator[Storage]:
    """A new root with an empty registry and an empty history, that the settings name."""
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("DAGSTER_HOME", "")
    monkeypatch.delenv("DAGSTER_HOME")
    storage = Storage.open()
    (storage.mlflow / "mlflow.db").write_bytes(store_template.read_bytes())
    prepare_instance(storage)
    yield storage
    os.environ.pop("DAGSTER_HOME", None)


@pytest.fixture(scope="session")
def toy_package(tmp_path_factory) -> tuple[Path, str]:
    """Folder of a small model's package, and the sha256 of its manifest."""
    from tests.core.serving import toy

    folder = tmp_path_factory.mktemp("packages") / "toy"
    return folder, toy.build_toy(folder)
