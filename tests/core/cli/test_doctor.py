"""``roma doctor`` reports what is there, and fails quickly where something is missing."""

from __future__ import annotations

import socket
import time

from click.testing import CliRunner

from roma_core.cli import main
from roma_core.cli.doctor import storage, trackers, world
from tests.time_limits import within


def texts(found) -> dict[str, tuple[str, str]]:
    return {f.name: (f.status, f.detail) for f in found}


def test_the_command_prints_a_line_for_everything(tmp_path):
    done = CliRunner().invoke(main, ["doctor", "--run-dir", str(tmp_path / "not" / "yet")])
    assert done.exit_code == 0, done.output
    for topic in ("python", "torch", "accelerate", "cpu", "gpu", "world", "storage", "mlflow"):
        assert f" {topic} " in done.output
    assert "MB/s written and synced" in done.output and str(tmp_path) in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_never_answers_is_given_up_soon(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@{address}")
        started = time.monotonic()
        status, detail = texts(trackers())["mlflow"]
        assert time.monotonic() - started < within(4)
    assert status == "error" and "does not answer" in detail and address in detail
    assert "secret" not in detail


def test_a_store_that_is_not_there_and_a_folder_without_rights_fail(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'none.db'}")
    assert texts(trackers())["mlflow"][0] == "error"
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.mkdtemp", lambda *_, **__: (tmp_path / "file" / "x").mkdir())
    assert texts(storage(tmp_path))["storage"][0] == "error"


def test_a_world_that_lacks_an_address_fails(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    status, detail = texts(world())["world"]
    assert status == "error" and "MASTER_ADDR" in detail
