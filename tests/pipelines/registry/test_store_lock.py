"""The lock of a registered model on a real MLflow server, as several computers would use it."""

import threading
import time

import pytest

from roma_core.serving.registry_client import connect
from roma_pipelines.registry.gate import GATE_TAG
from roma_pipelines.registry.promotion import (
    CHAMPION,
    PREVIOUS,
    PromotionRefused,
    audit,
    promote,
)
from roma_pipelines.registry.store import RegistryBusy, model_lock
from roma_pipelines.registry.versions import COMPARED_TAG, version_at
from tests.time_limits import within

pytestmark = pytest.mark.slow


@pytest.fixture
def rivals(server):
    """Three versions of a model, each compared with no champion."""
    server.create_registered_model("rivals")
    for _ in range(3):
        tags = {GATE_TAG: "passed", COMPARED_TAG: "none"}
        server.create_model_version("rivals", "s3://nowhere/model", None, tags)
    yield server
    server.delete_registered_model("rivals")


def locks(client):
    return [m.name for m in client.search_registered_models() if ".lock" in m.name]


def test_of_promotions_at_once_through_a_server_one_wins(rivals):
    """Four of them, each with a client of its own; all were compared with no champion."""
    refused = []

    def promoted(version):
        try:
            mine = connect(rivals.tracking_uri)
            promote(mine, "rivals", version, reason="better", actor="tester", evidence={})
        except PromotionRefused as error:
            refused.append(str(error))

    threads = [threading.Thread(target=promoted, args=(v,)) for v in ("1", "2", "3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (event,) = audit(rivals, "rivals")
    assert version_at(rivals, "rivals", CHAMPION) == event.version
    assert version_at(rivals, "rivals", PREVIOUS) is None
    assert len(refused) == 2 and all("the champion is now" in text for text in refused)
    assert locks(rivals) == []


def test_a_lock_whose_holder_died_is_broken_and_a_living_one_is_not(rivals):
    rivals.create_registered_model("rivals.lock", tags={"roma.holder": "dead-1"})
    order = []

    def enter(number):
        with model_lock(
            connect(rivals.tracking_uri), "rivals", dead_after_s=within(1), timeout_s=within(30)
        ):
            order.append(number)
            time.sleep(0.3)
            order.append(number)

    threads = [threading.Thread(target=enter, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[::2] == order[1::2] and sorted(order[::2]) == [0, 1, 2], "one after the other"
    assert locks(rivals) == []

    with (
        model_lock(rivals, "rivals"),
        pytest.raises(RegistryBusy, match=r"rivals\.lock is held by .*delete the registered model"),
        model_lock(rivals, "rivals", dead_after_s=60, timeout_s=0.5),
    ):
        pytest.fail("two hold the lock")
