import numpy as np
import pytest

from roma_core.serving.reference_profile import drift, reference_profile


def waves(n, seed, shift=0.0, pace=1.0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        length = int(rng.integers(20, 40))
        yield {
            "positions": {"time": np.cumsum(rng.exponential(pace, length)).tolist()},
            "values": {"flux": (rng.normal(size=length) + shift).tolist()},
        }


def test_more_of_the_same_is_no_drift_and_each_change_shows_where_it_is():
    profile = reference_profile(waves(300, seed=0), {"a": 200, "b": 100})
    assert profile["classes"] == {"a": 200, "b": 100}

    same = drift(profile, list(waves(200, seed=1)))
    brighter = drift(profile, list(waves(200, seed=2, shift=1.0)))
    slower = drift(profile, list(waves(200, seed=3, pace=3.0)))

    assert set(same) == {"values.flux", "gap.time", "length"}
    assert max(same.values()) < 0.25
    assert brighter["values.flux"] > 0.25 > brighter["gap.time"]
    assert slower["gap.time"] > 0.25 > slower["values.flux"]


def test_a_profile_of_another_version_is_refused():
    with pytest.raises(ValueError, match="schema_version 2, this code reads 1"):
        drift({"schema_version": 2}, [])
