"""What a training job refuses and fills in when it is planned."""

import json

import numpy as np
import pytest

from roma_core.data import DatasetConfig, StoredDataset, build_dataset
from roma_core.model import RoMAForClassificationConfig
from roma_core.schema import Channel, ChannelFit
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.job import TrainingJobConfig, data_fields
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
