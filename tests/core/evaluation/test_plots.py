import dataclasses
import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from roma_core import figures
from roma_core.data import StoredDataset, build_dataset
from roma_core.evaluation import plots
from roma_core.evaluation.classification_metrics import evaluate
from roma_core.evaluation.drift import InputSample, profile_of_sample
from roma_core.evaluation.metrics import Estimate, GroupErrors, PartEstimate, evaluate_regression
from roma_core.evaluation.plots import (
    drift_figure,
    embedding_map,
    principal_components,
)
from roma_core.evaluation.reconstruction import reconstruct_examples
from roma_core.figures import MAX_BYTES, ORANGE, png_of
from roma_core.model.config import EncoderConfig, RoMAForPreTrainingConfig
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.schema import Channel, PositionAxis
from tests.core.evaluation.tables import TIME, regression_table
from tests.core.hand_made import HandMade, config_of, series


def reconstruction(n=24, channels=("a", "b"), title="series"):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(n, len(channels)))
    return plots.ReconstructionExample(
        title, channels, rng.random(n), values, values + 0.1, rng.random(values.shape) > 0.5
    )


RECORDS = [
    {"step": s, "epoch": s / 2, "time": 0.0, "metrics": {"train/loss": 1 / s, "train/lr": 0.1}}
    for s in range(1, 9)
] + [
    {
        "step": 8,
        "epoch": 4.0,
        "time": 0.0,
        "metrics": {"validation/loss": 0.2, "validation/accuracy": 0.9},
    }
]


def pixels(png):
    assert len(png) <= MAX_BYTES
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def share_of(image, colour):
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(image - wanted).max(axis=2) < 24).mean()


def test_a_learning_curve_is_by_epoch_and_marks_the_weights_that_were_kept(monkeypatch):
    monkeypatch.setattr(figures, "png_of", lambda figure: figure)

    found = [[*axes.lines[-1].get_xdata()] for axes in plots.learning_curve(RECORDS, 6).axes]

    assert found == [[3, 3], [3, 3]]  # step 6 is at the end of epoch 3
    assert {axes.get_xlabel() for axes in plots.learning_curve(RECORDS).axes} == {"epoch"}


def test_names_are_no_mathtext(monkeypatch):
    name = "$5_$"  # is none that could be drawn
    assert plots.reconstruction_examples([reconstruction(channels=(name, "b"), title=name)])
    drawn = []
    monkeypatch.setattr(figures, "png_of", lambda figure: drawn.append(figure) or png_of(figure))
    plots.learning_curve(RECORDS)
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels(which="both")]
    assert any(labels) and not any("$" in label for label in labels)


def test_every_plot_is_a_small_png(simulated):
    metrics = evaluate(simulated())
    for png in (
        plots.confusion_matrix(metrics),
        plots.reliability_curve(metrics),
        plots.ranking_curves(simulated()),
        plots.ranking_curves(simulated(k=2)),
        plots.reconstruction_examples([reconstruction()] * 3),
        plots.learning_curve(RECORDS),
    ):
        image = pixels(png)
        assert min(image.shape[:2]) > 300
        assert 0.02 < (image < 250).any(axis=2).mean() < 0.9  # neither blank nor black


def test_a_crowded_plot_stays_below_the_limit(simulated):
    many = evaluate(simulated(n=2000, k=40, sharpness=0.5))
    assert pixels(plots.confusion_matrix(many)).size
    assert pixels(plots.ranking_curves(simulated(n=2000, k=40, sharpness=0.5))).size
    crowd = [reconstruction(n=60, channels=tuple("abcd"))] * 3
    assert pixels(plots.reconstruction_examples(crowd)).size


def test_a_legend_stands_above_the_panels_and_covers_no_point(monkeypatch):
    monkeypatch.setattr(figures, "png_of", lambda figure: figure)
    one = PartEstimate(value=1.0, low=0.5, high=2.0)
    group = GroupErrors(name="g", slug="g", n_series=3, mse=one, clean_mse=None)
    floor = Estimate(value=1.9, low=1.8, high=2.0)
    regression = evaluate_regression(regression_table(np.eye(2).repeat(9, axis=0), [9, 9]))

    for figure in (
        plots.learning_curve(RECORDS),
        plots.reconstruction_examples([reconstruction()] * 2),
        plots.error_by_position(regression, TIME[0]),
        plots.errors_by_group([group] * 2, floor),
    ):
        figure.canvas.draw()
        (legend,) = figure.legends
        assert all(axes.get_legend() is None for axes in figure.axes)
        assert legend.get_window_extent().y0 >= max(axes.bbox.y1 for axes in figure.axes)


