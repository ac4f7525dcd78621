"""``new-experiment``: a file that loads, with choices that suit the data and say why."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from roma_core.data.infer_schema import source_statistics
from roma_core.data.manifest import Repairs
from roma_core.data.splits import SplitOptions, Splitter
from roma_core.schema import Channel
from roma_core.sources.base import RawSeries
from roma_core.trainer.defaults import DatasetSize, default_settings
from roma_pipelines.cli import main
from roma_pipelines.experiment import load_experiment
from roma_pipelines.scaffold import propose
from tests.core.hand_made import HandMade
from tests.pipelines.tiny import write_waves

ROOT = Path(__file__).parents[3]


@pytest.fixture
def waves(tmp_path, monkeypatch):
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "storage"))
    write_waves(tmp_path)
    return str(tmp_path / "waves_*.ts")


def invoke(*arguments):
    return CliRunner().invoke(main, ["new-experiment", *arguments])


def test_files_that_the_shell_expanded_are_one_table_and_options_reach_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "storage"))
    for k in range(3):
        rows = [
            f"p{i},h{i % 10},{i},{j},{i * j % 7},bad,{i % 2}"
            for i in range(k, 30, 3)
            for j in range(4)
        ]
        rows = [row.replace("bad", "4") if i % 2 else row for i, row in enumerate(rows)]
        text = "\n".join(["patient,hospital,age,day,hr,lab,died", *rows])
        (tmp_path / f"{k}.csv").write_text(text)
    files = [str(tmp_path / f"{k}.csv") for k in range(3)]

    done = invoke(
        "clinic", "--source", *files, "--covariate", "age", "--group", "hospital", "--print"
    )

    assert done.exit_code == 0, done.output
    (tmp_path / "clinic.yaml").write_text(done.stdout)
    dataset = load_experiment(str(tmp_path / "clinic.yaml")).dataset
    assert [str(path) for path in dataset.source.files] == files
    assert [column.column for column in dataset.source.columns.covariates] == ["age"]
    assert dataset.source.missing_values == ("bad",)
    assert dataset.split.by == "group"
    assert "layout auto: joint, 1.5 of 2 channels are observed at a time" in done.stdout


def test_a_target_column_makes_a_regression(tmp_path, monkeypatch):
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "storage"))
    rows = [f"p{i},{j},{i * j % 7},{70 + i},{i % 2}" for i in range(40) for j in range(4)]
    (tmp_path / "a.csv").write_text("\n".join(["patient,day,hr,weight,died", *rows]))

    done = invoke(
        "weights", "--source", str(tmp_path / "a.csv"), "--target-column", "weight", "--print"
    )

    assert done.exit_code == 0, done.output
    document = yaml.safe_load(done.stdout)
    document["attributes"]["finetuning"]["model"]["predict_variance"] = True
    (tmp_path / "weights.yaml").write_text(yaml.safe_dump(document))
    experiment = load_experiment(str(tmp_path / "weights.yaml"))
    assert experiment.task == "regression" and experiment.finetuning.model["predict_variance"]
    columns = experiment.dataset.source.columns
    assert (columns.target_level, columns.targets[0].column) == ("series", "weight")
    assert columns.metadata.label is None
    assert "reports: r2; of weight, of every series" in done.stdout


def test_times_of_day_that_pass_midnight_are_pointed_at(tmp_path, monkeypatch):
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "storage"))
    nights = [f"{i},{(22 + j) % 24}:30,{i * j % 7},{i % 2}" for i in range(20) for j in range(4)]
    (tmp_path / "nights.csv").write_text("\n".join(["id,time,hr,label", *nights]))

    done = invoke("nights", "--source", str(tmp_path / "nights.csv"), "--print")

    assert "# WARNING: time is less than a day, and not ascending in 20 series" in done.stdout


def test_what_is_printed_loads_as_an_experiment(waves, tmp_path):
    done = invoke("waves", "--source", waves, "--drop-rate", "0.3", "--print")

    assert done.exit_code == 0, done.output
    (tmp_path / "waves.yaml").write_text(done.stdout)
    experiment = load_experiment(str(tmp_path / "waves.yaml"))
    assert experiment.dataset.drop_rate == 0.3
    assert experiment.finetuning.trainer["epochs"] > 100  # 60 short series: many passes
    assert "published split: 60 train, 24 test" in done.stdout
    assert "of the gate and reports: accuracy; the classes" in done.stdout
    assert experiment.schedule is None


def test_it_is_written_once_and_replaced_only_by_force(waves, tmp_path, monkeypatch):
    monkeypatch.setenv("ROMA_PROJECT", str(tmp_path))

    first = invoke("waves", "--source", waves)
    again = invoke("waves", "--source", waves)
    forced = invoke("waves", "--source", waves, "--force", "--target", "slurm")

    path = tmp_path / "defs" / "waves" / "defs.yaml"
    assert first.exit_code == 0
    assert f"wrote       {path}" in first.output
    assert "primary metric: accuracy; the classes are balanced: " in first.output
    assert again.exit_code == 1
    assert "exists; choose another name" in again.output
    assert forced.exit_code == 0
    assert load_experiment(str(path)).resources.target == "slurm"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("Waves!", "--source", "nothing-here"),
            "expected lower-case letters",
        ),
        (("waves", "--source", "nothing-here.csv"), "no file matches nothing-here.csv"),
        (("waves", "--source", "WAVES", "--drop-rate", "1.5"), "dataset.drop_rate"),
        (("spirals", "--source", "WAVES", "--force"), "spirals is a shipped experiment"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(waves, tmp_path, monkeypatch, arguments, told):
    monkeypatch.setenv("ROMA_PROJECT", str(tmp_path))

    done = invoke(*(waves if word == "WAVES" else word for word in arguments))

    assert done.exit_code == 1
    assert told in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "defs").exists()


def test_dg_scaffolds_the_same(waves, tmp_path):
    project = tmp_path / "project"
    (project / "defs").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", project)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }

    done = subprocess.run(
        [
            *("dg", "scaffold", "defs", "roma_pipelines.components.RomaExperiment", "waves"),
            *("--source", str(tmp_path / "waves_train.ts")),
        ],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    path = project / "defs/waves/defs.yaml"
    assert load_experiment(str(path)).dataset.split.stratified

    path.write_text(path.read_text().replace("tokens_per_batch", "tokens_per_bach"))
    loading = [sys.executable, "-c", "from roma_pipelines.definitions import defs; defs()"]
    broken = subprocess.run(
        loading, cwd=project, env=environment, capture_output=True, text=True, check=False
    )

    assert broken.returncode == 0, broken.stderr
    *_, before, last = broken.stderr.splitlines()
    wrong = "trainer.tokens_per_bach: not a setting; the closest one is tokens_per_batch"
    assert before.endswith(f"the experiment waves is left out: {path}: pretraining.{wrong}")
    assert last == f"{path}: finetuning.{wrong}"


# choices ----------------------------------------------------------------------------------------


def statistics_of(
    n=40, start=0.0, scale=1.0, constant=False, labels=("a", "b"), classes=("a", "b")
):
    """Series of 20 observations of one channel, of two classes unless ``labels`` has fewer."""
    rng = np.random.default_rng(0)
    series = []
    for k in range(n):
        values = rng.normal(size=(20, 1)) * scale
        values[0] = 1e6 * scale if scale > 1 else values[0]
        series.append(
            RawSeries(
                id=f"s{k}",
                positions=start + np.arange(20.0)[:, None],
                values=(np.full((20, 1), k) if constant else values).astype(np.float32),
                label=labels[k % len(labels)],
            )
        )
    one = (Channel(name="v", unit="1"),)
    return source_statistics(HandMade(series=tuple(series), classes=classes, channels=one))


@pytest.mark.parametrize(
    ("labels", "classes", "told"), [("a", ("a", "b"), "only 'a'"), ((None,), (), "--label")]
)
def test_nothing_is_learnt_from_one_class_also_if_two_are_declared(labels, classes, told):
    with pytest.raises(ValueError, match=told):
        propose(statistics_of(labels=labels, classes=classes))


def test_groups_are_split_so_that_every_split_has_every_class():
    statistics = statistics_of(n=60)
    groups = {f"g{k}": {"ab"[k % 10 == 0]} for k in range(60)}
    dataset = propose(dataclasses.replace(statistics, classes_of_group=groups), name="x").dataset

    assert dataset["split"] == {"by": "group"}
    fractions = dataset["validation_fraction"], dataset["test_fraction"]
    splitter = Splitter("x", SplitOptions(by="group"), *fractions)
    rare = [
        RawSeries(id=g, positions=np.zeros((1, 1)), values=np.zeros((1, 1), "f4"), group=g)
        for g, label in groups.items()
        if label == {"b"}
    ]
    assert {splitter.assign(one) for one in rare} == {"train", "validation", "test"}


@pytest.mark.parametrize(("n", "fraction"), [(400, 0.1), (40, 0.19), (14, 0.25)])
def test_the_rarest_class_is_in_validation_too(n, fraction):
    dataset = propose(statistics_of(n=n)).dataset

    assert dataset["split"] == {"stratified": True}
    assert dataset["validation_fraction"] == fraction


def test_dates_are_anchored_and_small_positions_are_not():
    assert propose(statistics_of()).dataset["axes"]["t"] == {"scale": "auto"}
    assert propose(statistics_of(start=60_000)).dataset["axes"]["t"]["anchor"] == "first"


def test_far_values_are_squeezed_and_ordinary_ones_are_not():
    assert "channels" not in propose(statistics_of()).dataset
    channel = next(iter(propose(statistics_of(scale=10.0)).dataset["channels"].values()))
    assert channel["transform"] == "arcsinh"
    assert 5 < channel["transform_scale"] < 30


def test_a_channel_that_is_a_fact_of_the_object_is_pointed_at():
    assert propose(statistics_of()).warnings == []
    assert "never changes within a series" in propose(statistics_of(constant=True)).warnings[0]


def test_rows_that_are_averaged_are_pointed_at_if_they_are_many():
    for n, told in ((100, []), (800, ["50% of the rows are at the position of another of their"])):
        repairs = Repairs(duplicate_observations=n)
        found = propose(dataclasses.replace(statistics_of(), repairs=repairs)).warnings
        assert [line[: len(told[0])] for line in found] == told


def test_small_data_get_many_passes_and_large_data_few():
    small = default_settings(DatasetSize(n_series=40, n_observations=4_000, n_channels=1))
    large = default_settings(DatasetSize(n_series=50_000, n_observations=10_000_000, n_channels=2))

    assert small.steps["finetuning"] >= 1000
    assert (
        large.trainings["finetuning"]["trainer"]["epochs"]
        < small.trainings["finetuning"]["trainer"]["epochs"]
    )
    assert large.trainings["pretraining"]["model"]["encoder_config"]["d_model"] > 64
    # the loss of averaged weights says when few series are overfitted; windows learn for longer
    least = {"ema_decay", "early_stopping_patience", "best_metric"}
    assert least <= small.trainings["finetuning"]["trainer"].keys()
    assert least.isdisjoint(large.trainings["finetuning"]["trainer"])
    dense = DatasetSize(40, 4_000, n_channels=1, grid_fill=1.0)
    assert "final_weights" not in default_settings(dense).trainings["finetuning"]["trainer"]
    for sizes in (small, large):
        trainer = sizes.trainings["finetuning"]["trainer"]
        assert trainer["final_weights"] == "best"
        assert trainer["tokens_per_batch"] <= 2048
        assert trainer["eval_every"] <= sizes.steps["finetuning"]


def test_long_series_make_small_batches_and_more_steps():
    short = default_settings(DatasetSize(n_series=200, n_observations=20_000, n_channels=1))
    long = default_settings(DatasetSize(n_series=200, n_observations=200_000, n_channels=1))

    for sizes in (short, long):
        shown = sizes.trainings["finetuning"]["trainer"]["epochs"] * 200
        assert shown == pytest.approx(1200 * 16, rel=0.1)
    assert long.steps["finetuning"] > 5 * short.steps["finetuning"]


def test_a_second_axis_needs_cls_and_wide_observations_no_features():
    one = default_settings(DatasetSize(n_series=200, n_observations=20_000, n_channels=1))
    two = default_settings(
        DatasetSize(n_series=200, n_observations=20_000, n_channels=900, n_axes=2)
    )

    assert [s.trainings["pretraining"]["model"]["use_cls"] for s in (one, two)] == [False, True]
    assert [s.trainings["pretraining"]["model"]["value_features"] for s in (one, two)] == [64, 0]
    assert [s.trainings["pretraining"]["model"]["neighbours"] for s in (one, two)] == [5, 0]


def test_long_series_on_a_grid_get_windows():
    size = DatasetSize(n_series=200, n_observations=20_000, n_channels=1, grid_fill=0.5)
    windows = default_settings(size).shape

    assert windows["window"] > 1 and "neighbours" not in windows
    for other in (
        {"grid_fill": 0.0}, {"grid_fill": 0.01}, {"n_axes": 2}, {"n_channels": 900},
        {"n_observations": 2_000},
    ):  # fmt: skip
        assert "window" not in default_settings(dataclasses.replace(size, **other)).shape
    assert "window" not in default_settings(size, "observation").shape


def test_few_dense_series_are_not_pretrained_unless_that_is_asked_for():
    few = DatasetSize(n_series=200, n_observations=20_000, n_channels=1, grid_fill=1.0)
    many, ragged = dataclasses.replace(few, n_series=1000), dataclasses.replace(few, grid_fill=0.0)
    many = dataclasses.replace(many, n_observations=100_000)

    new = default_settings(few)
    assert set(new.trainings) == set(new.steps) == {"finetuning"}
    assert "no pretraining" in new.reasons["pretraining"]
    for pretrained in (
        default_settings(many),
        default_settings(ragged),
        default_settings(few, pretrains=True),
    ):
        assert "pretraining" in pretrained.trainings
        assert "window" not in pretrained.trainings["finetuning"]["model"]
    assert "pretraining" not in default_settings(ragged, pretrains=False).trainings
    shape = default_settings(few, pretrains=True).shape
    same = {name: value for name, value in new.shape.items() if name in shape}
    stack = same.pop("encoder_config")
    assert same.items() <= shape.items() and shape["encoder_config"].items() <= stack.items()


@pytest.mark.parametrize(
    ("grid_fill", "observed", "dropped"),
    [(1, 1, 0), (0.95, 1, 0), (0.9, 1, 0.5), (0.5, 1, 0.5), (1, 0.9, 0.5), (0, 1, 0.5)],
)
def test_observations_are_dropped_at_random_where_some_are_missing(grid_fill, observed, dropped):
    size = DatasetSize(200, 40_000, n_channels=1, grid_fill=grid_fill, observed=observed)
    finetuning = default_settings(size)

    assert finetuning.trainings["finetuning"]["trainer"]["augment_drop_rate"] == dropped
    assert ("no observations are dropped" in finetuning.reasons["finetuning"]) is (dropped == 0)


def test_every_choice_is_valid_for_the_trainer():
    from roma_pipelines.experiment import Stage, training_errors

    for size in (
        DatasetSize(n_series=1, n_observations=1, n_channels=900, n_axes=2),
        DatasetSize(n_series=200, n_observations=40_000, n_channels=2, grid_fill=1.0),
    ):
        sizes = default_settings(size)
        stages = {name: Stage(**one) for name, one in sizes.trainings.items()}
        assert not training_errors(stages.get("pretraining"), stages["finetuning"])


def test_the_file_holds_no_setting_twice(waves):
    text = invoke("waves", "--source", waves, "--print").stdout

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys))
        return loader.construct_mapping(node, deep=True)

    Strict.add_constructor("tag:yaml.org,2002:map", mapping)
    yaml.load(text, Strict)
