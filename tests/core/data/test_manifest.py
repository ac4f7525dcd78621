"""Damage of a data-set folder is found before it is used."""

import json
import shutil

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from roma_core.cli import main
from roma_core.data import (
    DataError,
    StoredDataset,
)
from tests.core.hand_made import (
    errors_in,
    flip_a_byte,
)


@settings(max_examples=40, deadline=None)
@given(draw=st.data())
def test_any_changed_byte_is_found_before_use(sound, tmp_path_factory, draw):
    copy = tmp_path_factory.mktemp("copy") / "set"
    shutil.copytree(sound, copy)
    name = draw.draw(st.sampled_from(sorted(p.name for p in sound.iterdir() if p.suffix == ".npy")))
    flip_a_byte(copy / name, draw.draw(st.integers(0, (copy / name).stat().st_size - 1)))

    with pytest.raises(DataError, match=f"is damaged: {name}: sha256"):
        StoredDataset(copy)
    assert errors_in(copy) and name in errors_in(copy)[0]


def test_a_cut_or_missing_file_and_a_changed_manifest_are_found(sound, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(sound, copy)
    with (copy / "values.npy").open("rb+") as file:
        file.truncate(200)
    (copy / "ids.json").unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["data_schema"]["normalisation"][0]["mean"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))

    found = errors_in(copy)

    assert [problem.split(":")[0] for problem in found] == [
        "manifest.json",
        "ids.json",
        "values.npy",
    ]
    with pytest.raises(DataError, match=r"ids\.json: missing.*values\.npy: 200 bytes"):
        StoredDataset(copy)


def test_a_folder_without_a_manifest_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        StoredDataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"schema_version": 0}',
            "has schema_version 0, this version of the software reads 1 and 2",
        ),
        ('{"schema_ver', "is not valid JSON"),
        ('{"schema_version": 1}', "name: required, but not given"),
    ],
)
def test_a_manifest_of_another_version_is_refused(sound, tmp_path, text, message):
    copy = tmp_path / "set"
    shutil.copytree(sound, copy)
    (copy / "manifest.json").write_text(text)

    with pytest.raises(DataError, match=message):
        StoredDataset(copy)
    (problem,) = errors_in(copy)
    assert message in problem
    assert CliRunner().invoke(main, ["data", "inspect", str(copy)]).stderr.startswith("Error: ")