def test_a_pure_number_has_no_unit_in_a_label(tmp_path):
    pure = HandMade(
        axes=(PositionAxis(name="time", unit="1"),),
        channels=(Channel(name="a", unit="1"), Channel(name="b", unit="V")),
        series=[series("s0", split="train"), series("s1", split="test")],
    )
    dataset = StoredDataset(
        build_dataset(config_of(source=pure), tmp_path, tmp_path, progress=False)
    )
    shape = {"tubelet_size": (1, 1, 1), "n_channels": 2, "n_pos_dims": 1}
    stack = EncoderConfig(d_model=8, nhead=1, depth=1)
    model = RoMAForPreTraining(
        RoMAForPreTrainingConfig(**shape, encoder_config=stack, decoder_config=stack)
    )

    example, *_ = reconstruct_examples(model.eval(), dataset.split("test"))

    assert (example.axis, list(example.channels)) == ("time", ["a", "b (V)"])


def test_only_hidden_tokens_are_drawn_as_reconstructed():
    some = reconstruction()
    all_visible = plots.ReconstructionExample(
        some.title, some.channels, some.positions, some.values, some.predicted,
        np.ones(some.values.shape, bool),
    )  # fmt: skip

    hidden = share_of(pixels(plots.reconstruction_examples([some])), plots.ORANGE)
    none = share_of(pixels(plots.reconstruction_examples([all_visible])), plots.ORANGE)

    assert hidden > 2 * none  # the legend alone is left


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"no metric ends with one of.*'train/lr'"):
        plots.learning_curve([{"step": 1, "epoch": 1.0, "time": 0.0, "metrics": {"train/lr": 0.1}}])
    with pytest.raises(ValueError, match="no reconstructions"):
        plots.reconstruction_examples([])
    with pytest.raises(ValueError, match="other has channels"):
        plots.reconstruction_examples([reconstruction(), reconstruction(1, ("z",), "other")])
    with pytest.raises(ValueError, match=r"visible should have shape \(3, 1\)"):
        plots.ReconstructionExample(
            "s", ["a"], np.zeros(3), np.zeros((3, 1)), np.zeros((3, 1)), np.ones(2, bool)
        )


def some_series(n, seed, level=0.0, channels=("flux", "error")):
    rng = np.random.default_rng(seed)
    quantities = {
        "length": rng.integers(20, 200, n).astype(float),
        "gap.time": rng.exponential(1.0, 50 * n),
    }
    values = {f"value.{name}": rng.normal(level, 1.0, 50 * n) for name in channels}
    return InputSample(n, quantities, values, {}, {})


def test_drift_is_drawn_in_another_colour_and_nothing_in_common_is_refused():
    profile = profile_of_sample(some_series(300, seed=0), "digest")

    same = pixels(drift_figure(profile, some_series(300, seed=1)))
    far = pixels(drift_figure(profile, some_series(300, seed=2, level=2.0)))

    left = slice(0, same.shape[1] * 2 // 5)  # the bars
    assert share_of(same[:, left], ORANGE) == 0 < 0.02 < share_of(far[:, left], ORANGE)
    assert pixels(drift_figure(profile, some_series(3, 3, channels=tuple("ab")))).size
    with pytest.raises(ValueError, match="no quantity"):
        drift_figure(profile, InputSample(2, {}, {}, {}, {}))


def test_the_map_shows_the_two_directions_of_most_variance():
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    found = rng.normal(size=(90, 6)) * (0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    found[:, 4] += 5 * (labels == 1)
    found[:, 2] -= 2 * (labels == 2)

    points, shares = principal_components(found.astype(np.float32))

    assert shares[0] > shares[1] > 0.05 and shares.sum() == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(np.abs(points[labels == 1, 0] - points[labels == 0, 0]), 5, atol=0.9)
    again, _ = principal_components(found.astype(np.float32)[::-1])
    np.testing.assert_allclose(again[::-1], points, atol=1e-6)
    png = embedding_map(found.astype(np.float32), labels, ["a", "b<c", "d"])
    assert len(png) <= MAX_BYTES
    assert not principal_components(np.ones((3, 1)))[0].any()
    assert embedding_map(found[:1].astype(np.float32), labels[:1], ["a"] * 30)


def test_every_series_of_the_map_has_a_tooltip(simulated):
    table = simulated(n=3000, k=12)  # more series than are drawn
    table = dataclasses.replace(table, ids=[f"star <{k}>" for k in range(3000)])

    svg = plots.embedding_svg(np.random.default_rng(0).normal(size=(3000, 4)), table)

    titles = [e.text for e in ElementTree.fromstring(svg).findall(".//{*}a/{*}title")]
    classes, p = table.classes, table.probabilities.max(axis=1)
    assert sorted(titles) == sorted(
        f"star <{k}>\nclass {classes[table.labels[k]]}\npredicted {classes[table.predicted[k]]} ({p[k]:.0%})"
        for k in range(0, 3000, 2)
    )
