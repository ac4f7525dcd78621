"""A real MLflow server: promotions from several computers, and copies from another registry."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from roma_core.serving.registry_client import FetchError, connect, fetch, resolve
from roma_pipelines.registry.gate import GATE_TAG
from roma_pipelines.registry.lineage import ORIGIN_TAG, transfer
from roma_pipelines.registry.lock import RegistryBusy, model_lock
from roma_pipelines.registry.promotion import CHAMPION, PREVIOUS, NotPromoted, audit, promote
from roma_pipelines.registry.versions import CANDIDATE, COMPARED_TAG, version_at
from tests.pipelines.registry.conftest import registered_as

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(mlflow_server):
    client = connect(mlflow_server)
    client.create_registered_model("rivals")
    for _ in range(3):
        tags = {GATE_TAG: "passed", COMPARED_TAG: "none"}
        client.create_model_version("rivals", "s3://nowhere/model", None, tags)
    return client


def locks(client):
    return [m.name for m in client.search_registered_models() if ".lock" in m.name]


def test_of_promotions_at_once_through_a_server_one_wins(server):
    """Four of them, each with a client of its own; all were compared with no champion."""
    refused = []

    def promoted(version):
        try:
            mine = connect(server.tracking_uri)
            promote(mine, "rivals", version, why="better", who="tester", evidence={})
        except NotPromoted as error:
            refused.append(str(error))

    threads = [threading.Thread(target=promoted, args=(v,)) for v in ("1", "2", "3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (event,) = audit(server, "rivals")
    assert version_at(server, "rivals", CHAMPION) == event.version
    assert version_at(server, "rivals", PREVIOUS) is None
    assert len(refused) == 2 and all("the champion is now" in text for text in refused)
    assert locks(server) == []


def test_a_lock_whose_holder_died_is_broken_and_a_living_one_is_not(server):
    server.create_registered_model("rivals.lock", tags={"roma.holder": "dead-1"})
    order = []

    def enter(number):
        with model_lock(connect(server.tracking_uri), "rivals", dead_after_s=1, patience_s=30):
            order.append(number)
            time.sleep(0.3)
            order.append(number)

    threads = [threading.Thread(target=enter, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[::2] == order[1::2] and sorted(order[::2]) == [0, 1, 2], "one after the other"
    assert locks(server) == []

    with (
        model_lock(server, "rivals"),
        pytest.raises(RegistryBusy, match=r"rivals\.lock is held by .*delete the registered model"),
        model_lock(server, "rivals", dead_after_s=60, patience_s=0.5),
    ):
        pytest.fail("two hold the lock")


def test_a_copy_in_another_registry_is_the_same_and_is_promoted_there(
    server, client, toy_package, other_package, tmp_path
):
    first = registered_as(client, toy_package, "moved", "k1")
    promote(client, "moved", first, why="first", who="tester", evidence={})
    second = registered_as(client, other_package, "moved", "k2", **{COMPARED_TAG: first})

    late = transfer(client, server, f"models:/moved/{second}", "roma/moved")
    tags = server.get_model_version("moved", late).tags
    assert tags[ORIGIN_TAG].endswith(f"models:/moved/{second}")
    assert "is not here" in tags[COMPARED_TAG], "its rival was never copied"
    server.delete_registered_model("moved")

    copied = transfer(client, server, "models:/moved@champion", "roma/moved")
    assert copied == transfer(client, server, "models:/moved@champion", "roma/moved")
    promote(server, "moved", copied, why="proven", who="tester", evidence={})
    copied = transfer(client, server, f"models:/moved/{second}", "roma/moved")
    assert version_at(server, "moved", CANDIDATE) == copied == "2"
    assert server.get_model_version("moved", copied).tags[COMPARED_TAG] == "1"
    promote(server, "moved", copied, why="better", who="tester", evidence={})

    version = resolve(server, "models:/moved@champion")
    assert version.manifest_sha256 == other_package[1]
    assert (fetch(server, version, tmp_path) / "artifacts" / "package" / "model.pt2").is_file()
    assert server.get_model_version("moved", copied).description.startswith("# toy")


def test_a_damaged_version_is_not_copied(server, client, toy_package):
    version = registered_as(client, toy_package, "damaged", "k1")
    place = Path(client.get_model_version_download_uri("damaged", version).removeprefix("file://"))
    weights = place / "artifacts" / "package" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(FetchError, match=r"weights\.safetensors was changed"):
        transfer(client, server, f"models:/damaged/{version}", "roma/damaged")
    assert "damaged" not in [m.name for m in server.search_registered_models()]


def test_a_thin_client_fetches_through_the_server_without_torch(
    server, client, toy_package, tmp_path
):
    version = registered_as(client, toy_package, "thin", "k1")
    copied = transfer(client, server, f"models:/thin/{version}", "roma/thin")
    program = (
        "import sys; from pathlib import Path\n"
        "from roma_core.serving import client, fetching\n"
        f"registry = fetching.connect({server.tracking_uri!r})\n"
        f"version = fetching.resolve(registry, 'models:/thin/{copied}')\n"
        "print(fetching.fetch(registry, version, Path(sys.argv[1])))\n"
        "print([m for m in ('torch', 'roma_pipelines') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
