from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from roma_core.evaluation.config import ServingChecks
from roma_core.evaluation.metrics import Estimate, MeasuredBaseline
from roma_core.evaluation.predictions import PredictionTable, ReconstructionTable, RegressionTable
from roma_core.schema import Channel
from roma_core.serving.package import SmokeTest
from roma_pipelines.registry import gate as gates
from roma_pipelines.registry.gate import CHECKS, GateDecision, GateThresholds, checks_of

N, K = 370, 5
TRIAL = SmokeTest(load_s=0.5, latency_ms=2.0, golden_difference=1e-7)
SOUND = ServingChecks(serving_difference=1e-7, size_mb=3.0, smoke_test=TRIAL)


def gate(candidate, champion, thresholds, primary="accuracy", **measured):
    return gates.gate(candidate, champion, SOUND.model_copy(update=measured), thresholds, primary)


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
    thresholds = GateThresholds(max_primary_drop=0.03, n_bootstrap=500)
    passed = []
    for _ in range(200):
        champion, candidate = draw(rng, difference)
        passed.append(gate(candidate, champion, thresholds).passed)
    rate = np.mean(passed)
    print(f"promoted at a true difference of {difference:+.2f}, ε 0.03: {rate:.1%} of 200 draws")
    assert low <= rate <= high


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
    decision = gate(right, right, GateThresholds(max_primary_drop=0))
    assert decision.passed
    worse = table(np.arange(N) % 10 > 1)
    assert not gate(worse, right, GateThresholds(max_primary_drop=0)).passed


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
        assert why in named(decision)["comparable"].explanation
        assert not named(decision)["not_worse_than_champion"].passed


def test_each_floor_and_ceiling_decides_alone():
    correct = np.ones(N, bool)
    correct[np.arange(0, N, 2 * K)] = False  # half of class "a" is wrong
    candidate = table(correct)
    accuracy = correct.mean()

    def check(name, **thresholds):
        return named(gate(candidate, None, GateThresholds(**thresholds)))[name]

    assert check("primary_metric", min_primary=accuracy).passed
    assert not check("primary_metric", min_primary=accuracy + 0.001).passed
    assert check("class_floor", min_class_recall=0.5).passed
    assert not check("class_floor", min_class_recall=0.51).passed
    assert "'a'" in check("class_floor").explanation
    off = abs(accuracy - 0.9)
    assert check("calibration", max_calibration_error=0.001 + off).passed
    assert not check("calibration", max_calibration_error=off / 2).passed


def test_a_class_that_the_champion_knew_may_not_be_lost():
    champion = table(np.ones(N, bool))
    correct = np.ones(N, bool)
    correct[np.arange(0, N, 2 * K)] = False  # accuracy 0.9, but half of class "a"
    thresholds = {"max_primary_drop": 0.2, "max_recall_drop": 0.2}

    lost = gate(table(correct), champion, GateThresholds(**thresholds))
    kept = gate(champion, champion, GateThresholds(**thresholds))

    assert kept.passed
    assert [c.name for c in lost.checks if not c.passed] == ["class_floor"]
    assert "('a')" in named(lost)["class_floor"].explanation


def test_one_unlucky_series_of_a_rare_class_does_not_decide():
    labels = np.arange(N) % (K - 1)
    labels[7] = K - 1  # the only one of class "e"
    correct = np.arange(N) != 7
    thresholds = GateThresholds(max_recall_drop=0.2)
    decision = gate(table(correct, labels), table(np.ones(N, bool), labels), thresholds)
    assert named(decision)["class_floor"].passed


@pytest.mark.parametrize("n", [2, 3])
def test_a_class_of_few_that_is_lost_whole_decides(n):
    labels = np.arange(N) % (K - 1)
    labels[:n] = K - 1
    correct = np.arange(N) >= n
    thresholds = GateThresholds(max_recall_drop=0.2)
    decision = gate(table(correct, labels), table(np.ones(N, bool), labels), thresholds)
    assert not named(decision)["class_floor"].passed


