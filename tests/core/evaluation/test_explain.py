"""Occlusion: an importance is the difference of two ordinary predictions, and parts are what they say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from roma_core.evaluation.explain import Part, explain
from roma_core.evaluation.plots import importance_figure
from roma_core.schema import Channel, ChannelNormalisation, DataSchema, PositionAxis
from roma_core.serving import pyfunc_model
from roma_core.serving.job import load_package
from tests.core.serving import toy

SCHEMA = DataSchema(
    channels=(Channel(name="flux", unit="mJy"), Channel(name="ratio", unit="1")),
    axes=(PositionAxis(name="time", unit="d"), PositionAxis(name="band", unit="1")),
    classes=toy.CLASSES,
    normalisation=(
        ChannelNormalisation(mean=2.0, std=4.0),
        ChannelNormalisation(mean=0.0, std=1.0),
    ),
)


class InWindow(toy.Toy):
    """The flux between days 4 and 6 decides the class."""

    def forward(self, values, positions, valid):
        time = positions[..., 0]
        counts = valid & (time >= 4) & (time < 6)
        evidence = torch.where(counts, values[..., 0], 0.0).sum(dim=1)
        return torch.stack([evidence, 0 * evidence, -evidence], dim=1)


def test_only_the_window_and_the_channel_that_decide_are_important(tmp_path):
    toy.build_toy(tmp_path / "package", InWindow(), SCHEMA)
    package = load_package(tmp_path / "package")
    rng = np.random.default_rng(0)
    time = np.sort(np.append(rng.uniform(0, 10, 38), [0, 10]))
    row = {
        "id": "s",
        "positions": {"time": time.tolist(), "band": [0.0] * 40},
        "values": {"flux": [3.0] * 40, "ratio": rng.normal(size=40).tolist()},
        "units": {"time": "d", "flux": "mJy"},
    }

    found = explain(package, row, n_windows=10)

    *windows, flux, ratio = found.parts
    assert [(part.start, part.end) for part in windows] == [(k, k + 1) for k in range(10)]
    assert [part.n_observations for part in windows] == np.histogram(time, np.arange(11))[
        0
    ].tolist()
    assert found.prediction.startswith("class one, ")
    (output,) = found.outputs

    def log_p(keep):
        columns = {
            part: {name: np.array(column)[keep].tolist() for name, column in row[part].items()}
            for part in ("positions", "values")
        }
        (answer,) = package.predict([{**row, **columns}])
        return np.log(answer.probabilities["one"])

    whole = log_p(time >= 0)
    for k, part in enumerate(windows):
        without = log_p((time < k) | (time >= k + 1))
        assert part.importance[output] == pytest.approx(whole - without, abs=1e-6)
        assert (part.importance[output] > 0.01) == (k in (4, 5))
    assert flux.importance[output] == pytest.approx(whole - np.log(1 / 3), abs=1e-6)
    assert (flux.without, ratio.importance[output]) == (
        "set to its mean",
        pytest.approx(0, abs=1e-6),
    )


def test_a_series_that_does_not_fit_is_refused_as_by_a_prediction(tmp_path):
    toy.build_toy(tmp_path / "package", InWindow(), SCHEMA)
    row = {"positions": {"time": [0.0, 1.0], "band": [0.0, 0.0]}, "values": {"flux": [1.0]}}
    with pytest.raises(pyfunc_model.InvalidSeries, match="'ratio' is missing"):
        explain(load_package(tmp_path / "package"), row)


def stub(**changes):
    """Of a regressor whose target is the sum of all values, and of those in band r twice."""

    def outputs(series):
        sums = []
        for one in series:
            bands = np.where(np.array(one.positions["band"]) == "r", 2.0, 1.0)
            columns = [[x or 0.0 for x in column] for column in one.values.values()]
            sums.append([float((np.array(columns) * bands).sum()), 1.0])
        return np.array(sums)

    fields = {"kind": "regressor", "golden_field": "targets", "targets": {"total": "kg"}}
    fields |= {"axes": [{"name": "time"}, {"name": "band", "categories": ["g", "r"]}]}
    fields |= {"channels": [{"name": "a"}, {"name": "b"}], "may_miss": True, "outputs": outputs}
    return SimpleNamespace(**{**fields, **changes}, module=pyfunc_model)


ROW = {
    "positions": {"time": [0.0, 1.0, 5.0, 9.0], "band": ["r", "g", "g", "r"]},
    "values": {"a": [1.0, None, 4.0, None], "b": [None, None, None, 8.0]},
}


def test_missing_channels_and_categories_are_left_out_of_a_regression():
    found = explain(stub(), ROW, n_windows=3)

    assert found.outputs == {"total": 2 + 4 + 16}
    parts = {part.text: (part.n_observations, part.importance["total"]) for part in found.parts}
    assert parts == {
        "time 0 to 3": (1, 2.0),
        "time 3 to 6": (1, 4.0),
        "time 6 to 9": (1, 16.0),
        "band r": (2, 18.0),
        "band g": (1, 4.0),
        "a": (2, 6.0),
        "b": (1, 16.0),
    }
    assert found.n_observations == 3, "one has no value"
    assert found.prediction == "total 22 kg"
    pure = explain(stub(targets={"total": "1"}), ROW, n_windows=3)
    assert pure.prediction == "total 22", "a pure number has no unit"


@pytest.mark.parametrize(
    ("start", "end", "text"),
    [
        (1_700_000_012.3, 1_700_004_332.3, "t 1700000000 to 1700004300"),
        (-0.0123456, 0.0, "t -0.012 to 0"),
        (1e16, 1e16, "t 1e+16 to 1e+16"),
    ],
)
def test_the_ends_of_a_window_differ_also_far_from_zero(start, end, text):
    fields = {"kind": "window", "name": "t", "n_observations": 1, "importance": {}}
    assert Part(start=start, end=end, **fields).text == text


@pytest.mark.parametrize(
    ("changes", "row", "told"),
    [
        (
            {"golden_field": "interpolation", "kind": "autoencoder"},
            ROW,
            "got autoencoder; give another",
        ),
        ({"per_observation": True}, ROW, "got regressor of observations"),
        ({}, {"positions": {"time": [3.0], "band": ["g"]}, "values": {"a": [1.0]}}, "at time 3"),
    ],
)
def test_what_cannot_be_explained_is_said(changes, row, told):
    with pytest.raises(ValueError, match=told):
        explain(stub(**changes), row)


def test_windows_far_below_a_channel_are_not_shaded():
    def drawn(window, channel):
        row = {"positions": {"time": [0.0, 2.0]}, "values": {"a": [1.0, 2.0]}}
        return importance_figure(row, "time", [(0, 1, window), (1, 2, 0)], {"a": channel})

    assert drawn(1e-4, 4.0) == drawn(0, 4.0)
    assert drawn(1.0, 4.0) != drawn(0, 4.0)
