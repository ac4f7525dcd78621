"""Drawings that Dagster's page shows without a click: SVGs in fewer than 1000 characters of Markdown."""

import math
import random
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from roma_pipelines.pictures import against_true, bars, confusion, curves

RECORDS = [
    {"step": s, "epoch": s / 4, "metrics": {"train/loss": 1 / s}}
    | ({"metrics": {"eval/loss": 2 / s, "eval/f1": 1 - 1 / s}} if s % 4 == 0 else {})
    for s in range(1, 801)
]
_DICE = random.Random(0)
PAIRS = [(x, x + _DICE.random()) for x in (_DICE.random() for _ in range(500))]
FEW = [[9, 1, 0], [0, 8, 2], [0, 0, 10]]


def svg_of(metadata):
    """The image's tree, parsed as a browser does, and its texts."""
    text = metadata["summary_plot"].value
    assert len(text) < 1000
    tree = ElementTree.fromstring(unquote(text.split("](<data:image/svg+xml,")[1][:-2]))
    return tree, [element.text for element in tree.iter() if element.text]


@pytest.mark.parametrize(
    ("metadata", "shown"),
    [
        (curves(RECORDS, "eval/f1", 400), ["train", "f1", "epochs 0-200; dashed: weights kept"]),
        (curves(RECORDS[:3], None, None), ["loss, log scale", "1", "0.333", "epochs 0-0.75"]),
        (curves([], None, 7), ["loss", "0"]),
        (bars("drift", {"a<b & c": 0.4, "d": 0.1}, (0.1, 0.25), "index"), ["a<b & c 0.4", "d 0.1"]),
        (bars("drift", {f"quantity {k}" * 4: k for k in range(60)}, (0.1,), "index"), ["index"]),
        (confusion(FEW, ["one", "two", "three & more"]), ["three & more"]),
        (confusion(FEW * 2, ["a very long name of a class"] * 6), ["row: true class; column: predicted"]),
        (against_true("flux", PAIRS), ["flux: predicted against true"]),
        (against_true("flux", []), ["flux: predicted against true"]),
    ],
)  # fmt: skip
def test_a_drawing_is_short_and_says_what_it_shows(metadata, shown):
    _, texts = svg_of(metadata)
    assert set(shown) <= set(texts)


def test_curves_end_where_they_should_and_what_does_not_fit_is_left_out():
    tree, _ = svg_of(curves(RECORDS, None, 400))
    train, validation, kept = (
        [int(x) for x in element.get("d").replace("M", "").replace("l", " ").replace("-", " -").split()]
        for element in tree.iter("{http://www.w3.org/2000/svg}path")
    )  # fmt: skip

    for line in (train, validation):
        assert abs(sum(line[::2]) - 190) <= 1 and abs(sum(line[1::2]) - 78) < 25
    assert kept == [115, 18, 0, 62]  # in the middle, from top to bottom
    assert confusion([[1] * 40] * 40, [str(k) for k in range(40)]) == {}
    assert math.isclose(train[0], 40, abs_tol=1)
    dash = svg_of(curves(RECORDS[:1], None, None))[0].find("{*}path")
    assert dash is not None and dash.get("d") == "M190 20l3 0"
