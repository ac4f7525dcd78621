"""Benchmarks of the results: runs run once, go on after an interruption, and stand in a table."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from roma_core.files import read_json
from roma_pipelines.experiment import COMPONENT, load_experiment
from roma_pipelines.launching.spec import JobFailed
from roma_pipelines.storage import Storage
from tests.benchmarks.results.__main__ import results
from tests.benchmarks.results.benchmarks import (
    Benchmark,
    Case,
    Reference,
    Run,
    chosen,
    read_benchmarks,
)
from tests.benchmarks.results.runs import (
    Plan,
    Record,
    execute,
    expected_s,
    read_record,
    record_path,
)
from tests.benchmarks.results.store import ResultsStore
from tests.benchmarks.results.table import put_in_place, section_text
from tests.pipelines.tiny import attributes

BENCHMARK = Benchmark(
    name="waves",
    experiment="waves",
    protocol="Waves.",
    cases=(Case(name="0%"), Case(name="50%", changes={"dataset.drop_rate": 0.5})),
    seeds=(0, 1),
    metrics=("accuracy", "log_loss"),
    references=(
        Reference(
            name="guess",
            source="invented",
            like_for_like=False,
            values={"accuracy": {"0%": 0.8, "50%": 0.7}, "log_loss": {"0%": 0.5}},
        ),
        Reference(
            name="best possible",
            source="computed",
            like_for_like=True,
            is_bound=True,
            values={"accuracy": {"0%": 0.99}},
        ),
    ),
)


def record(case, seed, accuracy, log_loss=0.4):
    return Record(
        run=Run(benchmark="waves", case=case, seed=seed),
        metrics={"accuracy": accuracy, "log_loss": log_loss},
        n_series=24,
        seconds={"pretraining": 1.0, "finetuning": 2.0},
        device="cpu",
        dataset_digest="d",
        settings_digest="s",
        code="abc",
        finished_at=0.0,
    )


def test_the_shipped_benchmarks_name_experiments_that_exist():
    benchmarks = read_benchmarks()

    for benchmark in benchmarks.values():
        experiment = load_experiment(benchmark.experiment)
        for case in benchmark.cases:
            assert benchmark.changed(experiment, case).name == experiment.name


def test_runs_are_chosen_by_benchmark_case_and_seed():
    benchmarks = {"waves": BENCHMARK}

    assert len(chosen(benchmarks, [], [], [])) == 4
    assert [run.name for run in chosen(benchmarks, ["waves"], ["50%"], [1])] == ["waves/50%/1"]
    with pytest.raises(ValueError, match="no benchmark 'wave'"):
        chosen(benchmarks, ["wave"], [], [])
    with pytest.raises(ValueError, match="no case '5%'; they have 0%, 50%"):
        chosen(benchmarks, ["waves"], ["5%"], [])


def test_the_table_says_what_was_run_what_is_ahead_and_what_was_not_run():
    records = {r.run: r for r in (record("0%", 0, 0.9, 0.6), record("0%", 1, 0.8, 0.6))}

    text = section_text(BENCHMARK, records, frozenset({Run(benchmark="waves", case="0%", seed=1)}))

    # t of one degree of freedom, 12.7, times 0.0707 / sqrt(2)
    assert "| 0% | accuracy | 0.850 ± 0.071 | 0.8 | 0.99 | even, +0.05 ± 0.635 |" in text
    assert "| 0% | log loss | 0.600 ± 0.000 | 0.5 | – | behind, -0.100 ± 0.000 |" in text
    assert "| 50% | accuracy | not run | 0.7 | – | – |" in text
    assert "not like for like" in text
    assert "earlier settings of the experiment: waves/0%/1" in text


def verdict(metric: str, *values: float) -> str:
    """The last cell of a table with one row, beside a figure of 0.2."""
    benchmark = Benchmark(
        name="r",
        experiment="e",
        protocol="",
        cases=(Case(name="c"),),
        seeds=(0, 1, 2),
        metrics=(metric,),
        references=(
            Reference(name="a", source="", like_for_like=True, values={metric: {"c": 0.2}}),
        ),
    )
    records = {}
    for seed, value in enumerate(values):
        run = Run(benchmark="r", case="c", seed=seed)
        found = record("0%", 0, 0).model_copy(update={"run": run, "metrics": {metric: value}})
        records[run] = found
    (row,) = re.findall(
        r"^\| c \| .*\|$", section_text(benchmark, records, frozenset()), re.MULTILINE
    )
    return row.split("|")[-2].strip()


@pytest.mark.parametrize(
    "metric, word",
    [
        ("mse_24_hz", "ahead"),
        ("clean_rmse", "ahead"),
        ("mse_observed_3", "ahead"),
        ("macro_f1", "behind"),
    ],
)
def test_a_smaller_error_and_a_larger_score_are_ahead(metric, word):
    assert verdict(metric, 0.1, 0.11, 0.12).startswith(f"{word}, ")


def test_nothing_is_claimed_where_the_interval_of_the_seeds_holds_zero():
    # t of two degrees of freedom, 4.303, times the deviation / sqrt(3)
    assert verdict("accuracy", 0.22, 0.26, 0.30) == "even, +0.060 ± 0.099"
    assert verdict("accuracy", 0.29, 0.30, 0.31) == "ahead, +0.100 ± 0.0248"
    assert verdict("accuracy", 0.2, 0.2, 0.2) == "even, +0.000 ± 0.000"
    assert verdict("accuracy", 0.9) == "+0.700, one seed"


def test_a_section_is_replaced_and_the_rest_left_alone(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Mine\n\nwords\n")

    put_in_place(path, "a", "first\n")
    put_in_place(path, "b", "other\n")
    put_in_place(path, "a", "second\n")

    text = path.read_text()
    assert text.startswith("# Mine\n\nwords\n")
    assert "first" not in text
    assert text.index("second") < text.index("other")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "storage"))
    file = {"type": COMPONENT, "attributes": attributes(tmp_path)}
    path = tmp_path / "waves.yaml"
    path.write_text(yaml.safe_dump(file))
    benchmark = BENCHMARK.model_copy(update={"experiment": str(path)})
    benchmarks = [benchmark.model_dump(mode="json")]
    (tmp_path / "benchmarks.yaml").write_text(yaml.safe_dump(benchmarks))
    monkeypatch.setattr(
        "tests.benchmarks.results.benchmarks.BENCHMARKS", tmp_path / "benchmarks.yaml"
    )
    monkeypatch.setattr(read_benchmarks, "__defaults__", (tmp_path / "benchmarks.yaml",))
    return load_experiment(str(path))


@pytest.mark.chaos  # of developers' own commands, half a minute
def test_a_run_is_made_once_and_the_table_is_written(tiny, tmp_path):
    out = tmp_path / "RESULTS.md"
    arguments = ["waves", "--case", "50%", "--seed", "0", "--out", str(out)]

    first = CliRunner().invoke(results, arguments)
    again = CliRunner().invoke(results, arguments)

    assert first.exit_code == 0, first.output
    assert "1 run to run" in first.output
    before_the_cost, _, _ = first.output.partition("1 run to run")
    assert "data of waves/50%/0: found, or built now …" in before_the_cost
    assert "finetune: job" in first.output
    assert again.exit_code == 0, again.output
    assert "job" not in again.output
    found = read_record(Storage.open(), Run(benchmark="waves", case="50%", seed=0))
    assert found is not None
    assert 0 <= found.metrics["accuracy"] <= 1
    assert f"{found.metrics['accuracy']:.3f} (1 of 2 seeds)" in out.read_text()


def test_the_expected_time_grows_with_the_model_and_other_settings_say_nothing(tiny):
    run, storage = Run(benchmark="waves", case="0%", seed=0), Storage.open()
    stack = "pretraining.model.encoder_config"
    wide = {f"{stack}.d_model": 512, f"{stack}.nhead": 4, f"{stack}.depth": 8}

    def expected(changes):
        case = Case(name="0%", changes=changes)
        return expected_s(plan(BENCHMARK.changed(tiny, case), run), storage, lambda line: None)

    narrow = expected({})
    made = record("0%", 0, 0.9)
    path = record_path(storage, run)
    path.parent.mkdir(parents=True)
    path.write_text(made.model_dump_json())
    assert expected(wide) > 20 * narrow, "a record with other settings is no guide"
    same = made.model_copy(update={"settings_digest": plan(tiny, run).digest})
    path.write_text(same.model_dump_json())
    assert expected({}) == 3


def test_ctrl_c_leaves_the_job_and_says_how_to_see_and_to_end_it(tiny, tmp_path, monkeypatch):
    def interrupted(launcher, folder, spec, config, **options):
        folder.attempt_record(1).parent.mkdir(parents=True)
        folder.attempt_record(1).write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("tests.benchmarks.results.runs.supervise", interrupted)

    found = CliRunner().invoke(results, ["--out", str(tmp_path / "R.md")])

    assert found.exit_code == 130
    (key,) = (path.name for path in Storage.open().jobs.iterdir())
    assert f"job {key} goes on" in found.stderr
    assert f"`roma-pipeline jobs cancel {key}`" in found.stderr
    assert "the same command" in found.stderr


BENCHMARK_TEXT = """
- name: waves
  experiment: waves
  protocol: Waves.
  cases: [{ name: 0%, chnages: {} }]
  seeds: [zero]
