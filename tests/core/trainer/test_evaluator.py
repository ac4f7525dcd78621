"""Early stopping, and which checkpoints and weights are kept."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from roma_core import RoMAForClassification, Trainer, TrainerConfig
from roma_core.trainer.checkpoint import committed, kept, load_newest, read_state
from roma_core.trainer.evaluator import EarlyStopping, r2
from roma_core.trainer.metrics import read_records
from tests.core.trainer.training_runs import Sines, classifier, config


def test_r2_is_the_mean_over_the_targets_that_differ():
    rng = np.random.default_rng(0)
    true = rng.normal([5, 0, 3], [1, 100, 0], (50, 3)).astype(np.float32)
    predicted = true + rng.normal(size=(50, 3)).astype(np.float32)

    expected = r2_score(true[:, :2], predicted[:, :2])

    assert r2(true, predicted) == pytest.approx(expected) and np.isnan(r2(true[:1], true[:1]))


def test_early_stopping_keeps_the_best_and_counts_what_was_not_better():
    stopping = EarlyStopping("min", min_delta=0.1)
    for value, best, since in [(3, 3, 0), (2.95, 3, 1), (math.nan, 3, 2), (2, 2, 0), (2, 2, 1)]:
        assert stopping.update(value) == (since == 0)
        assert (stopping.best, stopping.evaluations_since_best) == (best, since)
    for patience, stops in [(1, True), (2, False), (None, False)]:
        assert replace(stopping, patience=patience).should_stop is stops
    largest = EarlyStopping("max", best=0.5)
    assert largest.update(0.6) and largest.best == 0.6


def retention(newest: int | None, best: int, mode: str) -> TrainerConfig:
    return TrainerConfig(max_checkpoints=newest, keep_best=best, best_metric_mode=mode)


def test_the_newest_and_the_best_checkpoints_stay():
    steps = {10: 0.9, 20: 0.2, 30: 0.5, 40: None, 50: 0.2, 60: math.nan}
    assert kept(steps, retention(2, 1, "min")) == {20, 50, 60}
    assert kept(steps, retention(2, 2, "max")) == {10, 30, 50, 60}
    assert kept(steps, retention(3, 0, "min")) == {40, 50, 60}
    assert kept(steps, retention(None, 0, "min")) == set(steps)


def test_the_metric_that_ranks_checkpoints_is_evaluated_and_largest_is_best(tmp_path):
    changes = {"best_metric": "eval/auroc", "best_metric_mode": "max", "final_weights": "best"}
    trainer = Trainer(config(tmp_path, **changes, eval_every=2, epochs=3))
    end = trainer.train(Sines(16), Sines(8), classifier())
    scores = [
        record["metrics"]["eval/auroc"]
        for _, record in read_records(tmp_path / "checkpoints" / "metrics.jsonl")
        if "eval/auroc" in record["metrics"]
    ]
    assert len(scores) > 1 and end.metrics["eval/auroc"] == max(scores)


SCORES = {2: 0.5, 4: 0.4, 6: 0.7, 8: 0.6, 10: 0.8}


def test_training_ends_early_and_keeps_the_best(tmp_path):
    """A callback gives the metric; the second start finds the run ended."""
    changes = {
        "eval_every": 2,
        "save_every": 100,
        "early_stopping_patience": 2,
        "best_metric": "eval/score",
        "final_weights": "best",
        "epochs": 20,
        "max_checkpoints": 2,
    }
    models = []
    for _ in range(2):
        steps = iter(SCORES)
        trainer = Trainer(config(tmp_path, **changes))
        trainer.set_evaluate_callback(lambda *_, steps=steps: {"score": SCORES[next(steps)]})
        models.append(classifier())
        end = trainer.train(Sines(16), Sines(8), models[-1])
        assert (end.status, end.step) == ("completed", 8)
        assert "early stopping: 2 evaluations without a better eval/score than 0.4" in end.reason
        assert (end.metrics["eval/score"], end.weights_step) == (0.4, 4)
    saved = committed(tmp_path / "checkpoints")
    assert [p.name for p in saved] == ["step-00000002", "step-00000004", "step-00000008"][
        -len(saved) :
    ]
    best = next(p for p in saved if read_state(p).evaluation["eval/score"] == 0.4)
    newest = load_newest(tmp_path / "checkpoints")
    assert (
        newest is not None and newest.path.name == "step-00000008" and best.name == "step-00000004"
    )
    for model in models:
        again = RoMAForClassification.from_pretrained(best)
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])
