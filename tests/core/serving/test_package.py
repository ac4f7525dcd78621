"""The package folder and the code that serves it, without MLflow."""

import ast
import json
import shutil
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator, ValidationError

from roma_core.files import sha256_of
from roma_core.schema import ChannelNormalisation, DataSchema, Normaliser, PositionAxis, Target
from roma_core.serving import pyfunc_model
from roma_core.serving.package import SmokeTestFailed, smoke_test_package
from roma_core.serving.pyfunc_model import (
    InvalidSeries,
    Package,
    PackageError,
    Series,
    open_package,
)
from tests.core.serving import toy
from tests.time_limits import within

FILES = (
    *sorted(pyfunc_model.REQUIRED_FILES), "profile.json", "requirements.lock", "MODEL_CARD.md",
)  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages") / "toy"
    toy.build_toy(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(package):
    return open_package(package)


def given(n=4, seed=0, **changes):
    return Series(**toy.series(n, seed, **changes).model_dump())


def by_hand(one):
    """Probabilities of one series, computed alone and without the package."""
    flux, ratio = (np.array(one.values[c], np.float32).astype(float) for c in ("flux", "ratio"))
    time, band = (np.array(one.positions[a]) for a in ("time", "band"))
    values = np.stack([(np.arcsinh(flux / 3) - 0.5) / 2, (ratio + 1) / 4], axis=1)
    positions = np.stack([(time - time.min()) / 2, band - 1], axis=1)
    tensors = [torch.tensor(x[None].astype(np.float32)) for x in (values, positions)]
    with torch.no_grad():
        logits = toy.Toy()(*tensors, torch.ones(1, len(flux), dtype=torch.bool))[0]
    return torch.softmax(logits.double(), dim=0).numpy()


def test_ragged_series_come_out_in_order_and_as_if_alone(classifier):
    lengths = [7, 1, 50, 3, 3, 20, 8, 41]
    rows = [given(n, seed=i) for i, n in enumerate(lengths)]

    found = classifier.predict(rows)

    assert [p.id for p in found] == [f"s{i}" for i in range(len(lengths))]
    for one, prediction in zip(rows, found, strict=True):
        expected = by_hand(one)
        assert list(prediction.probabilities) == list(toy.CLASSES)
        assert list(prediction.probabilities.values()) == pytest.approx(expected, abs=1e-6)
        assert prediction.label == toy.CLASSES[expected.argmax()]
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-12)


DEPTHS = (
    Target(name="depth", unit="m", mean=100.0, std=10.0),
    Target(name="heat", unit="K"),
)


@pytest.mark.parametrize("level", ["series", "observation"])
def test_a_regressor_answers_in_the_units_of_its_targets(tmp_path, level):
    fields = {"targets": DEPTHS, "target_level": level, "missing_values": True, "classes": ()}
    schema = toy.SCHEMA.model_copy(update=fields)
    module = toy.ToyOfTargets(level == "observation")
    options = {"schema": schema, "kind": "regressor", "n_outputs": 4}
    toy.build_toy(tmp_path / "toy", module, **options)
    package = open_package(tmp_path / "toy")
    rows = [given(n, seed=n) for n in (7, 1, 20)]
    nothing = [None, *rows[0].values["flux"][1:]], [None, *rows[0].values["ratio"][1:]]
    gap = given(7, seed=7, values=dict(zip(("flux", "ratio"), nothing, strict=True)))

    answers = package.predict([*rows, gap])

    tokens = [torch.from_numpy(array)[None] for array in package._tokens(rows[0], "")[:2]]
    with torch.no_grad():
        first = module(*tokens, torch.ones(1, 7, dtype=torch.bool))[0].double().numpy()
    for k, target in enumerate(DEPTHS):
        assert answers[0].values[target.name] == pytest.approx(first[..., k], abs=1e-5)
        assert answers[0].std[target.name] == pytest.approx(first[..., 2 + k], abs=1e-5)
    assert package.scale.tolist() == [10.0, 1.0, 10.0, 1.0]
    document = json.loads((tmp_path / "toy/series.schema.json").read_text())
    name = type(answers[0]).__name__
    validator = Draft202012Validator({"$defs": document["$defs"], "$ref": f"#/$defs/{name}"})
    for answer in answers:
        validator.validate(answer.model_dump(exclude_none=level == "series"))
    if level == "observation":
        assert [len(answer.values["depth"]) for answer in answers] == [7, 1, 20, 7]
        assert answers[3].values["depth"][0] is None
        assert answers[3].values["heat"][1:] == pytest.approx(answers[0].values["heat"][1:])
    with pytest.raises(ValueError, match="expected outputs for 2 targets, got 3"):
        toy.build_toy(tmp_path / "three", module, **options | {"n_outputs": 3})


