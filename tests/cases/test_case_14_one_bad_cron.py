"""One experiment that cannot be used is reported by file and setting, and the others still work."""

import html
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from roma_pipelines.experiment import Experiment

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "roma_pipelines" / "defs" / "japanese_vowels" / "defs.yaml"
OTHERS = {path.parent.name for path in SHIPPED.parents[1].glob("*/defs.yaml")}
SHADOWED = "spirals"
LOOK = """
import json, sys
from click.testing import CliRunner
from starlette.testclient import TestClient
from roma_pipelines.cli import main
from roma_pipelines.definitions import defs
from roma_pipelines.pages.overview import create_app
from roma_pipelines.storage import Storage, prepare_instance
prepare_instance(Storage.open())
loaded, folders = defs(), sys.argv[1:]
graph = loaded.resolve_asset_graph()
said = lambda command, name: CliRunner().invoke(main, [command, name]).output
found = {
    "names": sorted({k.path[0] for k in graph.materializable_asset_keys}),
    "errors": {"/".join(k.path[:-1]): graph.get(k).description for k in graph.external_asset_keys},
    "schedules": sorted(s.name for s in loaded.schedules),
    "page": TestClient(create_app(Storage.open(), "http://d", "http://m"), "http://localhost").get("/").text,
    "plan": {name: said("plan", name) for name in folders},
    "demo": {name: said("demo", name) for name in folders[1:]},
    "health": json.loads(CliRunner().invoke(main, ["health", "--json"]).output),
    "unknown": said("demo", "never"),
}
json.dump(found, open("found.json", "w"))
"""


def run(project, *command):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ROMA_STORAGE_ROOT": str(project / "storage"),
    }
    return subprocess.run(
        [sys.executable, *command], cwd=project, env=environment, capture_output=True, text=True
    )


def with_(attributes, **changes):
    return yaml.safe_dump(
        {
            "type": "roma_pipelines.components.RomaExperiment",
            "attributes": {**attributes, "name": "broken", **changes},
        }
    )


KINDS = {
    "z_cron": (lambda a: with_(a, schedule="0 3 * *"), "schedule: '0 3 * *' is no cron expression"),
    "z_misspelt": (lambda a: with_(a, schedul="@daily"), "schedul: not a setting; the closest one"),
    "z_yaml": (lambda a: "attributes: {name: broken, [", "is not valid YAML: line 1"),
    "z_latin": (
        lambda a: with_(a).replace("broken", "é").encode("latin-1"),
        "can't decode byte 0xe9",
    ),
    "z_empty": (lambda a: "", "expected `type` and `attributes`"),
    "z_gone": (None, "No such file or directory"),
    "z_encoder": (
        lambda a: with_({k: v for k, v in a.items() if k != "pretraining"}, pretrained_from="gone"),
        "pretrained_from: gone: no valid experiment of that name",
    ),
    "z_name": (lambda a: with_(a, name="plasticc"), "name: another experiment is called plasticc"),
    "z_asset": (
        lambda a: with_(a, name="fresh", automation={"freshness_h": {"report": 3}}),
        "automation.freshness_h.report: no such asset",
    ),
    "z_type": (
        lambda a: with_(a).replace("RomaExperiment", "Nope"),
        "type: expected roma_pipelines.components.RomaExperiment, got 'roma_pipelines.components.Nope'",
    ),
    "z_typeless": (
        lambda a: with_(a).rpartition("type: ")[0],
        "expected `type` and `attributes` of an experiment",
    ),
    "z_key": (
        lambda a: with_(a) + "foo: 1\n",
        "foo: no such key; expected one of type, attributes",
    ),
    "z_owners": (lambda a: with_(a, name="owned", owners=["somebody"]), "somebody"),
    SHADOWED: (
        lambda a: with_(a),
        "spirals is a shipped experiment; choose another folder and name",
    ),
}
"""Folder of an experiment that cannot be used -> its file, and what is said of it."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every place says, with all broken experiments at once, and two good ones of one folder name."""
    attributes = yaml.safe_load(SHIPPED.read_text())["attributes"]
    project = tmp_path_factory.mktemp("project")
    defs = project / "defs"
    for folder, (text, _) in KINDS.items():
        path = defs / folder / "defs.yaml"
        path.parent.mkdir(parents=True)
        if text is None:
            path.symlink_to(project / "gone.yaml")
        elif isinstance(content := text(attributes), bytes):
            path.write_bytes(content)
        else:
            path.write_text(content)
    for name in ("first", "second"):
        path = defs / name / "x" / "defs.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(with_(attributes, name=name))
    done = run(project, "-c", LOOK, "japanese_vowels", *KINDS)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((project / "found.json").read_text())


@pytest.mark.parametrize("folder", KINDS)
def test_a_broken_experiment_says_everywhere_what_is_wrong(found, folder):
    expected = KINDS[folder][1]
    (health,) = [one for one in found["health"] if one["name"] == "experiments"]
    assert health["status"] == "error"
    places = found["errors"][folder], found["plan"][folder], found["demo"][folder], health["detail"]
    for said in (*places, html.unescape(found["page"])):
        assert f"{folder}/defs.yaml" in said and expected in said


def test_the_others_load(found):
    assert set(found["names"]) == OTHERS - {SHADOWED} | {"first", "second"}
    assert set(found["errors"]) == set(KINDS)
    assert "japanese_vowels_retraining" in found["schedules"]
    assert "Error" not in found["plan"]["japanese_vowels"]
    assert "no experiment 'never'; available: " in found["unknown"]
    assert "says why: spirals, z_asset, z_cron" in found["unknown"]


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
