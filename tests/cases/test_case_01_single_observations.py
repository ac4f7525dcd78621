"""Objects seen once: pretraining has nothing to hide in them, and does not end because of them."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from roma_core import RoMAForPreTraining, RoMAForPreTrainingConfig, Trainer
from roma_core.data.store import StoredDataset
from roma_core.files import read_json
from roma_core.trainer.metrics import read_records
from tests.cases.trainings import DECODER, SMALL, build, interrupted, roma
from tests.core.trainer.training_runs import (
    DECODER as DECODER_STACK,
)
from tests.core.trainer.training_runs import (
    SHAPE,
    Plan,
    assert_same_end,
    config,
    interrupt,
    last_step,
    points,
    run,
)

BATCHES = {"by tokens": "tokens_per_batch=256", "by series": "batch_size=8"}


@pytest.fixture(scope="module")
def alerts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("alerts")
    build(root, [1] * 2000 + [20] * 200)
    return root


def data_of(root: Path) -> Path:
    return next((root / "data/s").glob("[0-9a-f]*")).relative_to(root)


@pytest.mark.parametrize("batches", BATCHES)
def test_pretraining_leaves_single_observations_out_and_says_so(alerts, batches):
    run_folder = alerts / batches.replace(" ", "-")
    command = ["pretrain", "--data", data_of(alerts), "--run-dir", run_folder, *SMALL, *DECODER]
    command += ["--set", "trainer.epochs=3", "--set", f"trainer.{BATCHES[batches]}"]
    output = roma(*command, cwd=alerts)

    lengths = StoredDataset(alerts / data_of(alerts)).split("train").lengths
    n_single, n = int((lengths == 1).sum()), len(lengths)
    sentence = f"{n_single:,} of {n:,} training series have one observation, of which nothing can be hidden"
    assert output.count(sentence) == 1 and f"{n - n_single} series" in output
    result = read_json(run_folder / "result.json")
    assert result["facts"]["series_left_out"] == n_single
    assert 0 < result["metrics"]["eval/loss"] < 10
    losses = [
        r["metrics"]["train/loss"]
        for _, r in read_records(run_folder / "metrics.jsonl")
        if "train/loss" in r["metrics"]
    ]
    assert losses and all(0 < loss < 10 for loss in losses)


def test_a_stopped_pretraining_meets_the_same_decision(alerts):
    command = ["pretrain", "--data", data_of(alerts), "--run-dir", "stopped", *SMALL, *DECODER]
    command += ["--set", "trainer.epochs=300", "--set", "trainer.batch_size=8"]
    command += ["--set", "trainer.save_every=10"]
    for expected in ("", "resumed from step-"):
        output = interrupted(*command, run=alerts / "stopped", cwd=alerts)
        assert expected in output and output.count("pretraining leaves them out") == 1


def test_nothing_but_single_observations_is_refused_when_it_is_planned(tmp_path):
    data = build(tmp_path, [1] * 60)
    output = roma(
        "pretrain", "--data", data, "--run-dir", "run", *SMALL, *DECODER, cwd=tmp_path, code=1
    )
    assert "every training series of s has one observation" in output
    assert not (tmp_path / "run").exists()


def test_no_mask_is_refused_before_the_first_step(alerts):
    command = ["pretrain", "--data", data_of(alerts), "--run-dir", "unmasked", *SMALL, *DECODER]
    output = roma(*command, "--set", "model.mask_ratio=0", cwd=alerts, code=1)
    assert "a mask_ratio above 0, which is 0.0" in output


# --- data sets of one's own, whose lengths are not known ----------------------------------------


class Alerts:
    """Series of one token, and one in ten of five."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict:
        g = np.random.default_rng(i)
        t = np.sort(g.uniform(0, 10, 1 if i % 10 else 5)).astype(np.float32)
        values = np.stack([np.sin(t), np.cos(t)], 1).astype(np.float32)
        return {"values": values[:, :, None, None], "positions": t[None]}


def autoencoder() -> RoMAForPreTraining:
    """No dropout, in float64: the same gradients with any number of processes, up to rounding."""
    torch.manual_seed(0)
    stack = SHAPE["encoder_config"].model_copy(update={"hidden_drop_rate": 0.0})
    shape = SHAPE | {"encoder_config": stack, "decoder_config": DECODER_STACK}
    return RoMAForPreTraining(RoMAForPreTrainingConfig(**shape)).double()


CHANGES = {"batch_size": 4, "epochs": 4, "save_every": 3, "eval_every": 1000}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    output = run(Plan(folder, CHANGES, autoencoder, train=Alerts(60), test=None))
    (n_empty,) = re.findall(r"(\d+) steps had nothing to hide and were passed over", output)
    assert 10 < int(n_empty) < 50 and output.count("such steps are passed over") == 1
    return folder


def test_empty_steps_are_no_part_of_the_curve(unbroken):
    losses = [value for name, _, value in points(unbroken) if name == "train/loss"]
    assert 10 < len(losses) < 50 and all(loss > 0 for loss in losses)


@pytest.mark.parametrize("step", [5, 40])
def test_a_resume_passes_the_same_steps_over(tmp_path, unbroken, step):
    broken = Plan(tmp_path, CHANGES, autoencoder, train=Alerts(60), test=None)

    def is_later() -> bool:
        return last_step(tmp_path) >= step and any(tmp_path.glob("checkpoints/step-*"))

    interrupt(broken, is_later, signal.SIGKILL)
    assert "resumed from" in run(broken)
    assert_same_end(tmp_path, unbroken)


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (2, {"batch_size": 2}),
        (1, {"batch_size": 1, "gradient_accumulation_steps": 4}),
        (2, {"batch_size": 1, "gradient_accumulation_steps": 2}),
        (2, {"batch_size": 2, "sharding": "fsdp"}),
    ],
)
def test_a_process_with_nothing_to_hide_takes_part_in_the_step(
    tmp_path, unbroken, processes, changes
):
    run(Plan(tmp_path, CHANGES | changes, autoencoder, train=Alerts(60), test=None), processes)
    one, two = points(unbroken), points(tmp_path)
    assert [p[:2] for p in one] == [p[:2] for p in two]
    for (name, _, expected), (*_, found) in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-6), name


def test_an_evaluation_with_nothing_to_hide_has_no_loss(tmp_path):
    end = Trainer(config(tmp_path, epochs=1)).train(Alerts(20), Ones(4), autoencoder())
    assert "eval/loss" in end.metrics and np.isnan(end.metrics["eval/loss"])


class Ones(Alerts):
    def __getitem__(self, i: int) -> dict:
        return super().__getitem__(10 * i + 1)
