"""Which parts learn how fast, what a class weighs, when to end, and which weights are kept."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from roma_core import RoMAForClassification, RoMAForClassificationConfig, Trainer, TrainerConfig
from roma_core.trainer.checkpoint import Retention, committed, load_newest, read_state
from roma_core.trainer.evaluator import EarlyStopping
from roma_core.trainer.optim import (
    layer_scales,
    learning_rate_factor,
    make_optimizer,
    set_learning_rate,
)
from roma_core.trainer.step import class_weights, training_loss
from tests.core.trainer.training_runs import SHAPE, Sines, autoencoder, classifier, config


def test_early_stopping_keeps_the_best_and_counts_what_was_not_better():
    stopping = EarlyStopping("min", min_delta=0.1)
    for value, best, since in [(3, 3, 0), (2.95, 3, 1), (math.nan, 3, 2), (2, 2, 0), (2, 2, 1)]:
        assert stopping.update(value) == (since == 0)
        assert (stopping.best, stopping.evaluations_since_best) == (best, since)
    for patience, stops in [(1, True), (2, False), (None, False)]:
        assert replace(stopping, patience=patience).should_stop is stops
    largest = EarlyStopping("max", best=0.5)
    assert largest.update(0.6) and largest.best == 0.6


def test_the_newest_and_the_best_checkpoints_stay():
    steps = {10: 0.9, 20: 0.2, 30: 0.5, 40: None, 50: 0.2, 60: math.nan}
    assert Retention(newest=2, best=1, mode="min").kept(steps) == {20, 50, 60}
    assert Retention(newest=2, best=2, mode="max").kept(steps) == {10, 30, 50, 60}
    assert Retention(newest=3, best=0, mode="min").kept(steps) == {40, 50, 60}
    assert Retention(newest=None, best=0, mode="min").kept(steps) == set(steps)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_every_schedule_is_a_function_of_the_step_alone(schedule):
    def rates(steps):
        return {s: learning_rate_factor(schedule, s, 50, 8) for s in steps}

    forwards, shuffled = range(50), random.Random(0).sample(range(50), 50)
    assert rates(forwards) == dict(sorted(rates(shuffled).items()))
    assert all(0 < rate <= 1 for rate in rates(forwards).values())
    assert rates(forwards)[7] == rates(forwards)[8] == 1.0


def test_layers_near_the_input_learn_slower():
    model = classifier()  # 2 blocks
    scales = layer_scales([name for name, _ in model.named_parameters()], 0.5)
    by_part = {
        part: {s for name, s in scales.items() if name.startswith(part)}
        for part in ("projection.", "cls", "encoder.layers.0.", "encoder.layers.1.", "head.")
    }
    assert list(by_part.values()) == [{0.125}, {0.125}, {0.25}, {0.5}, {1.0}]
    named = list(model.named_parameters())
    optimizer = make_optimizer(named, TrainerConfig(layer_lr_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rate) == len(named)
    for name, parameter in named:
        assert rate[id(parameter)] == pytest.approx(0.1 * scales[name])
        assert (decay[id(parameter)] > 0) == (parameter.ndim >= 2)


def test_a_linear_probe_moves_the_head_alone(tmp_path):
    model = classifier()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    changes = {"freeze_encoder": True, "save_every": 2, "epochs": 2}
    end = Trainer(config(tmp_path, **changes)).train(Sines(16), Sines(8), model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("head.") for name in moved)
    again = Trainer(config(tmp_path, **changes)).train(Sines(16), Sines(8), classifier())
    assert again.metrics == end.metrics
    with pytest.raises(ValueError, match="pretraining would learn nothing"):
        Trainer(config(tmp_path / "p", **changes)).train(Sines(16), None, autoencoder())


def test_class_weights_average_to_one_over_the_series():
    counts = np.array([30, 10, 0])
    weights = class_weights("inverse_frequency", counts)
    assert float(weights[0] * 30) == pytest.approx(float(weights[1] * 10))
    assert float((weights * torch.tensor(counts)).sum() / 40) == pytest.approx(1)
    given = class_weights([1.0, 3.0, 0.0], counts)
    assert float(given[1] / given[0]) == pytest.approx(3)
    with pytest.raises(ValueError, match="2 numbers, but there are 3 classes"):
        class_weights([1.0, 2.0], counts)


class Rare(Sines):
    """One series in four is of class 1."""

    def __getitem__(self, i: int) -> dict:
        return super().__getitem__(i) | {"label": int(i % 4 == 0)}


def test_weights_and_smoothing_shape_training_and_not_evaluation(tmp_path):
    model = classifier()
    settings = TrainerConfig(class_weights="inverse_frequency", label_smoothing=0.1)
    loss = training_loss(model, settings, Rare(16))
    logits, label = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    expected = F.cross_entropy(logits, label, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(loss(logits, label), expected * torch.tensor([2 / 3, 2, 2 / 3, 2]))

    own = model.loss_fn
    changes = {"epochs": 1, "class_weights": [0.0, 1.0], "base_lr": 1e-9, "batch_size": 16}
    seen = []
    trainer = Trainer(config(tmp_path, **changes))
    trainer.set_evaluate_callback(lambda model, *_: seen.append(model.loss_fn))
    end = trainer.train(Rare(16), Rare(16), model)
    assert seen == [own] and model.loss_fn is own
    unweighted = Trainer(config(tmp_path / "u", epochs=1, base_lr=1e-9, batch_size=16))
    assert unweighted.train(Rare(16), Rare(16), classifier()).metrics == pytest.approx(
        end.metrics, rel=1e-5
    )


def test_a_wish_that_the_model_cannot_grant_is_refused_or_said(tmp_path, caplog):
    regression = RoMAForClassification(
        RoMAForClassificationConfig(**SHAPE, dim_output=2, problem_type="regression")
    )
    with pytest.raises(ValueError, match="label_smoothing are for classification"):
        training_loss(regression, TrainerConfig(label_smoothing=0.1), Sines(4))
    model = autoencoder()
    assert training_loss(model, TrainerConfig(label_smoothing=0.1), Sines(4)) is model.loss_fn
    assert "ignores label_smoothing" in caplog.text
    with pytest.raises(ValueError, match="final_weights=best needs"):
        TrainerConfig(final_weights="best", keep_best=0)
    for changes in ({"early_stopping_patience": 2}, {"final_weights": "best"}):
        with pytest.raises(ValueError, match="needs a test_dataset"):
            Trainer(config(tmp_path, **changes)).train(Sines(8), None, model)
    with pytest.raises(ValueError, match=r"best_metric is eval/f1, but .* gives eval/loss;"):
        Trainer(config(tmp_path, best_metric="eval/f1")).train(Sines(8), Sines(8), model)
    assert not (tmp_path / "metrics.jsonl").exists()  # before the first step
    with pytest.raises(ValueError, match=r"finite and not negative, got \[-1"):
        TrainerConfig(class_weights=[-1, 2])


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
        assert end.metrics["eval/score"] == 0.4
    saved = committed(tmp_path / "checkpoints")
    assert [p.name for p in saved] == ["step-00000002", "step-00000004", "step-00000008"][
        -len(saved) :
    ]
    best = next(p for p in saved if read_state(p).evaluation["eval/score"] == 0.4)
    kept = load_newest(tmp_path / "checkpoints")
    assert kept is not None and kept.path.name == "step-00000008" and best.name == "step-00000004"
    for model in models:
        again = RoMAForClassification.from_pretrained(best)
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])
