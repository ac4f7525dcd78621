import json
import time
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from sklearn import metrics as sk

from roma_core.evaluation.classification_metrics import (
    chance,
    compare_predictions,
    evaluate,
    metric_samples,
)
from roma_core.evaluation.metrics import (
    Estimate,
    ReconstructionMetrics,
    compare_regressions,
    equal_mass_bins,
    evaluate_regression,
    headline,
    wilson,
)
from roma_core.evaluation.plots import errors_by_group
from roma_core.evaluation.predictions import PredictionTable
from roma_core.evaluation.reconstruction import (
    coverage,
    errors_by_class,
    noise_error,
    reconstruction_errors,
)
from roma_core.evaluation.report import ReportContent, render_report
from roma_core.trainer.defaults import PrimaryMetric
from roma_core.trainer.evaluator import score
from tests.core.evaluation.tables import reconstruction_table, regression_table
from tests.time_limits import within


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
    others = np.eye(9)[true], table.probabilities
    assert found.auroc.value == pytest.approx(sk.roc_auc_score(*others, average="macro"))
    assert found.average_precision.value == pytest.approx(sk.average_precision_score(*others))
    assert found.brier.value == pytest.approx(sk.brier_score_loss(true, table.probabilities))
    assert [c.auroc for c in found.per_class] == pytest.approx(
        sk.roc_auc_score(*others, average=None)
    )
    expected = sk.precision_recall_fscore_support(true, predicted)
    rows = [(c.precision, c.recall, c.f1, c.support) for c in found.per_class]
    np.testing.assert_allclose(np.array(rows).T, expected)


def two_classes(n=200, positive=0.27, decimals=1):
    """A rare second class and, by rounding, many equal probabilities."""
    rng = np.random.default_rng(4)
    labels = (rng.random(n) < positive).astype(int)
    p = np.round(1 / (1 + np.exp(1 - rng.normal(1.0 * labels))), decimals)
    ids = [str(i) for i in range(n)]
    return PredictionTable(
        ids, ("no", "yes"), labels, np.stack([1 - p, p], axis=1), np.ones(n, np.int64)
    )


def test_of_two_classes_the_second_is_ranked_and_tabled_by_threshold():
    table = two_classes()
    true, p = table.labels, table.probabilities[:, 1]

    found = evaluate(table)

    assert found.auroc.value == pytest.approx(sk.roc_auc_score(true, p))
    assert found.average_precision.value == pytest.approx(sk.average_precision_score(true, p))
    assert found.brier.value == pytest.approx(sk.brier_score_loss(true, p))
    row = next(one for one in found.thresholds if one.threshold == 0.3)
    assert row.sensitivity == pytest.approx(sk.recall_score(true, p >= 0.3))
    assert row.specificity == pytest.approx(sk.recall_score(1 - true, p < 0.3))
    assert row.precision == pytest.approx(sk.precision_score(true, p >= 0.3))
    assert row.f1 == pytest.approx(sk.f1_score(true, p >= 0.3))
    page = render_report(ReportContent(title="t", summary="s", created="c", metrics=found))
    assert "yes predicted where its probability is at least the threshold" in page


def test_intervals_of_ranks_agree_with_a_bootstrap_written_as_a_loop():
    table = two_classes()
    true, p = table.labels, table.probabilities[:, 1]
    rng = np.random.default_rng(5)
    drawn = [rng.integers(len(p), size=len(p)) for _ in range(300)]

    found = evaluate(table, n_bootstrap=2000)

    for name, area in (
        ("auroc", sk.roc_auc_score),
        ("average_precision", sk.average_precision_score),
    ):
        looped = np.percentile([area(true[rows], p[rows]) for rows in drawn], [2.5, 97.5])
        estimate = found.estimates()[name]
        assert [estimate.low, estimate.high] == pytest.approx(looped, abs=0.02)


def test_classes_without_series_are_named_and_give_no_nan():
    whole = by_hand()
    only = PredictionTable(
        ["a", "b"], ("x", "y"), np.zeros(2, int), np.full((2, 2), 0.5), np.ones(2, np.int64)
    )
    for table, values, note in (
        (whole, (0.5, 0.5), "Without series in this split: 'never seen'"),
        (only, None, "All series are of class 'x': AUROC, average precision"),
    ):
        found = evaluate(table)
        assert (found.auroc and (found.auroc.value, found.per_class[1].auroc)) == values
        assert note in found.notes[0] and found.thresholds == ()
        json.dumps(found.document(), allow_nan=False)
        page = render_report(ReportContent(title="t", summary="s", created="c", metrics=found))
        assert found.notes[0].replace("'", "&#39;") in page and "nan" not in page


@pytest.mark.parametrize("classes", [2, 5])
def test_training_and_evaluation_agree_on_the_primary_metric(simulated, classes):
    table = simulated(n=120, k=classes, sharpness=1.0)
    logits = np.log(table.probabilities)
    samples = metric_samples(table, n_bootstrap=100)
    for name in get_args(PrimaryMetric):
        assert score(name, logits, table.labels) == pytest.approx(samples[name][0])
    # a class without series is left out, and series of one class are not ranked
    rows = np.flatnonzero(table.labels != classes - 1)
    assert np.isnan(score("auroc", logits[rows], table.labels[rows])) == (classes == 2)


