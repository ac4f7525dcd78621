"""Statistics of a data set, as numbers, text and a picture."""

import numpy as np
import pytest

from roma_core.data import (
    StoredDataset,
    plot_profile,
    profile_dataset,
)
from tests.core.data.test_quality import LAYOUTS, gappy_set
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

    assert picture.startswith(b"\x89PNG") and 5_000 < len(picture) <= 40 * 1024


def test_a_profile_of_single_observations_has_no_gaps(tmp_path):
    dataset = StoredDataset(built(tmp_path, series("a", 1), series("b", 1, "y", seed=1)))

    profile = profile_dataset(dataset)

    assert profile.gaps == {"t": None}
    assert plot_profile(profile, dataset).startswith(b"\x89PNG")


def test_long_names_leave_room_for_the_plots(tmp_path, recwarn):
    dataset = StoredDataset(built(tmp_path, *(series("path/" * 50 + x, 3) for x in "bc")))

    plot_profile(profile_dataset(dataset), dataset)

    assert not [one for one in recwarn if "layout not applied" in str(one.message)]


@LAYOUTS
def test_channels_are_profiled_by_their_observed_values_in_either_layout(tmp_path, layout):
    dataset = StoredDataset(gappy_set(tmp_path, layout=layout))
    joint = [dataset.joint(i) for i in range(len(dataset))]
    values = np.concatenate([v for _, v in joint])

    profile = profile_dataset(dataset)

    assert list(profile.values) == list(profile.observed)[:3] == ["hr", "lab", "flag"]
    assert profile.values["lab"].median == pytest.approx(np.nanmedian(values[:, 1]))
    known = ~np.isnan(values[:, 1])
    of_x = np.repeat(dataset.labels == 0, [len(v) for _, v in joint])
    assert profile.observed["lab"]["all"] == pytest.approx(known.mean())
    assert profile.observed["lab"]["x"] == pytest.approx(known[of_x].mean())
    assert profile.observed["age"]["all"] == pytest.approx(53 / 60)
    assert list(profile.gaps) == ["t"] and profile.gaps["t"].maximum == 1
    counts = {name: sum(of.values()) for name, of in profile.categories.items()}
    assert counts == {"band": len(values), "sex": 60}
    assert profile.covariates["age"].minimum >= 30
    text = profile.to_markdown()
    assert "channel |" in text and "Observations, or objects, of each band" in text
    assert "nan" not in text and f"{known.mean():.1%}" in text
    assert plot_profile(profile, dataset).startswith(b"\x89PNG")
