"""The trainer: order, gradients, resuming, stopping, metrics. Small models, one thread."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from roma_core import (
    EncoderConfig,
    RoMAForClassification,
    RoMAForClassificationConfig,
    RoMAForPreTraining,
    RoMAForPreTrainingConfig,
    Trainer,
    TrainerConfig,
)
from roma_core.trainer.checkpoint import committed, load_newest
from roma_core.trainer.epoch_plan import EpochPlan, share_of
from roma_core.trainer.schedule import learning_rate_factor

SHAPE = {
    "encoder_config": EncoderConfig(d_model=16, nhead=2, depth=2, hidden_drop_rate=0.1),
    "tubelet_size": (1, 1, 1),
    "n_channels": 2,
    "n_pos_dims": 1,
}


class Sines:
    """Two classes of noisy sines at irregular times."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict:
        g = np.random.default_rng(i)
        length, label = g.integers(4, 12), i % 2
        t = np.sort(g.uniform(0, 10, length))
        wave = np.sin(t * (1 + label))
        values = np.stack([wave, np.cos(t) + label], 1) + g.normal(0, 0.05, (length, 2))
        return {
            "values": torch.tensor(values, dtype=torch.float32)[:, :, None, None],
            "positions": torch.tensor(t, dtype=torch.float32)[None],
            "label": label,
        }


def config(folder, **changes) -> TrainerConfig:
    values = {
        "base_lr": 5e-3,
        "epochs": 4,
        "batch_size": 8,
        "eval_every": 7,
        "save_every": 5,
        "log_every": 1,
        "checkpoint_dir": Path(folder) / "checkpoints",
    }
    return TrainerConfig(**values | changes)


def autoencoder():
    torch.manual_seed(0)
    decoder = EncoderConfig(d_model=12, nhead=1, depth=1)
    return RoMAForPreTraining(RoMAForPreTrainingConfig(**SHAPE, decoder_config=decoder))


def plain_autoencoder():
    """No dropout, so nothing random depends on the process; float64, so that rounding stays small."""
    torch.manual_seed(0)
    shape = SHAPE | {"encoder_config": EncoderConfig(d_model=16, nhead=2, depth=2)}
    decoder = EncoderConfig(d_model=12, nhead=1, depth=1)
    return RoMAForPreTraining(RoMAForPreTrainingConfig(**shape, decoder_config=decoder)).double()


def classifier():
    torch.manual_seed(0)
    return RoMAForClassification(RoMAForClassificationConfig(**SHAPE, dim_output=2))


def points(folder) -> list[tuple[str, int, float]]:
    lines = (Path(folder) / "checkpoints/metrics.jsonl").read_text().splitlines()
    wall_clock = ("train/tokens_per_s", "train/data_wait_share")
    return [
        (name, r["step"], value)
        for r in map(json.loads, lines)
        for name, value in r["metrics"].items()
        if name not in wall_clock
    ]


def test_every_epoch_visits_every_sample_once_in_an_order_of_its_own():
    plan = EpochPlan(n_samples=43, global_batch_size=10, seed=3)
    epochs = [np.concatenate(plan.epoch(e)) for e in range(3)]
    assert all(sorted(e) == list(range(43)) for e in epochs)
    assert (epochs[0] != epochs[1]).any()
    assert [len(b) for b in plan.epoch(0)] == [9, 9, 9, 8, 8]
    assert plan.epoch(0)[0].tolist() == EpochPlan(43, 10, 3).epoch(0)[0].tolist()


@pytest.mark.parametrize("world_size, micro", [(1, 9), (2, 4), (3, 1), (4, 8)])
def test_processes_and_micro_batches_share_a_step_exactly(world_size, micro):
    batch = EpochPlan(43, 10, 3).epoch(0)[0]
    shares = [share_of(batch, rank, world_size, micro) for rank in range(world_size)]
    flat = [i for share in shares for part in share for i in part]
    assert sorted(flat) == sorted(batch)
    assert max(len(part) for share in shares for part in share) <= micro


def test_more_processes_than_samples_is_refused():
    with pytest.raises(ValueError, match="2 samples cannot be shared by 3 processes"):
        share_of(np.array([4, 5]), 0, 3, 8)


