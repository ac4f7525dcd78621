import numpy as np
import pytest

from roma_core.evaluation.predictions import PredictionTable
from roma_pipelines.registry.promotion import GateThresholds, gate

N, K = 370, 5


def table(correct, labels=None, confidence=0.9, ids=None):
    """Predictions that are right where ``correct`` says so."""
    n = len(correct)
    labels = np.arange(n) % K if labels is None else labels
    predicted = np.where(correct, labels, (labels + 1) % K)
    p = np.full((n, K), (1 - confidence) / (K - 1))
    p[np.arange(n), predicted] = confidence
    ids = [f"s{i}" for i in range(n)] if ids is None else ids
    return PredictionTable(ids, tuple("abcde"), labels, p, np.ones(n, np.int64))


def draw(rng, difference, base=0.9, agreement=0.8):
    """Champion and candidate of true accuracies ``base`` and ``base + difference``, correlated."""
    shared, own = rng.random(N), rng.random((2, N))
    noise = np.where(rng.random(N) < agreement, shared, own)  # (2, N)
    return table(noise[0] < base), table(noise[1] < base + difference)


def named(decision):
    return {check.name: check for check in decision.checks}


@pytest.mark.parametrize(("difference", "low", "high"), [(-0.06, 0, 0.05), (0.06, 0.8, 1)])
def test_promotion_rates_at_twice_epsilon(difference, low, high):
    """At most 5 % at a true difference of -2ε, at least 80 % at +2ε, in 200 draws."""
    rng = np.random.default_rng(0)
    thresholds = GateThresholds(max_loss_to_champion=0.03, n_bootstrap=500)
    passed = []
    for _ in range(200):
        champion, candidate = draw(rng, difference)
        passed.append(gate(candidate, champion, thresholds).passed)
    assert low <= np.mean(passed) <= high


def test_the_comparison_is_paired_by_id():
    rng = np.random.default_rng(1)
    champion, candidate = draw(rng, 0.02)
    order = rng.permutation(N)
    shuffled = PredictionTable(
        [champion.ids[i] for i in order],
        champion.classes,
        champion.labels[order],
        champion.probabilities[order],
        champion.lengths[order],
    )
    thresholds = GateThresholds()
    assert gate(candidate, shuffled, thresholds) == gate(candidate, champion, thresholds)


def test_the_bound_is_the_one_of_a_bootstrap_written_as_a_loop():
    rng = np.random.default_rng(2)
    champion, candidate = draw(rng, 0.0)
    gain = candidate.correct.astype(float) - champion.correct
    means = [gain[rng.integers(N, size=N)].mean() for _ in range(5000)]

    check = named(gate(candidate, champion, GateThresholds()))["not_worse_than_champion"]

    assert check.value == pytest.approx(np.quantile(means, 0.05), abs=0.003)
    assert check.threshold == -0.01


def test_an_equal_model_passes_even_without_tolerance():
    right = table(np.arange(N) % 10 > 0)
    decision = gate(right, right, GateThresholds(max_loss_to_champion=0))
    assert decision.passed
    worse = table(np.arange(N) % 10 > 1)
    assert not gate(worse, right, GateThresholds(max_loss_to_champion=0)).passed


def test_shuffled_labels_and_other_series_are_refused():
    right = table(np.ones(N, bool))
    labels = np.random.default_rng(0).permutation(right.labels)
    relabelled = PredictionTable(
        right.ids, right.classes, labels, right.probabilities, right.lengths
    )
    fewer = table(np.ones(N - 1, bool))
    for candidate, why in ((relabelled, "another label"), (fewer, "1 ids are in one table only")):
        decision = gate(candidate, right, GateThresholds())
        assert not decision.passed
        assert why in named(decision)["same_series"].explanation


def test_each_floor_and_ceiling_decides_alone():
    correct = np.ones(N, bool)
    correct[np.arange(0, N, 2 * K)] = False  # half of class "a" is wrong
    candidate = table(correct)
    accuracy = correct.mean()

    def check(**thresholds):
        (only,) = gate(candidate, None, GateThresholds(**thresholds)).checks
        return only

    assert check(min_accuracy=accuracy).passed
    assert not check(min_accuracy=accuracy + 0.001).passed
    assert check(min_class_recall=0.5).passed
    assert not check(min_class_recall=0.51).passed
    assert "'a'" in check(min_class_recall=0.5).explanation
    assert check(max_calibration_error=0.001 + abs(accuracy - 0.9)).passed
    assert not check(max_calibration_error=abs(accuracy - 0.9) / 2).passed


def test_a_decision_survives_json_and_the_first_model_needs_no_champion():
    decision = gate(table(np.ones(N, bool)), None, GateThresholds())
    assert decision.passed and decision.checks == ()
    decision = gate(table(np.ones(N, bool)), table(np.ones(N, bool)), GateThresholds())
    assert type(decision).model_validate_json(decision.model_dump_json()) == decision