@pytest.mark.parametrize("champion", [False, True])
def test_a_model_of_shuffled_labels_is_refused_with_and_without_a_champion(champion):
    """What a classifier that was trained on shuffled labels says is right by accident."""
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(100):
        by_accident = table(rng.random(N) < 1 / K)
        beside = table(rng.random(N) < 0.9) if champion else None
        refused += not gate(by_accident, beside, GateThresholds()).passed
    print(f"refused {refused} of 100 models of shuffled labels")
    assert refused == 100


def rare_class(rng, n=300, positive=0.27, separation=1.5):
    """A calibrated model of two classes whose score differs between them by ``separation``."""
    labels = (rng.random(n) < positive).astype(int)
    score = rng.normal(separation * labels, 1.0)
    odds = positive / (1 - positive) * np.exp(separation * score - separation**2 / 2)
    p = odds / (1 + odds)
    ids = [f"s{i}" for i in range(n)]
    return PredictionTable(
        ids, ("no", "yes"), labels, np.stack([1 - p, p], axis=1), np.ones(n, np.int64)
    )


@pytest.mark.parametrize(("positive", "separation"), [(0.27, 1.5), (0.1, 3.0)])
def test_a_useful_model_of_a_rare_class_is_better_than_guessing(positive, separation):
    rng = np.random.default_rng(5)
    for _ in range(20):
        useful = rare_class(rng, positive=positive, separation=separation)
        check = named(gate(useful, None, GateThresholds()))["better_than_guessing"]
        assert check.passed, check.explanation
        assert check.value < check.threshold == 0

        shuffled = PredictionTable(
            useful.ids,
            useful.classes,
            rng.permutation(useful.labels),
            useful.probabilities,
            useful.lengths,
        )
        decision = gate(shuffled, None, GateThresholds())
        assert [c.name for c in decision.checks if not c.passed] == ["better_than_guessing"]


def unsure(rng, n=300):
    """27 % positives, AUROC about 0.744, and probabilities so wrong that only their order is useful."""
    honest = rare_class(rng, n=n, separation=0.927)
    p = 0.05 + 0.2 * honest.probabilities[:, 1]
    return replace(honest, probabilities=np.stack([1 - p, p], axis=1))


def test_an_imbalanced_model_that_ranks_well_is_promoted_by_auroc():
    candidate = unsure(np.random.default_rng(8))
    value = roc_auc_score(candidate.labels, candidate.probabilities[:, 1])
    assert value == pytest.approx(0.744, abs=0.03)
    thresholds = GateThresholds(min_primary=0.65)
    decision = gate(candidate, None, thresholds, "auroc")
    assert decision.passed, decision.reasons()
    assert named(decision)["primary_metric"].value == pytest.approx(value)
    failed = [
        c.name for c in gate(candidate, None, GateThresholds(), "accuracy").checks if not c.passed
    ]
    assert failed == ["better_than_guessing"]  # it never predicts the rare class


@pytest.mark.parametrize("primary", ["macro_f1", "auroc", "average_precision"])
def test_shuffled_labels_are_refused_by_every_primary_metric(primary):
    """100 of 100 small tables of two imbalanced or five classes."""
    rng, thresholds, refused = np.random.default_rng(9), GateThresholds(n_bootstrap=1000), 0
    for k in range(100):
        sure = table(rng.random(80) < 0.9) if k % 2 else unsure(rng, n=80)
        shuffled = replace(sure, labels=rng.permutation(sure.labels))
        refused += not gate(shuffled, None, thresholds, primary).passed
    assert refused == 100


