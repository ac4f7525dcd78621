"""The lock of a registered model, as processes on several computers would use it."""

import contextlib
import http.client
import itertools
import os
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mlflow.exceptions import MlflowException

from roma_pipelines.registry import store
from roma_pipelines.registry.promotion import CHAMPION, PREVIOUS, PromotionRefused, audit, promote
from roma_pipelines.registry.store import MlflowSettings, RegistryBusy, model_lock
from roma_pipelines.registry.versions import version_at
from tests.pipelines.registry.contender import add_rivals, contender, locks
from tests.time_limits import wait_until, within

pytestmark = pytest.mark.slow


@pytest.fixture
def rivals(server):
    add_rivals(server)
    yield server
    for name in ["rivals", *locks(server)]:
        server.delete_registered_model(name)


@contextlib.contextmanager
def slow(address, delay_s, which="", let_go=None, arrived=None):
    """A server that passes requests on to another one, those that match ``which`` after a while.

    The event ``let_go`` ends the wait early; ``arrived`` is set when such a request was answered.
    """
    target = urllib.parse.urlsplit(address).netloc
    let_go, arrived = let_go or threading.Event(), arrived or threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self):
            if delayed := re.match(which, self.requestline):
                let_go.wait(delay_s)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            connection = http.client.HTTPConnection(target)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            content = response.read()
            if delayed:
                arrived.set()
            with contextlib.suppress(OSError):  # the client no longer waits
                self.send_response(response.status)
                self.send_header("Content-Type", response.headers["Content-Type"])
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = answer

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}"
        proxy.shutdown()


def test_of_promotions_at_once_through_a_server_one_wins(rivals):
    """Three processes; all versions were compared with no champion."""
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(contender(rivals.tracking_uri, f"promote:{v}")) for v in "123"
        ]
        results = [process.result() for process in started]

    (event,) = audit(rivals, "rivals")
    assert version_at(rivals, "rivals", CHAMPION) == event.version
    assert version_at(rivals, "rivals", PREVIOUS) is None
    refused = [one["error"] for one in results if "error" in one]
    assert len(refused) == 2 and all("the champion is now" in text for text in refused)
    assert locks(rivals) == []


def test_a_slow_server_delays_a_promotion_and_nothing_else(rivals):
    """The lease covers a request that is slower than the whole promotion of the other."""
    with (
        slow(rivals.tracking_uri, 0.5) as address,
        contender(address, "promote:1") as first,
        contender(rivals.tracking_uri, "promote:2") as second,
    ):
        results = [first.result(), second.result()]

    (event,) = audit(rivals, "rivals")
    assert version_at(rivals, "rivals", CHAMPION) == event.version
    assert sum("the champion is now" in one.get("error", "") for one in results) == 1


def test_a_holder_that_the_server_delays_beyond_its_lease_moves_nothing(rivals):
    with (
        slow(rivals.tracking_uri, 2.0) as address,
        contender(address, "promote:1", lease_s=12, call_s=6) as late,
    ):
        wait_until(lambda: locks(rivals), 30)
        with contender(rivals.tracking_uri, "promote:2", lease_s=12, call_s=6) as other:
            results = {one["version"]: one for one in (late.result(), other.result())}

    events = audit(rivals, "rivals")
    moved = [version for version, one in results.items() if "error" not in one]
    assert [event.version for event in events] == moved, "exactly what was recorded was moved"
    assert version_at(rivals, "rivals", CHAMPION) == moved[-1] == "2"
    assert "RegistryBusy: rivals.lock was lost, or expires" in results["1"]["error"]


def test_a_move_that_arrives_after_it_was_given_up_comes_before_the_next(
    rivals, monkeypatch, caplog
):
    monkeypatch.setattr(store, "_LEASE_S", 6.0)
    monkeypatch.setattr(store, "_CALL_S", 2.0)
    moves = "POST /api/2.0/mlflow/registered-models/alias "
    with (
        slow(rivals.tracking_uri, 5, moves) as address,
        contender(address, "promote:1", lease_s=6, call_s=2) as late,
    ):
        assert late.wait() != 0, "the request is given up"
        with pytest.raises(PromotionRefused, match="the champion is now 1"):
            promote(rivals, "rivals", "2", reason="better", actor="tester", evidence={})

    assert [event.version for event in audit(rivals, "rivals")] == ["1"]
    rivals.set_registered_model_alias("rivals", CHAMPION, "3")
    with pytest.raises(PromotionRefused):
        promote(rivals, "rivals", "2", reason="better", actor="tester", evidence={})
    assert "champion of rivals is version 3, but the audit ends with version 1" in caplog.text


