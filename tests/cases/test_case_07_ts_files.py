"""``.ts`` files as archives have them: missing numbers, headers in any case, other encodings."""

import numpy as np
import pytest

from tests.cases.commands import build, error_of, new_experiment

TEXT = """\
# hourly counts, some hours were not counted
@problemName Pedestrians
@timeStamps false
@missing true
@univariate true
@equalLength true
@seriesLength 6
@classLabel true 1 2
@data
12,15,?,30,22,10:1
11,16,25,31,23,9:1
2,?,?,4,6,8:2
3,2,5,5,7,9:2
13,14,26,?,21,11:1
2,3,4,5,6,7:2
"""


def config_of(path, **options):
    return {
        "name": "pedestrians",
        "source": {"kind": "ts", "files": [{"path": str(path)}]},
        "validation_fraction": 0.0,
        "split": {"stratified": True},
        **options,
    }


def contents(dataset):
    return [[array.tolist() for array in dataset.raw(i)] for i in range(len(dataset))]


@pytest.fixture
def expected(tmp_path):
    (tmp_path / "plain.ts").write_text(TEXT.replace("?", "NaN"))
    return contents(build(tmp_path, config_of(tmp_path / "plain.ts")))


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.replace("?", " ? ").encode(),
        TEXT.replace("\n", "\r\n").encode(),
        ("\ufeff" + TEXT).encode(),
        TEXT.encode("utf-16"),
        TEXT.replace("hourly", "stündlich").encode("latin-1"),
        TEXT.replace("@data", "@DATA").replace("true", "TRUE").encode(),
        TEXT.replace("@classLabel", "@classlabel").replace("@data", " @Data ").encode(),
        TEXT.replace("\n", "\n\n").replace(":1", " : 1 ").encode(),
    ],
)
def test_what_is_written_otherwise_is_read_alike(tmp_path, expected, content):
    (tmp_path / "pedestrians.ts").write_bytes(content)

    dataset = build(tmp_path, config_of(tmp_path / "pedestrians.ts"))

    assert dataset.manifest.repairs.observations_without_values == 4
    assert dataset.lengths.tolist() == [5, 6, 4, 6, 5, 6]
    assert contents(dataset) == expected
    assert dataset.schema.classes == ("1", "2")


def test_a_missing_number_is_kept_as_missing_and_refused_only_on_request(tmp_path):
    path = tmp_path / "pedestrians.ts"
    path.write_text(TEXT)

    message = error_of(tmp_path, config_of(path, repair={"missing": "refuse"}))
    assert "hold nan at observation 2" in message and "repair.missing to 'keep'" in message
    dataset, _ = new_experiment(path)
    assert "repair" not in dataset
    assert build(tmp_path, dataset | {"name": "again"}).manifest.repairs is not None


def test_another_encoding_is_said(tmp_path):
    (tmp_path / "a.ts").write_bytes(TEXT.replace("1 2", "größer 2").encode("latin-1"))
    (tmp_path / "a.ts").write_bytes(
        (tmp_path / "a.ts").read_bytes().replace(b":1\n", ":größer\n".encode("latin-1"))
    )

    with pytest.warns(UserWarning, match=r"a\.ts is not UTF-8 text; it is read as Latin-1"):
        dataset, _ = new_experiment(tmp_path / "a.ts")

    dataset["name"] = "case"
    assert "größer" in build(tmp_path, dataset).schema.classes
    assert np.isfinite(next(build(tmp_path, dataset).parts()).values).all()
