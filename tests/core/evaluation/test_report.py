import base64
from html.parser import HTMLParser

import numpy as np
import pytest
from pydantic import ValidationError

from roma_core.evaluation.classification_metrics import compare_predictions, evaluate
from roma_core.evaluation.config import Baseline, Fact, FactSheet
from roma_core.evaluation.plots import confusion_matrix
from roma_core.evaluation.predictions import PredictionTable
from roma_core.evaluation.report import (
    CardContent,
    Plot,
    ReportContent,
    render_card,
    render_report,
)
from tests.core.serving import toy


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def content(simulated):
    metrics = evaluate(simulated())
    return ReportContent(
        title="Japanese vowels",
        summary="A small classifier.",
        created="2026-11-03",
        metrics=metrics,
        baselines=(
            Baseline(name="interpolation + MiniRocket", accuracy=0.987, source="elsewhere"),
        ),
        plots=(
            Plot(title="Confusion", caption="Counts.", alt="Counts", png=confusion_matrix(metrics)),
        ),
        facts=(
            FactSheet(title="Data", facts=(Fact(label="digest", value="abc", monospace=True),)),
        ),
        limits=("One split decides.",),
    )


def test_the_report_stands_alone_and_says_everything(content):
    html = render_report(content)
    tags = Tags(html)

    assert tags.open == []
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags.found}
    assert "http:" not in html and "https:" not in html and "url(" not in html
    (image,) = [attrs for tag, attrs in tags.found if tag == "img"]
    assert image["alt"] == "Counts"
    assert base64.b64decode(image["src"].partition(",")[2]) == content.plots[0].png
    accuracy = content.metrics.accuracy
    for shown in (
        f"test accuracy, 95 % interval {accuracy.low:.3f}–{accuracy.high:.3f}",
        "interpolation + MiniRocket", "0.987", "Calibration error", "class 8", "abc",
        "One split decides.", "A small classifier.", "2026-11-03",
    ):  # fmt: skip
        assert shown in tags.text.replace("\xa0", " "), shown


def test_text_from_outside_is_escaped(content):
    evil = "<script>alert('1')</script>\"&"
    hostile = content.model_copy(
        update={
            "title": evil,
            "summary": evil,
            "limits": (evil,),
            "baselines": (Baseline(name=evil, accuracy=0.5, source=evil),),
            "plots": (content.plots[0].model_copy(update={"alt": evil, "caption": evil}),),
            "facts": (FactSheet(title=evil, facts=(Fact(label=evil, value=evil),)),),
        }
    )
    tags = Tags(render_report(hostile))

    assert "script" not in {tag for tag, _ in tags.found}
    assert next(attrs for tag, attrs in tags.found if tag == "img")["alt"] == evil
    assert tags.text.count(evil) == 10


def test_a_report_without_extras_has_no_empty_sections(content):
    bare = content.model_copy(update={"plots": (), "facts": (), "limits": (), "baselines": ()})
    text = Tags(render_report(bare)).text

    for heading in ("Plots", "Limits", "Comparison with other methods", "Provenance"):
        assert heading not in text


def test_bad_input_is_refused():
    with pytest.raises(ValidationError, match="bytes of a PNG file"):
        Plot(title="t", caption="c", alt="a", png=b"GIF89a")
    with pytest.raises(ValidationError, match="alt"):
        Plot(title="t", caption="c", alt="", png=b"\x89PNG\r\n\x1a\n")


def card_content(table, **changed):
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
    card = render_card(card_content(table))
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
    card = render_card(card_content(ours, changes=changed, champion_version="7"))
    assert "the champion was version 7" in card
    accuracy = changed[0]
    assert accuracy.difference.value == pytest.approx(ours.correct.mean() - champion.correct.mean())
    assert accuracy.difference.low > 0, "twice as sharp is better for sure"
    assert [c.name for c in changed] == [
        *("accuracy", "balanced accuracy", "macro F1", "AUROC", "average precision", "log loss"),
        "Brier score", *(f"recall of class {k}" for k in range(3)),
    ]  # fmt: skip
    said = {"champion_version": "7", "champion_problem": "does not load"}
    assert "version 7 could not be evaluated on these series: does not load" in render_card(
        card_content(ours, **said)
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
    card = render_card(card_content(table(True), changes=changed, champion_version="7"))
    assert f"| recall of {whole.classes[0]} | 1.000 | 0.000 | +1.000 | – |" in card
