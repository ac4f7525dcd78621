"""Baselines of the same run: features against their definition, and what they predict."""

import numpy as np
import pytest

from roma_core.data import StoredDataset
from roma_core.evaluation import baselines
from roma_core.evaluation.baselines import (
    FEATURES,
    METHODS,
    measure_baselines,
    summary_features,
    why_not_on_grid,
)
from roma_core.evaluation.classification_metrics import metric_samples
from roma_core.evaluation.predictions import PredictionTable
from roma_core.schema import Channel, Covariate, PositionAxis
from roma_core.sources.base import RawSeries
from tests.core.hand_made import HandMade, built

CHANNELS = (Channel(name="a", unit="V"), Channel(name="b", unit="V"))
TIME = PositionAxis(name="time", unit="s")
BAND = PositionAxis(name="band", unit="index of g, r", categories=("g", "r"))


def one(name, g, n, label):
    """Channel b is often missing; only channel a of band r knows the class."""
    band = g.integers(0, 2, n)
    values = g.normal(size=(n, 2))
    values[:, 0] += 3.0 * (band == 1) * (label == "y")
    values[g.random(n) < 0.4, 1] = np.nan
    positions = np.column_stack([np.sort(g.uniform(5, 50, n)), band])
    return RawSeries(
        name,
        positions=positions,
        values=values.astype(np.float32),
        label=label,
        covariates=np.float32([len(name)]),
        recorded_split=("train", "train", "test")[int(name[1:]) % 3],
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    g = np.random.default_rng(0)
    rows = tuple(one(f"s{k}", g, 6 + k % 9, "xy"[k % 2]) for k in range(180))
    source = HandMade(
        series=rows,
        channels=CHANNELS,
        axes=(TIME, BAND),
        covariates=(Covariate(name="age", unit="year"),),
    )
    return StoredDataset(built(tmp_path_factory.mktemp("banded"), source=source))


def in_words(positions, values, band, channel):
    """The features of one quantity, written out for one series."""
    chosen = (positions[:, 1] == band) & ~np.isnan(values[:, channel])
    t = positions[chosen, 0] - positions[:, 0].min()
    x = values[chosen, channel].astype(np.float64)
    if not len(x):
        return [0] + [np.nan] * (len(FEATURES) - 1)
    several = len(x) > 1
    order = np.sort(x)
    quantiles = [order[int(q * (len(x) - 1))] for q in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)]
    return [
        len(x), x.mean(), x.std(), *quantiles, x[0], x[-1],
        np.polyfit(t, x, 1)[0] if several else np.nan,
        np.abs(np.diff(x)).mean() if several else np.nan,
        np.diff(t).mean() if several else np.nan,
        np.diff(t).max() if several else np.nan,
        t[x.argmin()], t[x.argmax()],
    ]  # fmt: skip


def test_features_of_every_channel_and_category_are_what_they_say(dataset):
    split = dataset.split("train")
    found = summary_features(split)
    for k in (0, 1, 7, 50):
        positions, values = dataset.joint(int(split.indices[k]))
        expected = [in_words(positions, values, b, c) for c in (0, 1) for b in (0, 1)]
        age = dataset.covariates[split.indices[k]]
        assert found[k] == pytest.approx(
            [*np.ravel(expected), *age], rel=1e-4, abs=1e-4, nan_ok=True
        )


def measured(dataset, labels, probabilities):
    test = dataset.split("test")
    score = lambda p: metric_samples(PredictionTable.of_split(test, p, {}))["accuracy"]  # noqa: E731
    return measure_baselines(test, labels, "accuracy", score, score(probabilities))


