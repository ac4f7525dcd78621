"""CSV as Europe, instruments, Excel and UCI write it, through ``new-experiment`` and ``data build``."""

import bz2
import random
import warnings

import numpy as np
import pytest

from roma_core.data import DataError
from roma_core.data.infer_schema import ColumnRoles, infer_source
from tests.cases.commands import build, error_of, new_experiment

random.seed(0)
ROWS = [(i, k, round(random.gauss(10, 1), 3), "ab"[i % 2]) for i in range(30) for k in range(8)]


def text(separator=",", decimal=".", blank="", missing=None, end="\n", quote="", names=None):
    """The rows in one dialect."""
    lines = [list(names or ("object_id", "time", "flux", "label"))]
    for a, b, c, d in ROWS:
        value = missing if missing is not None and b == 3 else f"{c:.3f}".replace(".", decimal)
        lines.append([str(a), str(b), value, f"{quote}{d}{quote}"])
    return "".join((separator + blank).join(line) + end for line in lines)


PLAIN = text()


@pytest.mark.parametrize(
    "content",
    [
        text(";", ","),
        text(";", "."),
        text("\t", ","),
        text("|"),
        text(",", blank=" "),
        text(";", ",", end="\r\n"),
        text(";", ",", quote='"'),
        "# from pipeline v3\n# flux in mJy\n" + PLAIN,
        "# one, two, three, four\n" + PLAIN,
        "#" + PLAIN,
        "# a\u2028b\n" + PLAIN,
        "# a night\n# " + text(";", ","),
        "sep=;\n" + text(";", ","),
        "\n\n" + PLAIN + "\n\n",
        PLAIN.rstrip("\n"),
        "\ufeff" + text(";", ","),
        text(names=["object_id ", " time", "flux", '"label"']),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_every_dialect_gives_the_same_numbers(tmp_path, content, encoding):
    (tmp_path / "a.csv").write_bytes(
        content.removeprefix("\ufeff" * (encoding == "utf-16")).encode(encoding)
    )

    config, output = new_experiment(tmp_path / "a.csv")

    assert "objects: object_id; positions: time; values: flux" in output
    dataset = build(tmp_path, config | {"name": "case"})
    assert dataset.ids == [str(i) for i in range(30)] and dataset.schema.classes == ("a", "b")
    values = np.concatenate([dataset.raw(i)[1][:, 0] for i in range(30)])
    assert values.tolist() == np.array([row[2] for row in ROWS], "f4").tolist()


@pytest.mark.parametrize("missing", ["?", "", "NA", "NaN", "N/A", "null", "None", "<NA>", " ? "])
@pytest.mark.parametrize("separator", [",", ";"])
def test_missing_words_are_missing_numbers(tmp_path, missing, separator):
    decimal = "," if separator == ";" else "."
    (tmp_path / "a.csv").write_text(text(separator, decimal, missing=missing))

    config, _ = new_experiment(tmp_path / "a.csv")

    assert "repair" not in config
    dataset = build(tmp_path, config | {"name": "case"})
    assert dataset.manifest.repairs.observations_without_values == 30
    assert set(dataset.lengths.tolist()) == {7}


def test_latin_1_is_read_with_a_word(tmp_path):
    content = text(";", ",", names=["object_id", "time", "größe", "label"])
    (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))

    with pytest.warns(UserWarning, match=r"a\.csv is not UTF-8 text; it is read as Latin-1"):
        config, _ = new_experiment(tmp_path / "a.csv")

    dataset = build(tmp_path, config | {"name": "case"})
    assert [channel.name for channel in dataset.schema.channels] == ["größe"]


@pytest.mark.parametrize("n_above", [1, 100_000])
def test_windows_1252_is_refused_in_a_sentence(tmp_path, n_above):
    content = "# größe\n" * n_above + "# in €…\n" * (n_above == 1) + PLAIN + "1,9,2,€\n"
    (tmp_path / "a.csv").write_bytes(content.encode("cp1252"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if n_above > 1 else "error")
        with pytest.raises(DataError, match=r"a\.csv .*is no UTF-8, perhaps Windows-1252; save"):
            infer_source([tmp_path / "a.csv"], ColumnRoles())


@pytest.mark.parametrize("decimals", [",5", ""])
def test_points_in_a_file_with_decimal_commas_are_refused(tmp_path, decimals):
    lines = [f"{k};{i};{k},5;1.{i}00{decimals}" for k in range(10) for i in range(8)]
    (tmp_path / "a.csv").write_text("\n".join(["object;time;temperature;flux", *lines]))
    columns = {"object": "object", "axes": [{"column": "time"}], "channels": [{"column": "flux"}]}
    source = {"kind": "table", "files": [str(tmp_path / "a.csv")], "columns": columns}

    expected = (
        f"column 'flux' holds '1.000{decimals}' in row 1, expected numbers with decimal commas"
    )
    assert expected in error_of(tmp_path, {"name": "x", "source": source})


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32"])
def test_text_in_another_encoding_is_refused(tmp_path, encoding):
    (tmp_path / "a.csv").write_bytes(PLAIN.encode(encoding))

    with pytest.raises(
        DataError, match=r"a\.csv holds NUL characters, so it is no text; save it as"
    ):
        infer_source([tmp_path / "a.csv"], ColumnRoles())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            PLAIN + "1,2\n",
            "cannot be read: line 242, '1,2': Expected Number of Columns: 4 Found: 2",
        ),
        (PLAIN + "1,9,high,b\n", "column 'flux' holds 'high' in row 241, expected numbers"),
        (text(";", ",") + "1;9;1.234,5;b\n", "column 'flux' holds '1.234,5' in row 241"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    columns = {"object": "object_id", "axes": [{"column": "time"}]}
    columns |= {"channels": [{"column": "flux"}], "metadata": {"label": "label"}}
    source = {"kind": "table", "files": [str(tmp_path / "a.csv")], "columns": columns}

    assert message in error_of(tmp_path, {"name": "x", "source": source})


def test_a_compression_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.csv.bz2").write_bytes(bz2.compress(PLAIN.encode()))
    columns = {"object": "object_id", "axes": [{"column": "time"}]}
    columns |= {"channels": [{"column": "flux"}]}
    source = {"kind": "table", "files": [str(tmp_path / "a.csv.bz2")], "columns": columns}

    expected = "a.csv.bz2: expected a .parquet or .csv file, plain or compressed as .gz or .zst"
    assert expected in error_of(tmp_path, {"name": "x", "source": source})
    with pytest.raises(DataError, match=r"expected .ts, .csv \(or .csv.gz, .csv.zst\) or .parquet"):
        infer_source([tmp_path / "a.csv.bz2"], ColumnRoles())
