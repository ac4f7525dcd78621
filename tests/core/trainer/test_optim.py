"""Learning-rate schedule, layer-wise rates and linear probes."""

import random

import pytest
import torch

from roma_core import Trainer, TrainerConfig
from roma_core.trainer.optim import (
    layer_scales,
    learning_rate_factor,
    make_optimizer,
    set_learning_rate,
)
from tests.core.trainer.training_runs import Sines, autoencoder, classifier, config


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
