"""Trackers that follow metrics.jsonl: every point once, whatever fails, without delaying the training."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from roma_core import (
    EncoderConfig,
    RoMAForClassification,
    RoMAForClassificationConfig,
    Trainer,
    TrainerConfig,
)
from roma_core.files import read_json, write_json
from roma_core.trainer import trackers as module
from roma_core.trainer.metrics import MetricsLog, read_records
from roma_core.trainer.trackers import (
    Bookmark,
    Trackers,
    TrackerThread,
    WandbConfig,
    forward,
    forward_to_mlflow,
)
from tests.core.trainer.training_runs import MlflowServer
from tests.core.trainer.wandb_server import WandbServer, upload
from tests.time_limits import wait_until, within

ROOT = Path(__file__).parents[3]
Point = tuple[str, int, float, int]


class Run:
    """A training's part in this: it logs, commits, crashes and resumes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.step = folder, 0
        self.log = MetricsLog(folder / "metrics.jsonl")

    def train(self, until: int) -> int:
        """Log steps, two records each, up to ``until``; the offset a checkpoint there would have."""
        while self.step < until:
            self.step += 1
            self.log.append(
                self.step, self.step / 10, {"train/loss": 1 / self.step, "train/lr": 0.1}
            )
            self.log.append(self.step, self.step / 10, {"eval/loss": 2 / self.step})
        return self.log.offset

    def resume(self, offset: int, step: int) -> None:
        self.log.close()
        time.sleep(0.002)  # records of a later attempt have later times
        self.log, self.step = MetricsLog(self.folder / "metrics.jsonl", offset), step

    def points(self) -> list[Point]:
        return points_of([r for _, r in read_records(self.folder / "metrics.jsonl")])


def points_of(records) -> list[Point]:
    """(name, step, value, time in ms) of every metric, sorted."""
    return sorted(
        (name, r["step"], value, round(r["time"] * 1000))
        for r in records
        for name, value in r["metrics"].items()
    )


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return Run(folder)


