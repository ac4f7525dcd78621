"""Targets: what is known of every observation, or series, from the source to the loss."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from roma_core import EncoderConfig, RoMAForClassification, RoMAForClassificationConfig, Trainer
from roma_core.data import DataError, DatasetConfig, StoredDataset, build_dataset
from roma_core.data.manifest import Manifest
from roma_core.data.profile import plot_profile, profile_dataset
from roma_core.data.quality import check_dataset
from roma_core.model import RoMAForPreTrainingConfig
from roma_core.schema import Channel, Target
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


def whole(k, target=None):
    one = series(f"s{k}", 5 + k % 7, label=None, split=None, seed=k)
    return replace(one, targets=np.array([100 + k if target is None else target], np.float32))


def whole_source(*every, **changes):
    fields = {"series": every, "classes": (), "targets": DEPTH, "target_level": "series"}
    return HandMade(**fields | changes)


@pytest.fixture(scope="module")
def stored_whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    source = whole_source(*map(whole, range(40)))
    config = config_of(source=source, drop_rate=0.3, split={"stratified": True})
    with pytest.warns(
        UserWarning, match="no classes to stratify by; its objects are split by a hash"
    ):
        return StoredDataset(build_dataset(config, folder, folder, progress=False))


def test_targets_of_whole_series_are_kept_with_the_scale_of_train(stored_whole):
    dataset, train = stored_whole, stored_whole.split("train")
    known = dataset.series_targets[train.indices, 0]

    assert dataset.series_targets[:, 0].tolist() == [100 + int(name[1:]) for name in dataset.ids]
    (depth,) = dataset.schema.targets
    assert (depth.mean, depth.std) == pytest.approx((known.mean(), known.std()))
    assert dataset.targets(3) is None and dataset.sample(3)["targets"].tolist() == [103]
    rows = np.array([7, 2])
    batch = dataset.gather(rows).reorder(np.array([1, 0]))
    assert np.array_equal(batch.series_targets, dataset.series_targets[rows[::-1]])
    assert (dataset.manifest.schema_version, dataset.schema.target_level) == (4, "series")
    assert not [f for f in check_dataset(dataset.path) if f.severity == "error"]
    profile = profile_dataset(dataset)
    assert (profile.targets["depth"].minimum, profile.targets["depth"].maximum) == (100, 139)
    assert plot_profile(profile, dataset).startswith(b"\x89PNG")


def test_a_set_of_before_targets_had_a_scale_is_read_with_its_digest(stored):
    document = stored.manifest.model_dump(mode="json") | {"schema_version": 2}
    for target in document["data_schema"]["targets"]:
        assert target.pop("std") > 1 and target.pop("mean")

    manifest = Manifest.model_validate(document)

    assert manifest.data_schema.targets == (Target(name="depth", unit="m", mean=0, std=1),)
    again = manifest.model_dump(mode="json")["data_schema"]
    assert again == document["data_schema"] and "target_level" not in again


def test_a_series_without_its_target_is_refused_or_left_out_and_a_constant_one_warned_of(tmp_path):
    every = [whole(k, np.nan if k == 3 else 7) for k in range(20)]
    how = {"root": tmp_path, "cache": tmp_path, "progress": False}
    with pytest.raises(
        DataError, match=r"series 's3': its target 'depth' is nan, .* leave the series"
    ):
        build_dataset(config_of(source=whole_source(*every)), **how)

    config = config_of(source=whole_source(*every), repair={"not_finite": "drop"})
    with pytest.warns(
        UserWarning, match="target 'depth' never changes in the train split; its std is"
    ):
        dataset = StoredDataset(build_dataset(config, **how))

    assert "s3" not in dataset.ids and dataset.manifest.repairs.series_without_targets == 1


def test_targets_stay_with_their_observations_through_sorting_and_dropping(stored):
    for i in range(len(stored)):
        assert np.array_equal(stored.targets(i), 10 * stored.raw(i)[1][:, :1])
        assert np.array_equal(stored.sample(i)["targets"], stored.targets(i))
    assert stored.manifest.schema_version == 4
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
def test_many_series_at_once_are_those_read_one_by_one(stored, stored_whole, chosen):
    class OneByOne:
        """The same set, without the way of giving many at once."""

        def __init__(self, subset):
            self.subset = subset

        def __len__(self):
            return len(self.subset)

        def __getitem__(self, i):
            return self.subset[i]

    shape = {"tubelet_size": (1, 1, 1), "n_channels": 2, "n_pos_dims": 1}
    regression = {"dim_output": 1, "problem_type": "regression"}
    cases = (
        (stored, RoMAForPreTrainingConfig(**shape)),
        (stored, RoMAForClassificationConfig(**shape, dim_output=2)),
        (stored, RoMAForClassificationConfig(**shape, **regression, pooling="token")),
        (stored_whole, RoMAForClassificationConfig(**shape, **regression, pooling="mean")),
    )
    for dataset, config in cases:
        train = dataset.split("train")
        parts = np.array_split(np.arange(len(train))[::-1], 4)
        collate = Collate(config, 7, chosen)
        for part in parts:
            one, other = (collate.batch(d, part, epoch=3) for d in (train, OneByOne(train)))
            assert one.segments.lengths == other.segments.lengths
            if dataset is stored_whole:
                expected = 100 + np.array([int(dataset.ids[i][1:]) for i in one.sample_ids])
                assert one.labels[:, 0].tolist() == expected.tolist()
            for name in ("tokens", "positions", "sample_ids", "indices", "labels"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
            if one.masked is not None:
                assert torch.equal(one.masked.hidden_rows, other.masked.hidden_rows)
                assert torch.equal(one.masked.visible_rows, other.masked.visible_rows)


@pytest.mark.parametrize(
    ("kind", "level"),
    [
        *itertools.product(["table", "parquet", "npz"], ["observation", "series"]),
        ("objects", "series"),
    ],
)
def test_targets_come_from_every_kind_of_file_and_go_out_again(
    stored, stored_whole, tmp_path, kind, level
):
    stored = stored if level == "observation" else stored_whole
    lengths, whole = stored.lengths, stored.series_targets
    raw = [
        (*stored.raw(i), stored.targets(i) if whole is None else whole[i : i + 1].repeat(n, axis=0))
        for i, n in enumerate(lengths)
    ]
    positions, values, targets = (np.concatenate(column) for column in zip(*raw, strict=True))
    columns = [{"column": "a", "unit": "V"}, {"column": "b", "unit": "V"}]
    axes = [{"column": "t", "unit": "s"}]
    if kind == "parquet":
        stored.to_parquet(tmp_path / "x.parquet")
        marked = pq.read_schema(tmp_path / "x.parquet").field("depth").metadata
        assert marked == {b"unit": b"m", b"role": b"target"}
        source = {"axes": axes, "channels": columns, "targets": [{"column": "depth", "unit": "m"}]}
        source["target_level"] = level
    elif kind in ("table", "objects"):
        rows = {"object": np.repeat(stored.ids, lengths), "t": positions[:, 0]}
        rows |= {"a": values[:, 0], "b": values[:, 1], "depth": targets[:, 0]}
        rows |= {"depth": 0 * targets[:, 0]} if kind == "objects" else {}
        pq.write_table(pa.table(rows), tmp_path / "x.parquet")
        named = {"object": "object", "axes": axes, "channels": columns}
        named |= {"targets": [{"column": "depth", "unit": "m"}], "target_level": level}
        source = {"columns": named}
        if kind == "objects":
            known = {"object": stored.ids, "depth": whole[:, 0]}
            pq.write_table(pa.table(known), tmp_path / "o.parquet")
            source["objects"] = {"file": str(tmp_path / "o.parquet"), "object": "object"}
    else:
        np.savez(
            tmp_path / "x.npz",
            values=values,
            positions=positions,
            targets=targets if whole is None else whole,
            offsets=stored.offsets,
            ids=np.array(stored.ids),
        )
        schema = stored.schema.model_dump(mode="json")
        named = {
            k: [{"name": c["name"], "unit": c["unit"]} for c in schema[k]]
            for k in schema
            if k in ("channels", "axes", "targets")
        }
        source = {"file": str(tmp_path / "x.npz"), **named, "target_level": level}
    if kind != "npz":
        source["files"] = [str(tmp_path / "x.parquet")]
    kind = {"objects": "table"}.get(kind, kind)
    config = DatasetConfig(name="again", source={"kind": kind, **source})

    again = StoredDataset(build_dataset(config, tmp_path, tmp_path, progress=False))

    names = [[(t.name, t.unit) for t in x.schema.targets] for x in (again, stored)]
    assert names[0] == names[1] and again.ids == stored.ids
    assert again.schema.target_level == level
    assert np.array_equal(again.series_targets, whole)
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
