"""The registry of sources, sources of other packages, and what importing them costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from roma_core.data import DatasetConfig, StoredDataset, build_dataset
from roma_core.sources.base import kinds, source_config

PLUGIN = """
import numpy as np
from roma_core.schema import Channel, PositionAxis
from roma_core.sources.base import RawSeries, SourceConfig

class OneConfig(SourceConfig):
    n: int = 4
    axes: tuple = (PositionAxis(name="t", unit="s"),)
    channels: tuple = (Channel(name="x", unit="V"),)
    classes: tuple = ()
    files: dict = {}

    def open(self, cache):
        return self

    def read(self):
        for k in range(self.n):
            yield RawSeries(f"s{k}", np.arange(5.0)[:, None], np.full((5, 1), k, np.float32) + np.arange(5, dtype=np.float32)[:, None])
"""


def install(folder, monkeypatch, points):
    """A package as the installer leaves it: a module, and a folder that names its entry points."""
    (folder / "archive_of_ours.py").write_text(PLUGIN)
    info = folder / "archive_of_ours-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: archive-of-ours\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[roma_core.sources]\n{points}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "archive_of_ours", raising=False)


def test_another_package_adds_a_source(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "ours = archive_of_ours:OneConfig")
    values = {"name": "s", "source": {"kind": "ours", "n": 40}}
    config = DatasetConfig.model_validate(values)

    dataset = StoredDataset(build_dataset(config, tmp_path / "out", tmp_path, progress=False))

    assert len(dataset) == 40 and "ours" in kinds()
    assert '"n":40' in dataset.manifest.provenance.source
    with pytest.raises(ValueError, match="m: not a setting; the closest one is n"):
        source_config({"kind": "ours", "m": 1})


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("ts = archive_of_ours:OneConfig", "two sources are called 'ts'"),
        ("ours = archive_of_ours:No", "'ours' .archive_of_ours:No. cannot be used"),
        ("ours = archive_of_ours:PositionAxis", "is no subclass of SourceConfig"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(tmp_path, monkeypatch, points, message):
    install(tmp_path, monkeypatch, points)

    with pytest.raises(ValueError, match=message):
        source_config({"kind": "ours"})


def test_an_unknown_kind_names_the_closest():
    with pytest.raises(ValueError, match="the closest is 'package_file'"):
        source_config({"kind": "package_fiel"})


def test_reading_and_building_need_no_torch():
    code = (
        "import sys, roma_core.data.build, roma_core.data.quality, roma_core.data.profile, "
        "roma_core.cli.data, roma_core.estimators; sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_kind_is_documented():
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")

    for kind in kinds():
        assert f"`{kind}`" in page
