"""What ``roma data export`` writes is understood by ``new-experiment`` and built into the same data."""

import dataclasses

import numpy as np
import pytest
from click.testing import CliRunner

from roma_core.cli import main
from roma_core.data import StoredDataset
from roma_core.data.infer_schema import ColumnRoles, infer_source
from roma_core.schema import Channel, PositionAxis
from roma_core.sources.base import source_config
from tests.cases.commands import build
from tests.core.data.test_quality import LAYOUTS, gappy_set
from tests.core.hand_made import HandMade, built, series

AXES = (PositionAxis(name="phase", unit="d"), PositionAxis(name="wave", unit="index of g, r"))


def stored(folder, level):
    rng = np.random.default_rng(0)
    all_series = []
    for k in range(60):
        n = 3 + k % 5
        positions = np.stack([np.sort(rng.uniform(0, 9, n)), rng.integers(0, 2, n)], axis=1)
        one = series(f"s{k}", n, "xy"[k % 2], None, k, positions=positions, group=f"g{k % 7}")
        shape = (n, 1) if level == "observation" else (1,)
        targets = rng.normal(size=shape).astype("f4") if level else None
        all_series.append(dataclasses.replace(one, targets=targets))
    targets = (Channel(name="clean", unit="V"),) if level else ()
    level = level or "observation"
    source = HandMade(series=tuple(all_series), axes=AXES, targets=targets, target_level=level)
    return StoredDataset(built(folder, source=source, validation_fraction=0.2))


@pytest.mark.parametrize("level", [None, "observation", "series"])
def test_an_export_is_read_back_with_its_axes_targets_units_and_splits(tmp_path, level):
    first = stored(tmp_path, level)
    export = ["data", "export", str(first.path), str(tmp_path / "all.parquet")]
    assert CliRunner().invoke(main, export).exit_code == 0

    inferred = infer_source([tmp_path / "all.parquet"], ColumnRoles())
    again = build(
        tmp_path, {"name": "again", "source": inferred.config, "validation_fraction": 0.0}
    )

    for part in ("axes", "channels", "targets", "target_level", "classes"):
        assert getattr(again.schema, part) == getattr(first.schema, part)
    assert again.ids == first.ids and again.groups == first.groups
    assert again.splits.tolist() == first.splits.tolist() and 1 in again.splits
    for i in range(len(first)):
        for one, other in zip(first.raw(i), again.raw(i), strict=True):
            assert np.array_equal(one, other)
        assert (level == "observation") == (again.targets(i) is not None)
        assert np.array_equal(first.targets(i), again.targets(i))
    assert (level == "series") == (again.series_targets is not None)
    assert np.array_equal(first.series_targets, again.series_targets)


@LAYOUTS
def test_gaps_categories_and_covariates_are_read_back_in_either_layout(tmp_path, layout):
    first = StoredDataset(gappy_set(tmp_path, layout=layout))
    first.to_parquet(tmp_path / "all.parquet")

    inferred = infer_source([tmp_path / "all.parquet"], ColumnRoles())
    config = {"name": "small", "source": inferred.config, "layout": layout}
    again = build(tmp_path, config | {"validation_fraction": 0.0})

    assert again.schema == first.schema and again.manifest.files == first.manifest.files


def test_one_split_is_the_rows_of_that_split(tmp_path):
    first = stored(tmp_path, "observation")

    n = first.to_parquet(tmp_path / "validation.parquet", "validation")

    inferred = infer_source([tmp_path / "validation.parquet"], ColumnRoles())
    found = list(source_config(inferred.config).open(tmp_path).read())
    rows = first.split("validation").indices
    assert n == len(rows) > 0 and [s.id for s in found] == [first.ids[i] for i in rows]
    assert {s.recorded_split for s in found} == {"validation"}
