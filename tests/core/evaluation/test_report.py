import base64
from html.parser import HTMLParser

import pytest
from pydantic import ValidationError

from roma_core.evaluation.config import Baseline, Fact, FactSheet
from roma_core.evaluation.metrics import evaluate
from roma_core.evaluation.plots import confusion_matrix
from roma_core.evaluation.report import Plot, ReportContent, render_report


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
            "split": evil,
            "limits": (evil,),
            "baselines": (Baseline(name=evil, accuracy=0.5, source=evil),),
            "plots": (content.plots[0].model_copy(update={"alt": evil, "caption": evil}),),
            "facts": (FactSheet(title=evil, facts=(Fact(label=evil, value=evil),)),),
        }
    )
    tags = Tags(render_report(hostile))

    assert "script" not in {tag for tag, _ in tags.found}
    assert next(attrs for tag, attrs in tags.found if tag == "img")["alt"] == evil
    assert tags.text.count(evil) == 11


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
