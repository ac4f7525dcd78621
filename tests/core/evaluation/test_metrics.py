import time

import numpy as np
import pytest
from sklearn import metrics as sk

from roma_core.evaluation.metrics import equal_mass_bins, evaluate
from roma_core.evaluation.predictions import PredictionTable


def by_hand():
    return PredictionTable(
        ids=list("abcd"),
        classes=("x", "y", "never seen"),
        labels=np.array([0, 0, 1, 1]),
        probabilities=np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.4, 0.6, 0], [0.3, 0.7, 0]]),
        lengths=np.array([1, 2, 3, 4]),
    )


def test_values_are_those_of_scikit_learn(simulated):
    table = simulated()

    found = evaluate(table)

    true, predicted = table.labels, table.predicted
    assert found.accuracy.value == pytest.approx(sk.accuracy_score(true, predicted))
    assert found.balanced_accuracy.value == pytest.approx(
        sk.balanced_accuracy_score(true, predicted)
    )
    assert found.macro_f1.value == pytest.approx(sk.f1_score(true, predicted, average="macro"))
    assert found.log_loss.value == pytest.approx(sk.log_loss(true, table.probabilities))
    assert np.array_equal(found.confusion, sk.confusion_matrix(true, predicted))
    expected = sk.precision_recall_fscore_support(true, predicted)
    rows = [(c.precision, c.recall, c.f1, c.support) for c in found.per_class]
    np.testing.assert_allclose(np.array(rows).T, expected)


def test_values_are_those_computed_by_hand():
    found = evaluate(by_hand())

    assert found.accuracy.value == 0.75
    assert found.balanced_accuracy.value == 0.75  # (1/2 + 2/2) / 2: the third class has no series
    assert found.macro_f1.value == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found.log_loss.value == pytest.approx(-np.log([0.9, 0.2, 0.6, 0.7]).mean())
    # four bins hold one series each: |1-.9| + |0-.8| + |1-.6| + |1-.7| over 4
    assert found.calibration_error.value == pytest.approx(0.4)
    x, y, never = found.per_class
    assert (x.precision, x.recall, x.f1, x.support, x.predicted) == (1, 0.5, 2 / 3, 2, 1)
    assert (y.precision, y.recall, y.support, y.predicted) == (2 / 3, 1, 2, 3)
    assert (never.precision, never.recall, never.f1, never.support) == (None, None, None, 0)
    assert found.confusion == ((1, 1, 0), (0, 2, 0), (0, 0, 0))
    assert [(b.confidence, b.accuracy, b.count) for b in found.reliability] == [
        (0.6, 1, 1), (0.7, 1, 1), (0.8, 0, 1), (0.9, 1, 1),
    ]  # fmt: skip
    assert [(b.least, b.most, b.accuracy) for b in found.by_length] == [
        (1, 1, 1), (2, 2, 0), (3, 3, 1), (4, 4, 1),
    ]  # fmt: skip


def test_a_perfect_table_has_no_spread(simulated):
    table = simulated(sharpness=50.0)

    found = evaluate(table)

    assert (found.accuracy.low, found.accuracy.value, found.accuracy.high) == (1, 1, 1)


def test_intervals_agree_with_a_bootstrap_written_as_a_loop(simulated):
    table = simulated(sharpness=2.0)
    rng = np.random.default_rng(5)
    looped = []
    for _ in range(1000):
        rows = rng.integers(len(table.ids), size=len(table.ids))
        looped.append(sk.f1_score(table.labels[rows], table.predicted[rows], average="macro"))

    found = evaluate(table, n_bootstrap=1000).macro_f1

    assert [found.low, found.high] == pytest.approx(np.percentile(looped, [2.5, 97.5]), abs=0.008)


def test_the_accuracy_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        correct = rng.random(300) < 0.8
        p = np.where(correct[:, None], [0.9, 0.1], [0.1, 0.9])
        zeros = np.zeros(300, np.int64)
        ids = [str(i) for i in range(300)]
        found = evaluate(PredictionTable(ids, ("x", "y"), zeros, p, zeros + 1), n_bootstrap=200)
        covered += found.accuracy.low <= 0.8 <= found.accuracy.high
    assert 180 <= covered <= 200  # 190 expected, standard deviation 3


def test_equal_input_gives_equal_output_and_series_order_does_not_matter(simulated):
    table = simulated()
    rows = np.random.default_rng(3).permutation(len(table.ids))
    shuffled = PredictionTable(
        [table.ids[i] for i in rows],
        table.classes,
        table.labels[rows],
        table.probabilities[rows],
        table.lengths[rows],
    )

    assert evaluate(table) == evaluate(table)
    values = {n: e.value for n, e in evaluate(table).estimates().items()}
    assert {n: e.value for n, e in evaluate(shuffled).estimates().items()} == pytest.approx(values)


def test_equal_numbers_share_a_bin():
    assert len(np.unique(equal_mass_bins(np.ones(50), 15))) == 1
    assert np.bincount(equal_mass_bins(np.arange(30.0), 15)).tolist() == [2] * 15


def test_a_thousand_resamples_take_less_than_a_second(simulated):
    table = simulated()
    evaluate(table, n_bootstrap=100)  # first use of the linear algebra library
    start = time.perf_counter()

    evaluate(table, n_bootstrap=1000)

    assert time.perf_counter() - start < 1


def test_metrics_survive_json_and_have_flat_names(simulated):
    found = evaluate(simulated())

    assert type(found).model_validate_json(found.model_dump_json()) == found
    assert {"accuracy", "accuracy_low", "log_loss_high"} < set(found.flat())
    assert len(found.flat()) == 15


def test_too_few_resamples_are_refused(simulated):
    with pytest.raises(ValueError, match="at least 100"):
        evaluate(simulated(), n_bootstrap=10)
