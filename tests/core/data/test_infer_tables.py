"""Tables as people have them: what is inferred, and what is built from it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from roma_core.data import DataError, DatasetConfig, StoredDataset, build_dataset
from roma_core.data.infer_schema import ColumnRoles, infer_source, source_statistics
from roma_core.sources.base import source_config
from roma_core.sources.table_files import file_patterns
from roma_pipelines.scaffold import propose

N = 40
SCALES = {"hr": (80, 9), "lactate": (1.5, 0.4), "platelets": (250, 40)}


def clinic():
    """Visits with gaps, and the patients: one in four dead, a hospital of every five."""
    rng = np.random.default_rng(0)
    at = np.repeat(np.arange(N), 8)
    visits = pd.DataFrame(
        {"patient": [f"p{k:02d}" for k in at], "hours": np.tile(np.arange(8.0), N)}
    )
    for name, (mean, std) in SCALES.items():
        values = np.round(mean + std * rng.standard_normal(len(at)), 2)
        visits[name] = np.where(rng.random(len(at)) < 0.4, np.nan, values)
    visits = visits[visits[list(SCALES)].notna().any(axis=1)]
    patients = pd.DataFrame({"patient": [f"p{k:02d}" for k in range(N)]})
    patients["died"] = (np.arange(N) % 4 == 0).astype(int)
    patients["age"] = 40 + np.arange(N)
    patients["sex"] = np.where(np.arange(N) % 3 == 0, "f", "m")
    patients["hospital"] = [f"h{k // 5}" for k in range(N)]
    patients["split"] = np.array(["train", "train", "val", "test"])[np.arange(N) // 2 % 4]
    return visits, patients


VISITS, PATIENTS = clinic()
FLAT = VISITS.merge(PATIENTS)
LONG = VISITS.melt(["patient", "hours"], var_name="variable").dropna()
N_VALUES = len(LONG)
TIMES = LONG["hours"].map(lambda h: f"{int(h) + 20:02d}:15")
CODES = LONG["variable"].map({"hr": 211, "lactate": 50813, "platelets": 51265})
UNITS = LONG["variable"].map({"hr": "1/min", "lactate": "mmol/L", "platelets": "G/L"})
LABELLED = LONG.merge(PATIENTS[["patient", "died"]])


def files(folder):
    for name, rows in LONG.assign(Time=TIMES).groupby("patient"):
        rows[["Time", "variable", "value"]].to_csv(folder / f"{name}.txt", index=False)


def hive(folder):
    for died, rows in FLAT.groupby("died"):
        (folder / f"class={'ab'[died]}").mkdir()
        rows[["patient", "hours", *SCALES]].to_parquet(
            folder / f"class={'ab'[died]}" / "part.parquet"
        )


def sentinels(folder):
    rows = FLAT.drop(columns=["age", "sex", "hospital", "split"])
    rows = rows.assign(hr=rows.hr.fillna(-9999), lactate=rows.lactate.fillna(99.999))
    words = rows.platelets.map(lambda x: "bad" if x != x else f"{x:.2f}".replace(".", ","))
    rows.assign(platelets=words).to_csv(folder / "a.csv", sep=";", decimal=",")


def codes(folder):
    rows = LONG.assign(itemid=CODES, valueuom=UNITS, charttime=pd.Timestamp("2150-01-01"))
    rows["charttime"] += pd.to_timedelta(rows.pop("hours"), "h")
    rows.drop(columns="variable").to_csv(folder / "a.tsv", sep="\t", index=False)


def blocks(folder):
    """Every quantity in a row of its own, also where the time is the same."""
    rows = [FLAT.assign(**{name: np.nan for name in SCALES if name != one}) for one in SCALES]
    pd.concat(rows).dropna(subset=[*SCALES], how="all").to_csv(folder / "a.csv")


def stays(folder):
    rows = FLAT.assign(stay_id=FLAT.patient.str[1:].astype(int) + 100, subject_id=FLAT.hospital)
    rows.drop(columns=["patient", "hospital", "split", "age", "sex"]).to_csv(folder / "a.csv")


def unnamed(folder):
    rows = LABELLED.rename(columns={"variable": "what", "value": "number"})
    rare = rows[:1].assign(what="rare", hours=99.0)
    rows = pd.concat([rows, rare]).reset_index(drop=True)
    rows.insert(0, "id", np.arange(1, len(rows) + 1))
    rows.to_csv(folder / "a.csv", index=False)


SPLIT, NEVER, NEVERS = "split: split", "never change within", "never changes within"
TABLES = {  # how it is written, roles, whether with a table of patients, sentences
    "wide": (
        lambda d: FLAT.to_csv(d / "a.csv"),
        {},
        False,
        [SPLIT, f"age, sex {NEVER}", "hospital may"],
    ),
    "covariates": (
        lambda d: FLAT.to_parquet(d / "a.parquet"),
        {"covariates": ("age", "sex"), "group": "hospital"},
        False,
        ["group: hospital, split: split", "covariates: age, sex"],
    ),
    "sentinels": (sentinels, {}, False, ["missing values: 'bad', -9999.0, 99.999"]),
    "text": (lambda d: FLAT.astype({"hr": str}).to_parquet(d / "a.parquet"), {}, False, [SPLIT]),
    "blocks": (blocks, {}, False, ["label: died"]),
    "stays": (stays, {}, False, ["40 objects of 8 subject_id as groups"]),
    "hive": (hive, {}, False, ["label: class"]),
    "long": (
        lambda d: LONG.to_parquet(d / "a.parquet"),
        {"covariates": ("sex",)},
        True,
        [f"age {NEVERS}"],
    ),
    "codes": (codes, {}, True, ["a row per value; objects: patient; positions: charttime"]),
    "files": (files, {}, True, ["objects: filename; positions: Time; values: hr, lactate, "]),
    "unnamed": (unnamed, {}, False, ["pass --axis what if they are one", "few objects: rare"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_clinical_table_is_built_as_it_is(tmp_path, name):
    write, roles, has_objects, sentences = TABLES[name]
    (tmp_path / "table").mkdir()
    write(tmp_path / "table")
    PATIENTS.to_csv(tmp_path / "patients.csv", index=False)

    objects = tmp_path / "patients.csv" if has_objects else None
    inferred = infer_source([tmp_path / "table"], ColumnRoles(**roles), objects)
    statistics = source_statistics(source_config(inferred.config).open(tmp_path))
    proposal = propose(statistics)
    section = {"source": inferred.config, **inferred.dataset, **proposal.dataset}
    config = DatasetConfig.model_validate({"name": "clinic", **section})
    dataset = StoredDataset(build_dataset(config, tmp_path / "out", tmp_path, progress=False))

    schema, said = dataset.schema, " | ".join(inferred.notes + inferred.warnings)
    assert all(sentence in said for sentence in sentences)
    channels = ["211", "50813", "51265"] if name == "codes" else list(SCALES)
    assert [channel.name for channel in schema.channels] == channels
    assert sum(np.isfinite(dataset.raw(i)[1]).sum() for i in range(N)) == N_VALUES
    assert (schema.layout, statistics.n_observations) == (statistics.layout, dataset.offsets[-1])
    assert config.layout == "auto"
    assert any(f"layout auto: {schema.layout}, " in reason for reason in proposal.reasons)
    assert len(schema.classes) == 2 and len(dataset) == N
    means = zip(schema.normalisation, SCALES.values(), strict=True)
    assert all(abs(entry.mean - mean) < std for entry, (mean, std) in means)
    assert [c.name for c in schema.covariates] == list(roles.get("covariates", ()))
    is_recorded = SPLIT in said
    assert (dataset.splits[:4].tolist() == [0, 0, 0, 0]) or not is_recorded
    assert config.split.by == ("group" if name in ("stays", "covariates") else "object")
    if name == "blocks":
        assert config.repair.duplicates == "mean"
    if name == "codes":
        assert [channel.unit for channel in schema.channels] == ["1/min", "mmol/L", "G/L"]
    if name == "files":
        assert config.source.files[0].name == "*.txt"
        (first, *_), _ = dataset.raw(dataset.ids.index("p00"))
        assert first[0] == (20 + VISITS["hours"][0]) * 3600 + 900


BANDS = pd.DataFrame(
    {
        "id": np.repeat(np.arange(20), 10),
        "mjd": 59000.5 + np.tile(np.arange(10.0), 20),
        "passband": np.tile([0, 1], 100),
        "flux": np.random.default_rng(0).normal(size=200),
        "target": np.repeat(np.arange(20) % 2, 10),
    }
)


@pytest.mark.parametrize("options", [{}, {"quantity": "passband"}])
def test_a_band_is_an_axis_of_categories_unless_it_is_called_a_quantity(tmp_path, options):
    BANDS.to_csv(tmp_path / "a.csv", index=False)

    inferred = infer_source([tmp_path / "a.csv"], ColumnRoles(**options))

    columns = inferred.config["columns"]
    if options:
        assert columns["quantity"] == {"column": "passband", "value": "flux"}
        return
    assert columns["axes"][1] == {"column": "passband", "categories": ["0", "1"]}
    assert inferred.dataset == {"normalise_by": "passband"}


NIGHTS = {
    "time": [f"{k % 10:02d}:30" for k in range(200)],
    "date": pd.to_datetime("2024-01-01") + pd.to_timedelta(np.arange(200) % 10, "D"),
}


DATES = [f"2024-03-{1 + k // 24:02d}T{k % 24:02d}:00" for k in range(200)]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (NIGHTS, {}, "'time' holds times of day and 'date' dates; join them in one"),
        ({"parameter": [f"q{k}" for k in range(300)]}, {}, "names more than 256 quantities"),
        ({}, {"covariates": ("nothing",)}, "--covariate nothing: there is no such column"),
        ({}, {"covariates": ("target",)}, "--covariate target: it is the label"),
        ({}, {"targets": ("nothing",)}, "has no column 'nothing'"),
        (
            {"w": ["a", "b"] * 100},
            {"targets": ("w",)},
            "column 'w' holds 'a' in row 1, expected num",
        ),
        ({}, {"targets": ("flux",), "channels": ("flux",)}, "given what it predicts"),
        ({}, {"targets": ("flux", "target")}, "all must change within an object, or"),
        (
            {
                "flux": np.where(np.arange(200) % 3, np.arange(200.0), "<5"),
                "passband": np.tile(["g", "r"], 100),
            },
            {},
            "no column is left for the values.*; flux: '<5' among its numbers, 67 times",
        ),
        ({"flux": np.where(np.arange(200) % 3, np.arange(200.0), "<5")}, {}, "no column is left"),
        ({}, {"quantity": "passband", "channels": ("flux", "mjd")}, "which of flux, mjd is the"),
        (
            {"flux": [f"{k},25" for k in range(200)]},
            {},
            "no column is left.*numbers with points, or separate the cells by semicolons",
        ),
        (
            {"mjd": DATES[:100] + [f"{d}Z" for d in DATES[100:]]},
            {},
            "'mjd' holds times with an off",
        ),
        (
            {"mjd": [*DATES[:42], "2024-02-30T00:00", *DATES[43:]]},
            {},
            "column 'mjd' holds '2024-02-30T00:00' in row 43, expected dates",
        ),
    ],
)
def test_what_cannot_be_known_is_an_error(tmp_path, change, options, message):
    table = pd.concat([BANDS, BANDS])[: len(next(iter(change.values()), BANDS))]
    table.assign(**change).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataError, match=message):
        inferred = infer_source([tmp_path / "a.csv"], ColumnRoles(**options))
        list(source_config(inferred.config).open(tmp_path).read())


def test_a_clock_beside_whole_days_is_not_left_out_without_a_word(tmp_path):
    days = pd.to_datetime("2024-01-01") + pd.to_timedelta(np.arange(200) // 20, "D")
    clock = [f"{k % 20:02d}:30:00" for k in range(200)]
    table = pd.DataFrame({"id": np.arange(200) // 100, "date": days.date, "clock": clock})
    table.assign(x=np.arange(200) % 7 / 3).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataError, match="'clock' holds times of day and 'date' dates; join them"):
        infer_source([tmp_path / "a.csv"], ColumnRoles())
    assert infer_source([tmp_path / "a.csv"], ColumnRoles(time="date")).config["kind"] == "table"

    whole = days + pd.to_timedelta(np.arange(200) % 20, "h")  # the clock is something else
    table.assign(date=whole, x=np.arange(200) % 7 / 3).to_csv(tmp_path / "b.csv", index=False)
    assert infer_source([tmp_path / "b.csv"], ColumnRoles()).config["kind"] == "table"


def test_a_column_of_dates_that_is_not_used_may_hold_anything(tmp_path):
    mixed = DATES[:100] + [f"{d}Z" for d in DATES[100:]]
    batch = np.where(np.arange(200) % 20 == 0, "other", "2024-01-01")  # mostly dates, but words
    table = pd.DataFrame({"id": np.arange(200) // 20, "time": np.arange(200) % 20, "seen": mixed})
    table.assign(x=np.arange(200) % 7 / 3, batch=batch).to_csv(tmp_path / "a.csv", index=False)
    inferred = infer_source([tmp_path / "a.csv"], ColumnRoles(axes=("batch",)))
    series = list(source_config(inferred.config).open(tmp_path).read())
    assert len(series) == 10 and series[0].positions[:2].tolist() == [[0, 1], [1, 0]]


def test_a_target_with_one_other_cell_is_pointed_out(tmp_path):
    series, time = np.divmod(np.arange(30 * 10), 10)
    table = pd.DataFrame({"id": series, "time": time, "x": np.sin(time + series), "y": series / 30})
    table.loc[42, "y"] = 99
    table.to_csv(tmp_path / "a.csv", index=False)
    inferred = infer_source([tmp_path / "a.csv"], ColumnRoles(targets=("y",)))
    assert [line for line in inferred.warnings if line.startswith("y changes within 1 of 30 obj")]


@pytest.mark.parametrize(
    ("has_objects", "target", "level"),
    [(False, "age", "series"), (True, "age", "series"), (False, "lactate", "observation")],
)
def test_a_target_column_makes_a_regression(tmp_path, has_objects, target, level):
    table, objects = (VISITS, tmp_path / "patients.csv") if has_objects else (FLAT, None)
    table.to_csv(tmp_path / "visits.csv", index=False)
    PATIENTS.to_csv(tmp_path / "patients.csv", index=False)

    inferred = infer_source([tmp_path / "visits.csv"], ColumnRoles(targets=(target,)), objects)
    columns = inferred.config["columns"]
    statistics = source_statistics(source_config(inferred.config).open(tmp_path))
    proposal = propose(statistics, predicts_targets=True)
    config = {"name": "clinic", "source": inferred.config, **proposal.dataset}
    path = build_dataset(DatasetConfig(**config), tmp_path, tmp_path, progress=False)

    assert columns["targets"] == [{"column": target}] and "label" not in columns["metadata"]
    assert target not in [one["column"] for one in columns["channels"]]
    assert f"targets: {target}, of every {level}" in inferred.notes
    assert not [line for line in inferred.warnings if target in line]
    finetuning = proposal.sizes.trainings["finetuning"]
    assert proposal.task == "regression" and "label_smoothing" not in finetuning["trainer"]
    assert finetuning["model"]["pooling"] == ("mean" if level == "series" else "token")
    schema = StoredDataset(path).schema
    assert (schema.target_level, schema.targets[0].name) == (level, target)


@pytest.mark.parametrize("share", [1.0, 0.75])
def test_dense_series_of_which_numbers_are_missing_are_not_complete(tmp_path, share):
    series, time = np.divmod(np.arange(8 * 100), 100)
    table = pd.DataFrame({"id": series, "label": series % 2, "time": time, "x": np.sin(time)})
    table["y"] = np.where(time % 2 < 4 * share - 2, np.cos(time), np.nan)
    table.to_csv(tmp_path / "dense.csv", index=False)

    inferred = infer_source([tmp_path / "dense.csv"], ColumnRoles())
    statistics = source_statistics(source_config(inferred.config).open(tmp_path))
    trainer = propose(statistics).sizes.trainings["finetuning"]["trainer"]

    assert (statistics.grid_fill, statistics.observed) == (1.0, share)
    assert trainer["augment_drop_rate"] == (0.0 if share == 1 else 0.5)


def test_a_number_that_recurs_far_away_is_pointed_at(tmp_path):
    flux = BANDS.flux.where(np.arange(200) % 20 > 0, 1e20)
    BANDS.assign(flux=flux).to_csv(tmp_path / "a.csv", index=False)

    (warning,) = infer_source([tmp_path / "a.csv"], ColumnRoles()).warnings

    assert "pass --missing-value 1e+20" in warning


def test_a_sentinel_that_is_a_usual_value_of_another_column_is_kept(tmp_path):
    k = np.arange(200)
    table = pd.DataFrame({"id": k // 10, "hours": k % 10, "spo2": 95 + k % 5, "label": k // 10 % 2})
    table.assign(gcs=np.where(k % 7, 3 + k % 12, 99)).to_csv(tmp_path / "a.csv", index=False)

    found = infer_source([tmp_path / "a.csv"], ColumnRoles())

    assert "missing_values" not in found.config
    assert "99 in gcs seems to stand for a missing value, but is a usual value of spo2" in str(
        found.warnings
    )


def test_a_sentinel_of_a_covariate_in_the_table_of_objects_is_found(tmp_path):
    table = VISITS[["patient", "hours", "hr"]]
    table.to_csv(tmp_path / "a.csv", index=False)
    ages = PATIENTS.age.where(PATIENTS.age % 4 > 0, -999)
    PATIENTS.assign(age=ages).to_csv(tmp_path / "objects.csv", index=False)
    roles = ColumnRoles(covariates=("age",))

    found = infer_source([tmp_path / "a.csv"], roles, tmp_path / "objects.csv")

    assert found.config["missing_values"] == [-999.0]


def test_units_that_differ_between_objects_are_pointed_at(tmp_path):
    unit = np.where(LABELLED.patient < "p20", "mmol/L", "mg/dL")
    LABELLED.assign(unit=unit).to_csv(tmp_path / "a.csv", index=False)

    warnings = infer_source([tmp_path / "a.csv"], ColumnRoles()).warnings

    assert "lactate has the units mg/dL, mmol/L; convert its values to one" in warnings


def test_a_channel_that_is_called_y_is_no_label(tmp_path):
    BANDS.rename(columns={"passband": "x", "flux": "y"}).to_csv(tmp_path / "a.csv", index=False)
    columns = infer_source([tmp_path / "a.csv"], ColumnRoles()).config["columns"]
    assert columns["metadata"] == {"label": "target"}

    BANDS.rename(columns={"target": "z", "flux": "y"}).to_csv(tmp_path / "a.csv", index=False)
    assert infer_source([tmp_path / "a.csv"], ColumnRoles()).config["columns"]["metadata"] == {}


def test_many_files_are_one_pattern_if_it_matches_no_other(tmp_path):
    paths = [tmp_path / f"{k}.csv" for k in range(9)]
    for path in paths:
        path.touch()

    assert file_patterns(paths) == [str(tmp_path / "*.csv")]
    assert file_patterns(paths[:-1], most=3) == [*map(str, paths[:-1])]