def test_a_model_that_guesses_is_behind_the_features_and_a_perfect_one_is_not(dataset, capsys):
    test = dataset.split("test")
    perfect = np.eye(2)[dataset.labels[test.indices]]
    (baseline,) = measured(dataset, dataset.labels, np.full((len(test), 2), 0.5))
    assert baseline.value.value > 0.85 and baseline.difference.high < 0
    assert baseline.n_train == 120
    assert (
        "no baseline 'MiniRocket + ridge': its series have several axes" in capsys.readouterr().out
    )
    (baseline,) = measured(dataset, dataset.labels, perfect)
    assert baseline.difference.value == pytest.approx(1 - baseline.value.value)
    shuffled = np.random.default_rng(1).permutation(dataset.labels)
    (baseline,) = measured(dataset, shuffled, perfect)
    assert baseline.value.low < 0.6


def test_targets_of_series_are_predicted_as_well(dataset):
    counts = np.array([np.isfinite(dataset.joint(i)[1]).sum(0) for i in range(len(dataset))])
    train, test = dataset.split("train"), dataset.split("test")
    predicted = METHODS["summary features + gradient boosting"](
        train, counts[train.indices].astype(np.float32), test, 0
    )
    true = counts[test.indices]
    assert ((predicted - true) ** 2).mean() < 0.3 * true.var(axis=0).mean()


def test_a_regression_of_series_on_a_grid_is_compared_with_both_methods(shapes):
    """The ridge of MiniRocket's float32 features predicts float32, which a table refuses."""
    targets = np.arange(len(shapes), dtype=np.float32)[:, None] % 7
    test = shapes.split("test")

    def score(predicted):
        assert predicted.dtype == np.float64
        return -((predicted - targets[test.indices]) ** 2).mean(axis=1)

    found = measure_baselines(test, targets, "r2", score, score(np.zeros((len(test), 1))))
    assert [one.name for one in found] == list(METHODS)


def test_a_class_of_a_single_series_is_no_error_among_many_series(dataset, monkeypatch):
    train, test = dataset.split("train"), dataset.split("test")
    labels = dataset.labels[train.indices].copy()
    labels[0] = 2
    monkeypatch.setattr(baselines, "_EARLY_STOPPING", 50)
    scores = METHODS["summary features + gradient boosting"](train, labels, test, 0)
    assert scores.shape == (len(test), 3)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A short wave somewhere in noise: of 4 steps a period, or of 6."""
    g, rows = np.random.default_rng(0), []
    for k in range(120):
        values = 0.3 * g.normal(size=60)
        start, period = int(g.integers(5, 35)), (4, 6)[k % 2]
        values[start : start + 20] += np.sin(2 * np.pi * np.arange(20) / period + g.uniform(0, 6))
        kept = np.sort(g.permutation(60)[:56])
        rows.append(
            RawSeries(
                f"s{k}",
                positions=kept[:, None] * 0.25,
                values=values[kept, None].astype(np.float32),
                label="xy"[k % 2],
                recorded_split=("train", "train", "test")[k % 3],
            )
        )
    source = HandMade(series=tuple(rows), channels=CHANNELS[:1], axes=(TIME,))
    return StoredDataset(built(tmp_path_factory.mktemp("shapes"), source=source))


def test_minirocket_tells_shapes_that_summaries_do_not(shapes, monkeypatch):
    train, test = shapes.split("train"), shapes.split("test")
    assert why_not_on_grid(train) is None  # though some steps are missing
    labels, true = shapes.labels[train.indices], shapes.labels[test.indices]
    scores = METHODS["MiniRocket + ridge"](train, labels, test, 0)
    assert scores.shape == (40, 2)
    assert (scores.argmax(1) == true).mean() >= 0.9
    monkeypatch.setattr(baselines, "MAX_SERIES_ON_GRID", 7)  # of test series at a time
    parts = METHODS["MiniRocket + ridge"](train, labels, test, 0)
    assert parts == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("digits", [2, 12])
def test_random_times_are_no_grid_even_if_rounded(shapes, monkeypatch, digits):
    def random(row):
        times = np.sort(np.random.default_rng(row).uniform(0, 9, (20, 1)), axis=0)
        return np.round(times, digits), None

    monkeypatch.setattr(shapes, "joint", random)
    assert "do not lie on one grid" in why_not_on_grid(shapes.split("train"))