def test_the_schedule_warms_up_and_ends_near_zero():
    factors = [learning_rate_factor("cosine", s, 100, 10) for s in range(100)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 1e-3
    assert learning_rate_factor("linear", 55, 100, 10) == pytest.approx(0.5)
    assert learning_rate_factor("constant", 99, 100, 0) == 1.0


def test_training_learns_and_records_each_metric_once(tmp_path):
    trainer = Trainer(config(tmp_path, epochs=12))
    seen = []
    trainer.set_evaluate_callback(
        lambda model, loss, dataset: seen.append(loss) or {"seen": len(seen)}
    )
    trainer.set_post_train_hook(lambda model, run, device: seen.append((run, str(device))))

    end = trainer.train(train_dataset=Sines(40), test_dataset=Sines(20), model=classifier())

    assert end.status == "completed" and end.step == 60
    assert end.metrics["eval/accuracy"] > 0.9
    assert seen[-1] == (tmp_path.absolute() / "checkpoints", "cpu")
    found = points(tmp_path)
    assert len({(n, s) for n, s, _ in found}) == len(found)
    assert {s for n, s, _ in found if n == "train/loss"} == set(range(1, 61))
    assert [p.name for p in committed(tmp_path / "checkpoints")] == [
        f"step-{s:08d}" for s in (45, 50, 55, 60)
    ]


def test_a_run_killed_after_its_last_checkpoint_still_reports_its_metrics(tmp_path):
    ends = [
        Trainer(config(tmp_path, epochs=2)).train(Sines(16), Sines(8), classifier())
        for _ in range(2)
    ]
    assert ends[0].step == ends[1].step == 4
    assert ends[0].metrics == ends[1].metrics != {}
    found = points(tmp_path)
    assert len({(n, s) for n, s, _ in found}) == len(found)


def test_classes_are_counted_when_dim_output_is_not_given(tmp_path):
    model = RoMAForClassification(RoMAForClassificationConfig(**SHAPE))
    Trainer(config(tmp_path, epochs=1)).train(Sines(16), Sines(8), model)
    assert model.config.dim_output == 2


TRAIN = """
import sys, torch
from pathlib import Path
sys.path[:0] = {path!r}
from test_trainer import Sines, autoencoder, classifier, config, plain_autoencoder
from roma_core import Trainer
model = {model}()
end = Trainer(config({folder!r}, {changes})).train(Sines(41), Sines(12), model)
torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None
print("END", end.status, end.step, end.world_size)
"""


def start(folder, model="autoencoder", changes="", processes=1, wait=True):
    script = Path(folder) / "train.py"
    root = str(Path(__file__).parents[2])
    script.parent.mkdir(exist_ok=True, parents=True)
    script.write_text(
        TRAIN.format(
            path=[str(Path(__file__).parent), root],
            model=model,
            folder=str(folder),
            changes=changes,
        )
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = [
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        f"--master-port={port}",
    ]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not wait:
        return process
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def interrupt(process, folder, until, number) -> str:
    """Send a signal once ``until`` records are written; the process's output."""
    metrics = Path(folder) / "checkpoints/metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) > until:
            process.send_signal(number)
            break
    return process.communicate(timeout=60)[0]


def weights(folder):
    checkpoint = load_newest(Path(folder) / "checkpoints")
    return checkpoint.state, load_file(checkpoint.path / "model.safetensors")


def test_a_killed_run_ends_like_an_unbroken_one(tmp_path):
    """SIGKILL at moments spread over the run, then SIGTERM; bit-equal weights, no metric twice."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    changes = "ema_decay=0.9, augment_drop_rate=0.3, epochs=40"  # 240 steps
    start(unbroken, changes=changes)
    for until, number in ((11, signal.SIGKILL), (97, signal.SIGKILL), (180, signal.SIGTERM)):
        process = start(broken, changes=changes, wait=False)
        output = interrupt(process, broken, until, number)
    assert "END continue" in output and process.returncode == 0
    assert "resumed from" in output
    output = start(broken, changes=changes)
    assert "END completed 240 1" in output

    (state, expected), (again, found) = weights(unbroken), weights(broken)
    assert state.step == again.step == 240
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert points(broken) == points(unbroken)


@pytest.mark.slow
def test_another_number_of_processes_continues_the_same_run(tmp_path):
    """1 process → 2 → 1: same order and masks, so without dropout the same weights up to rounding."""
    one, mixed = tmp_path / "one", tmp_path / "mixed"
    changes = "epochs=10, save_every=1000, eval_every=1000"  # 60 steps
    start(one, "plain_autoencoder", changes)
    for processes, until in ((1, 10), (2, 30)):
        process = start(mixed, "plain_autoencoder", changes, processes, wait=False)
        output = interrupt(process, mixed, until, signal.SIGTERM)
        assert "asked to stop (SIGTERM)" in output
    assert "resumed from" in start(mixed, "plain_autoencoder", changes)
    (state, expected), (again, found) = weights(one), weights(mixed)
    assert state.global_batch_size == again.global_batch_size == 8
    assert [p[:2] for p in points(mixed)] == [p[:2] for p in points(one)]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


def test_two_processes_compute_what_one_does(tmp_path):
    """Also: evaluation every 3 steps on both ranks, which the published trainer does not survive."""
    outputs = [
        start(tmp_path / str(n), "classifier", f"batch_size={8 // n}, eval_every=3, epochs=2", n)
        for n in (1, 2)
    ]
    assert "END completed 12 1" in outputs[0] and "END completed 12 2" in outputs[1]
    one, two = ({(n, s): v for n, s, v in points(tmp_path / k)} for k in ("1", "2"))
    assert one.keys() == two.keys()
    assert one["train/loss", 1] == pytest.approx(two["train/loss", 1], rel=1e-2)  # dropout differs


def test_a_truncated_checkpoint_is_passed_over(tmp_path, caplog):
    Trainer(config(tmp_path, epochs=2)).train(Sines(40), None, autoencoder())
    newest, previous = committed(tmp_path / "checkpoints")[::-1][:2]
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    found = load_newest(tmp_path / "checkpoints")
    assert found.path == previous
    assert "does not match its sha256" in caplog.text


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    Trainer(config(tmp_path, epochs=1)).train(Sines(16), None, autoencoder())
    with pytest.raises(ValueError, match="random_seed is 42, now it is 7"):
        Trainer(config(tmp_path, epochs=1, random_seed=7)).train(Sines(16), None, autoencoder())
    with pytest.raises(ValueError, match="size of the training set is 16, now it is 17"):
        Trainer(config(tmp_path, epochs=1)).train(Sines(17), None, autoencoder())


def test_a_loss_that_is_not_finite_names_the_samples(tmp_path):
    with pytest.raises(RuntimeError, match=r"not finite in step \d+ on process 0; sample ids \["):
        Trainer(config(tmp_path, base_lr=1e30, optimizer="sgd", gradient_clip=None)).train(
            Sines(16), None, autoencoder()
        )
