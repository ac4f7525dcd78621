"""The trainer: order, gradients, learning, checkpoints. Small models, one thread."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from roma_core import (
    EncoderConfig,
    RoMAForClassification,
    RoMAForClassificationConfig,
    Trainer,
    TrainerConfig,
)
from roma_core.trainer import distributed
from roma_core.trainer.checkpoint import committed
from roma_core.trainer.distributed import init_accelerator
from roma_core.trainer.optim import learning_rate_factor
from roma_core.trainer.sampler import lengths_of
from roma_core.trainer.step import TrainStep
from tests.benchmarks.timing import HostReads
from tests.core.trainer.training_runs import (
    SHAPE,
    Plan,
    Sines,
    Waves,
    autoencoder,
    autoencoder_of_windows,
    classifier,
    config,
    interrupt,
    plain_autoencoder,
    plain_classifier,
    points,
    records_reach,
    run,
    weights,
)
from tests.time_limits import within


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
        f"step-{s:08d}" for s in (50, 55, 56, 60)
    ]


@pytest.mark.parametrize(
    ("made", "is_random"), [(autoencoder, False), (autoencoder_of_windows, True)]
)
def test_series_of_all_lengths_are_normalised_together(tmp_path, made, is_random):
    """Running statistics, which predictions use, are not those of short or of long series alone."""
    trainer = Trainer(config(tmp_path, epochs=1, tokens_per_batch=150))
    trainer.train(Waves(), None, made())

    lengths = lengths_of(Waves())
    inside = np.mean([lengths[batch].std() for batch in trainer.sampler.batches(0)])
    assert bool(inside > 0.7 * lengths.std()) is is_random


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about processors")
def test_the_processor_determines_the_precision_of_auto_in_every_training(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    for matrix_units, expected in ((True, "bf16"), (False, "no"), (True, "bf16")):
        monkeypatch.setattr(distributed, "has_matrix_units", lambda units=matrix_units: units)
        accelerator = init_accelerator(config(tmp_path, mixed_precision="auto"))
        assert accelerator.mixed_precision == expected
        assert caplog.messages[-1] == f"mixed_precision auto: {expected}"
    auto = config(tmp_path, mixed_precision="auto")
    for made, expected in ((classifier, "no"), (autoencoder_of_windows, "bf16")):  # 16 wide
        assert init_accelerator(auto, made()).mixed_precision == expected
    # null is that of the launcher, not that of the training before
    assert init_accelerator(config(tmp_path)).mixed_precision == "no"


@pytest.mark.parametrize(
    ("model", "reads"),
    [(autoencoder, set()), (classifier, {"nonzero"})],  # labels are checked on a CPU alone
)
def test_no_step_reads_a_number_of_the_device(tmp_path, monkeypatch, model, reads):
    do_step, found, operators = TrainStep.__call__, [], []

    def counted(step, *arguments):
        step.checks_every_step = False  # as on a GPU
        with HostReads() as mode:
            result = do_step(step, *arguments)
        found.extend(mode.found)
        operators.append(mode.operators)
        return result

    monkeypatch.setattr(TrainStep, "__call__", counted)
    settings = config(tmp_path, epochs=1, batch_size=20, ema_decay=0.9)
    Trainer(settings).train(Sines(40), None, model())
    assert len(operators) == 2 and min(operators) > 100
    assert set(found) == reads


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


SCRIPT = """
import os
from pathlib import Path
from tests.core.trainer.training_runs import *
if __name__ == "__main__":
    trainer = Trainer(config({folder!r}, eval_every=3, epochs=2, batch_size=4))
    end = trainer.train(Sines(41), Sines(12), plain_classifier())
    torch.distributed.destroy_process_group()
    # one write: two processes share the pipe
    os.write(1, f"END {{end.status}} {{end.step}} {{end.world_size}}\\n".encode())
"""


def test_torchrun_evaluates_on_both_ranks_and_computes_what_one_process_does(tmp_path):
    """Evaluation every 3 steps with 2 processes: the published trainer does not survive it."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path / "2")))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"),
            script,
        ],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        | {"TMPDIR": str(tmp_path)}  # torchrun leaves a folder of logs behind
        | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=within(60),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("END completed 12 2") == 2
    run(Plan(tmp_path / "1", {"eval_every": 3, "epochs": 2}, plain_classifier))
    one, two = ({(n, s): v for n, s, v in points(tmp_path / k)} for k in ("1", "2"))
    assert one.keys() == two.keys()
    for step in (1, 12):
        assert one["train/loss", step] == pytest.approx(two["train/loss", step], rel=1e-3)


SIXTY = {"epochs": 10, "batch_size": 4, "save_every": 8, "eval_every": 1000}  # steps of 8 series


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Sixty steps by two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("two")
    run(Plan(folder, SIXTY, plain_autoencoder), 2)
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_another_number_of_processes_continues_the_same_run(tmp_path, by_two, number):
    """2 processes → 1 → 2: same order and masks; without dropout the same weights up to rounding."""
    mixed = Plan(tmp_path, SIXTY, plain_autoencoder)
    for processes, until in ((2, 12), (1, 30)):
        stopped = interrupt(mixed, records_reach(mixed.folder, until), number, processes)
        if number == signal.SIGTERM:
            assert "asked to stop (SIGTERM)" in stopped.output
        else:
            assert set(stopped.exit_codes) == {-signal.SIGKILL}, stopped.output
    assert "resumed from" in run(mixed, 2)
    (state, expected), (again, found) = weights(by_two), weights(mixed.folder)
    assert state.step == again.step == 60
    assert state.global_batch_size == again.global_batch_size == 8
    assert [p[:2] for p in points(mixed.folder)] == [p[:2] for p in points(by_two)]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


