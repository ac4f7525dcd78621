"""A package in a new process that has nothing of this project."""

import pytest

from roma_core.serving.smoke_test import SmokeTestFailed, smoke_test_package
from tests.core.serving import toy
from tests.time_limits import within


def test_a_sound_package_is_timed_and_a_damaged_one_is_refused(tmp_path):
    folder = tmp_path / "toy"
    toy.build_toy(folder)

    result = smoke_test_package(folder)

    print(f"load and verify {result.load_s:.3f} s, one series {result.latency_ms:.2f} ms")
    assert result.golden_difference < 1e-5
    assert 0 < result.load_s < within(3)
    assert 0 < result.latency_ms < within(1000)

    (folder / "model.pt2").write_bytes(b"not a program")
    with pytest.raises(SmokeTestFailed, match=r"model\.pt2 was changed: its sha256 is"):
        smoke_test_package(folder)