def test_golden_rows_of_a_target_far_from_0_allow_for_the_rounding_of_float32(tmp_path):
    years = Target(name="depth", unit="year", mean=-2_000_000.0, std=1.0), DEPTHS[1]
    fields = {"targets": years, "target_level": "series", "classes": ()}
    schema = toy.SCHEMA.model_copy(update=fields)
    options = {"schema": schema, "kind": "regressor", "n_outputs": 4}
    toy.build_toy(tmp_path / "toy", toy.ToyOfTargets(False), **options)
    row = json.loads((tmp_path / "toy/golden.jsonl").read_text().splitlines()[0])
    allowed = {name: scale * row["tolerance"] for name, scale in row["scale"].items()}
    assert allowed["depth"] >= np.spacing(np.float32(2_000_000))
    assert allowed["heat"] == pytest.approx(1e-4)


def test_the_order_of_observations_and_a_shift_of_an_anchored_axis_do_not_matter(classifier):
    one = given(9)
    order = np.random.default_rng(1).permutation(9)
    moved = {
        "positions": {k: [v[i] for i in order] for k, v in one.positions.items()},
        "values": {k: [v[i] for i in order] for k, v in one.values.items()},
    }
    moved["positions"]["time"] = [t - 50000 for t in moved["positions"]["time"]]

    first, second = classifier.predict([one, given(**moved)])

    assert second.probabilities == pytest.approx(first.probabilities, abs=1e-6)


def test_batches_hold_every_row_once_and_stay_below_the_limit(classifier):
    lengths = np.array([7, 1, 50, 3, 3, 20, 8, 41, 10, 10, 10, 10, 10])

    batches = list(classifier._batches(lengths))

    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 40
    assert len(batches) < len(lengths)


def test_batches_of_many_tokens_hold_little_padding(classifier, monkeypatch):
    monkeypatch.setattr(classifier, "max_batch_tokens", 16_384)
    lengths = np.random.default_rng(0).integers(20, 300, 2000)

    batches = list(classifier._batches(lengths))

    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.03 * lengths.sum()
    assert padded / len(batches) > 4096


UNITS = {"time": "d", "flux": "mJy"}
TIMES = {"time": [1.0, 2.0], "band": [1.0, 2.0]}
VALUES = {"flux": [1.0, 2.0], "ratio": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": VALUES | {"colour": [1, 2]}}, r"values: unknown 'colour'; .*'flux', 'ratio'"),
        ({"values": {"flux": [1, 2]}}, r"values: 'ratio' is missing; got \['flux'\]"),
        ({"positions": {"time": [1, 2]}}, "positions: 'band' is missing"),
        ({"positions": TIMES | {"x": [1, 2]}}, "positions: unknown 'x'"),
        ({"values": VALUES | {"flux": [1]}}, "'flux' has 1 numbers, but 'time' has 2"),
        ({"values": VALUES | {"flux": [1, float("nan")]}}, "'flux' has no number at index 1, but no value"),
        ({"positions": TIMES | {"time": [float("inf"), 1]}}, "'time' must hold finite .* inf at index 0"),
        ({"values": VALUES | {"ratio": [1e300, 1]}}, "values: a number is too large for float32"),
        ({"positions": {k: [] for k in TIMES}, "values": {k: [] for k in VALUES}}, "1 to 50 observations, got 0"),
        ({"positions": {k: [1] * 51 for k in TIMES}, "values": {k: [1] * 51 for k in VALUES}}, "1 to 50 observations, got 51"),
        ({"units": None}, "units: 'time' is missing; this model takes it in 'd'"),
        ({"units": {"time": "d"}}, "units: 'flux' is missing; this model takes it in 'mJy'"),
        ({"units": {"flux": "Jy"}}, "units: 'flux' must be in 'mJy', got 'Jy'"),
        ({"units": {"ratio": "d"}}, "units: 'ratio' is a plain number to this model .* got 'd'"),
        ({"units": {"colour": "1"}}, "units: unknown 'colour'; this model takes 'time'"),
    ],
)  # fmt: skip
def test_a_series_that_does_not_fit_is_named(classifier, changes, message):
    bad = {"id": "x7", "positions": TIMES, "values": VALUES, "units": UNITS, **changes}
    with pytest.raises(InvalidSeries, match=r"series 1 \(id 'x7'\): .*" + message):
        classifier.predict([given(), bad])


