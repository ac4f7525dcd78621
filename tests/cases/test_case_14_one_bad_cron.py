"""One experiment that cannot be used is reported by file and setting, and the others still work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from roma_pipelines.experiment import Experiment

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "roma_pipelines" / "defs" / "japanese_vowels" / "defs.yaml"
OTHERS = {path.parent.name for path in SHIPPED.parents[1].glob("*/defs.yaml")}
LOAD = """
import json
from roma_pipelines.definitions import defs
graph = defs().resolve_asset_graph()
errors = {k.path[0]: graph.get(k).description for k in graph.external_asset_keys}
keys = {k.path[0] for k in graph.materializable_asset_keys}
print(json.dumps([sorted(keys), errors, sorted(s.name for s in defs().schedules)]))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the packages, whose experiments a test may add to."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("roma_core", "roma_pipelines"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def run(checkout, *command):
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ROMA_STORAGE_ROOT": str(checkout / "storage"),
    }
    return subprocess.run(
        [sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True
    )


def with_(attributes, **changes):
    return yaml.safe_dump(
        {
            "type": "roma_pipelines.components.RomaExperiment",
            "attributes": {**attributes, "name": "broken", **changes},
        }
    )


KINDS = {
    "cron": (lambda a: with_(a, schedule="0 3 * *"), "schedule: '0 3 * *' is no cron expression"),
    "misspelt": (lambda a: with_(a, schedul="@daily"), "schedul: not a setting; the closest one"),
    "not YAML": (lambda a: "attributes: {name: broken, [", "is not valid YAML: line 1"),
    "encoder": (
        lambda a: with_({k: v for k, v in a.items() if k != "pretraining"}, pretrained_from="gone"),
        "pretrained_from: gone: no valid experiment of that name",
    ),
    "name": (lambda a: with_(a, name="plasticc"), "another experiment has this name"),
    "automation": (
        lambda a: with_(a, automation={"freshness_h": {"report": 3}}),
        "automation.freshness_h.report: no such asset",
    ),
    "owners": (lambda a: with_(a, owners=["somebody"]), "somebody"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_others_load_and_the_broken_one_says_what_is_wrong(checkout, kind):
    text, expected = KINDS[kind]
    folder = checkout / "roma_pipelines" / "defs" / "a_broken"
    folder.mkdir()
    (folder / "defs.yaml").write_text(text(yaml.safe_load(SHIPPED.read_text())["attributes"]))

    try:
        done = run(checkout, "-c", LOAD)
    finally:
        shutil.rmtree(folder)

    assert done.returncode == 0, done.stderr[-2000:]
    names, errors, schedules = json.loads(done.stdout)
    assert set(names) == OTHERS
    assert "japanese_vowels_retraining" in schedules
    assert list(errors) == ["plasticc" if kind == "name" else "a_broken"]  # its second file
    (error,) = errors.values()
    assert expected in error
    if kind in ("cron", "misspelt", "not YAML"):
        assert "a_broken/defs.yaml" in error
    assert "is left out" in done.stderr


def test_folders_of_one_name_keep_their_experiments_beside_a_broken_one(checkout):
    attributes = yaml.safe_load(SHIPPED.read_text())["attributes"]
    defs = checkout / "roma_pipelines" / "defs"
    folders = [defs / "zz_a" / "x", defs / "zz_b" / "x", defs / "zz_c" / "x"]
    changes = [{"name": "first"}, {"name": "second"}, {"schedule": "0 3 * *"}]
    for folder, changed in zip(folders, changes, strict=True):
        folder.mkdir(parents=True)
        (folder / "defs.yaml").write_text(with_(attributes, **changed))

    try:
        done = run(checkout, "-c", LOAD)
    finally:
        for folder in folders:
            shutil.rmtree(folder.parent)

    assert done.returncode == 0, done.stderr[-2000:]
    names, errors, _ = json.loads(done.stdout)
    assert set(names) == OTHERS | {"first", "second"}
    assert list(errors) == ["zz_c"] and "zz_c/x/defs.yaml: schedule" in errors["zz_c"]


def test_commands_name_file_and_setting(checkout):
    folder = checkout / "roma_pipelines" / "defs" / "a_broken"
    folder.mkdir()
    attributes = yaml.safe_load(SHIPPED.read_text())["attributes"]
    (folder / "defs.yaml").write_text(with_(attributes, schedule="0 3 * *"))
    try:
        plans = {
            name: run(checkout, "-m", "roma_pipelines.cli", "plan", name)
            for name in ("a_broken", "japanese_vowels")
        }
        demo = run(checkout, "-m", "roma_pipelines.cli", "demo", "a_broken")
        health = run(checkout, "-m", "roma_pipelines.cli", "health", "--json")
    finally:
        shutil.rmtree(folder)

    assert plans["japanese_vowels"].returncode == 0, plans["japanese_vowels"].stderr
    for done in (plans["a_broken"], demo):
        (line,) = [x for x in done.stderr.splitlines() if x.startswith("Error: ")]
        assert done.returncode == 1
        assert "a_broken/defs.yaml: schedule: '0 3 * *' is no cron expression" in line
    found = {one["name"]: one for one in json.loads(health.stdout)}
    assert health.returncode == 1 and found["experiments"]["status"] == "error"
    assert "a_broken/defs.yaml: schedule" in found["experiments"]["detail"]


@pytest.mark.parametrize(
    "cron", ["0 3 * *", "0 25 * * *", "0 0 30 2 *", "whenever", "", "0 3 * * * *"]
)
def test_a_schedule_that_never_fires_is_refused(cron):
    attributes = yaml.safe_load(SHIPPED.read_text())["attributes"]
    with pytest.raises(ValueError, match=r"experiment japanese_vowels: schedule: .* no cron"):
        Experiment.parse({**attributes, "schedule": cron})


@pytest.mark.parametrize("cron", ["@daily", "0 3 * * 7", "0  3 * * *"])
def test_a_schedule_that_cron_knows_is_accepted(cron):
    attributes = yaml.safe_load(SHIPPED.read_text())["attributes"]
    assert Experiment.parse({**attributes, "schedule": cron}).schedule == cron
