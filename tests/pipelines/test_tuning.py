"""Hyperparameter search: its space, its trials, a killed search, and the change of the file."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import dagster as dg
import pytest
import yaml
from click.testing import CliRunner

from roma_core.data.build import build_dataset
from roma_core.data.store import StoredDataset
from roma_core.job import Exit, Result
from roma_core.trainer.job import train
from roma_pipelines import tuning
from roma_pipelines.cli import main
from roma_pipelines.cli.tune import changed_text
from roma_pipelines.experiment import COMPONENT, Experiment
from roma_pipelines.launching.jobs import all_jobs
from roma_pipelines.launching.spec import JobState, Phase
from roma_pipelines.launching.targets import launcher_for
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.resources import JOB_CLIENTS, LocalJobClient
from roma_pipelines.search_space import default_space, sections
from roma_pipelines.storage import DEFS
from tests.pipelines import tiny
from tests.pipelines.launching.fake import FakeLauncher, running
from tests.time_limits import wait_until, within

RATE = "finetuning.trainer.base_lr"
RATES = {RATE: {"low": 1e-4, "high": 0.1, "log": True}}
FAST = {"pretraining": {"trainer": {"epochs": 1, "batch_size": 16}}}
FAST["finetuning"] = {"trainer": {"epochs": 2, "batch_size": 8, "base_lr": 0.01, "eval_every": 6}}


def attributes(folder, **section):
    return tiny.attributes(folder, **FAST, tuning={"space": RATES, "parallel": 1, **section})


# -- the section ---------------------------------------------------------------------------------


def test_the_default_space_has_what_the_file_drops(tmp_path):
    trainer = FAST["finetuning"]["trainer"] | {"augment_drop_rate": 0.75}
    experiment = Experiment.parse(tiny.attributes(tmp_path, finetuning={"trainer": trainer}))
    assert default_space(experiment)["finetuning.trainer.augment_drop_rate"].contains(0.75)


@pytest.mark.parametrize(
    ("path", "dimension", "sentence"),
    [
        (RATE, {"low": -0.1, "high": 1}, f"tuning.space: {RATE}: must be greater than 0, got -0.1"),
        ("finetuning.trainer.rate", {"choices": [1, 2]}, "finetuning.trainer.rate: not a setting"),
        ("finetuning.model.use_cls", {"choices": [True, False]}, "determined by the pretrained"),
        ("trainer.base_lr", {"low": 0.1, "high": 1}, "expected a path such as"),
        (
            "finetuning.trainer.epochs",
            {"low": 1.5, "high": 9},
            "finetuning.trainer.epochs: must be",
        ),
        ("finetuning.trainer.random_seed", {"low": 1, "high": 9}, "best of several seeds"),
        ("finetuning.trainer.eval_every", {"low": 1, "high": 9}, "best of its evaluations"),
        (RATE, {"low": 0.1, "high": float("inf")}, "finite"),
        (RATE, {"low": 0.1, "high": 0.2, "step": 1}, "larger than the range"),
        (RATE, {"low": 1, "high": 0.1}, "expected low and a larger high, or choices; got low=1.0"),
        (RATE, {"low": 0, "high": 1, "log": True}, "log needs a low above 0"),
        (RATE, {"choices": [0.1, 0.2], "low": 0.1}, "nothing beside them"),
    ],
)
def test_a_wrong_space_is_refused_when_the_file_loads(tmp_path, path, dimension, sentence):
    with pytest.raises(ValueError) as caught:
        Experiment.parse(attributes(tmp_path, space={path: dimension}))
    assert sentence in str(caught.value)


def test_only_an_experiment_with_the_section_changes(tmp_path):
    plain = tiny.attributes(tmp_path)
    assert "tuning" not in Experiment.parse(plain).model_dump()
    graph = tiny.definitions(plain | {"tuning": {}}).resolve_asset_graph()
    study = graph.get(dg.AssetKey(["waves", "tuning_study"]))
    assert [key.path[-1] for key in study.parent_keys] == ["dataset"] and not study.child_keys
    keys = tiny.definitions(plain).resolve_asset_graph().materializable_asset_keys
    assert study.key not in keys


# -- the file ------------------------------------------------------------------------------------


def test_better_settings_are_written_between_the_comments_of_the_file():
    before = (DEFS / "japanese_vowels" / "defs.yaml").read_text()
    settings = {
        RATE: 1e-5,
        "finetuning.trainer.optimizer_args.weight_decay": 0.1,
        "finetuning.trainer.warmup_steps": None,
        "finetuning.model.encoder_config.pos_drop_rate": 0.2,
        "finetuning.model.pooling": "mean",
        "pretraining.trainer.epochs": 7,
    }
    one, other = "a-0123456789ab, trial 1: x", "b-0123456789ab, trial 2: x"
    after = changed_text(before, settings, one)
    experiment = Experiment.parse(yaml.safe_load(before)["attributes"])

    made = Experiment.parse(yaml.safe_load(after)["attributes"])
    assert made == experiment.with_settings(**sections(experiment, settings))
    gone = set(before.splitlines()) - set(after.splitlines())
    assert len(gone) == 3 and not any("#" in line for line in gone)  # base_lr, two flow mappings
    again = changed_text(after, {RATE: 0.5}, other)
    assert again.count(f"# tuned by {one}") == 1  # of the pretraining
    assert again.count(f"  # tuned by {other}\n  finetuning:") == 1


def test_a_shipped_file_is_not_changed():
    done = CliRunner().invoke(main, ["tune", "japanese_vowels", "--write"])

    assert done.exit_code == 1
    assert (
        "defs.yaml is shipped and not changed; copy it to defs/NAME in your project" in done.output
    )


@pytest.mark.parametrize(
    ("trainer", "after"),
    [
        # a comment stays with the line below it, and what a person wrote stays
        (
            " # by hand\n      # table 3\n      epochs: 9 # few\n",
            "epochs: 9 # few\n      base_lr: 0.5",
        ),
        ("\n      base_lr:\n      epochs: 9\n", "base_lr: 0.5\n      epochs: 9"),
        (" {epochs: 9}\n", "{epochs: 9, base_lr: 0.5 }"),
        (" {}\r\n", "{ base_lr: 0.5 }\r\n"),
        (" &a\n      epochs: 9\n", None),
        (" !!map {epochs: 9}\n", None),
    ],
)
def test_forms_of_yaml_are_kept_or_refused(trainer, after):
    text = f"attributes:\n  # tuned by hand\n  finetuning:\n    trainer:{trainer}"
    if after is None:
        with pytest.raises((ValueError, yaml.YAMLError)):
            changed_text(text, {RATE: 0.5}, "evidence")
        return
    made = changed_text(text, {RATE: 0.5}, "evidence")
    assert after in made and "  # tuned by hand" in made
    assert yaml.safe_load(made)["attributes"]["finetuning"]["trainer"]["base_lr"] == 0.5


# -- trials --------------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(tuning, "_POLL_S", 0.01)
    monkeypatch.setattr(tuning, "supervise", functools.partial(tuning.supervise, poll_every_s=0.01))


def finish(folder, attempt, spec, **result):
    attempt.path.mkdir(parents=True, exist_ok=True)
    attempt.write_exit(Exit(status="completed"))
    facts = {"job_key": spec.key, "attempt": attempt.n, "world_size": 1, "wall_s": 0.0}
    folder.write_result(Result(**facts, **result))
    return JobState(Phase.ENDED_OK)


def trained(folder, attempt, spec):
    """The training itself, in this process."""
    attempt.path.mkdir(parents=True, exist_ok=True)
    return finish(folder, attempt, spec, outputs=train(folder, attempt).outputs)


class InThisProcess(LocalJobClient):
    def launcher(self, profile=None):
        return FakeLauncher([trained])


@pytest.fixture
def searched(storage, tmp_path, fast, monkeypatch):
    """A search whose trials log the given values: None fails, and low ones wait to be pruned."""

    def make(curves, **section):
        experiment = Experiment.parse(attributes(tmp_path, trials=len(curves), **section))
        lines = []

        def play(folder, attempt, spec):
            n = next(n for n in range(99) if search._folder(f"trial {n}") == folder)
            if curves[n] is None:
                failed = Exit(status="failed", reason=f"ValueError: no such axis in {folder.path}")
                attempt.path.mkdir(parents=True, exist_ok=True)
                attempt.write_exit(failed)
                return JobState(Phase.ENDED_BAD, "exit code 1")
            records = [{"step": k, "metrics": {search.metric: v}} for k, v in enumerate(curves[n])]
            folder.metrics.write_text("".join(json.dumps(one) + "\n" for one in records))
            return JobState(Phase.RUNNING) if curves[n][-1] == 0 else finish(folder, attempt, spec)

        fake = FakeLauncher([play, *[running()] * 9999])
        search = tuning.Search(experiment, dataset, storage, lines.append, lambda *_: fake)
        monkeypatch.setattr(search, "_encoder", lambda *_: None)
        monkeypatch.setattr(tuning.runs.JobRun, "update", lambda *_: None)
        return search, lines

    experiment = Experiment.parse(attributes(tmp_path))
    dataset = build_dataset(experiment.dataset, storage.datasets, storage.cache, progress=False)
    return make


def test_every_trial_counts_once_and_the_best_is_compared_with_the_file(searched):
    flat = [[value] * 5 for value in (0.5, 0.6, 0.7, 0.5, 0.4)]
    search, lines = searched([*flat, None, [0.1, 0.1, 0.1, 0.1, 0]], parallel=1)
    found = search.run()

    assert Counter(row["state"] for row in found.rows) == {"complete": 5, "fail": 1, "pruned": 1}
    assert found.rows[5]["reason"].startswith("ValueError: no such axis")
    assert found.rows[0]["settings"] == "settings of the file"
    assert (found.best.number, found.file) == (2, 0.5)
    assert found.text.startswith("trial 2 beats the settings of the file by 0.2000: eval/accuracy")
    assert found.settings.keys() == {RATE}
    assert (
        "trial 6: eval/accuracy 0.1000, pruned after 5 evaluations; best so far 0.7000" in lines[-1]
    )
    again, lines = searched([*flat, None, None], parallel=1)
    assert again.run().rows == found.rows
    assert "7 of 7 trials were started, 0 are unfinished" in lines[0]
    other, _ = searched([[0.5]] * 3, hours=1e-9, space={RATE: {"choices": [0.1, 0.2]}})
    assert len(other.run().rows) == 1 and other.name != search.name


@pytest.mark.parametrize("parallel, each", [(1, 6), (2, 3)])
def test_trials_share_the_cores_of_this_computer(searched, monkeypatch, parallel, each):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("joblib.cpu_count", lambda **_: 6)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 6)
    search, _ = searched([[0.5], [0.6]], parallel=parallel)
    search.run()

    specs = [json.loads(path.read_text()) for path in search.storage.jobs.glob("*/spec.json")]
    assert [spec["threads_per_process"] for spec in specs] == [each, each]


def test_a_failure_of_all_first_trials_ends_the_search(searched):
    search, _ = searched([None] * 9, parallel=1)
    with pytest.raises(tuning.TuningError, match=r"no trial of the study waves-.*no such axis"):
        search.run()
    assert len(search.study.trials) == 3


def test_settings_of_the_file_that_fail_are_tried_once(searched):
    search, _ = searched([None, [0.5], [0.6]], parallel=1)
    found = search.run()

    assert [row["settings"] == "settings of the file" for row in found.rows] == [True, False, False]
    assert found.file is None and found.settings.keys() == {RATE}


def test_a_target_that_takes_no_jobs_ends_the_search_and_costs_no_trial(searched):
    curves = [[0.5], [0.6], None, None, None, [0.9]]
    search, _ = searched(curves, parallel=1)
    search.launcher = lambda *_: launcher_for("slurm", "nope", search.storage)
    with pytest.raises(tuning.TuningError, match=r"(?s)trial 0 could not start: .*same command"):
        search.run()

    found = searched(curves, parallel=1)[0].run()
    states = [row["state"] for row in found.rows]
    assert states == ["complete", "complete", "fail", "fail", "fail"], "alike failures end it"


def test_the_asset_searches_without_the_test_split(storage, tmp_path, fast, monkeypatch):
    given = attributes(tmp_path, trials=2) | {"primary_metric": "macro_f1"}
    trainer = given["finetuning"]["trainer"] | {"best_metric": "eval/loss"}  # compares no trials
    given["finetuning"] = given["finetuning"] | {"trainer": trainer}
    assets = tiny.definitions(given).assets
    clients = {**JOB_CLIENTS, "local": InThisProcess()}

    def materialize(name):
        key, where = dg.AssetKey(["waves", name]), {"instance": instance, "resources": clients}
        assert dg.materialize(assets, selection=[key], **where).success
        return instance.get_latest_materialization_event(key).asset_materialization.metadata

    with dg.DagsterInstance.get() as instance:
        materialize("dataset")
        splits, split = set(), StoredDataset.split
        monkeypatch.setattr(
            StoredDataset, "split", lambda self, name: splits.add(name) or split(self, name)
        )
        made = materialize("tuning_study")
        jobs = {job.key: job for job in all_jobs(storage.jobs)}

    assert splits == {"train", "validation"}
    assert Counter(job.spec.command[2] for job in jobs.values()) == {"pretrain": 1, "finetune": 2}
    logged = [
        json.loads(line)["metrics"].get("eval/macro_f1", 0)
        for job in jobs.values()
        for line in job.folder.metrics.read_text().splitlines()
    ]
    assert made["best_value"].value == max(logged) > 0
    page = Path(made["report"].value).read_text()
    assert made["study"].value in page and page.count("data:image/png") >= 2
    client = connect(MlflowSettings(), storage.mlflow)
    runs = client.search_runs([client.get_experiment_by_name("roma/waves").experiment_id])
    (outer,) = (run for run in runs if run.info.run_name == made["study"].value)
    inner = [run.data.tags.get("mlflow.parentRunId") for run in runs if run is not outer]
    assert inner == [outer.info.run_id] * 3
    assert outer.data.metrics["best_eval/macro_f1"] == made["best_value"].value


@pytest.mark.slow
def test_a_killed_search_adopts_its_trials(storage, tmp_path):
    path = tmp_path / "defs.yaml"
    path.write_text(yaml.safe_dump({"type": COMPONENT, "attributes": attributes(tmp_path)}))
    command = [sys.executable, "-m", "roma_pipelines.cli", "tune", str(path)]
    command += ["--trials", "2", "--parallel", "2"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    log = tmp_path / "log"

    def n_claimed():
        return len(list(storage.jobs.glob("*/attempts/1/owner.json")))

    with log.open("w") as output:
        first = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        wait_until(lambda: n_claimed() == 3 or first.poll() is not None, 60, "both trials run")
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=within(60)
    )

    assert done.returncode == 0, log.read_text() + done.stdout + done.stderr
    assert "2 of 2 trials were started, " in done.stdout
    assert "; 2 of 2 trials, " in done.stdout
    assert "of the file" in done.stdout.splitlines()[-2]
    jobs = all_jobs(storage.jobs)
    assert [len(job.records) for job in jobs] == [1, 1, 1]
    assert {job.status for job in jobs} == {"completed"}
    assert not tiny.living_jobs(storage.jobs)
