"""The training loss: class weights and label smoothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from roma_core import RoMAForClassification, RoMAForClassificationConfig, Trainer, TrainerConfig
from roma_core.trainer.step import class_weights, training_loss
from tests.core.trainer.training_runs import SHAPE, Sines, autoencoder, classifier, config


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
        with pytest.raises(ValueError, match="needs a test_dataset"):
            Trainer(config(tmp_path, **changes)).train(Sines(8), None, model)
    with pytest.raises(ValueError, match=r"best_metric is eval/f1, but .* gives eval/loss;"):
        Trainer(config(tmp_path, best_metric="eval/f1")).train(Sines(8), Sines(8), model)
    assert not (tmp_path / "metrics.jsonl").exists()  # before the first step
    with pytest.raises(ValueError, match=r"finite and not negative, got \[-1"):
        TrainerConfig(class_weights=[-1, 2])
