"""Features of an encoder: their distances and what these leave to chance."""

import numpy as np
import pytest

from roma_core.data import StoredDataset
from roma_core.data.store import raw_series
from roma_core.evaluation.drift import (
    ReferenceProfile,
    drift_effects,
    embedding_distance,
    embedding_profile,
    profile_of_sample,
    reference_profile,
    sample_from_parquet,
    sample_from_rows,
)
from roma_core.schema import DataError
from tests.core.data.test_quality import LAYOUTS, gappy_set


def features(n, shift=0.0, seed=0):
    """``(n, 3)`` of very different spreads."""
    return np.random.default_rng(seed).normal(shift, 1, (n, 3)) * (1.0, 100.0, 0.01)


def distance(n, **changes):
    return embedding_distance(
        embedding_profile(features(1000)), np.median(features(n, seed=1, **changes), axis=0), n
    )


def test_series_of_the_same_kind_are_near_and_others_as_far_as_they_were_moved():
    assert distance(200) < 0.2
    assert distance(200, shift=2.0) == pytest.approx(2.0, abs=0.3)


def test_chance_is_taken_off_where_there_are_few():
    profile = embedding_profile(features(1000))
    found = [
        embedding_distance(profile, np.median(features(30, seed=seed), axis=0), 30)
        for seed in range(1, 60)
    ]

    print(f"30 series of the same kind: at most {max(found):.2f}")
    assert np.median(found) < 0.15 and max(found) < 0.5


def test_one_far_series_moves_nothing():
    there = features(100, seed=3)
    moved = there.copy()
    moved[0] = 1e9
    profile = embedding_profile(features(1000))

    before, after = (embedding_distance(profile, np.median(x, axis=0), 100) for x in (there, moved))

    assert abs(before - after) < 0.05


def test_a_feature_that_never_varies_does_not_divide_by_nothing():
    still = features(100)
    still[:, 1] = 7
    assert embedding_distance(embedding_profile(still), np.median(still, axis=0), 100) == 0
    assert embedding_distance(embedding_profile(np.ones((9, 2))), [1, 1], 9) == 0


def test_features_of_another_encoder_are_refused():
    with pytest.raises(ValueError, match="of 3 features, these series have 2"):
        embedding_distance(embedding_profile(features(10)), [0, 0], 10)


@LAYOUTS
def test_exports_and_requests_are_compared_by_channel_category_and_covariate(tmp_path, layout):
    dataset = StoredDataset(gappy_set(tmp_path / "a", n=200, layout=layout))
    profile = reference_profile(dataset)
    assert ReferenceProfile.model_validate_json(profile.model_dump_json()) == profile
    with pytest.raises(FileNotFoundError):  # not of the content: it may be back in the next attempt
        sample_from_parquet([tmp_path / "train.parquet"], dataset.schema)
    (tmp_path / "train.parquet").write_text("no table")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        sample_from_parquet([tmp_path / "train.parquet"], dataset.schema)
    dataset.to_parquet(tmp_path / "train.parquet", "train")

    exported = sample_from_parquet([tmp_path / "train.parquet"], dataset.schema)
    schema, train = dataset.schema, dataset.split("train")
    requests = list(raw_series(train, range(len(train))))
    parts = [[*map(dict, p)] for p in (schema.given_axes, schema.channels, schema.covariates)]

    for sample in (exported, sample_from_rows(requests, *parts)):
        effects = drift_effects(profile, sample)
        assert max(effect.size for effect in effects) < 1e-6
        assert {"value.lab", "category.band", "covariate.age", "covariate.sex"} <= {
            effect.quantity for effect in effects if effect.measure == "psi"
        }
    for request in requests:
        request["values"].pop("lab")
        request["positions"]["band"] = ["r" for _ in request["positions"]["band"]]
        request["covariates"] = {"age": None, "sex": "m"}
    drifted = drift_effects(profile, sample_from_rows(requests, *parts))
    sizes = {(e.quantity, e.measure): e.size for e in drifted}
    assert sizes["value.lab", "missing"] == pytest.approx(1 - profile.missing["lab"], abs=0.03)
    assert sizes["covariate.age", "missing"] > 0.8
    assert min(sizes["category.band", "psi"], sizes["covariate.sex", "psi"]) > 0.5
    assert sizes["value.hr", "psi"] < 1e-6


def test_both_layouts_have_one_profile(tmp_path):
    joint, per_channel = (
        reference_profile(StoredDataset(gappy_set(tmp_path / name, layout=name)))
        for name in ("joint", "per_channel")
    )
    assert joint.model_copy(update={"dataset_digest": ""}) == per_channel.model_copy(
        update={"dataset_digest": ""}
    )


def test_chance_alone_is_seldom_a_drift_of_channels_or_categories():
    g = np.random.default_rng(0)
    axes = [{"name": "t"}, {"name": "band", "categories": list("ugriz")}]
    covariates = [{"name": "age"}, {"name": "sex", "categories": ["f", "m", "x"]}]

    def some_requests(n):
        for _ in range(n):
            k = int(g.integers(1, 20))
            missing = g.random(9) < 0.5  # of the whole series
            yield {
                "positions": {
                    "t": np.sort(g.uniform(0, 9, k)),
                    "band": list(g.choice(list("ugriz"), k)),
                },
                "values": {
                    str(c): np.where(missing[c], np.nan, g.normal(size=k)) for c in range(9)
                },
                "covariates": {"age": g.choice([None, 40.0]), "sex": g.choice(["f", "m", "x"])},
            }

    parts = axes, [{"name": str(c)} for c in range(9)], covariates
    profile = profile_of_sample(sample_from_rows(some_requests(400), *parts), "digest")
    largest = [
        {e.measure: e.size for e in drift_effects(profile, sample)[::-1]}  # the largest last
        for sample in (sample_from_rows(some_requests(100), *parts) for _ in range(30))
    ]
    assert sum(found["missing"] >= 0.1 or found["psi"] >= 0.25 for found in largest) <= 1
