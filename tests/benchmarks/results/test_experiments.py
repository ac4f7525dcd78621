"""The experiments of the results that are no definitions."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.benchmarks.results
from roma_pipelines.experiment import load_experiment

FILES = sorted((Path(tests.benchmarks.results.__file__).parent / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_is_as_its_file_is_called_and_can_be_read(path):
    assert load_experiment(str(path)).name == path.stem