def test_processes_and_micro_batches_give_the_same_gradients(tmp_path):
    """1 process × 8, 2 × 4, 2 × 2 × accumulation 2: with plain SGD at rate 1 a step is the gradient."""
    start = dict(plain_autoencoder().named_parameters())
    gradients = []
    for processes, batch_size, accumulation in ((1, 8, 1), (2, 4, 1), (2, 2, 2)):
        plan = Plan(
            tmp_path / f"{processes}x{batch_size}x{accumulation}",
            {
                "batch_size": batch_size,
                "gradient_accumulation_steps": accumulation,
                "epochs": 1,
                "optimizer": "sgd",
                "base_lr": 1.0,
                "warmup_steps": 0,
                "gradient_clip": None,
            },
            plain_autoencoder,
            train=Sines(8),
        )
        run(plan, processes)
        state, after = weights(plan.folder)
        assert state.step == 1
        gradients.append({name: start[name].detach() - after[name] for name in after})
    for other in gradients[1:]:
        for name, expected in gradients[0].items():
            assert expected.abs().max() > 0
            torch.testing.assert_close(other[name], expected, rtol=1e-9, atol=1e-15)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    Trainer(config(tmp_path, epochs=1)).train(Sines(16), None, autoencoder())
    with pytest.raises(ValueError, match="random_seed 42 → 7; set it back"):
        Trainer(config(tmp_path, epochs=1, random_seed=7)).train(Sines(16), None, autoencoder())
    with pytest.raises(ValueError, match="size of the training set 16 → 17"):
        Trainer(config(tmp_path, epochs=1)).train(Sines(17), None, autoencoder())


def test_a_run_that_goes_on_says_which_settings_changed_and_which_may(tmp_path):
    train = (Sines(16), None, autoencoder())
    Trainer(config(tmp_path, epochs=1)).train(*train)
    with pytest.raises(ValueError, match=r"base_lr 0.005 → 0.1, gradient_clip 1.0 → None;") as e:
        Trainer(config(tmp_path, epochs=1, base_lr=0.1, gradient_clip=None)).train(*train)
    assert "may change only background_checkpoints, batch_size" in str(e.value)
    allowed = {"batch_size": 3, "save_every": 2, "threads": 1, "run_name": "again"}
    assert Trainer(config(tmp_path, epochs=1, **allowed)).train(*train).step == 2


def test_the_learning_rate_stays_that_of_the_processes_that_began(tmp_path):
    changes = {"lr_scaling": True, "batch_size": 4, "save_every": 1, "epochs": 3}
    plan = Plan(tmp_path, changes, plain_autoencoder)
    interrupt(plan, records_reach(tmp_path, 4), signal.SIGTERM, 2)
    run(plan)
    rates = [value for name, _, value in points(tmp_path) if name == "train/lr"]
    factors = [learning_rate_factor("cosine", step, 18, 2) for step in range(18)]
    assert rates == pytest.approx([2 * 5e-3 * factor for factor in factors])


def test_training_by_tokens_learns_and_goes_on_where_it_stopped(tmp_path):
    def train(folder, **changes):
        torch.manual_seed(0)
        stack = EncoderConfig(d_model=16, nhead=2, depth=1)
        shape = {"tubelet_size": (1, 1, 1), "n_channels": 2, "n_pos_dims": 1, "dim_output": 2}
        model = RoMAForClassification(RoMAForClassificationConfig(encoder_config=stack, **shape))
        options = {
            "epochs": 16,
            "tokens_per_batch": 100,
            "base_lr": 0.01,
            "eval_every": 30,
            "save_every": 5,
            "augment_drop_rate": 0.2,
            "augment_jitter_std": 0.02,
            "augment_channel_drop_rate": 0.1,
            "augment_crop_rate": 0.2,
            "checkpoint_dir": folder,
        }
        trainer = Trainer(TrainerConfig(**{**options, **changes}))
        return trainer.train(Waves(), Waves(), model), model

    whole, expected = train(tmp_path / "whole")
    assert whole.status == "completed" and whole.metrics["eval/accuracy"] > 0.9
    stop_at(tmp_path / "parts", lambda: train(tmp_path / "parts"), step=12)
    resumed, found = train(tmp_path / "parts", num_dataset_workers=2)
    assert resumed.step == whole.step
    for a, b in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b)


def stop_at(folder, train, step):
    """Kill a training between two steps, as a power cut would: its newest checkpoint is older."""
    do_step = TrainStep.__call__

    def until(train_step, number, *arguments):
        if number == step:
            raise KeyboardInterrupt
        return do_step(train_step, number, *arguments)

    TrainStep.__call__ = until
    try:
        with pytest.raises(KeyboardInterrupt):
            train()
    finally:
        TrainStep.__call__ = do_step
    assert [p.name for p in sorted(folder.iterdir())][-1] == "step-00000010"
