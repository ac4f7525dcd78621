"""What may happen to a training: kills, stop requests, a full disk, numbers that are not finite."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from roma_core import Trainer
from roma_core.job import Attempt, StopRequests
from roma_core.trainer.checkpoint import committed
from roma_core.trainer.step import TrainStep
from tests.core.trainer.training_runs import (
    Plan,
    Sines,
    SlowSines,
    Started,
    Store,
    StuckSines,
    assert_same_end,
    assert_told_once,
    autoencoder,
    classifier,
    config,
    interrupt,
    is_saving,
    last_step,
    points,
    records_reach,
    run,
    weights,
)

CHANGES = {"ema_decay": 0.9, "augment_drop_rate": 0.3, "epochs": 20, "log_every": 3}  # 120 steps


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("unbroken")
    run(Plan(folder, CHANGES))
    return folder


def test_a_killed_run_ends_like_an_unbroken_one(tmp_path, unbroken, store_root):
    """SIGKILL early, in a save, and late; then SIGTERM. MLflow has every point once as well."""
    plan, store = Plan(tmp_path, CHANGES), Store(f"sqlite:///{store_root / 'mlflow.db'}")
    seed = random.randrange(1000)
    early = random.Random(seed).randrange(3, 30)
    landed = []

    def kill(when: Callable[[], bool]) -> None:
        killed = interrupt(plan, when, signal.SIGKILL, **store.environment)
        assert killed.exit_codes == [-signal.SIGKILL], killed.output
        landed.append(last_step(tmp_path))

    kill(lambda: last_step(tmp_path) >= early)
    for _ in range(10):
        kill(lambda: last_step(tmp_path) >= 45 and is_saving(tmp_path))
        if is_saving(tmp_path):  # it died in it
            break
    else:
        pytest.fail("no kill hit a save")
    kill(lambda: last_step(tmp_path) >= 84)
    print(f"seed {seed}: killed after steps {landed}")
    when = lambda: last_step(tmp_path) >= 102  # noqa: E731
    stopped = interrupt(plan, when, signal.SIGTERM, **store.environment)
    assert "resumed from" in stopped.output and "END continue" in stopped.output
    assert stopped.exit_codes == [0]
    assert "END completed 120 1" in run(plan, **store.environment)
    assert_same_end(tmp_path, unbroken)
    assert_told_once(store, tmp_path)
    assert not is_saving(tmp_path)


def test_a_stop_in_an_evaluation_leaves_it_for_the_next_attempt(tmp_path):
    changes = {"epochs": 2, "eval_every": 6, "save_every": 100, "max_checkpoints": 2}
    plan = Plan(tmp_path / "stopped", changes, classifier, test=SlowSines(24))  # 2.4 s
    at_six = records_reach(plan.folder, 5)
    started = time.monotonic()
    stopped = interrupt(plan, lambda: at_six() and not time.sleep(0.3), signal.SIGTERM)
    assert "asked to stop (SIGTERM); saved at step 6" in stopped.output
    assert weights(plan.folder)[0].evaluation_due
    assert "eval/loss" not in {name for name, *_ in points(plan.folder)}
    print("stopped after", time.monotonic() - started)
    run(plan)
    run(Plan(tmp_path / "unbroken", changes, classifier, test=Sines(24)))
    assert_same_end(plan.folder, tmp_path / "unbroken")


def test_a_stop_while_waiting_for_loader_processes_is_heard(tmp_path):
    plan = Plan(tmp_path, {"num_dataset_workers": 4, "batch_size": 4}, train=StuckSines(32))
    started = Started(plan)
    while "parameters" not in started.output:
        time.sleep(0.01)
    time.sleep(1.5)
    started.send(signal.SIGTERM)
    assert "asked to stop (SIGTERM); saved at step 0" in started.end(20)  # the loader waits longer
    assert started.exit_codes == [0]


def test_one_rank_that_is_asked_stops_both(tmp_path):
    plan = Plan(tmp_path, CHANGES | {"batch_size": 4})
    started = Started(plan, 2)
    reached = records_reach(tmp_path, 3)
    while not reached():
        time.sleep(0.001)
    pid = started.processes[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGUSR1)
    output = started.end()
    assert started.exit_codes == [0, 0], output
    assert "asked to stop (another process was asked to stop)" in output


def test_a_stop_request_outlives_a_second_listener():
    with StopRequests() as outer:
        signal.raise_signal(signal.SIGTERM)
        with StopRequests() as inner:
            assert inner.requested() and inner.reason == "SIGTERM"
    assert outer.requested()
    with StopRequests() as later:
        assert not later.requested()


def test_an_evaluation_beats(tmp_path):
    attempt = Attempt(tmp_path / "1")
    attempt.path.mkdir()
    beats = []
    attempt.beat = lambda step: beats.append(step)  # type: ignore[method-assign]
    changes = {"heartbeat_interval_s": 1e-9, "epochs": 1, "eval_every": 100}
    trainer = Trainer(config(tmp_path, **changes))
    trainer.train(Sines(16), Sines(40), classifier(), attempt=attempt)
    assert beats == [0, 1] + [2] * 5  # 2 steps, then 5 batches of 8


def _allow_small_files(trainer: Trainer) -> None:
    """After the first evaluation no file may grow beyond 20 kB, as on a disk that is full."""

    def fill(model, loss, dataset):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    trainer.set_evaluate_callback(fill)


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tmp_path, unbroken):
    plan = Plan(tmp_path, CHANGES, prepare=_allow_small_files)
    started = Started(plan)
    output = started.end()
    assert started.exit_codes == [1]
    assert "could not be written" in output and "earlier ones are untouched" in output
    assert [p.name for p in committed(tmp_path / "checkpoints")] == ["step-00000005"]
    assert not is_saving(tmp_path)
    assert "resumed from step-00000005" in run(Plan(tmp_path, CHANGES))
    assert_same_end(tmp_path, unbroken)


def test_a_run_goes_on_from_before_a_truncated_checkpoint(tmp_path, unbroken):
    plan = Plan(tmp_path, CHANGES)
    interrupt(plan, records_reach(tmp_path, 20), signal.SIGTERM)
    newest, previous = committed(tmp_path / "checkpoints")[::-1][:2]
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    output = run(plan)
    assert f"{newest} is damaged (optimizer.safetensors does not match its sha256)" in output
    assert f"resumed from {previous.name}" in output
    assert_same_end(tmp_path, unbroken)


class Poisoned(Sines):
    """Item 5 is infinitely large."""

    def __getitem__(self, i: int) -> dict:
        item = super().__getitem__(i)
        if i == 5:
            item["values"][1] = float("inf")
        return item


@pytest.mark.parametrize("at_once", [True, False], ids=["cpu", "as on a GPU"])
def test_a_loss_that_is_not_finite_is_never_saved(tmp_path, monkeypatch, at_once):
    """On a GPU steps are not checked one by one; the step is found before anything of it is kept."""
    init = TrainStep.__init__

    def changed(self, *arguments):
        init(self, *arguments)
        self.checks_every_step = at_once

    monkeypatch.setattr(TrainStep, "__init__", changed)
    trainer = Trainer(config(tmp_path, save_every=2, eval_every=100, log_every=100))
    with pytest.raises(
        RuntimeError, match=r"not finite in step \d+ on process 0; sample ids \["
    ) as e:
        trainer.train(Poisoned(41), None, autoencoder())
    (dump,) = (tmp_path / "checkpoints/non_finite").iterdir()
    assert str(dump) in str(e.value)
    with safe_open(dump, "pt") as file:
        step = int(file.metadata()["step"])
        assert 5 in file.get_tensor("0/sample_ids")
        assert not file.get_tensor("0/tokens").isfinite().all()
    saved = committed(tmp_path / "checkpoints")
    assert [int(p.name[5:]) for p in saved] == list(range(2, step + 1, 2))
    if saved:
        assert all(t.isfinite().all() for t in weights(tmp_path)[1].values())


def test_what_a_rate_too_large_does_is_named_too(tmp_path):
    changes = {"base_lr": 1e30, "optimizer": "sgd", "gradient_clip": None}
    with pytest.raises(RuntimeError, match="lower base_lr"):
        Trainer(config(tmp_path, **changes)).train(Sines(16), None, autoencoder())


def test_writing_in_the_background_changes_nothing(tmp_path, unbroken):
    run(Plan(tmp_path, CHANGES | {"background_checkpoints": False}))
    assert_same_end(tmp_path, unbroken)
    assert torch.equal(*(next(iter(weights(f)[1].values())) for f in (tmp_path, unbroken)))
