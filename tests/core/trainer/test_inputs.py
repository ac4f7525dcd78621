"""Training on missing values, both layouts, categories and covariates: pretrained, finetuned, reloaded."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from roma_core import RoMAForClassification, RoMAForPreTraining, Trainer, TrainerConfig
from roma_core.data import StoredDataset
from roma_core.model.config import RoMAForClassificationConfig, RoMAForPreTrainingConfig
from roma_core.schema import Channel, Covariate, PositionAxis
from roma_core.sources.base import RawSeries
from roma_core.trainer.dataloader import Collate, augmentations_of
from roma_core.trainer.job import TrainingJobConfig, data_fields
from tests.core.hand_made import HandMade, built

WARD = PositionAxis(
    name="ward", unit="1", categories=("a", "b"), encoding="embedding", unknown=True
)
CONFIGS = {
    RoMAForPreTraining: RoMAForPreTrainingConfig,
    RoMAForClassification: RoMAForClassificationConfig,
}
SMALL = {"d_model": 16, "nhead": 2, "depth": 2}
COVARIATES = (Covariate(name="age", unit="y"), Covariate(name="sex", categories=("f", "m")))

CHANNELS = (Channel(name="hr", unit="1/min"), Channel(name="lab", unit="g"))


def patient(k):
    """Two quantities with gaps; the class is a rise of the second."""
    g = np.random.default_rng(k)
    n, y = int(g.integers(5, 12)), k % 2
    hours = np.sort(g.uniform(0, 40, n))
    values = np.stack([70 + g.normal(0, 5, n), 200 + y * 3 * hours + g.normal(0, 5, n)], 1)
    values[g.random((n, 2)) < 0.4] = np.nan
    values[np.isnan(values).all(1), 0] = 70
    covariates = np.float32([40 + k % 30, g.choice([0, 1])])
    positions = np.column_stack([hours, g.integers(0, 2, n)])
    split = "test" if k % 5 == 0 else "train"
    return RawSeries(
        f"p{k}", positions, values.astype(np.float32), "xy"[y], split, covariates=covariates
    )


@pytest.fixture(scope="module", params=["joint", "per_channel"])
def dataset(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = HandMade(
        series=tuple(map(patient, range(60))),
        channels=CHANNELS,
        axes=(PositionAxis(name="t", unit="h"), WARD),
        covariates=COVARIATES,
    )
    options = {
        "layout": request.param,
        "validation_fraction": 0.2,
        "axes": {"t": {"scale": "auto"}},
    }
    return StoredDataset(built(folder, source=source, **options))


def run(config, dataset, model, folder):
    (folder / "config.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    trainer = TrainerConfig.from_values(config.trainer | {"checkpoint_dir": folder / "checkpoints"})
    model.data_schema = dataset.schema.model_dump(mode="json")
    return Trainer(trainer).train(dataset.split("train"), dataset.split("validation"), model)


def test_a_pretrained_encoder_is_finetuned_and_answers_alike_after_a_reload(dataset, tmp_path):
    trainer = TrainerConfig(epochs=30, batch_size=16, base_lr=3e-3, augment_unknown_rate=0.2)
    fields = {"encoder_config": SMALL, "decoder_config": SMALL | {"depth": 1}, "mask_ratio": 0.5}
    fields["mask_strategy"] = {"random": 0.5, "channel": 0.25, "window": 0.25}
    plan = TrainingJobConfig.resolve("pretrain", dataset.path, fields, trainer)
    assert plan.model["missing_values"] == (dataset.schema.layout == "joint")
    assert plan.model["covariates"] == [0, 2]
    torch.manual_seed(0)
    autoencoder = RoMAForPreTraining(RoMAForPreTrainingConfig.from_values(plan.model))
    run(plan, dataset, autoencoder, tmp_path / "pretrain")
    autoencoder.save_pretrained(tmp_path / "encoder")

    trainer = trainer.model_copy(update={"epochs": 60})
    plan = TrainingJobConfig.resolve(
        "finetune", dataset.path, {}, trainer, weights=tmp_path / "encoder"
    )
    classifier = RoMAForClassification.from_pretrained(
        tmp_path / "encoder", dim_output=2, pooling="mean"
    )
    assert classifier.config.model_dump(mode="json")["axis_categories"] == list(
        data_fields(dataset.schema)["axis_categories"]
    )
    run(plan, dataset, classifier, tmp_path / "finetune")
    classifier.save_pretrained(tmp_path / "classifier")
    again = RoMAForClassification.from_pretrained(tmp_path / "classifier").eval()

    right = right_without = 0
    program = classifier.eval().export().module()
    for item in dataset.split("test"):
        values = item["values"][None]
        positions = torch.from_numpy(item["positions"])[None]
        covariates = torch.from_numpy(item["covariates"])[None]
        values = torch.from_numpy(values)
        with torch.no_grad():
            logits, _ = classifier(values, positions, covariates=covariates)
            reloaded, _ = again(values, positions, covariates=covariates)
            tokens = values.flatten(2), positions.transpose(1, 2).contiguous()
            exported = program(
                *tokens, torch.ones(1, len(tokens[0][0]), dtype=torch.bool), covariates
            )
        torch.testing.assert_close(logits, reloaded, rtol=0, atol=0)
        torch.testing.assert_close(logits, exported, rtol=1e-5, atol=1e-5)
        right += int(logits.argmax()) == item["label"]
        positions[:, 1] = 2  # a ward that training never had, of an object without covariates
        with torch.no_grad():
            logits = program(
                values.flatten(2),
                positions.transpose(1, 2).contiguous(),
                torch.ones(1, positions.shape[2], dtype=torch.bool),
                torch.full_like(covariates, torch.nan),
            )
        right_without += int(logits.argmax()) == item["label"]
    assert right >= 10 and right_without >= 10  # of 12


@pytest.mark.parametrize("rate", [0.3, 0.0])
@pytest.mark.parametrize("kind", [RoMAForPreTraining, RoMAForClassification])
def test_unknown_and_missing_are_learned_where_training_has_neither(dataset, kind, rate):
    fields = {"encoder_config": SMALL} | data_fields(dataset.schema)
    fields |= {"decoder_config": SMALL} if kind is RoMAForPreTraining else {"dim_output": 2}
    model = kind(CONFIGS[kind].from_values(fields))
    config, train = TrainerConfig(augment_unknown_rate=rate), dataset.split("train")
    collate = Collate(model.config, 0, augmentations_of(config, model.config, train))
    _, loss = model(collate.batch(train, np.arange(len(train))))
    loss.backward()
    gradients = [model.categories.tables[0].weight.grad[2]]
    gradients += [model.covariates.table.weight.grad[k] for k in (0, 2)]  # 'missing' of each
    if kind is RoMAForPreTraining:
        gradients.append(model.decoder_categories.tables[0].weight.grad[2])
    assert [bool(g.abs().max() > 0) for g in gradients] == [rate > 0] * len(gradients)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"covariates": COVARIATES[::-1]}, r"covariates: .* has \[2, 0\], but .* with \[0, 2\]"),
        ({"covariates": (COVARIATES[0], Covariate(name="sex", categories=("m", "f")))}, "'sex'"),
        ({"channels": CHANNELS[::-1]}, "categories: .*'lab', 'hr'.*'hr', 'lab'"),
        ({"layout": "other"}, "n_channels: "),
    ],
)
def test_an_encoder_of_other_inputs_is_refused_when_it_is_planned(
    dataset, tmp_path, other, message
):
    layout = dataset.schema.layout
    if "channels" in other and layout == "joint":
        return  # its channels have no embedding: another name may be the same quantity
    fields = {"encoder_config": SMALL, "decoder_config": SMALL | {"depth": 1}}
    plan = TrainingJobConfig.resolve("pretrain", dataset.path, fields, TrainerConfig())
    autoencoder = RoMAForPreTraining(RoMAForPreTrainingConfig.from_values(plan.model))
    autoencoder.data_schema = dataset.schema.model_dump(mode="json")
    autoencoder.save_pretrained(tmp_path / "encoder")
    if "layout" in other:
        layout = "joint" if layout == "per_channel" else "per_channel"
    source = {"axes": dataset.schema.given_axes, "channels": CHANNELS, "covariates": COVARIATES}
    source |= {name: changed for name, changed in other.items() if name != "layout"}
    rows = [replace(patient(k), covariates=np.float32([k % 2, k % 2])) for k in range(20)]
    data = built(tmp_path, source=HandMade(series=tuple(rows), **source), layout=layout)
    with pytest.raises(ValueError, match=message):
        TrainingJobConfig.resolve(
            "finetune", data, {}, TrainerConfig(), weights=tmp_path / "encoder"
        )
