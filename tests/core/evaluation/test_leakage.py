"""Test series that training may have seen, and the digest that counts decisions."""

from pathlib import Path

import numpy as np
import pytest

from roma_core.data.build import build_dataset
from roma_core.data.config import DatasetConfig
from roma_core.data.store import StoredDataset
from roma_core.evaluation.leakage import (
    LeakageReport,
    check_leakage,
    split_digest,
    training_datasets,
)


def built(folder, test_fraction):
    """A data set of twenty series of one channel, of which a share is for testing."""
    rng = np.random.default_rng(0)
    lines = [f"s{k},{i},{rng.normal():.4f},{'ab'[k % 2]}" for k in range(20) for i in range(12)]
    (folder / "stars.csv").write_text("\n".join(["star,t,flux,class", *lines]) + "\n")
    columns = {
        "object": "star",
        "axes": [{"column": "t", "unit": "d"}],
        "channels": [{"column": "flux", "unit": "mJy"}],
        "metadata": {"label": "class"},
    }
    source = {"kind": "table", "files": [str(folder / "stars.csv")], "columns": columns}
    config = DatasetConfig.model_validate(
        {
            "name": "stars",
            "source": source,
            "test_fraction": test_fraction,
            "validation_fraction": 0.2,
        }
    )
    path = build_dataset(config, folder / "data", folder / "cache", progress=False)
    return StoredDataset(path)


@pytest.fixture
def dataset(tmp_path):
    return built(tmp_path, test_fraction=0.5)


def test_objects_that_were_learnt_from_another_version_are_named(dataset, tmp_path):
    assert check_leakage(dataset, [dataset.path]) == LeakageReport((), ())
    before = built(tmp_path, test_fraction=0.1)
    (text,) = check_leakage(dataset, [dataset.path, before.path]).refused
    n = len(dataset.split("test")) - len(before.split("test"))
    assert n > 0
    assert f"{n} test objects, such as 's" in text and "were in train or validation" in text
    (text,) = check_leakage(dataset, [tmp_path / "gone"]).refused
    assert text.startswith("unknown, because") and "no longer exist" in text


def test_weights_of_another_program_say_nothing_of_their_data(tmp_path):
    weights = tmp_path / "outputs" / "model"
    for text in ('{"model_type": "x"}', "[1]", '{"dataset": 3}'):
        (tmp_path / "config.json").write_text(text)
        assert training_datasets(weights) == ()
    (tmp_path / "config.json").write_text('{"dataset": "d", "weights": null}')
    assert training_datasets(weights) == (Path("d"),)


def test_a_split_is_known_by_its_objects(dataset):
    assert split_digest(dataset.split("test")) == split_digest(dataset.split("test"))
    assert split_digest(dataset.split("test")) != split_digest(dataset.split("train"))
