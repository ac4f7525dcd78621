"""One batch of series of different lengths: selecting and reordering keep what belongs together."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from roma_core.data.ragged import RaggedBatch


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
