"""The training loss, the learning-rate schedule, layer-wise rates and linear probes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from roma_core import RoMAForClassification, RoMAForClassificationConfig, Trainer, TrainerConfig
from roma_core.trainer.optim import (
    class_weights,
    layer_scales,
    learning_rate_factor,
    make_optimizer,
    set_learning_rate,
    training_loss,
)
from tests.core.trainer.training_runs import (
    SHAPE,
    Sines,
    autoencoder,
    autoencoder_of_windows,
    classifier,
    config,
)


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


def test_a_setting_that_the_model_does_not_support_is_refused_or_warned_of(tmp_path, caplog):
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
        with pytest.raises(ValueError, match="needs series to evaluate on"):
            Trainer(config(tmp_path, **changes)).train(Sines(8), None, model)
    with pytest.raises(ValueError, match=r"best_metric is eval/f1, but .* gives eval/loss;"):
        Trainer(config(tmp_path, best_metric="eval/f1")).train(Sines(8), Sines(8), model)
    assert not (tmp_path / "metrics.jsonl").exists()  # before the first step
    with pytest.raises(ValueError, match=r"finite and not negative, got \[-1"):
        TrainerConfig(class_weights=[-1, 2])


def test_the_schedule_warms_up_and_ends_near_zero():
    factors = [learning_rate_factor("cosine", s, 100, 10) for s in range(100)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 1e-3
    assert learning_rate_factor("linear", 55, 100, 10) == pytest.approx(0.5)
    assert learning_rate_factor("constant", 99, 100, 0) == 1.0


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


def test_convolutions_of_windows_are_part_of_the_embedding():
    names = [name for name, _ in autoencoder_of_windows().named_parameters()]
    scales = layer_scales(names, 0.5)
    assert {s for name, s in scales.items() if name.startswith("stem.")} == {0.125}


def test_the_encoder_learns_slower_where_it_is_asked_to():
    named = list(classifier().named_parameters())
    optimizer = make_optimizer(named, TrainerConfig(encoder_lr_scale=0.1, layer_lr_decay=0.5))
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    by_name = {name: scale[id(p)] for name, p in named}
    assert by_name["encoder.layers.1.w1.weight"] == pytest.approx(0.05)
    assert by_name["projection.weight"] == 0.125 and by_name["head.linear.weight"] == 1


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
