"""What comes in comes out: series, samples, subsets; batches keep what belongs together."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from roma_core.data import (
    StoredDataset,
)
from roma_core.data.store import RaggedBatch
from tests.core.hand_made import (
    SOME,
    built,
    errors_but_leaks,
    series,
)

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


def test_what_comes_in_comes_out(tmp_path):
    dataset = StoredDataset(built(tmp_path))

    assert dataset.ids == [s.id for s in SOME]
    assert dataset.lengths.tolist() == [10, 7, 12, 1]
    assert dataset.labels.tolist() == [0, 1, 0, 1]
    for i, given_series in enumerate(SOME):
        positions, values = dataset.raw(i)
        assert positions.dtype == np.float64 and values.dtype == np.float32
        assert np.array_equal(positions, given_series.positions)
        assert np.array_equal(values, given_series.values)
    assert dataset.manifest.counts["train"].n_observations == 17
    assert dataset.manifest.irregularity is None
    assert dataset.path.name == dataset.manifest.digest[:12]


@settings(max_examples=25, deadline=None)
@given(lengths=lengths, draw=st.data(), rate=st.sampled_from([0.0, 0.5]))
@pytest.mark.filterwarnings("ignore:channel", "ignore:no series of the classes")
def test_every_column_survives_bit_by_bit(tmp_path_factory, lengths, draw, rate):
    given_series = [series("first", 2, split="train")]
    for k, n in enumerate(lengths):
        values = draw.draw(hnp.arrays(np.float32, (n, 2), elements=numbers))
        positions = draw.draw(hnp.arrays(np.float64, (n, 1), elements=st.floats(-1e9, 1e9)))
        given_series.append(
            series(f"s{k}", n, "xy"[k % 2], None, values=values, positions=positions)
        )
    folder = tmp_path_factory.mktemp("data")
    as_it_comes = {"unsorted": "keep", "duplicates": "keep"}
    dataset = StoredDataset(built(folder, *given_series, drop_rate=rate, repair=as_it_comes))

    assert errors_but_leaks(dataset.path) == []
    for i, s in enumerate(given_series):
        positions, values = dataset.raw(i)
        n = len(s.values)
        assert len(values) == n - int(rate * n)
        rows = [r.tobytes() for r in np.hstack([s.positions, s.values.astype(np.float64)])]
        kept = [r.tobytes() for r in np.hstack([positions, values.astype(np.float64)])]
        remaining = iter(rows)
        assert all(row in remaining for row in kept)  # a subsequence, in order
    assert sum(dataset.lengths) == dataset.offsets[-1]


def test_a_sample_is_what_the_model_takes(tmp_path):
    axes = {"t": {"anchor": "first", "offset": 1.0, "scale": 2.0}}
    dataset = StoredDataset(built(tmp_path, axes=axes))

    sample = dataset.sample(2)

    assert sample["values"].shape == (12, 2, 1, 1) and sample["values"].dtype == np.float32
    assert sample["positions"].shape == (1, 12) and sample["positions"].dtype == np.float32
    np.testing.assert_allclose(sample["positions"][0], (np.arange(12) - 1) / 2)
    assert (sample["label"], sample["id"]) == (0, 2)
    train = np.concatenate([dataset.sample(i)["values"][:, :, 0, 0] for i in (0, 1)])
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-6)  # fitted on train alone
    np.testing.assert_allclose(train.std(axis=0), 1, atol=1e-6)


def test_a_split_is_a_map_style_data_set(tmp_path):
    dataset = StoredDataset(built(tmp_path))

    test = dataset.split("test")

    assert len(test) == 2
    assert test.indices.tolist() == [2, 3] and test.lengths.tolist() == [12, 1]
    assert [sample["id"] for sample in test] == [2, 3]
    assert len(dataset.split("validation")) == 0
    with pytest.raises(ValueError, match="there is no split 'valid'"):
        dataset.split("valid")
    for outside in (-1, 4):
        with pytest.raises(IndexError):
            dataset.raw(outside)


def test_a_worker_maps_the_files_anew(tmp_path):
    subset = StoredDataset(built(tmp_path)).split("test")

    content = pickle.dumps(subset)
    copy = pickle.loads(content)

    assert len(content) < 2000
    assert np.array_equal(copy[0]["values"], subset[0]["values"])


def test_a_subsample_has_every_class_and_grows(tmp_path):
    many = [series(f"s{i}", 3, "x" if i < 30 else "y", "train", i) for i in range(40)]
    train = StoredDataset(built(tmp_path, *many)).split("train")

    tenth, half = train.subsample(0.1, seed=1), train.subsample(0.5, seed=1)

    assert np.bincount(train.dataset.labels[tenth.indices]).tolist() == [3, 1]
    assert np.bincount(train.dataset.labels[half.indices]).tolist() == [15, 5]
    assert set(tenth.indices) < set(half.indices)
    assert set(tenth.indices) != set(train.subsample(0.1, seed=2).indices)
    assert np.bincount(train.dataset.labels[train.subsample(0.001, seed=1).indices]).tolist() == [
        1,
        1,
    ]
    assert (
        len(train.subsample(0.7, seed=1)) == 21 + 7
    )  # 0.7 · 30 is a little more in floating point
    assert train.subsample(1, seed=1) is train
    assert len(train.dataset.split("test").subsample(0.5, seed=1)) == 0


def batch_of(lengths) -> RaggedBatch:
    """Every number says to which series and observation it belongs."""
    parts = [100.0 * k + np.arange(n) for k, n in enumerate(lengths)]
    batch = RaggedBatch.of(
        [p[:, None].astype(np.float32) for p in parts],
        [p[:, None] for p in parts],
        range(len(parts)),
    )
    labels = 10 * np.arange(len(lengths))
    return RaggedBatch(
        batch.values, batch.positions, batch.lengths, batch.ids, labels, batch.values * 2
    )


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_rows_stay_with_their_series(lengths, seed):
    random = np.random.default_rng(seed)
    batch = batch_of(lengths)
    kept = random.random(len(batch.values)) < 0.5
    kept[batch.starts] = True  # at least one of each series
    order = random.permutation(len(lengths))

    for changed, ids in (
        (batch.select(kept), np.arange(len(lengths))),
        (batch.reorder(order), order),
        (batch.select(kept).reorder(order), order),
    ):
        assert changed.ids.tolist() == ids.tolist()
        assert changed.labels.tolist() == (10 * ids).tolist()
        assert (changed.values[:, 0] // 100 == changed.ids[changed.series]).all()
        assert np.array_equal(changed.targets, 2 * changed.values)
        assert np.array_equal(changed.positions, changed.values)
        assert changed.lengths.sum() == len(changed.values) and changed.lengths.min() >= 1
        values, positions = changed.split()
        assert [len(v) for v in values] == [len(p) for p in positions] == changed.lengths.tolist()
        assert all((np.diff(v[:, 0]) > 0).all() for v in values)  # in their order
    assert np.array_equal(batch.reorder(order).lengths, np.array(lengths)[order])
    assert np.array_equal(batch.index, batch.values[:, 0] % 100)