def test_right_units_pass_and_an_empty_list_does_not(classifier):
    assert classifier.predict([given(units={"flux": "mJy", "time": "d"})])[0].id == "s0"
    with pytest.raises(InvalidSeries, match="at least one series"):
        classifier.predict([])


def test_the_json_schema_of_a_package_takes_what_the_model_takes(package):
    validator = Draft202012Validator(json.loads((package / "series.schema.json").read_text()))
    good = {"positions": TIMES, "values": VALUES, "units": UNITS}
    one = {k: [v[0]] for k, v in TIMES.items()}, {k: [v[0]] for k, v in VALUES.items()}
    validator.validate({"inputs": [good, {"positions": one[0], "values": one[1], "units": UNITS}]})
    for changes in (
        {"values": VALUES | {"colour": [1, 2]}},
        {"values": {"flux": [1, 2]}},
        {"units": {"time": "d", "flux": "Jy"}},
        {"units": {"time": "d"}},
        {"values": {k: [] for k in VALUES}},
        {"values": VALUES | {"flux": ["bright", 1]}},
        {"values": {k: [1] * 51 for k in VALUES}},
        {"color": "red"},
    ):
        with pytest.raises(ValidationError):
            validator.validate({"inputs": [good | changes]})
    with pytest.raises(ValidationError):
        validator.validate({"inputs": []})


@pytest.mark.parametrize("name", [*FILES, pyfunc_model.MANIFEST])
def test_a_changed_or_missing_file_is_refused_before_anything_is_deserialised(
    package, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("deserialised"))
    for damage in ("changed", "missing"):
        copy = tmp_path / damage
        shutil.copytree(package, copy)
        if damage == "missing":
            (copy / name).unlink()
        elif name == pyfunc_model.MANIFEST:
            (copy / name).write_text((copy / name).read_text().replace("model.pt2", "../model.pt2"))
        else:
            content = bytearray((copy / name).read_bytes())
            content[len(content) // 2] ^= 1
            (copy / name).write_bytes(content)
        with pytest.raises(PackageError, match=name):
            open_package(copy)


def test_a_classifier_of_before_there_were_regressors_still_predicts(package, tmp_path):
    shutil.copytree(package, tmp_path / "older")
    about = json.loads((package / "package.json").read_text())
    assert about.pop("per_observation") is False
    (tmp_path / "older" / "package.json").write_text(json.dumps(about))
    assert Package(tmp_path / "older").check_golden(package / "golden.jsonl") < 1e-6


def test_an_added_file_and_another_version_are_refused(package, tmp_path):
    copy = tmp_path / "added"
    shutil.copytree(package, copy)
    (copy / "extra.py").write_text("")
    with pytest.raises(PackageError, match=r"extra\.py"):
        open_package(copy)
    manifest = json.loads((copy / pyfunc_model.MANIFEST).read_text())
    (copy / pyfunc_model.MANIFEST).write_text(json.dumps(manifest | {"schema_version": 2}))
    with pytest.raises(PackageError, match="schema_version 2, this file reads 1"):
        open_package(copy)


def test_a_program_that_computes_something_else_is_refused(package, tmp_path):
    """What a wrong build of torch would do: all files as recorded, other numbers."""
    other = tmp_path / "other"
    toy.build_toy(other, module=toy.Toy(seed=1))
    shutil.copyfile(package / "golden.jsonl", other / "golden.jsonl")
    classifier = Package(other)
    with pytest.raises(PackageError, match=r"golden row 0 .* probabilities differ by"):
        classifier.check_golden(other / "golden.jsonl")


def test_building_is_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "package"
    broken = toy.Toy()
    with torch.no_grad():
        broken.head.bias[0] = float("nan")
    with pytest.raises(PackageError, match="finite outputs"):
        toy.build_toy(folder, module=broken)
    assert [p.name for p in tmp_path.iterdir()] == ["package.safetensors"]

    first, second = toy.build_toy(folder), toy.build_toy(folder, max_length=60)

    assert first != second == sha256_of(folder / "MANIFEST.json")
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, pyfunc_model.MANIFEST])


