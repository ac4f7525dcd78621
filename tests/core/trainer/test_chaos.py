"""Twenty interruptions spread over a run, and an MLflow server that dies in it. `make chaos` runs it."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.core.trainer.training_runs import (
    MlflowServer,
    Plan,
    Started,
    Store,
    assert_same_end,
    assert_told_once,
    interrupt,
    is_saving,
    last_step,
    points,
    run,
)

pytestmark = pytest.mark.chaos
N = 20
CHANGES = {"ema_decay": 0.9, "augment_drop_rate": 0.3, "epochs": 60, "log_every": 1}  # 360 steps
STEPS = 360


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_twenty_interruptions_leave_no_trace(tmp_path, store_root, number):
    """One in every twentieth of the run, at a random step of it; every fourth SIGKILL hits a save."""
    seed = int(os.environ.get("ROMA_CHAOS_SEED", str(random.randrange(10**6))))
    dice = random.Random(seed)
    print(f"seed {seed}", flush=True)
    run(Plan(tmp_path / "unbroken", CHANGES))
    store = Store(f"sqlite:///{store_root / 'mlflow.db'}")
    broken = Plan(tmp_path / "broken", CHANGES)
    width = STEPS // N
    hit_saves, landed, began = 0, [], time.monotonic()
    for k in range(N):
        step = k * width + dice.randrange(width - 3)
        delay_s, in_a_save = dice.uniform(0, 0.01), number == signal.SIGKILL and k % 4 == 1

        def moment(step=step, delay_s=delay_s, in_a_save=in_a_save) -> bool:
            if last_step(broken.folder) < step:
                return False
            time.sleep(0 if in_a_save else delay_s)
            return is_saving(broken.folder) if in_a_save else True

        started = interrupt(broken, moment, number, **store.environment)
        reached, hit = last_step(broken.folder), is_saving(broken.folder)
        hit_saves += hit
        print(
            f"{number.name} {k + 1}: aimed at step {step}, last record {reached}{', in a save' * hit}",
            flush=True,
        )
        assert (0 in started.exit_codes) == (number == signal.SIGTERM), started.output
        assert reached >= step
        landed.append(reached)
    output = run(broken, **store.environment)
    assert f"END completed {STEPS} 1" in output
    assert_same_end(broken.folder, tmp_path / "unbroken")
    assert_told_once(store, broken.folder)
    print(
        f"{N} × {number.name}, {hit_saves} in the middle of a save, in {time.monotonic() - began:.0f} s: "
        f"weights bit-equal, {len(points(broken.folder))} points once in metrics.jsonl and in MLflow"
    )
    assert len({step // width for step in landed}) > N * 3 / 4  # spread over the whole run
    assert number != signal.SIGKILL or hit_saves > 0


def test_an_mlflow_server_that_dies_and_comes_back_misses_nothing(tmp_path, store_root):
    """It is away while a third of the run happens; the training takes no notice."""
    server = MlflowServer(store_root)
    try:
        server.start()
        store = Store(server.uri)
        plan = Plan(tmp_path, CHANGES | {"epochs": 700, "eval_every": 100, "save_every": 50})
        started = Started(plan, **store.environment, MLFLOW_HTTP_REQUEST_MAX_RETRIES="1")
        while not store.points():
            time.sleep(0.1)
        server.kill()
        died_at = points(tmp_path)[-1][1]
        while started.is_running() and points(tmp_path)[-1][1] < died_at + 1400:
            time.sleep(0.1)
        server.start()
        came_back_at = points(tmp_path)[-1][1]
        output = started.end(100)
        assert "END completed 4200 1" in output
        assert "training continues" in output
        print(f"the server was away from step {died_at} to {came_back_at} of 4200")
        assert_told_once(store, tmp_path)
    finally:
        server.kill()