class FakeTracker:
    """Keeps what it is sent; ``failures`` calls raise first."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.records: list = []
        self.run_ids: list[str] = []
        self.closed = 0

    def __call__(self, run_id: str) -> FakeTracker:
        self.run_ids.append(run_id)
        self._maybe_fail()
        return self

    def _maybe_fail(self) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise ConnectionError("connection refused")

    def send(self, records) -> None:
        self._maybe_fail()
        self.records += records

    def close(self) -> None:
        self.closed += 1

    def points(self) -> list[Point]:
        return points_of(self.records)


def follow(run: Run, tracker, offset: int = 0, run_id: str | None = None) -> Trackers:
    trackers = Trackers(TrackerThread(run.folder / "metrics.jsonl", "fake", tracker, run_id))
    trackers.start(offset)
    return trackers


def bookmark_of(run: Run, tracker: str = "fake") -> dict:
    return read_json(run.folder / f"{tracker}.offset.json", schema_version=1)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "_RETRY_S", 0.05)
    monkeypatch.setattr(module, "_CLOSE_TIMEOUT_S", within(0.5))


# --- what is sent ---------------------------------------------------------------------------


def test_only_committed_records_are_sent(run):
    tracker = FakeTracker()
    trackers = follow(run, tracker)
    committed = run.train(3)
    expected = run.points()
    run.train(5)
    trackers.committed(committed)
    trackers.close()
    assert tracker.points() == expected
    assert (bookmark_of(run)["offset"], bookmark_of(run)["step"]) == (committed, 3)
    assert tracker.closed == 1


def test_nothing_is_sent_before_the_first_checkpoint(run):
    tracker = FakeTracker()
    trackers = follow(run, tracker)
    run.train(3)
    trackers.close()
    assert tracker.records == []


def test_a_resume_sends_no_step_twice(run):
    tracker = FakeTracker()
    trackers = follow(run, tracker)
    checkpoint = run.train(3)
    trackers.committed(checkpoint)
    run.train(5)  # lost in the crash
    trackers.close()

    run.resume(checkpoint, 3)
    trackers = follow(run, tracker, checkpoint)
    trackers.committed(run.train(6))
    trackers.close()

    assert tracker.points() == run.points()
    assert len(set(tracker.run_ids)) == 1


def test_nor_does_a_resume_from_an_older_checkpoint(run):
    tracker = FakeTracker()
    trackers = follow(run, tracker)
    older = run.train(3)
    trackers.committed(run.train(5))
    trackers.close()
    sent = tracker.points()

    run.resume(older, 3)
    trackers = follow(run, tracker, older)
    trackers.committed(run.train(7))
    trackers.close()

    names = [(name, step) for name, step, *_ in tracker.points()]
    assert sorted(names) == sorted({(name, step) for name, step, *_ in run.points()})
    assert set(sent) < set(tracker.points())


def test_an_evaluation_that_comes_an_attempt_later_than_its_step_is_sent(run):
    tracker = FakeTracker()
    trackers = follow(run, tracker)
    run.train(2)
    run.log.append(3, 0.3, {"train/loss": 0.3})
    stopped_at = run.log.offset
    trackers.committed(stopped_at)
    trackers.close()

    run.resume(stopped_at, 3)
    trackers = follow(run, tracker, stopped_at)
    run.log.append(3, 0.3, {"eval/loss": 0.2})
    trackers.committed(run.log.offset)
    trackers.close()

    run.resume(stopped_at, 3)  # the node died before the next checkpoint
    trackers = follow(run, tracker, stopped_at)
    run.log.append(3, 0.3, {"eval/loss": 0.2})
    trackers.committed(run.train(4))
    trackers.close()

    sent = [p[:3] for p in tracker.points()]
    assert sorted(sent) == sorted(set(sent)) == sorted(p[:3] for p in run.points())


def test_a_training_from_the_start_is_a_run_of_its_own(run):
    tracker = FakeTracker()
    trackers = follow(run, tracker)
    trackers.committed(run.train(3))
    trackers.close()

    run.resume(0, 0)
    again = FakeTracker()
    trackers = follow(run, again)
    trackers.committed(run.train(2))
    trackers.close()

    assert again.points() == run.points()
    assert again.run_ids != tracker.run_ids


def test_a_crash_before_the_first_checkpoint_keeps_the_run(run):
    first, second = FakeTracker(), FakeTracker()
    follow(run, first).close()
    follow(run, second).close()
    assert first.run_ids == second.run_ids


def test_another_run_at_the_tracker_is_told_everything(run):
    for run_id in ("a", "b"):
        tracker = FakeTracker()
        trackers = follow(run, tracker, run.log.offset, run_id)
        trackers.committed(run.train(3))
        trackers.close()
        assert tracker.points() == run.points() and tracker.run_ids == [run_id]


def test_batches_end_where_steps_do(run, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 5)
    end, batches = run.train(8), []
    bookmark = Bookmark(run.folder / "b.json")
    forward(run.folder / "metrics.jsonl", bookmark, end, batches.append)
    assert [[r["step"] for r in batch] for batch in batches] == [
        [1, 1, 2, 2, 3, 3],
        [4, 4, 5, 5, 6, 6],
        [7, 7, 8, 8],
    ]
    assert (bookmark.offset, bookmark.step) == (end, 8)


# --- what may fail --------------------------------------------------------------------------


def test_a_tracker_that_is_down_at_the_start_misses_nothing(run, impatient, caplog):
    tracker = FakeTracker(failures=5)
    trackers = follow(run, tracker)
    trackers.committed(run.train(3))
    wait_until(lambda: tracker.points() == run.points(), 2)
    trackers.committed(run.train(4))
    trackers.close()
    assert tracker.points() == run.points()
    assert len(tracker.run_ids) == 6 and len(set(tracker.run_ids)) == 1
    assert [r.message for r in caplog.records if "connection refused" in r.message] == [
        f"fake: connection refused; training continues, its metrics are kept in {run.folder / 'metrics.jsonl'}"
    ]


def test_a_tracker_that_fails_half_way_misses_nothing(run, impatient, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 1)
    tracker = FakeTracker()
    trackers = follow(run, tracker)
    trackers.committed(run.train(2))
    wait_until(lambda: tracker.points() == run.points(), 2)
    tracker.failures = 3
    trackers.committed(run.train(6))
    wait_until(lambda: tracker.points() == run.points(), 2)
    trackers.close()


def test_what_a_tracker_missed_is_sent_by_the_next_attempt(run, impatient, caplog):
    tracker = FakeTracker(failures=1000)
    trackers = follow(run, tracker)
    trackers.committed(run.train(3))
    trackers.close()
    assert tracker.records == [] and "fake has not received all metrics" in caplog.text

    tracker = FakeTracker()
    follow(run, tracker, run.log.offset).close()
    assert tracker.points() == run.points()


def test_trackers_that_hang_do_not_delay_the_run(run, impatient, caplog):
    let_go = threading.Event()

    def hang(run_id):
        let_go.wait(within(20))
        return FakeTracker()

    metrics = run.folder / "metrics.jsonl"
    trackers = Trackers(*(TrackerThread(metrics, name, hang) for name in ("a", "b", "c")))
    started = time.monotonic()
    trackers.start(0)
    for until in (1, 2, 3):
        trackers.committed(run.train(until))
    assert time.monotonic() - started < within(0.4)
    trackers.close()
    assert time.monotonic() - started < within(1.5)  # one bound for all three, not one each
    assert caplog.text.count("has not received all metrics") == 3
    let_go.set()


def test_a_bookmark_that_cannot_be_read_does_not_end_the_run(run, impatient, caplog):
    (run.folder / "fake.offset.json").write_text("{")
    tracker = FakeTracker()
    trackers = follow(run, tracker)
    trackers.committed(run.train(2))
    trackers.close()
    assert "fake.offset.json is not valid JSON" in caplog.text


def test_followers_that_never_started_can_be_closed(run):
    Trackers(TrackerThread(run.folder / "metrics.jsonl", "fake", FakeTracker())).close()


# --- MLflow ---------------------------------------------------------------------------------


class MlflowStore:
    """A real store with one run."""

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self.uri, self.client = uri, MlflowClient(uri)
        self.run_id = self.client.create_run("0").info.run_id

    def points(self) -> list[Point]:
        names = self.client.get_run(self.run_id).data.metrics
        return sorted(
            (m.key, m.step, m.value, m.timestamp)
            for name in names
            for m in self.client.get_metric_history(self.run_id, name)
        )


@pytest.fixture
def store(store_root):
    return MlflowStore(f"sqlite:///{store_root / 'mlflow.db'}")


@pytest.fixture
def in_environment(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.setenv("MLFLOW_RUN_ID", store.run_id)
    return store


def test_mlflow_gets_every_point_once_with_its_own_time(run, in_environment):
    trackers = Trackers.from_environment(run.folder, TrainerConfig())
    trackers.start(0)
    trackers.committed(run.train(400))  # 1200 points, more than MLflow takes in one call
    trackers.close()
    assert in_environment.points() == run.points()
    assert len(run.points()) == 1200


@pytest.fixture
def made_later(run, store, monkeypatch):
    """The file that will name the run, written while the job starts."""
    path = run.folder / "mlflow_run.json"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.setenv("ROMA_JOB_MLFLOW_RUN", str(path))
    return path


def test_a_run_that_is_made_after_the_job_began_gets_everything(
    run, store, made_later, impatient, caplog
):
    """The job does not wait for it."""
    started = time.monotonic()
    trackers = Trackers.from_environment(run.folder, TrainerConfig())
    trackers.start(0)
    trackers.committed(run.train(3))
    assert time.monotonic() - started < within(5)  # mlflow may be imported in it
    wait_until(lambda: f"{made_later} was not written yet" in caplog.text, 5)
    write_json(made_later, {"schema_version": 1, "run_id": store.run_id})
    wait_until(lambda: store.points() == run.points(), 5)
    trackers.close()
    assert "has not received" not in caplog.text


def test_a_run_that_does_not_come_is_no_reason_to_wait(run, made_later, impatient, caplog):
    trackers = Trackers.from_environment(run.folder, TrainerConfig())
    trackers.start(0)
    trackers.committed(run.train(3))
    trackers.close()
    expected = f"{made_later} was not written yet; MLflow gets the metrics when the job has ended"
    assert expected in caplog.text and "mlflow has not received all metrics" in caplog.text


def test_mlflow_stores_a_replay_once(run, store):
    run.train(5)
    for attempt in range(2):
        if attempt:
            (run.folder / "mlflow.offset.json").unlink()
        forward_to_mlflow(run.folder / "metrics.jsonl", store.uri, store.run_id)
    assert store.points() == run.points()


def test_what_the_thread_could_not_send_is_sent_at_the_outcome(run, in_environment):
    trackers = Trackers.from_environment(run.folder, TrainerConfig())
    trackers.start(0)
    trackers.committed(run.train(3))
    trackers.close()
    run.train(5)  # after the last checkpoint of a run that failed
    forward_to_mlflow(run.folder / "metrics.jsonl", in_environment.uri, in_environment.run_id)
    assert in_environment.points() == run.points()


def test_one_strange_name_does_not_hold_back_the_others(run, store):
    run.log.append(1, 0.1, {"eval/f1 (macro, %)": 0.5, "eval/loss": 0.25})
    forward_to_mlflow(run.folder / "metrics.jsonl", store.uri, store.run_id)
    assert [p[:3] for p in store.points()] == [
        ("eval/f1 _macro_ __", 1, 0.5),
        ("eval/loss", 1, 0.25),
    ]


class Series:
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict:
        generator = torch.Generator().manual_seed(i)
        return {
            "values": torch.randn(6, 1, 1, 1, generator=generator),
            "positions": torch.arange(6.0)[None],
            "label": i % 2,
        }


def small_classifier() -> RoMAForClassification:
    torch.manual_seed(0)
    shape = {"tubelet_size": (1, 1, 1), "n_pos_dims": 1, "dim_output": 2}
    stack = EncoderConfig(d_model=8, nhead=1, depth=1)
    return RoMAForClassification(RoMAForClassificationConfig(encoder_config=stack, **shape))


def test_a_training_that_crashes_and_resumes_is_one_curve_at_mlflow(in_environment, tmp_path):
    changes = {"epochs": 4, "batch_size": 6, "save_every": 3, "eval_every": 1, "log_every": 1}
    changes["keep_best"] = 0  # a best step is a checkpoint, too, and would be committed
    trainer = Trainer(TrainerConfig(checkpoint_dir=tmp_path / "checkpoints", **changes))
    calls = []

    def crash_in_step_8(model, loss, dataset):
        calls.append(loss)
        if len(calls) == 8:
            raise RuntimeError("the node is gone")

    trainer.set_evaluate_callback(crash_in_step_8)
    with pytest.raises(RuntimeError, match="the node is gone"):
        trainer.train(Series(), Series(), small_classifier())
    assert {step for _, step, *_ in in_environment.points()} == set(range(1, 7))

    end = trainer.train(Series(), Series(), small_classifier())

    assert end.status == "completed" and end.step == 16
    lines = (tmp_path / "checkpoints/metrics.jsonl").read_text().splitlines()
    assert in_environment.points() == points_of(map(json.loads, lines))


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "never answers"])
def test_a_training_ends_in_time_though_mlflow_is_away(monkeypatch, tmp_path, caplog, silent):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if silent:
            server.listen()  # takes connections
        uri = f"http://user:secret@127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_RUN_ID", "a")
        config = TrainerConfig(checkpoint_dir=tmp_path / "c", epochs=2, log_every=1, save_every=1)
        started = time.monotonic()
        assert Trainer(config).train(Series(), None, small_classifier()).status == "completed"
        assert time.monotonic() - started < within(6)
    shown = uri.replace("user:secret@", "")
    assert f"{shown} does not answer" in caplog.text and "training continues" in caplog.text
    assert "mlflow has not received all" in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize("end", ["kill", "stop_answering"])
def test_a_server_that_goes_away_for_good_costs_a_training_nothing(
    monkeypatch, tmp_path, store_root, caplog, end
):
    """What it missed is in metrics.jsonl, and sent when the server is back."""
    server = MlflowServer(store_root)
    try:
        server.start()
        store = MlflowStore(server.uri)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        monkeypatch.setenv("MLFLOW_RUN_ID", store.run_id)
        changes = {"epochs": 4, "batch_size": 6, "save_every": 3, "eval_every": 1, "log_every": 1}
        trainer = Trainer(TrainerConfig(checkpoint_dir=tmp_path / "checkpoints", **changes))
        calls = []

        def go_away_in_step_8(model, loss, dataset):
            calls.append(loss)
            if len(calls) == 8:
                wait_until(store.points, 20)
                getattr(server, end)()
                calls.append(time.monotonic())

        trainer.set_evaluate_callback(go_away_in_step_8)
        end_of_run = trainer.train(Series(), Series(), small_classifier())
        assert time.monotonic() - calls[8] < within(6)
        assert (end_of_run.status, end_of_run.step) == ("completed", 16)
        assert f"{server.uri} does not answer" in caplog.text
        assert "mlflow has not received all metrics" in caplog.text
        server.kill()
        server.start()
        metrics = tmp_path / "checkpoints/metrics.jsonl"
        forward_to_mlflow(metrics, server.uri, store.run_id)
        assert store.points() == points_of(map(json.loads, metrics.read_text().splitlines()))
    finally:
        server.kill()


def test_a_training_ends_though_its_tracker_is_no_tracker(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    monkeypatch.setenv("MLFLOW_RUN_ID", "none")
    config = TrainerConfig(checkpoint_dir=tmp_path / "c", epochs=1, log_every=1)
    assert Trainer(config).train(Series(), None, small_classifier()).status == "completed"
    assert "training continues" in caplog.text and "mlflow has not received all" in caplog.text


# --- Weights & Biases -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, environment, expected",
    [
        ({}, {}, "disabled"),
        ({}, {"WANDB_API_KEY": "k"}, "online"),
        ({"api_key": "k"}, {}, "online"),
        ({}, {"WANDB_MODE": "offline"}, "offline"),
        ({}, {"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, "disabled"),
        ({"mode": "offline"}, {"WANDB_MODE": "online", "WANDB_API_KEY": "k"}, "offline"),
        ({"mode": "disabled", "api_key": "k"}, {}, "disabled"),
    ],
)
def test_the_mode_of_wandb(monkeypatch, settings, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert WandbConfig(**settings).effective_mode == expected


FOLLOW = """
import json, sys, time
from pathlib import Path
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.trackers import Trackers
from roma_core.trainer.metrics import MetricsLog
folder = Path(sys.argv[1])
log = MetricsLog(folder / "metrics.jsonl")
started = time.monotonic()
trackers = Trackers.from_environment(folder, TrainerConfig(**json.loads(sys.argv[2])))
trackers.start(0)
log.append(1, 0.5, {"train/loss": 0.5})
log.append(2, 1.0, {"train/loss": 0.25})
trackers.committed(log.offset)
trackers.close()
print(json.dumps({"seconds": time.monotonic() - started, "wandb": "wandb" in sys.modules}))
"""


def follow_in_a_process(folder: Path, trainer: dict | None = None, **environment: str) -> dict:
    """Two steps in a process of its own, without a network; what it printed, and its whole time."""
    without_home = {
        "HOME": str(folder),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
    }
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW, str(folder), json.dumps(trainer or {})],
        cwd=ROOT,
        env=os.environ | without_home | environment,
        capture_output=True,
        text=True,
        timeout=within(12),
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    return facts | {"process_seconds": time.monotonic() - started, "errors": done.stderr}


def history(folder: Path) -> list[dict]:
    """The rows in the one run on disk below ``folder``: a log of length-prefixed records."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/*run-*/run-*.wandb")
    content, start, rows, body = path.read_bytes(), 7, [], b""
    while start + 7 <= len(content):
        _, length, kind = struct.unpack("<IHB", content[start : start + 7])
        body += content[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(body)
            if items := record.history.item:
                rows.append(
                    {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                )
            body = b""
    return rows


def assert_offline_run_is_whole(folder: Path) -> None:
    records = [record for _, record in read_records(folder / "metrics.jsonl")]
    expected = [(r["metrics"]["train/loss"], r["step"], r["epoch"], r["time"]) for r in records]
    names = ("train/loss", "trainer/global_step", "epoch", "_timestamp")
    assert [tuple(row[name] for name in names) for row in history(folder)] == expected


def test_wandb_is_off_by_default_and_then_not_imported(tmp_path):
    assert not follow_in_a_process(tmp_path)["wandb"]
    assert not follow_in_a_process(tmp_path, {"log_wandb": False}, WANDB_API_KEY="k" * 40)["wandb"]


def test_wandb_offline_needs_no_network_and_keeps_every_point(tmp_path):
    facts = follow_in_a_process(tmp_path, ROMA_WANDB_MODE="offline")
    assert facts["wandb"]
    assert_offline_run_is_whole(tmp_path)


@pytest.fixture
def wandb_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "never answers"])
def test_wandb_online_without_a_network_waits_little_and_keeps_every_point(
    tmp_path, wandb_port, silent
):
    """The settings are the defaults: this is how long a person waits, the end of the process included."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", wandb_port))
        if silent:
            server.listen()  # takes connections
        facts = follow_in_a_process(
            tmp_path, ROMA_WANDB_API_KEY="k" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{wandb_port}"
        )
    print("waited", facts["seconds"], "of", facts["process_seconds"])
    assert facts["seconds"] < within(3)
    assert facts["process_seconds"] < within(4)  # the imports are in it
    assert f"http://127.0.0.1:{wandb_port} does not answer" in facts["errors"]
    assert "wandb sync" in facts["errors"]
    assert "k" * 40 not in facts["errors"]
    assert_offline_run_is_whole(tmp_path)


def assert_server_has_all(server: WandbServer, folder: Path) -> None:
    records = [record for _, record in read_records(folder / "metrics.jsonl")]
    expected = [(r["metrics"]["train/loss"], r["step"], r["epoch"], r["time"]) for r in records]
    names = ("train/loss", "trainer/global_step", "epoch", "_timestamp")
    assert [tuple(row[name] for name in names) for row in server.rows()] == expected


STEPS = """
import sys, time
from pathlib import Path
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer import trackers
from roma_core.trainer.metrics import MetricsLog
folder = Path(sys.argv[1])
trackers._RETRY_S = 0.2
log = MetricsLog(folder / "metrics.jsonl")
trackers_ = trackers.Trackers.from_environment(folder, TrainerConfig())
trackers_.start(0)
step = 0
for line in sys.stdin:
    until = step + int(line)
    while step < until:
        step += 1
        log.append(step, step / 10, {"train/loss": 1 / step})
    trackers_.committed(log.offset)
    print(step, flush=True)