def test_the_served_file_imports_no_more_than_its_requirements():
    tree = ast.parse(Path(pyfunc_model.__file__).read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.partition(".")[0])
    assert modules - sys.stdlib_module_names == {"mlflow", "numpy", "pydantic", "torch"}


@pytest.mark.parametrize("seed", range(20))
def test_the_served_file_normalises_as_the_data_side_does(seed):
    rng = np.random.default_rng(seed)
    transforms = get_args(ChannelNormalisation.model_fields["transform"].annotation)
    anchors = get_args(PositionAxis.model_fields["anchor"].annotation)
    n = int(rng.integers(1, 400))

    def number():
        return float(rng.lognormal(sigma=4))

    schema = DataSchema(
        channels=(),
        normalisation=tuple(
            ChannelNormalisation(
                transform=one, transform_scale=number(), mean=rng.normal() * number(), std=number()
            )
            for one in rng.permutation([*transforms] * 2)
        ),
        axes=tuple(
            PositionAxis(
                name=str(k), unit="1", anchor=one, offset=rng.normal() * number(), scale=number()
            )
            for k, one in enumerate(rng.permutation([*anchors] * 2))
        ),
    )
    values = rng.normal(size=(n, len(schema.normalisation))) * rng.lognormal(sigma=5, size=(n, 1))
    positions = 60_000 + rng.normal(size=(n, len(schema.axes))) * rng.lognormal(
        sigma=5, size=(n, 1)
    )
    constants = json.loads(schema.model_dump_json())
    lengths = np.array([n // 3, n - n // 3])

    served = (
        pyfunc_model.normalise_values(values, constants["normalisation"]),
        pyfunc_model.normalise_positions(positions, constants["axes"], lengths),
    )

    normaliser = Normaliser(schema)
    np.testing.assert_array_equal(served[0], normaliser.normalise(values.astype(np.float32)))
    np.testing.assert_array_equal(served[1], normaliser.normalise_positions(positions, lengths))
    assert served[0].dtype == served[1].dtype == np.float32


GPU = pytest.param(
    "cuda:0",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.mark.parametrize("device", ["cpu:0", GPU])
def test_a_package_moved_to_a_device_gives_the_same_answers(package, classifier, device):
    rows = [given(n, seed=n) for n in (3, 20, 7)]
    moved = pyfunc_model.open_package(package, device)
    np.testing.assert_allclose(moved.outputs(rows), classifier.outputs(rows), atol=1e-4)


def test_a_sound_package_is_timed_and_a_damaged_one_is_refused(tmp_path):
    folder = tmp_path / "toy"
    toy.build_toy(folder)

    result = smoke_test_package(folder)

    print(f"load and verify {result.load_s:.3f} s, one series {result.latency_ms:.2f} ms")
    assert result.golden_difference < 1e-5
    assert 0 < result.load_s < within(3)
    assert 0 < result.latency_ms < within(1000)

    (folder / "model.pt2").write_bytes(b"not a program")
    with pytest.raises(SmokeTestFailed, match=r"model\.pt2 was changed: its sha256 is"):
        smoke_test_package(folder)
