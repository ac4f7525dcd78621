"""Synthetic series: their order, noise and labels."""

import numpy as np
import pytest

from roma_core.data import DatasetConfig, StoredDataset, build_dataset
from roma_core.sources import synthetic
from roma_core.sources.base import source_config


@pytest.mark.parametrize(
    ("process", "shape"),
    [
        ("pendulum", (100, 576)),
        ("positions", (10, 1)),
        ("rbf", (50, 1)),
        ("sines", (100, 1)),
        ("spirals", (75, 2)),
    ],
)
def test_a_larger_generated_set_begins_with_the_smaller(tmp_path, monkeypatch, process, shape):
    monkeypatch.setattr(synthetic, "_AT_ONCE", 3)  # pendulums take long

    def drawn(n):
        config = {"kind": "synthetic", "process": process, "n_series": n, "seed": 3}
        return list(source_config(config).open(tmp_path).read())

    few, more = drawn(3), drawn(300 if process != "pendulum" else 4)

    assert few[0].values.shape == shape
    for a, b in zip(few, more, strict=False):
        assert a.id == b.id and np.array_equal(a.values, b.values)
    contents = {s.values.tobytes() + s.positions.tobytes() for s in more}
    assert len(contents) == len(more)  # no two are alike, whichever splits they go to


def test_spirals_turn_the_way_their_label_says(tmp_path):
    config = {"kind": "synthetic", "process": "spirals", "n_series": 64}

    for series in source_config(config).open(tmp_path).read():
        x = series.values[:, 0] + (5 if series.label == "clockwise" else -5)
        turned = np.unwrap(np.arctan2(series.values[:, 1], x)[10:])
        assert (turned[-1] > turned[0]) == (series.label == "anticlockwise")


def test_the_noise_of_a_generated_set_can_be_chosen(tmp_path):
    def drawn(process, **noise):
        config = {"kind": "synthetic", "process": process, "n_series": 100, **noise}
        return list(source_config(config).open(tmp_path).read())

    for process in ("spirals", "rbf", "sines"):
        found = [
            np.std(s.values - s.targets) for s in (*drawn(process), *drawn(process, noise=0.05))
        ]
        assert np.mean(found[:100]) == pytest.approx(0.1, rel=0.05)
        assert np.mean(found[100:]) == pytest.approx(0.05, rel=0.05)
        usual, quiet = drawn(process), drawn(process, noise=0)
        assert np.array_equal(quiet[0].values, quiet[0].targets)
        assert np.array_equal(quiet[0].targets, usual[0].targets)
    with pytest.raises(ValueError, match="noise of pendulum cannot be chosen; leave noise out, or"):
        source_config({"kind": "synthetic", "process": "pendulum", "n_series": 4, "noise": 0.1})


def test_a_sine_of_one_tone_has_its_frequency_for_a_label(tmp_path):
    config = {"kind": "synthetic", "process": "sines", "n_series": 60, "noise": 0}

    for series in source_config(config).open(tmp_path).read():
        # 99 of the 100 points are a whole second
        strength = np.abs(np.fft.rfft(series.values[:-1, 0])) / 49.5
        heard = np.flatnonzero(strength > 0.3)
        assert series.label == (f"{heard[0]} Hz" if len(heard) == 1 else "two tones")


def test_a_generated_set_is_built_like_any_other(tmp_path):
    source = {"kind": "synthetic", "process": "sines", "n_series": 50}
    config = DatasetConfig.model_validate({"name": "tones", "source": source, "drop_rate": 0.5})

    dataset = StoredDataset(build_dataset(config, tmp_path, tmp_path, progress=False))

    assert len(dataset) == 50 and dataset.lengths.tolist() == [50] * 50
