"""Statistics of a data set, as numbers, text and a picture."""

import numpy as np
import pytest

from roma_core.data import (
    StoredDataset,
    plot_profile,
    profile_dataset,
)
from tests.core.hand_made import (
    built,
    series,
)


def test_the_profile_counts_what_is_there(tmp_path):
    dataset = StoredDataset(built(tmp_path, drop_rate=0.3))

    profile = profile_dataset(dataset)

    assert profile.splits["train"].n_series == 2 and profile.splits["train"].n_observations == 12
    assert profile.splits["train"].classes == {"x": 1, "y": 1}
    assert profile.splits["validation"].lengths is None
    assert profile.splits["test"].lengths.maximum == 9
    assert profile.fraction_dropped == pytest.approx(8 / 30)
    gaps = np.concatenate([np.diff(dataset.raw(i)[0][:, 0]) for i in range(4)])
    assert profile.gaps["t"].maximum == gaps.max() > 1
    assert profile.values["b"].median == pytest.approx(
        np.median(next(dataset.parts()).values[:, 1])
    )
    assert type(profile).model_validate_json(profile.model_dump_json()) == profile
    text = profile.to_markdown()
    assert "26.7% of the delivered observations dropped" in text
    assert len({len(line) for line in text.splitlines() if line.startswith("| train ")}) == 1


def test_the_picture_is_small_enough_for_metadata(sound):
    dataset = StoredDataset(sound)

    picture = plot_profile(profile_dataset(dataset), dataset)

    assert picture.startswith(b"\x89PNG") and 5_000 < len(picture) <= 64 * 1024


def test_a_profile_of_single_observations_has_no_gaps(tmp_path):
    dataset = StoredDataset(built(tmp_path, series("a", 1), series("b", 1, "y", seed=1)))

    profile = profile_dataset(dataset)

    assert profile.gaps == {"t": None}
    assert plot_profile(profile, dataset).startswith(b"\x89PNG")