def of_targets(rng, noise, ids=None, n=80):
    """Predictions of two targets, one of them constant, with errors of this size."""
    true = np.stack([np.random.default_rng(0).normal(size=n), np.ones(n)], axis=1)
    return RegressionTable(
        ids=[f"s{k}" for k in range(n)] if ids is None else ids,
        series=np.arange(n),
        channels=(Channel(name="depth", unit="m"), Channel(name="heat", unit="K")),
        true=true,
        predicted=true + noise * rng.normal(size=(n, 2)),
        scale=np.ones(2),
        lengths=np.ones(n, np.int64),
    )


def test_a_regressor_is_promoted_when_it_should_be_and_refused_with_shuffled_targets():
    rng, thresholds = np.random.default_rng(11), GateThresholds(n_bootstrap=1000)
    good = of_targets(rng, 0.3)
    decision = gate(good, None, GateThresholds(min_primary=0.7), "r2")
    assert decision.passed, decision.reasons()
    assert [check.name for check in decision.checks] == list(checks_of("regression"))
    assert not {"class_floor", "calibration"} & set(checks_of("regression"))
    refused = 0
    for _ in range(100):
        # of shuffled targets a model learns their mean, and some noise
        shuffled = replace(good, predicted=0.2 * rng.permutation(good.predicted))
        refused += not gate(shuffled, None, thresholds, "r2").passed
    assert refused == 100

    def compared(candidate, champion):
        decision = gate(candidate, champion, GateThresholds(), "r2")
        return {check.name for check in decision.checks if not check.passed}

    assert compared(good, of_targets(rng, 0.4)) == set()
    assert compared(of_targets(rng, 0.6), good) == {"not_worse_than_champion"}
    other = replace(good, ids=[f"t{k}" for k in range(80)])
    assert compared(good, other) == {"comparable", "not_worse_than_champion"}
    by_class = table(np.ones(N, bool))
    assert compared(good, by_class) == {"comparable", "not_worse_than_champion"}


def test_an_autoencoder_is_promoted_when_it_beats_the_mean_and_not_worse_than_the_champion():
    def hidden(noise, seed, n=60):
        true = np.random.default_rng(0).normal(size=(3 * n, 1)).astype(np.float32)
        error = noise * np.random.default_rng(seed).normal(size=(3 * n, 1))
        return ReconstructionTable(
            ids=[f"s{k}" for k in range(n)],
            series=np.repeat(np.arange(n), 3),
            channels=(Channel(name="flux", unit="mJy"),),
            true=10 * true + 3,
            predicted=(10 * (true + error) + 3).astype(np.float32),
            index=np.tile(np.arange(3), n),
            squared=np.hstack([error**2, true**2]).astype(np.float64),
        )

    def failed(candidate, champion=None):
        decision = gate(candidate, champion, GateThresholds(), "r2")
        assert [check.name for check in decision.checks] == list(checks_of("interpolation"))
        return {check.name for check in decision.checks if not check.passed}

    good = hidden(0.3, 1)
    assert failed(good) == failed(good, hidden(0.4, 2)) == set()
    assert failed(hidden(1.0, 1)) == {"better_than_guessing"}  # as far off as the mean
    assert failed(hidden(0.6, 1), good) == {"not_worse_than_champion"}
    other = replace(good, index=good.index + 1)
    assert failed(good, other) == {"comparable", "not_worse_than_champion"}
    regressor = of_targets(np.random.default_rng(0), 0.3)
    assert failed(good, regressor) == {"comparable", "not_worse_than_champion"}


def test_the_bound_of_auroc_is_the_one_of_a_paired_bootstrap_written_as_a_loop():
    rng = np.random.default_rng(10)
    candidate = unsure(rng, n=150)
    noise = rng.normal(0, 0.02, 150)
    p = np.clip(candidate.probabilities[:, 1] + noise, 0, 1)
    champion = replace(candidate, probabilities=np.stack([1 - p, p], axis=1))
    rows = [rng.integers(150, size=150) for _ in range(400)]
    ours, theirs = (t.probabilities[:, 1] for t in (candidate, champion))
    labels = candidate.labels
    gains = [roc_auc_score(labels[r], ours[r]) - roc_auc_score(labels[r], theirs[r]) for r in rows]

    check = named(gate(candidate, champion, GateThresholds(), "auroc"))["not_worse_than_champion"]

    assert check.value == pytest.approx(np.quantile(gains, 0.05), abs=0.006)
    assert check.explanation.startswith("AUROC minus the champion's is")


