"""Targets: what is known of every observation, from the source to the loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from roma_core import EncoderConfig, RoMAForClassification, RoMAForClassificationConfig, Trainer
from roma_core.data import DataError, DatasetConfig, StoredDataset, build_dataset
from roma_core.data.quality import check_dataset
from roma_core.model import RoMAForPreTrainingConfig
from roma_core.schema import Channel
from roma_core.sources.synthetic import PROCESSES
from roma_core.trainer import TrainerConfig
from roma_core.trainer.dataloader import Collate, Crop, Drop, Jitter
from tests.core.hand_made import HandMade, built, config_of, series

DEPTH = (Channel(name="depth", unit="m"),)


def with_depth(name, n, seed, order=slice(None)):
    """Ten times the first channel, so that a mix-up shows."""
    one = series(name, n, seed=seed)
    positions, values = one.positions[order], one.values[order]
    return replace(one, positions=positions, values=values, targets=10 * values[:, :1])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    every = [with_depth(f"s{k}", 5 + k % 7, k) for k in range(40)]
    source = HandMade(
        series=(*every, with_depth("late", 6, 99, slice(None, None, -1))), targets=DEPTH
    )
    folder = tmp_path_factory.mktemp("sets")
    config = config_of(source=source, drop_rate=0.3)
    return StoredDataset(build_dataset(config, folder, folder, progress=False))


def test_targets_stay_with_their_observations_through_sorting_and_dropping(stored):
    for i in range(len(stored)):
        assert np.array_equal(stored.targets(i), 10 * stored.raw(i)[1][:, :1])
        assert np.array_equal(stored.sample(i)["targets"], stored.targets(i))
    assert stored.manifest.schema_version == 2
    assert stored.manifest.repairs.series_sorted == 1
    assert not [f for f in check_dataset(stored.path) if f.severity == "error"]


def test_a_set_without_targets_is_as_it_was_before_there_were_any(tmp_path):
    dataset = StoredDataset(built(tmp_path, *[series(f"s{k}", seed=k) for k in range(5)]))

    assert dataset.manifest.schema_version == 1
    assert "targets" not in dataset.schema.model_dump(mode="json")
    assert dataset.manifest.computed_digest() == (
        "7691a18a79eca0e9e628be0f27a0133d9380b2425a3a05d8cdf6da72a6c7ee4b"
    )


@pytest.mark.parametrize("chosen", [(), (Crop(0.4), Drop(0.5), Jitter(0.1, 0.1))])
def test_many_series_at_once_are_those_read_one_by_one(stored, chosen):
    class OneByOne:
        """The same set, without the way of giving many at once."""

        def __init__(self, subset):
            self.subset = subset

        def __len__(self):
            return len(self.subset)

        def __getitem__(self, i):
            return self.subset[i]

    shape = {"tubelet_size": (1, 1, 1), "n_channels": 2, "n_pos_dims": 1}
    configs = (
        RoMAForPreTrainingConfig(**shape),
        RoMAForClassificationConfig(**shape, dim_output=2),
        RoMAForClassificationConfig(
            **shape, dim_output=1, pooling="token", problem_type="regression"
        ),
    )
    train = stored.split("train")
    parts = np.array_split(np.arange(len(train))[::-1], 4)
    for config in configs:
        collate = Collate(config, 7, chosen)
        for part in parts:
            one, other = (collate.batch(d, part, epoch=3) for d in (train, OneByOne(train)))
            assert one.segments.lengths == other.segments.lengths
            for name in ("tokens", "positions", "sample_ids", "indices", "labels"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
            if one.masked is not None:
                assert torch.equal(one.masked.hidden_rows, other.masked.hidden_rows)
                assert torch.equal(one.masked.visible_rows, other.masked.visible_rows)


@pytest.mark.parametrize("kind", ["table", "parquet", "npz"])
def test_targets_come_from_every_kind_of_file_and_go_out_again(stored, tmp_path, kind):
    lengths = stored.lengths
    raw = [(*stored.raw(i), stored.targets(i)) for i in range(len(stored))]
    positions, values, targets = (np.concatenate(column) for column in zip(*raw, strict=True))
    columns = [{"column": "a", "unit": "V"}, {"column": "b", "unit": "V"}]
    axes = [{"column": "t", "unit": "s"}]
    if kind == "parquet":
        stored.to_parquet(tmp_path / "x.parquet")
        marked = pq.read_schema(tmp_path / "x.parquet").field("depth").metadata
        assert marked == {b"unit": b"m", b"role": b"target"}
        source = {"axes": axes, "channels": columns, "targets": [{"column": "depth", "unit": "m"}]}
    elif kind == "table":
        rows = {"object": np.repeat(stored.ids, lengths), "t": positions[:, 0]}
        rows |= {"a": values[:, 0], "b": values[:, 1], "depth": targets[:, 0]}
        pq.write_table(pa.table(rows), tmp_path / "x.parquet")
        named = {"object": "object", "axes": axes, "channels": columns}
        source = {"columns": named | {"targets": [{"column": "depth", "unit": "m"}]}}
    else:
        np.savez(
            tmp_path / "x.npz",
            values=values,
            positions=positions,
            targets=targets,
            offsets=stored.offsets,
            ids=np.array(stored.ids),
        )
        schema = stored.schema.model_dump(mode="json")
        named = {
            k: [{"name": c["name"], "unit": c["unit"]} for c in schema[k]]
            for k in schema
            if k in ("channels", "axes", "targets")
        }
        source = {"file": str(tmp_path / "x.npz"), **named}
    if kind != "npz":
        source["files"] = [str(tmp_path / "x.parquet")]
    config = DatasetConfig(name="again", source={"kind": kind, **source})

    again = StoredDataset(build_dataset(config, tmp_path, tmp_path, progress=False))

    assert again.schema.targets == stored.schema.targets and again.ids == stored.ids
    for i in range(len(stored)):
        assert np.array_equal(again.targets(i), stored.targets(i))


def test_targets_that_are_missing_or_not_finite_are_refused(tmp_path):
    source = HandMade(series=(series("bare"),), targets=DEPTH)
    with pytest.raises(DataError, match="series 'bare' has no targets, its source declares 1"):
        build_dataset(config_of(source=source), tmp_path, tmp_path, progress=False)

    one = with_depth("s", 4, 0)
    one.targets[2] = np.nan
    source = HandMade(series=(one,), targets=DEPTH)
    with pytest.raises(DataError, match="series 's': targets hold nan at observation 2, column 0"):
        build_dataset(config_of(source=source), tmp_path, tmp_path, progress=False)


@pytest.mark.parametrize("process", PROCESSES)
def test_columns_of_a_generated_set_have_different_names(process):
    made = PROCESSES[process]
    names = [part.name for part in (*made.axes, *made.channels, *made.targets)]
    assert len(set(names)) == len(names), "else it cannot be exported"


@pytest.mark.parametrize("process", ["spirals", "positions", "rbf", "sines"])
def test_a_model_learns_the_targets_of_a_generated_set(tmp_path, process):
    config = DatasetConfig(
        name="g", source={"kind": "synthetic", "process": process, "n_series": 200}, drop_rate=0.5
    )
    dataset = StoredDataset(build_dataset(config, tmp_path, tmp_path, progress=False))
    schema = dataset.schema
    torch.manual_seed(0)
    model = RoMAForClassification(
        RoMAForClassificationConfig(
            encoder_config=EncoderConfig(d_model=24, nhead=2, depth=1),
            tubelet_size=(1, 1, 1),
            n_channels=len(schema.channels),
            n_pos_dims=1,
            dim_output=len(schema.targets),
            pooling="token",
            problem_type="regression",
        )
    )
    settings = {"epochs": 3, "batch_size": 8, "base_lr": 3e-3, "warmup_steps": 2}
    trainer = Trainer(TrainerConfig(**settings, checkpoint_dir=tmp_path / "checkpoints"))
    test = dataset.split("test")
    targets = np.concatenate([dataset.targets(int(i)) for i in test.indices])

    end = trainer.train(dataset.split("train"), test, model)

    assert end.metrics["eval/loss"] < 0.9 * float((targets**2).mean())


def test_targets_of_the_pendulum_are_the_angle_in_its_pictures():
    drawn = PROCESSES["pendulum"].draw(np.random.default_rng(0), 4)

    clear = drawn.values[:, :5].reshape(-1, 24, 24)  # the first five frames have no noise
    across, down = clear.sum(1), clear.sum(2)  # (20, 24) each
    place = np.arange(24) - 11.5
    shown = np.arctan2((across * place).sum(1), (down * place).sum(1))
    sine, cosine = drawn.targets[:, :5].reshape(-1, 2).T
    error = np.angle(np.exp(1j * (shown - np.arctan2(sine, cosine))))
    assert np.abs(error).max() < 0.05
    assert np.allclose((drawn.targets**2).sum(2), 1)
    assert drawn.values.min() == 0 and drawn.values.max() == 255
