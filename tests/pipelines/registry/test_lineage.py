"""Replay where encoder and classifier are of different data, and copies in another registry."""

import subprocess
import sys
from pathlib import Path

import pytest

from roma_core.files import read_json, write_json
from roma_core.serving.registry_client import FetchError, fetch, resolve
from roma_pipelines.registry import lineage
from roma_pipelines.registry.lineage import ORIGIN_TAG, plan_replay, transfer
from roma_pipelines.registry.promotion import promote
from roma_pipelines.registry.versions import CANDIDATE, COMPARED_TAG, version_at
from tests.pipelines.registry.conftest import registered_as


def test_every_stage_gets_the_version_of_the_data_that_it_had(client, tmp_path, monkeypatch):
    for digest in ("a" * 64, "b" * 64):
        folder = tmp_path / "sets" / "waves" / digest[:16]
        folder.mkdir(parents=True)
        write_json(folder / "manifest.json", {"digest": digest})
    gone = str(tmp_path / "gone")
    configs = {
        "p1": {"dataset": gone, "dataset_digest": "a" * 64},
        "f1": {"dataset": gone, "dataset_digest": "b" * 64, "weights": "w"},
        "e1": {"dataset": gone, "dataset_digest": "b" * 64},
    }
    monkeypatch.setattr(lineage, "_config_of", lambda _client, _name, job: dict(configs[job]))
    client.create_registered_model("waves")
    tags = dict(zip(lineage._STAGES.values(), configs, strict=True))
    client.create_model_version("waves", (tmp_path / "model").as_uri(), None, tags)

    plan = plan_replay(client, "waves", "1", tmp_path / "out", tmp_path / "sets")

    planned = {s: read_json(folder / "config.json") for s, folder in plan.folders.items()}
    first, second = (str(tmp_path / "sets" / "waves" / (k * 16)) for k in "ab")
    assert {s: config["dataset"] for s, config in planned.items()} == {
        "pretrain": first,
        "finetune": second,
        "evaluate": second,
    }
    assert planned["evaluate"]["trained_on"] == [first, second]
    configs["p1"]["dataset_digest"] = "c" * 64
    with pytest.raises(ValueError, match="the data set of version cccccccccccccccc is neither"):
        plan_replay(client, "waves", "1", tmp_path / "other", tmp_path / "sets")


@pytest.mark.slow
def test_a_copy_in_another_registry_is_the_same_and_is_promoted_there(
    server, client, toy_package, other_package, tmp_path
):
    first = registered_as(client, toy_package, "moved", "k1")
    promote(client, "moved", first, reason="first", actor="tester", evidence={})
    second = registered_as(client, other_package, "moved", "k2", **{COMPARED_TAG: first})

    late = transfer(client, server, f"models:/moved/{second}", "roma/moved")
    tags = server.get_model_version("moved", late).tags
    assert tags[ORIGIN_TAG].endswith(f"models:/moved/{second}")
    assert "is not here" in tags[COMPARED_TAG], "its rival was never copied"
    server.delete_registered_model("moved")

    copied = transfer(client, server, "models:/moved@champion", "roma/moved")
    assert copied == transfer(client, server, "models:/moved@champion", "roma/moved")
    promote(server, "moved", copied, reason="proven", actor="tester", evidence={})
    copied = transfer(client, server, f"models:/moved/{second}", "roma/moved")
    assert version_at(server, "moved", CANDIDATE) == copied == "2"
    assert server.get_model_version("moved", copied).tags[COMPARED_TAG] == "1"
    promote(server, "moved", copied, reason="better", actor="tester", evidence={})

    version = resolve(server, "models:/moved@champion")
    assert version.manifest_sha256 == other_package[1]
    assert (fetch(server, version, tmp_path) / "artifacts" / "package" / "model.pt2").is_file()
    assert server.get_model_version("moved", copied).description.startswith("# toy")


@pytest.mark.slow
def test_a_damaged_version_is_not_copied(server, client, toy_package):
    version = registered_as(client, toy_package, "damaged", "k1")
    place = Path(client.get_model_version_download_uri("damaged", version).removeprefix("file://"))
    weights = place / "artifacts" / "package" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(FetchError, match=r"weights\.safetensors was changed"):
        transfer(client, server, f"models:/damaged/{version}", "roma/damaged")
    assert "damaged" not in [m.name for m in server.search_registered_models()]


@pytest.mark.slow
def test_a_thin_client_fetches_through_the_server_without_torch(
    server, client, toy_package, tmp_path
):
    version = registered_as(client, toy_package, "thin", "k1")
    copied = transfer(client, server, f"models:/thin/{version}", "roma/thin")
    program = (
        "import sys; from pathlib import Path\n"
        "from roma_core.serving import client, registry_client\n"
        f"registry = registry_client.connect({server.tracking_uri!r})\n"
        f"version = registry_client.resolve(registry, 'models:/thin/{copied}')\n"
        "print(registry_client.fetch(registry, version, Path(sys.argv[1])))\n"
        "print([m for m in ('torch', 'roma_pipelines') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