def test_an_accurate_model_that_is_too_sure_of_itself_is_better_than_guessing():
    correct = np.random.default_rng(6).random(N) < 0.85
    sure = table(correct, confidence=1.0)
    assert named(gate(sure, None, GateThresholds()))["better_than_guessing"].passed


def test_a_clearly_better_model_passes_every_check():
    rng = np.random.default_rng(4)
    for _ in range(20):
        champion, candidate = draw(rng, 0.06)
        assert gate(candidate, champion, GateThresholds(), champion_smoke_test=TRIAL).passed


@pytest.mark.parametrize(
    ("measured", "thresholds", "failed", "why"),
    [
        ({"smoke_test": None, "smoke_test_problem": "model.pt2 was changed"}, {}, {"golden_rows", "latency"}, "model.pt2 was changed"),
        ({"serving_difference": 2e-5}, {}, {"serving_parity"}, "2.0e-05"),
        ({"serving_difference": float("nan")}, {}, {"serving_parity"}, "nan"),
        ({}, {"max_latency_ms": 1.9}, {"latency"}, "2.00 ms per series; at most 1.9"),
        ({"champion_smoke_test": TRIAL.model_copy(update={"latency_ms": 0.5})}, {}, {"latency"}, "4.00 times the champion's"),
        ({}, {"max_size_mb": 2.9}, {"size"}, "3.00 MB; at most 2.9"),
        ({"leaks": ("object 'x' is in both",)}, {}, {"no_leak"}, "object 'x'"),
        ({"champion_problem": "the package does not load: model.pt2 was changed"}, {}, {"comparable", "not_worse_than_champion"}, "does not load"),
    ],
)  # fmt: skip
def test_what_was_measured_of_package_and_data_decides_too(measured, thresholds, failed, why):
    champion = None if "champion_problem" in measured else table(np.ones(N, bool))
    decision = gate(table(np.ones(N, bool)), champion, GateThresholds(**thresholds), **measured)
    assert {check.name for check in decision.checks if not check.passed} == failed
    assert why in decision.reasons()


def test_a_decision_survives_json_and_always_has_every_check():
    for champion in (None, table(np.ones(N, bool))):
        decision = gate(table(np.ones(N, bool)), champion, GateThresholds())
        assert decision.passed
        assert [check.name for check in decision.checks] == list(CHECKS)
        assert GateDecision.model_validate_json(decision.model_dump_json()) == decision


@pytest.mark.parametrize(
    ("gain", "least", "passed"), [(0.06, 0.0, True), (0.06, 0.05, False), (-0.01, None, True)]
)
def test_the_best_baseline_of_the_run_may_decide(gain, least, passed):
    baselines = [
        MeasuredBaseline(
            name=name,
            metric="accuracy",
            value=Estimate(value=value, low=value - 0.02, high=value + 0.02),
            difference=Estimate(value=gain, low=gain - 0.03, high=gain + 0.03),
            n_train=100,
            seconds=1,
        )
        for name, value in (("weak", 0.5), ("strong", 0.8))
    ]
    candidate, thresholds = table(np.ones(N, bool)), GateThresholds(min_baseline_gain=least)
    check = named(gates.gate(candidate, None, SOUND, thresholds, "accuracy", baselines))
    check = check["beats_baseline"]
    assert check.passed is passed
    assert "accuracy minus that of strong (0.8000) is" in check.explanation
    unmeasured = named(gates.gate(candidate, None, SOUND, thresholds))["beats_baseline"]
    assert unmeasured.passed is (least is None) and "no baseline was" in unmeasured.explanation
