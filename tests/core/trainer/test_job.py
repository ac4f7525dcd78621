"""What a training job refuses and fills in when it is planned."""

import json

import numpy as np
import pytest
import torch

from roma_core.data import DatasetConfig, StoredDataset, build_dataset
from roma_core.model import (
    RoMAForClassification,
    RoMAForClassificationConfig,
    RoMAForPreTraining,
    RoMAForPreTrainingConfig,
)
from roma_core.schema import Channel, ChannelFit
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.job import TrainingJobConfig, data_fields, model_of
from tests.core.hand_made import HandMade, built, config_of, series


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A data set of places that are to be told, and a run folder."""
    root = tmp_path_factory.mktemp("regression")
    config = DatasetConfig(
        name="places", source={"kind": "synthetic", "process": "positions", "n_series": 300}
    )
    return build_dataset(config, root, root, progress=False), root


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"problem_type": "regression"},
            "of every observation, but pooling=cls .* set pooling=token",
        ),
        ({"pooling": "token", "dim_output": 2}, "classes belong to series"),
        ({"dim_output": 2}, "a classifier needs classes"),
    ],
)
def test_a_training_for_what_the_data_do_not_know_is_refused_when_it_is_planned(
    places, fields, message
):
    with pytest.raises(ValueError, match=message):
        TrainingJobConfig.resolve("finetune", places[0], fields, TrainerConfig())


def test_the_data_determine_scale_and_pooling_of_a_regression(tmp_path):
    source = {"kind": "synthetic", "process": "damped", "n_series": 30}
    data = build_dataset(
        DatasetConfig(name="waves", source=source), tmp_path, tmp_path, progress=False
    )
    frequency, decay = StoredDataset(data).schema.targets
    fields = {"problem_type": "regression", "predict_variance": True}

    config = TrainingJobConfig.resolve("finetune", data, fields, TrainerConfig())

    assert (config.model["dim_output"], config.model["predict_variance"]) == (2, True)
    assert config.model["target_scales"] == [[t.mean, t.std] for t in (frequency, decay)]
    with pytest.raises(
        ValueError, match=r"targets of waves are of every series, .* set pooling=mean"
    ):
        TrainingJobConfig.resolve("finetune", data, fields | {"pooling": "token"}, TrainerConfig())


def test_a_regression_without_targets_is_refused_when_it_is_planned(tmp_path):
    data = built(tmp_path, *[series(f"s{k}", seed=k) for k in range(5)])
    fields = {"problem_type": "regression", "pooling": "token"}
    with pytest.raises(ValueError, match="has none; name their columns in `targets`"):
        TrainingJobConfig.resolve("finetune", data, fields, TrainerConfig())


def test_the_environment_does_not_make_a_regressor_of_a_published_classifier(
    places, tmp_path, monkeypatch
):
    data, manifest = places[0], StoredDataset(places[0]).manifest
    shape = {"encoder_config": {"d_model": 8, "nhead": 1}, "dim_output": 1}
    config = RoMAForClassificationConfig.from_values(shape | data_fields(manifest.data_schema))
    published = config.model_dump(mode="json")
    del published["problem_type"], published["pooling"]
    (tmp_path / "model_config.json").write_text(json.dumps(published))
    monkeypatch.setenv("ROMA_CLASSIFIER_PROBLEM_TYPE", "regression")

    with pytest.raises(ValueError, match="a classifier needs classes"):
        TrainingJobConfig.resolve("finetune", data, {}, TrainerConfig(), weights=tmp_path)


def test_an_old_data_set_whose_targets_have_no_scale_is_warned_of(tmp_path, monkeypatch):
    every = [series(f"s{k}", 4, targets=np.full((4, 1), k, np.float32)) for k in range(6)]
    source = HandMade(series=every, targets=(Channel(name="depth", unit="m"),))
    monkeypatch.setattr(ChannelFit, "result", lambda fit: tuple(fit.entries))
    data = build_dataset(config_of(source=source), tmp_path, tmp_path, progress=False)
    fields = {"problem_type": "regression", "pooling": "token"}

    with pytest.warns(UserWarning, match=r"before targets were standardised, .* build it again"):
        config = TrainingJobConfig.resolve("finetune", data, fields, TrainerConfig())

    assert config.model["target_scales"] == []


def test_the_environment_may_ask_for_a_regression(places, monkeypatch):
    for name, value in (("PROBLEM_TYPE", "regression"), ("POOLING", "token")):
        monkeypatch.setenv(f"ROMA_CLASSIFIER_{name}", value)

    config = TrainingJobConfig.resolve("finetune", places[0], {}, TrainerConfig())

    assert config.model["dim_output"] == 1, json.dumps(config.model)


@pytest.fixture
def autoencoder(places, tmp_path):
    """Weights of a small autoencoder of the places."""
    stored = StoredDataset(places[0])
    stack = {"d_model": 16, "nhead": 2, "depth": 2, "dim_feedforward": 32}
    config = RoMAForPreTrainingConfig(
        encoder_config=stack, decoder_config=stack | {"depth": 1}, **data_fields(stored.schema)
    )
    model = RoMAForPreTraining(config)
    model.data_schema = stored.schema.model_dump(mode="json")
    model.save_pretrained(tmp_path / "outputs" / "model")
    return model, tmp_path / "outputs" / "model"


def test_a_pretraining_continues_from_weights_with_their_shape(places, autoencoder):
    model, weights = autoencoder
    changes = {"mask_ratio": 0.6, "encoder_config": {"drop_path_rate": 0.2}}

    config = TrainingJobConfig.resolve(
        "pretrain", places[0], changes, TrainerConfig(), weights=weights
    )

    assert config.weights_digest is not None
    assert config.model["mask_ratio"] == 0.6
    stack = config.model["encoder_config"]
    assert (stack["d_model"], stack["depth"], stack["drop_path_rate"]) == (16, 2, 0.2)
    started = model_of(config, seed=5, resumes=False).state_dict()
    assert all(torch.equal(tensor, started[name]) for name, tensor in model.state_dict().items())
    resumed = model_of(config, seed=5, resumes=True).state_dict()  # a checkpoint fills these
    assert not torch.equal(resumed["projection.weight"], started["projection.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_config": {"depth": 3}}, "model.decoder_config: the weights in .* 'depth': 1"),
        ({"neighbours": 2}, "model.neighbours: the weights in .* were trained with 0, not 2"),
    ],
)
def test_another_shape_than_that_of_the_weights_is_refused(places, autoencoder, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingJobConfig.resolve(
            "pretrain", places[0], changes, TrainerConfig(), weights=autoencoder[1]
        )


def test_a_pretraining_does_not_continue_from_a_classifier_nor_one_of_other_classes(
    places, tmp_path
):
    source = {"kind": "synthetic", "process": "sines", "n_series": 60}
    data = build_dataset(DatasetConfig(name="s", source=source), tmp_path, tmp_path, progress=False)
    schema = StoredDataset(data).schema
    stack = {"d_model": 16, "nhead": 2, "depth": 1}
    config = RoMAForClassificationConfig(encoder_config=stack, dim_output=2, **data_fields(schema))
    model = RoMAForClassification(config)
    model.data_schema = schema.model_dump(mode="json") | {"classes": ["a", "b"]}
    model.save_pretrained(tmp_path / "model")
    for task, message in (
        ("pretrain", "holds a classifier"),
        ("finetune", "classes: the data set"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingJobConfig.resolve(task, data, {}, TrainerConfig(), weights=tmp_path / "model")


def test_a_head_is_not_continued_for_other_targets_nor_with_another_spread(tmp_path):
    source = {"kind": "synthetic", "process": "damped", "n_series": 30}
    data = build_dataset(DatasetConfig(name="w", source=source), tmp_path, tmp_path, progress=False)
    schema, fields = StoredDataset(data).schema, {"problem_type": "regression", "dim_output": 2}
    stack = {"d_model": 16, "nhead": 2, "depth": 1}
    config = RoMAForClassificationConfig(encoder_config=stack, **fields, **data_fields(schema))
    model = RoMAForClassification(config)

    def refused(given, message, **other):
        model.data_schema = schema.model_copy(update=other).model_dump(mode="json")
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match=message):
            TrainingJobConfig.resolve(
                "finetune", data, given, TrainerConfig(), weights=tmp_path / "model"
            )

    refused({"predict_variance": True}, "model.predict_variance: the head of .* with False")
    refused({}, r"targets: the data set w has \['frequency', 'decay'\]", targets=schema.targets[:1])


def test_the_data_determine_the_step_of_the_grid_that_windows_are_on(tmp_path):
    one = [
        series(f"s{k}", 40, seed=k, positions=np.arange(40.0)[:, None] * 0.25 + k) for k in range(4)
    ]
    data = built(tmp_path, *one, axes={"t": {"scale": 0.5}})
    fields = {"window": 8, "use_cls": False}

    pretraining = TrainingJobConfig.resolve("pretrain", data, fields, TrainerConfig())
    new = TrainingJobConfig.resolve("finetune", data, fields, TrainerConfig())

    assert pretraining.model["grid_step"] == new.model["grid_step"] == 0.5
    model_of(pretraining, 0, resumes=False).save_pretrained(tmp_path / "weights")
    tuned = TrainingJobConfig.resolve(
        "finetune", data, {}, TrainerConfig(), weights=tmp_path / "weights"
    )
    assert (tuned.model["window"], tuned.model["grid_step"]) == (8, 0.5)


@pytest.mark.parametrize("step", [0.5, 0.1, 0.4, None])
def test_weights_of_windows_take_data_on_their_steps_alone(tmp_path, step):
    def data(name, step):
        gaps = np.random.default_rng(0).uniform(0.1, 1, 40) if step is None else np.full(40, step)
        (tmp_path / name).mkdir()
        return built(tmp_path / name, series("s", 40, positions=gaps.cumsum()[:, None]))

    fields = {"window": 8, "use_cls": False}
    first = TrainingJobConfig.resolve("pretrain", data("a", 0.25), fields, TrainerConfig())
    model_of(first, 0, resumes=False).save_pretrained(tmp_path / "w")
    other = data("b", step)
    if step == 0.5:
        again = TrainingJobConfig.resolve(
            "pretrain", other, {}, TrainerConfig(), weights=tmp_path / "w"
        )
        assert again.model["grid_step"] == 0.25
        return
    for task in ("pretrain", "finetune"):
        with pytest.raises(
            ValueError, match=r"grid_step: the windows of the weights are on .* 0.25"
        ):
            TrainingJobConfig.resolve(task, other, {}, TrainerConfig(), weights=tmp_path / "w")


def test_windows_that_the_environment_asks_for_are_on_the_grid_of_the_data(tmp_path, monkeypatch):
    data = built(tmp_path, series("s", 40, positions=np.arange(40.0)[:, None] * 0.25))
    monkeypatch.setenv("ROMA_PRETRAIN_WINDOW", "8")
    model = TrainingJobConfig.resolve("pretrain", data, {}, TrainerConfig()).model
    assert (model["window"], model["grid_step"]) == (8, 0.25)
    monkeypatch.setenv("ROMA_PRETRAIN_WINDOW", "0")
    model = TrainingJobConfig.resolve("pretrain", data, {}, TrainerConfig()).model
    assert (model["window"], model["grid_step"]) == (0, None)


def test_windows_of_series_that_are_on_no_grid_are_refused_when_they_are_planned(tmp_path):
    g = np.random.default_rng(0)
    rows = [series("s", 40, positions=np.sort(g.uniform(0, 40, 40))[:, None])]
    data = built(tmp_path, *rows)
    with pytest.raises(ValueError, match=r"window needs series on a regular grid.* set window: 0"):
        TrainingJobConfig.resolve("pretrain", data, {"window": 8}, TrainerConfig())
