"""The trainer on a GPU: no waiting in a step, evaluation as on the CPU, and exact resume."""

from __future__ import annotations

import pytest
import torch

from roma_core import Trainer
from roma_core.trainer.dataloader import Collate
from roma_core.trainer.distributed import SINGLE_PROCESS
from roma_core.trainer.evaluator import classify, evaluate
from roma_core.trainer.step import TrainStep
from tests.core.trainer.training_runs import Sines, autoencoder, classifier, config, points

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"


def train(folder, model=autoencoder, **changes):
    trained = model()
    end = Trainer(config(folder, log_wandb=False, **changes)).train(Sines(41), Sines(12), trained)
    assert trained.projection.weight.device.type == DEVICE
    return end


@pytest.mark.parametrize("model", [autoencoder, classifier])
def test_no_step_waits_for_the_gpu(tmp_path, monkeypatch, model):
    do_step, steps = TrainStep.__call__, []

    def watched(self, step, *arguments):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first makes its state
        try:
            return do_step(self, step, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            steps.append(step)

    monkeypatch.setattr(TrainStep, "__call__", watched)
    train(tmp_path, model, epochs=2, ema_decay=0.9, class_weights="inverse_frequency")
    assert len(steps) == 12


@pytest.mark.parametrize("model", [autoencoder, classifier])
def test_an_evaluation_on_the_gpu_gives_the_metrics_of_the_cpu(tmp_path, model):
    settings, made = config(tmp_path), model()
    expected = evaluate(made, Sines(20), settings, SINGLE_PROCESS, lambda: False)
    found = evaluate(made.to(DEVICE), Sines(20), settings, SINGLE_PROCESS, lambda: False)
    assert found == pytest.approx(expected, rel=1e-3)
    if model is classifier:
        outputs = classify(made, Sines(20), Collate(made.config, 0), 8)
        expected = classify(made.cpu(), Sines(20), Collate(made.config, 0), 8)
        assert outputs.logits == pytest.approx(expected.logits, rel=1e-3, abs=1e-4)


def test_a_resumed_training_repeats_the_steps_of_an_unbroken_one(tmp_path, monkeypatch):
    """Up to the order in which its kernels add; masks, dropout, data and optimiser are the same."""
    whole = train(tmp_path / "whole")
    do_step = TrainStep.__call__

    def until(self, step, *arguments):
        if step == 12:
            raise KeyboardInterrupt
        return do_step(self, step, *arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(TrainStep, "__call__", until)
        train(tmp_path / "parts")
    resumed = train(tmp_path / "parts")

    assert resumed.step == whole.step == 24
    expected, found = (
        {(name, step): value for name, step, value in points(tmp_path / part)}
        for part in ("whole", "parts")
    )
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=2e-2, abs=1e-3)