def test_the_primary_metric_is_chosen_by_the_training_series():
    found = evaluate(two_classes()).compared_by("auto", {"no": 73, "yes": 27})
    assert (
        found.primary == found.auroc
        and "27 % of the series, less than 35 %" in found.primary_reason
    )
    assert headline(found.document()).startswith(f"AUROC {found.auroc.value:.3f} (95 % ")
    page = render_report(ReportContent(title="t", summary="s", created="c", metrics=found))
    assert "AUROC is the primary metric: the rarer of two classes has 27 %" in page

    one = replace(two_classes(), labels=np.zeros(200, np.int64))
    assert evaluate(one).compared_by("auto", {"no": 73, "yes": 27}).primary_metric == "accuracy"
    with pytest.raises(
        ValueError, match=r"auroc is undefined on the test split\. All series are of"
    ):
        evaluate(one).compared_by("auroc", {"no": 73, "yes": 27})


def test_chance_is_the_mean_of_random_predictions_of_the_right_fractions():
    rng, table = np.random.default_rng(6), two_classes(n=60, decimals=9)
    found = {name: [] for name in get_args(PrimaryMetric)}
    for _ in range(300):
        p = rng.permutation(np.linspace(0, 1, 60) ** (0.27 / 0.73))[:, None]
        guess = replace(table, probabilities=np.hstack([p, 1 - p]))
        for name in found:
            found[name].append(score(name, np.log(guess.probabilities + 1e-9), table.labels))
    for name in ("balanced_accuracy", "macro_f1", "auroc", "average_precision"):
        assert np.mean(found[name]) == pytest.approx(chance(table, name), abs=0.02)
    assert np.mean(found["accuracy"]) < chance(table, "accuracy")


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

    assert time.perf_counter() - start < within(1)


def test_metrics_survive_json_and_have_flat_names(simulated):
    found = evaluate(simulated())

    assert type(found).model_validate_json(found.model_dump_json()) == found
    assert {"accuracy", "accuracy_low", "log_loss_high"} < set(found.flat())
    assert len(found.flat()) == 24


def test_too_few_resamples_are_refused(simulated):
    with pytest.raises(ValueError, match="at least 100"):
        evaluate(simulated(), n_bootstrap=10)


def test_metrics_are_means_over_values_whatever_the_series_they_are_in():
    metrics = evaluate_regression(regression_table([[1, 0], [-1, 0], [2, 4]], [1, 2]))

    assert metrics.mse.value == pytest.approx((1 + 1 + 4 + 16) / 6)
    assert metrics.rmse.value == pytest.approx(np.sqrt(22 / 6))
    assert metrics.mae.value == pytest.approx(8 / 6)
    depth, heat = metrics.per_target
    assert (depth.name, depth.unit, heat.unit) == ("depth", "m", "K")
    assert depth.mse.value == pytest.approx(2) and heat.mse.value == pytest.approx(16 / 3)
    assert depth.r2.value == pytest.approx(1 - 2 / np.var([0, 2, 4]))
    assert metrics.primary == metrics.r2
    assert metrics.r2.value == pytest.approx((depth.r2.value + heat.r2.value) / 2)
    assert heat.nrmse.value == pytest.approx(np.sqrt(16 / 3) / 2), "its deviation in train is 2"
    assert metrics.nrmse.value == pytest.approx(np.sqrt((2 + 16 / 3 / 4) / 2))
    assert [(one.first, one.count) for one in metrics.by_position] == [(0, 2), (1, 1)]
    assert metrics.by_position[1].rmse == (2, 4)
    assert metrics.n_series == 2 and metrics.n_observations == 3


def test_resampling_takes_whole_series_so_that_equal_errors_in_a_series_count_once():
    random = np.random.default_rng(0)
    own = random.normal(size=(50, 1, 2))  # an error of its own for every series
    alike = regression_table(np.repeat(own, 20, axis=1).reshape(-1, 2), [20] * 50)
    single = regression_table(own[:, 0], [1] * 50)

    many, few = evaluate_regression(alike), evaluate_regression(single)

    assert many.mse.value == pytest.approx(few.mse.value)
    assert (many.mse.low, many.mse.high) == pytest.approx((few.mse.low, few.mse.high))
    assert many.mse.low < many.mse.value < many.mse.high


def test_a_target_that_never_changes_has_no_r2():
    metrics = evaluate_regression(regression_table([[1, 1]] * 4, [2, 2], true=np.ones((4, 2))))

    assert [one.r2 for one in metrics.per_target] == [None, None]
    assert metrics.r2 is None

    one = regression_table([[0.1, 0]] * 3, [1] * 3, true=np.array([[0.3, 7], [0.7, 7], [0.1, 7]]))
    found = evaluate_regression(one)  # many resamples repeat a single series
    assert found.per_target[1].r2 is None and found.r2 == found.per_target[0].r2
    assert -3 < found.r2.low < found.r2.value < 1


