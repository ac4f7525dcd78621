"""What all tests share: nobody's settings, and an MLflow store that is made once."""

import gc
import os
import shutil
from collections import Counter

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """No garbage is looked for among the modules, which stay, neither while they are imported nor later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    """Put files with the most slow tests first, then those with the most tests; mark what may run twice.

    Workers of ``pytest -n`` take whole files in this order: none is left with a long one at the end.
    Where daemons of SLURM or a browser take part, one failure may be theirs: such a test is run a second
    time, and the summary names it. All other tests have one try, also those that look for rare faults.
    """
    for item in items:
        seeks_faults = item.get_closest_marker("chaos") or item.path.name == "test_interruptions.py"
        of_slurm = "shared_cluster" in getattr(item, "fixturenames", ()) and not seeks_faults
        if of_slurm or item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.flaky(reruns=1))
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path], item.path))


@pytest.fixture(scope="session", autouse=True)
def storage_root(tmp_path_factory):
    """Code that runs outside a test, such as a thread that ends late, writes nothing into the project."""
    os.environ["ROMA_STORAGE_ROOT"] = str(tmp_path_factory.mktemp("roma"))


@pytest.fixture(autouse=True)
def nobodys_settings(monkeypatch, storage_root):
    """No test reads the settings, keys or modes of the person who runs it, or leaves any behind."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name == "ROMA_STORAGE_ROOT":
            continue
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