"""


def test_mistakes_in_a_file_of_benchmarks_are_sentences(tmp_path):
    path = tmp_path / "benchmarks.yaml"
    for text, said in (
        (BENCHMARK_TEXT, ("benchmark waves: cases.0.chnages: not a setting; the closest one is cases.0.changes",
                    "benchmark waves: seeds.0: must be a valid integer")),
        ("- 3", ("benchmark 1: expected a mapping of settings, got 3",)),
        ("benchmarks: 3", ("expected a list of benchmarks, got dict",)),
        ("- {", ("not valid YAML: line 1",)),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            read_benchmarks(path)
        lines = str(error.value).splitlines()
        assert len(lines) == len(said)
        for line, part in zip(lines, said, strict=True):
            assert line.startswith(f"{path}") and part in line


def test_mistakes_in_an_experiments_file_are_sentences(tiny, tmp_path):
    path = tmp_path / "waves.yaml"
    for changes, said in (
        ({"datset": {}}, ["datset: not a setting; the closest one is dataset"]),
        ({"dataset": 3}, ["dataset: must be a valid dictionary, got 3"]),
        (
            {"schedule": 5, "gate": {"mode": "x"}},
            [
                "gate.mode: must be 'automatic' or 'needs_approval', got 'x'",
                "schedule: must be a valid string, got 5",
            ],
        ),
        ({"finetuning": {"trainer": {"epoch": 2}}}, ["finetuning.trainer.epoch: "]),
    ):
        file = {"type": COMPONENT, "attributes": attributes(tmp_path) | changes}
        path.write_text(yaml.safe_dump(file))
        with pytest.raises(ValueError) as error:
            load_experiment(str(path))
        lines = str(error.value).splitlines()
        for line, part in zip(lines, said, strict=True):
            assert line.startswith(f"{path}: {part}")


def plan(experiment, run):
    return Plan(run, experiment, ("pretraining", "finetuning"), "test")


def test_a_run_may_finetune_new_weights_on_few_labels_and_be_judged_on_validation(tiny):
    benchmark = BENCHMARK.model_copy(update={"changes": {"finetuning.trainer.epochs": 2}})
    case = Case(name="few", changes={"finetuning.train_fraction": 0.5})
    run = Run(benchmark="waves", case="few", seed=0)
    few = Plan(run, benchmark.changed(tiny, case), ("finetuning",), "validation")

    found = execute(few, tiny.resources, Storage.open(), lambda line: None)

    (config,) = Storage.open().jobs.glob("*/config.json")
    document = read_json(config)
    assert (document["weights"], document["train_fraction"]) == (None, 0.5)
    assert document["model"]["encoder_config"]["d_model"] == 16
    assert document["trainer"]["epochs"] == 2
    assert found.metrics["log_loss"] == found.metrics["loss"] > 0
    assert set(found.seconds) == {"finetuning"}


def test_seeds_share_an_encoder_only_where_they_have_the_same_observations(tiny):
    benchmark = BENCHMARK.model_copy(update={"share_encoder": True, "seeds": (3, 4)})
    kept, dropped = (
        benchmark.encoder_seed(benchmark.changed(tiny, Case(name="c", changes=changes)))
        for changes in ({"dataset.drop_rate": 0}, {"dataset.drop_rate": 0.5})
    )
    assert (kept, dropped, BENCHMARK.encoder_seed(tiny)) == (3, None, None)
    whole = benchmark.changed(tiny, Case(name="c", changes={"dataset.drop_rate": 0}))
    own = plan(whole, Run(benchmark="waves", case="c", seed=4))
    shared = replace(own, encoder_seed=3)
    seeds = [shared.trainer(training).random_seed for training in ("pretraining", "finetuning")]
    assert seeds == [3, 4]
    assert own.trainer("pretraining").random_seed == 4
    assert shared.digest != own.digest
    first = replace(shared, run=Run(benchmark="waves", case="c", seed=3))
    assert first.digest == replace(first, encoder_seed=None).digest
    assert first.encoder == shared.encoder != own.encoder
    new = replace(shared, trainings=("finetuning",))
    assert new.digest == replace(new, encoder_seed=None).digest and new.encoder is None


@pytest.fixture
def sharing(tiny):
    """The benchmark of waves with one encoder, judged on validation."""
    return BENCHMARK.model_copy(
        update={
            "experiment": read_benchmarks()["waves"].experiment,
            "changes": {"dataset.drop_rate": 0},
            "share_encoder": True,
            "evaluated_on": "validation",
        }
    )


FIRST, SECOND = (Run(benchmark="waves", case="0%", seed=seed) for seed in (0, 1))


def test_a_shared_encoder_is_expected_once(sharing):
    def expected(*runs):
        store = ResultsStore(Storage.open(), {"waves": sharing})
        return [store.expected_s(run, lambda line: None) for run in runs]

    (alone,), both = expected(SECOND), expected(FIRST, SECOND)
    assert both[0] == alone > both[1] > 0
    digest = ResultsStore(Storage.open(), {"waves": sharing}).plan(FIRST).digest
    made = record("0%", 0, 0.9).model_copy(update={"settings_digest": digest})
    path = record_path(Storage.open(), FIRST)
    path.parent.mkdir(parents=True)
    path.write_text(made.model_dump_json())
    assert expected(SECOND) == [made.seconds["finetuning"]]


@pytest.mark.chaos  # of developers' own commands, half a minute
def test_a_shared_encoder_is_trained_and_recorded_once(sharing, tiny):
    store = ResultsStore(Storage.open(), {"waves": sharing})
    first, second = (
        execute(store.plan(run), tiny.resources, Storage.open(), lambda line: None)
        for run in (FIRST, SECOND)
    )

    assert set(first.seconds) == {"pretraining", "finetuning"}
    assert set(second.seconds) == {"finetuning"}
    tasks = [read_json(path)["task"] for path in Storage.open().jobs.glob("*/config.json")]
    assert sorted(tasks) == ["finetune", "finetune", "pretrain"]


def test_a_change_that_fits_nothing_is_refused(tiny):
    for changes, wrong in (
        ({"dataset.drop_rat": 0.5}, "drop_rat"),
        ({"name.first": 1}, "no section"),
        ({"finetuning.trainer.epochs": -1}, "epochs"),
    ):
        with pytest.raises(ValueError, match=wrong):
            BENCHMARK.changed(tiny, Case(name="wrong", changes=changes))


@pytest.mark.chaos  # of developers' own commands, half a minute
def test_an_interrupted_run_goes_on_with_the_jobs_that_are_done(tiny, tmp_path, monkeypatch):
    run, storage, log = Run(benchmark="waves", case="0%", seed=1), Storage.open(), []

    def die(line):
        log.append(line)
        if " evaluate: job" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan(tiny, run), tiny.resources, storage, die)
    made = {path: path.stat().st_mtime_ns for path in storage.jobs.glob("*/result.json")}
    execute(plan(tiny, run), tiny.resources, storage, log.append)

    assert len(made) == 2
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    assert read_record(storage, run) is not None


def test_a_run_that_fails_says_why(tiny, tmp_path):
    broken = tiny.model_copy(
        update={
            "finetuning": tiny.finetuning.model_copy(
                update={"trainer": {**tiny.finetuning.trainer, "base_lr": 1e30}}
            )
        }
    )

    with pytest.raises(JobFailed, match="not finite"):
        execute(
            plan(broken, Run(benchmark="waves", case="0%", seed=0)),
            broken.resources,
            Storage.open(),
            lambda line: None,
        )
    assert not list(Path(Storage.open().root).glob("results/**/*.json"))