started = time.monotonic()
trackers_.close()
print(time.monotonic() - started, flush=True)
"""


@pytest.fixture
def steps(tmp_path, wandb_port):
    """A process that does as many steps as it reads from stdin, with wandb online at a port."""
    environment = {
        "HOME": str(tmp_path),
        "ROMA_WANDB_API_KEY": "k" * 40,
        "WANDB_BASE_URL": f"http://127.0.0.1:{wandb_port}",
    }
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", STEPS, str(tmp_path)],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    yield process
    process.kill()
    process.wait()


def do(steps: subprocess.Popen[str], n: int) -> None:
    assert steps.stdin is not None and steps.stdout is not None
    steps.stdin.write(f"{n}\n")
    steps.stdin.flush()
    assert steps.stdout.readline()


def test_a_wandb_server_that_is_away_at_the_start_gets_everything(tmp_path, wandb_port, steps):
    server = WandbServer(wandb_port)
    do(steps, 3)
    time.sleep(1)
    server.start()
    try:
        do(steps, 2)
        wait_until(lambda: server.knows_runs, 8)
        steps.stdin.close()
        assert float(steps.stdout.readline()) < within(3)
        assert_server_has_all(server, tmp_path)
    finally:
        server.stop()


def test_a_wandb_server_that_dies_and_comes_back_misses_nothing(tmp_path, wandb_port, steps):
    server = WandbServer(wandb_port)
    server.start()
    try:
        do(steps, 3)
        wait_until(lambda: server.knows_runs, 8)
        server.stop()
        do(steps, 4)
        time.sleep(1)
        server.start()
        do(steps, 1)
        steps.stdin.close()
        assert float(steps.stdout.readline()) < within(3)
        assert_server_has_all(server, tmp_path)
    finally:
        server.stop()


def test_a_wandb_server_that_dies_for_good_holds_up_the_end_little(tmp_path, wandb_port, steps):
    server = WandbServer(wandb_port)
    server.start()
    do(steps, 3)
    wait_until(lambda: server.knows_runs, 8)
    server.stop()
    do(steps, 4)
    asked = time.monotonic()
    steps.stdin.close()
    assert steps.wait(within(10)) == 0
    print("ended after", time.monotonic() - asked)
    assert time.monotonic() - asked < within(3)
    assert [row["trainer/global_step"] for row in history(tmp_path)] == list(range(1, 8))
    server.start()
    try:
        upload((tmp_path / "errors").read_text(), server, tmp_path)
        assert_server_has_all(server, tmp_path)
    finally:
        server.stop()