def test_a_predicted_spread_is_reported_with_its_coverage_and_models_are_compared_in_pairs():
    random = np.random.default_rng(0)
    own = random.normal(size=(200, 2))
    better = regression_table(own, [1] * 200, std=np.ones((200, 2)))
    worse = replace(better, predicted=better.predicted + random.normal(size=(200, 2)))

    covered = evaluate_regression(better).coverage_95
    assert covered.value == pytest.approx(0.95, abs=0.03) and covered.low < 0.95 < covered.high
    changes = {change.name: change for change in compare_regressions(better, worse)}
    assert list(changes) == ["R²", "normalised RMSE", "R² of depth", "R² of heat"]
    assert changes["R²"].difference.low > 0 > changes["normalised RMSE"].difference.high
    with pytest.raises(ValueError, match="other series"):
        compare_regressions(better, replace(worse, ids=worse.ids[::-1]))


def test_errors_are_means_over_values_and_by_hand():
    found = reconstruction_errors(reconstruction_table())

    assert found["mse"].value == pytest.approx((1 + 9 + 4) / 3)
    assert found["rmse"].value == pytest.approx(np.sqrt(14 / 3))
    assert found["mae"].value == pytest.approx(2)
    # a resample of the two series that have errors is one of them, or both
    assert (found["mse"].low, found["mse"].high) == pytest.approx((4, 5))
    assert reconstruction_errors(reconstruction_table(), ranges=np.array([2.0]))[
        "nrmse"
    ].value == pytest.approx(found["rmse"].value / 2)
    assert reconstruction_errors(reconstruction_table(), "clean") == {} and noise_error(
        reconstruction_table()
    ) == {} == coverage(reconstruction_table())


def test_errors_against_the_clean_values_noise_and_coverage():
    table = reconstruction_table(
        clean=np.array([[1.0], [1], [2]], np.float32), std=np.array([[1.0], [1], [1.1]], np.float32)
    )

    found = reconstruction_errors(table, "clean")

    assert found["clean_mse"].value == pytest.approx((0 + 9 + 4) / 3)
    assert noise_error(table)["noise_mse"].value == pytest.approx(1 / 3)
    assert coverage(table)["coverage_95"].value == pytest.approx(2 / 3)
    found = [coverage(table)[f"coverage_{level}"].value for level in (50, 80)]
    assert found == pytest.approx([0, 1 / 3])


def test_errors_by_class_have_names_a_tracker_takes():
    groups = errors_by_class(
        reconstruction_table(), np.array([1, 0, 3]), ("5 Hz", "24 Hz", "a-b", "a b")
    )

    assert [(g.name, g.slug, g.n_series) for g in groups] == [
        ("24 Hz", "24_hz", 1),
        ("a b", "a_b_class3", 1),
    ]
    assert [g.mse.value for g in groups] == pytest.approx([5, 4])


def test_a_class_of_one_series_has_no_interval():
    table = reconstruction_table(series=np.array([0, 1, 2]))
    groups = errors_by_class(table, np.array([0, 1, 1]), ("one", "two"))
    alone, several = (group.mse for group in groups)
    metrics = ReconstructionMetrics(
        n_series=3,
        n_hidden=3,
        mean_hidden_fraction=0.5,
        overall=reconstruction_errors(table) | {"r2": Estimate(value=0.5, low=0.4, high=0.6)},
        groups=groups,
    )

    page = render_report(ReportContent(title="t", summary="s", created="c", metrics=metrics))
    document = json.loads(json.dumps(metrics.document(), allow_nan=False))

    assert (alone.low, alone.high) == (None, None) and several.low < several.high
    assert document["mse_one"] == {"value": alone.value, "low": None, "high": None}
    assert '<td class="number">–</td>' in page and "None" not in page
    assert errors_by_group(groups, None).startswith(b"\x89PNG")


def test_wilson_covers_small_samples():
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1
    low, high = wilson(8, 10)  # Wilson 1927: (0.490, 0.943)
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))


def test_missing_shares_become_buckets_and_travel_with_the_table(simulated, tmp_path):
    table = simulated(n=80, k=3)
    missing = np.linspace(0, 0.9, 80)
    table = PredictionTable(
        table.ids, table.classes, table.labels, table.probabilities, table.lengths, {}, missing
    )
    table.save(tmp_path / "t.parquet")
    again = PredictionTable.load(tmp_path / "t.parquet")
    np.testing.assert_array_equal(again.missing, missing)
    buckets = evaluate(again, n_bootstrap=100).by_missing
    assert [b.count for b in buckets] == [20] * 4
    assert (buckets[0].least, buckets[-1].most) == (0, 0.9)


def test_tables_of_other_series_are_not_compared(simulated):
    ours = simulated(n=50, k=3)
    other = PredictionTable(
        ours.ids, ours.classes, (ours.labels + 1) % 3, ours.probabilities, ours.lengths
    )
    with pytest.raises(ValueError, match="other labels"):
        compare_predictions(ours, other)
    with pytest.raises(ValueError, match="other series or classes"):
        compare_predictions(ours, simulated(n=51, k=3))
