"""The card and the comparison behind it."""

import numpy as np
import pytest

from roma_core.evaluation.compare import compare_predictions
from roma_core.evaluation.config import Fact, FactSheet
from roma_core.evaluation.metrics import evaluate, wilson
from roma_core.evaluation.predictions import PredictionTable
from roma_core.evaluation.report import CardContent, ReportContent, render_card, render_report
from tests.core.serving import toy


def content(table, **changed):
    sheet = FactSheet(title="Data", facts=(Fact(label="name", value="a|b <i>\n# c"),))
    fields = {
        "name": "toy",
        "kind": "classifier",
        "data_schema": toy.SCHEMA,
        "max_length": 50,
        "facts": (sheet,),
        "metrics": evaluate(table, n_bootstrap=100),
        "decided_before": 4,
        "lineage": {"git_sha": "abc"},
    }
    return CardContent(**fields | changed)


def test_a_card_says_what_was_measured_and_what_may_go_in(simulated):
    table = simulated(n=120, k=3)
    card = render_card(content(table))
    assert "| flux | mJy | channel |" in card and "1 to 50 observations" in card
    assert f"| Accuracy | {table.correct.mean():.3f} |" in card
    assert card.count("| class 1 |") == 1
    assert "There was no champion before." in card
    assert "on this test split before this one: 4" in card
    assert "| git sha | abc |" in card
    assert r"a\|b \<i> # c" in card, "what comes from outside stays in its cell"


def test_a_card_shows_changes_or_why_there_are_none(simulated):
    ours, champion = simulated(n=200, k=3, sharpness=4.0), simulated(n=200, k=3, sharpness=2.0)
    changed = compare_predictions(ours, champion)
    card = render_card(content(ours, changes=changed, champion_version="7"))
    assert "the champion was version 7" in card
    accuracy = changed[0]
    assert accuracy.difference.value == pytest.approx(ours.correct.mean() - champion.correct.mean())
    assert accuracy.difference.low > 0, "twice as sharp is better for sure"
    assert [c.name for c in changed] == [
        *("accuracy", "log-loss"), *(f"recall of class {k}" for k in range(3)),
    ]  # fmt: skip
    said = {"champion_version": "7", "champion_problem": "does not load"}
    assert "version 7 could not be evaluated on these series: does not load" in render_card(
        content(ours, **said)
    )


def test_one_series_of_a_class_says_nothing_for_sure(simulated):
    whole = simulated(n=30, k=3)
    rows = np.flatnonzero(
        (whole.labels > 0) | (np.arange(30) == np.flatnonzero(whole.labels == 0)[0])
    )

    def table(labels_right):
        labels = whole.labels[rows]
        predicted = labels if labels_right else (labels + 1) % 3
        ids = [whole.ids[k] for k in rows]
        return PredictionTable(
            ids, whole.classes, labels, np.eye(3)[predicted], whole.lengths[rows]
        )

    changed = compare_predictions(table(True), table(False))
    metrics = evaluate(table(True), n_bootstrap=100)
    page = render_report(
        ReportContent(title="t", summary="s", created="c", metrics=metrics, changes=changed,
                      champion_version="7")
    )  # fmt: skip

    alone = next(change for change in changed if change.n_series == 1)
    assert (alone.difference.value, alone.difference.low, alone.difference.high) == (1, None, None)
    assert metrics.per_class[0].recall_interval is None
    assert "<strong>+1.000</strong>" in page, "of the classes with more series"
    assert '<td class="number">+1.000</td>\n    <td class="number">–</td>' in page
    card = render_card(content(table(True), changes=changed, champion_version="7"))
    assert f"| recall of {whole.classes[0]} | 1.000 | 0.000 | +1.000 | – |" in card


def test_tables_of_other_series_are_not_compared(simulated):
    ours = simulated(n=50, k=3)
    other = PredictionTable(
        ours.ids, ours.classes, (ours.labels + 1) % 3, ours.probabilities, ours.lengths
    )
    with pytest.raises(ValueError, match="other labels"):
        compare_predictions(ours, other)
    with pytest.raises(ValueError, match="other series or classes"):
        compare_predictions(ours, simulated(n=51, k=3))


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