def test_a_release_that_arrives_late_leaves_the_lock_of_another(rivals):
    release = "(DELETE .*registered-models/delete|POST .*registered-models/rename) "
    let_go, arrived = threading.Event(), threading.Event()
    with (
        slow(rivals.tracking_uri, within(60), release, let_go, arrived) as address,
        contender(address, "enter:1", lease_s=20, call_s=2) as late,
    ):
        late.result()
        # as one that had waited for the lock breaks it
        dead = rivals.get_registered_model("rivals.lock").tags["roma.holder"]
        rivals.rename_registered_model("rivals.lock", f"rivals.lock.of.{dead}")
        with model_lock(rivals, "rivals") as lock:
            let_go.set()
            assert arrived.wait(within(10))
            lock.set_alias("rivals", CHAMPION, "2")


def test_a_lock_whose_creation_was_not_answered_is_ours(rivals, monkeypatch):
    create = rivals.create_registered_model

    def unanswered(*args, **tags):
        create(*args, **tags)
        raise MlflowException("API request failed with timeout exception")

    monkeypatch.setattr(rivals, "create_registered_model", unanswered)
    with model_lock(rivals, "rivals"):
        assert locks(rivals) == ["rivals.lock"]
    assert locks(rivals) == []


def test_a_lock_that_is_released_while_it_is_asked_for_is_asked_for_again(rivals, monkeypatch):
    """MLflow's server looks a model up that it could not create, which may have been deleted."""
    create, sent = rivals.create_registered_model, []

    def released_meanwhile(*args, **tags):
        sent.append(args)
        if len(sent) == 1:
            rivals.get_registered_model("rivals.lock")
        create(*args, **tags)

    monkeypatch.setattr(rivals, "create_registered_model", released_meanwhile)
    with model_lock(rivals, "rivals"):
        assert len(sent) == 2 and locks(rivals) == ["rivals.lock"]


def test_a_holder_that_wakes_up_late_moves_no_alias_and_keeps_the_lock_of_another(rivals):
    uri = rivals.tracking_uri
    with contender(uri, "wait:1", 8, 4) as first:
        first.holds()
        with contender(uri, "wait:2", 8, 4) as second:
            second.holds()  # after the lease of the first
            mine = rivals.get_registered_model("rivals.lock").tags

            first.go_on()
            error = first.result()["error"]

            assert "rivals.lock was lost, or expires before an alias could be moved" in error
            assert rivals.get_registered_model("rivals.lock").tags == mine
            assert version_at(rivals, "rivals", CHAMPION) is None


def test_a_lock_whose_holder_died_is_broken_and_a_living_one_is_not(rivals, monkeypatch):
    rivals.create_registered_model("rivals.lock", tags={"roma.holder": "dead-1"})
    with contextlib.ExitStack() as stack:
        uri = rivals.tracking_uri
        started = [
            stack.enter_context(contender(uri, f"enter:{n}", within(2), 1)) for n in range(3)
        ]
        spans = sorted(process.result()["held"] for process in started)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert locks(rivals) == ["rivals.lock.of.dead-1"], "so that no late process breaks another one"

    monkeypatch.setattr(store, "_KEEP_BROKEN_S", 0.0)
    with model_lock(rivals, "rivals"):
        pass
    assert locks(rivals) == []

    monkeypatch.setattr(store, "_WAIT_S", 0.5)
    with (
        model_lock(rivals, "rivals"),
        pytest.raises(RegistryBusy, match=r"rivals\.lock is held by .*delete the registered model"),
        model_lock(rivals, "rivals"),
    ):
        pytest.fail("two hold the lock")


def test_a_registry_beside_the_own_store_has_the_lock_of_its_server(rivals, store_root):
    settings = MlflowSettings.from_values({"registry_uri": rivals.tracking_uri})
    with model_lock(store.connect(settings, store_root), "rivals"):
        assert locks(rivals) == ["rivals.lock"]
    store.connect(MlflowSettings.from_values({}), store_root)  # the process's default again


def test_requests_are_bounded_while_the_lock_is_held_and_as_before_afterwards(rivals, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with model_lock(rivals, "rivals"):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "15", "to connect, and to wait"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_the_own_store_releases_the_lock_of_a_killed_process(client):
    add_rivals(client)
    with contender(client.tracking_uri, "wait:1") as dead:
        dead.holds()
        dead.kill()
        promote(client, "rivals", "2", reason="better", actor="tester", evidence={})
    assert version_at(client, "rivals", CHAMPION) == "2"
    assert locks(client) == []
