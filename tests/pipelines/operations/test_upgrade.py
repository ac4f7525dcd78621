"""An older layout of the storage root is taken to the present one, once, under a lock."""

import threading

import pytest

import roma_pipelines.storage as module
from roma_core.files import read_json, write_json
from roma_pipelines.storage import Storage, StorageError


@pytest.fixture
def old_root(tmp_path, monkeypatch):
    """A root of version 1 in a world whose version is 3; each step leaves a line."""
    Storage.open(tmp_path)
    steps = []

    def step(n):
        def run(storage):
            assert read_json(storage.root / "layout.json")["schema_version"] == n
            steps.append(n)

        return run

    monkeypatch.setattr(module, "LAYOUT_VERSION", 3)
    monkeypatch.setattr(module, "UPGRADES", {1: step(1), 2: step(2)})
    return tmp_path, steps


def test_every_step_is_made_once_whoever_opens(old_root):
    root, steps = old_root
    threads = [threading.Thread(target=Storage.open, args=(root,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps == [1, 2]
    assert read_json(root / "layout.json") == {"schema_version": 3}


def test_a_step_that_was_interrupted_is_made_again(old_root, monkeypatch):
    root, steps = old_root

    def crash(storage):
        raise KeyboardInterrupt

    monkeypatch.setitem(module.UPGRADES, 2, crash)
    with pytest.raises(KeyboardInterrupt):
        Storage.open(root)
    assert read_json(root / "layout.json") == {"schema_version": 2}
    monkeypatch.setitem(module.UPGRADES, 2, lambda storage: steps.append("again"))
    Storage.open(root)
    assert steps == [1, "again"]


@pytest.mark.parametrize("version", [0, 99, "1", None])
def test_a_layout_nobody_knows_is_left_alone(tmp_path, version):
    Storage.open(tmp_path)
    write_json(tmp_path / "layout.json", {"schema_version": version})
    with pytest.raises(StorageError, match="written by another version"):
        Storage.open(tmp_path)
