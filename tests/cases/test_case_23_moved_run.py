"""A run continues wherever its folder, its data set and its first weights lie now."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from roma_core.files import read_json, write_json
from tests.cases.trainings import DECODER, SMALL, build, interrupted, roma

SETTINGS = ["--set", "trainer.save_every=5", "--set", "trainer.eval_every=1000"]
LONG = ["--set", "trainer.epochs=3000"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A pretraining that ended, and a finetuning from it that was asked to stop."""
    root = tmp_path_factory.mktemp("scratch")
    data = build(root, [8] * 60)
    short = ["--data", data, "--run-dir", "pre", "--set", "trainer.epochs=1"]
    roma("pretrain", *short, *SMALL, *DECODER, cwd=root)
    interrupted(*finetune(data), run=root / "run", cwd=root)
    return root


def finetune(data: Path, weights: str = "pre/outputs/model") -> list:
    options = ["--data", data, "--run-dir", "run", "--weights", weights]
    return ["finetune", *options, *SETTINGS, *LONG]


@pytest.fixture
def moved(stopped, tmp_path) -> Path:
    """The same on another disk; the old place is gone, as far as the run can see."""
    shutil.copytree(stopped, tmp_path / "moved")
    config = (tmp_path / "moved/run/config.json").read_text()
    gone = config.replace(str(stopped), str(tmp_path / "gone"))
    (tmp_path / "moved/run/config.json").write_text(gone)
    return tmp_path / "moved"


def data_of(root: Path) -> Path:
    return next((root / "data/s").glob("[0-9a-f]*")).relative_to(root)


def test_the_same_command_continues_after_the_move(moved):
    output = interrupted(*finetune(data_of(moved)), run=moved / "run", cwd=moved)
    assert "resumed from step-" in output
    assert f"resumes with dataset {moved.parent / 'gone'}" in output
    document = read_json(moved / "run/config.json")
    assert document["dataset"].startswith(str(moved))
    assert document["weights"] == str(moved / "pre/outputs/model")


def test_so_does_one_that_was_begun_before_the_weights_had_a_digest(moved):
    document = read_json(moved / "run/config.json")
    del document["weights_digest"]
    document["weights"] = str(moved / "pre/outputs/model")
    write_json(moved / "run/config.json", document)
    assert "resumed from step-" in interrupted(
        *finetune(data_of(moved)), run=moved / "run", cwd=moved
    )


def test_first_weights_that_are_gone_are_not_missed(stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    document = read_json(tmp_path / "run/config.json")
    write_json(tmp_path / "run/config.json", document | {"weights": str(tmp_path / "gone")})
    output = interrupted("finetune", "--job", "run", run=tmp_path / "run", cwd=tmp_path)
    assert "resumed from step-" in output


def test_another_data_set_or_other_weights_are_another_run(moved):
    (moved / "b").mkdir()
    other = moved / "b" / build(moved / "b", [9] * 60)
    output = roma(*finetune(other), cwd=moved, code=1)
    assert "belongs to a run with other settings: dataset" in output
    shutil.copytree(moved / "pre/outputs/model", moved / "other")
    weights = moved / "other/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    output = roma(*finetune(data_of(moved), "other"), cwd=moved, code=1)
    assert "belongs to a run with other settings: weights" in output
