"""The whole path on a tiny experiment: real jobs, a real Dagster instance, a real MLflow store.

The jobs of ``first`` start as they do for users, those of all later events by a fork.

The tests follow one story; each fixture is its next event: ``first`` (two processes a training),
``interrupted`` and ``second`` (a failure after finetuning, and its retry, both with a run config), ``refused`` (a gate that
nothing passes), ``waiting`` (one that asks a person), ``damaged`` (a champion with a broken file),
``continued`` (the champion trained further), ``failed`` (a loss that is not finite).
"""

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from roma_core.data.store import StoredDataset
from roma_core.evaluation.predictions import PredictionTable
from roma_core.files import read_json, write_json
from roma_core.job import JobFolder
from roma_pipelines.assets import training
from roma_pipelines.automation.settings import DriftThresholds
from roma_pipelines.cli import main
from roma_pipelines.registry.gate import CHECKS
from roma_pipelines.registry.promotion import audit
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.registry.versions import version_at
from tests import forked
from tests.pipelines import tiny
from tests.pipelines.forked_jobs import jobs_are_forked
from tests.time_limits import within

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@dataclass
class House:
    """Where the story takes place."""

    folder: Path
    instance: dg.DagsterInstance

    @property
    def client(self):
        return connect(MlflowSettings(), self.folder / "roma" / "mlflow")

    def materialise(self, *nouns, tags=None, run_config=None, **changes):
        """Materialise the experiment, or some of its assets, with some settings changed."""
        definitions = tiny.definitions(tiny.attributes(self.folder, **changes))
        with jobs_are_forked() if nouns else contextlib.nullcontext():
            return definitions.resolve_implicit_global_asset_job_def().execute_in_process(
                instance=self.instance,
                asset_selection=[dg.AssetKey(["waves", n]) for n in nouns or tiny.ASSET_NAMES],
                tags=tags,
                run_config={
                    "ops": {f"waves__{k}": {"config": v} for k, v in (run_config or {}).items()}
                },
                raise_on_error=False,
            )

    def aliases(self):
        return {name: version_at(self.client, "waves", name) for name in ("champion", "previous")}

    def runs(self):
        experiment = self.client.get_experiment_by_name("roma/waves")
        return self.client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROMA_STORAGE_ROOT", str(folder / "roma"))
        patch.setenv("ONE", "1")
        patch.setenv("ROMA_ENV_FILE", str(folder / "empty.env"))
        (folder / "empty.env").touch()
        (folder / "dagster").mkdir()
        with dg.DagsterInstance.local_temp(str(folder / "dagster")) as instance:
            yield House(folder, instance)
    assert tiny.living_jobs(folder) == []


@pytest.fixture(scope="module")
def first(house):
    return house.materialise(resources={"processes_per_node": 2}, measure_baselines=True)


def metadata_of(result, noun) -> dict[str, Any]:
    """Metadata of the asset's materialisation in this run."""
    (event,) = result.asset_materializations_for_node(f"waves__{noun}")
    return {name: value.value for name, value in event.metadata.items()}


def failure_of(result, noun) -> dg.DagsterEvent:
    (event,) = [e for e in result.all_events if e.is_step_failure and e.step_key.endswith(noun)]
    return event.step_failure_data.error


def test_all_five_assets_are_made(first):
    assert first.success
    assert all(metadata_of(first, noun) for noun in tiny.ASSET_NAMES)
    assert "confusion matrix" in metadata_of(first, "evaluation_report")["summary_plot"]
    assert {e.check_name: e.passed for e in first.get_asset_check_evaluations()} == {
        "sound": True,
        "unsuspicious": True,
    } | dict.fromkeys(CHECKS, True)


@pytest.mark.parametrize("noun", ["pretrained_encoder", "finetuned_classifier"])
def test_two_processes_trained_together(first, noun):
    facts = metadata_of(first, noun)

    assert facts["processes"] == "2"
    assert "weights kept" in unquote(facts["summary_plot"]) and facts["weights_step"] > 0
    log = Path(facts["log"])
    assert "2 process(es)" in log.read_text()
    assert (log.parent / "torchrun").is_dir()  # not in /tmp, where nobody would remove it


@pytest.mark.parametrize("noun", ["pretrained_encoder", "finetuned_classifier"])
def test_mlflow_has_every_point_of_metrics_jsonl_once(house, first, noun):
    facts = metadata_of(first, noun)
    lines = [json.loads(line) for line in Path(facts["metrics"]).read_text().splitlines()]
    written = sorted(
        (name, line["step"], value) for line in lines for name, value in line["metrics"].items()
    )
    names = {name for name, _, _ in written}
    assert {"train/loss", "train/lr", "eval/loss"} <= names

    stored = sorted(
        (name, point.step, point.value)
        for name in names
        for point in house.client.get_metric_history(facts["mlflow_run_id"], name)
    )

    assert stored == written


def test_every_job_has_one_finished_run_with_its_configuration(house, first):
    runs = {run.data.tags["roma.asset"]: run for run in house.runs()}

    assert set(runs) == {f"waves/{noun}" for noun in tiny.ASSET_NAMES[1:4]}
    assert len(runs) == 3
    for noun, run in runs.items():
        assert run.info.status == "FINISHED"
        facts = metadata_of(first, noun.removeprefix("waves/"))
        assert run.data.tags["roma.job_key"] == facts["job_key"]
        assert run.info.run_id == facts["mlflow_run_id"]
    params = runs["waves/finetuned_classifier"].data.params
    assert params["trainer.batch_size"] == "8"
    assert (params["trainer.best_metric"], params["trainer.best_metric_mode"]) == (
        "eval/accuracy",
        "max",
    )
    compared = metadata_of(first, "evaluation_report")["primary_metric"]
    assert compared.startswith("accuracy ") and "the classes are balanced" in compared


def test_the_first_version_is_champion(house, first):
    assert metadata_of(first, "registered_classifier")["aliases"] == "champion, candidate"
    assert house.aliases() == {"champion": "1", "previous": None}


def test_progress_was_observed_on_the_asset(house, first):
    key = dg.AssetKey(["waves", "pretrained_encoder"])
    events = house.instance.fetch_observations(key, limit=50).records
    facts = [record.asset_observation.metadata for record in events]

    last = max(facts, key=lambda f: f["step"].value)
    assert last["step"].value == last["total_steps"].value
    assert last["train/loss"].value > 0


def test_recent_inputs_are_compared_by_a_job_and_a_check_warns_of_drift(house, first, tmp_path):
    """Test series, then with a flat channel and missing values: numbers over time under equal names."""
    recent = tmp_path / "recent.parquet"
    drift = {"files": [str(recent)], "min_series": 10}

    def compared():
        result = house.materialise("recent_inputs", automation={"drift": drift})
        assert result.success
        (check,) = result.get_asset_check_evaluations()
        assert check.severity is dg.AssetCheckSeverity.WARN
        return metadata_of(result, "recent_inputs"), check

    nothing = house.materialise("recent_inputs", automation={"drift": drift})
    assert nothing.success and not nothing.asset_materializations_for_node("waves__recent_inputs")
    StoredDataset(Path(metadata_of(first, "dataset")["path"])).to_parquet(recent, "test")
    near, _ = compared()
    table = pq.read_table(recent)
    flat = [[5.0] * len(row) for row in table["c01"].to_pylist()]
    nan = [[float("nan"), *row[1:]] for row in table["c02"].to_pylist()]
    for name, column in (("c01", flat), ("c02", nan)):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array(column, pa.list_(pa.float64())))
    pq.write_table(table, recent)
    far, check = compared()

    assert (near["series"], near["features"]) == (24, "compared")
    numbers = [name for name in near if name.endswith((" psi", " wasserstein", " embedding"))]
    assert {"value.c01 psi", "features embedding", "largest wasserstein"} <= set(numbers)
    assert set(numbers) <= set(far) and near["inputs"] != far["inputs"]
    sizes = near["features embedding"], far["features embedding"]
    assert sizes[0] < DriftThresholds().embedding < sizes[1]
    assert not check.passed and "features embedding is " in check.description
    assert far["drift"].startswith("![drift against the training data](data:image/png;base64,")
    assert "value.c01 " in unquote(far["summary_plot"])
    run = house.client.get_run(far["mlflow_run_id"])
    (plot,) = house.client.list_artifacts(run.info.run_id, "plots")
    assert plot.path == "plots/drift.png"


def test_the_command_predicts_what_the_report_says(house, first, tmp_path):
    """Training code on packed rows and the served model on raw rows agree."""
    report = JobFolder(metadata_of(first, "evaluation_report")["job_folder"])
    table = PredictionTable.load(report.outputs / "predictions.parquet")
    rows = zip(table.ids, table.predicted, table.probabilities, strict=True)
    expected = {name: (table.classes[label], p) for name, label, p in rows}
    assert len({label for label, _ in expected.values()}) == 3, "it learnt to tell them apart"

    done = forked.run(
        *("roma_core.cli", "predict"),
        *("--model", "models:/waves@champion", "--tracking-uri", house.client.tracking_uri),
        *(metadata_of(first, "dataset")["path"], str(tmp_path / "served.parquet")),
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert "24 series classified by models:/waves@champion (version 1)" in done.stdout
    rows = pq.read_table(tmp_path / "served.parquet").to_pylist()
    assert {row["id"] for row in rows} == set(expected)
    for row in rows:
        label, probabilities = expected[row["id"]]
        assert row["label"] == label
        served = dict(row["probabilities"])
        assert [served[name] for name in table.classes] == pytest.approx(probabilities, abs=1e-5)


CHANGED = {"target": "local", "model": {"encoder_config": {"drop_path_rate": 0.05}}, "trainer": {"epochs": 30}, "nodes": "1"}  # fmt: skip
# as the page scaffolds it
RUN_CONFIG = {"finetuned_classifier": {**CHANGED, "nodes": {"env": "ONE"}, "profile": None}}


@pytest.fixture(scope="module")
def interrupted(house, first):
    """A new classifier, whose worker fails between the end of the job and its materialisation."""
    with pytest.MonkeyPatch.context() as patch:
        show = training._materialised

        def fail_once(job, *lineage):
            if "finetune" in (job.folder.spec).read_text():
                raise OSError("the worker lost its disk")
            return show(job, *lineage)

        patch.setattr(training, "_materialised", fail_once)
        return house.materialise(*tiny.ASSET_NAMES[2:], run_config=RUN_CONFIG)


@pytest.fixture(scope="module")
def second(house, interrupted):
    """Its retry from failure, as Dagster's page and daemon tag it, with another run config."""
    run_id = interrupted.run_id
    return house.materialise(
        *tiny.ASSET_NAMES[2:],
        run_config={"finetuned_classifier": {"trainer": {"epochs": 29}}},
        tags={
            "dagster/is_resume_retry": "true",
            "dagster/parent_run_id": run_id,
            "dagster/root_run_id": run_id,
        },
    )


def test_a_retry_finds_the_finished_job(house, interrupted, second):
    assert "the worker lost its disk" in str(failure_of(interrupted, "finetuned_classifier"))
    assert second.success
    facts = metadata_of(second, "finetuned_classifier")

    (run,) = [run for run in house.runs() if run.data.tags["roma.job_key"] == facts["job_key"]]
    assert run.data.tags["roma.dagster_run_id"] == interrupted.run_id
    assert run.info.status == "FINISHED"
    assert facts["attempts"] == 1
    log = Path(facts["log"]).read_text()
    assert len(re.findall("process\\(es\\) on cpu", log)) == 1


def test_a_run_config_is_recorded_wherever_the_model_is_looked_at(house, second):
    facts = metadata_of(second, "finetuned_classifier")
    assert facts["run_config"] == CHANGED
    (made,) = second.asset_materializations_for_node("waves__finetuned_classifier")
    assert made.tags["dagster/data_version"] == facts["job_key"]  # what depends on it is stale
    run = house.client.get_run(facts["mlflow_run_id"])
    assert json.loads(run.data.tags["roma.run_config"]) == CHANGED
    assert run.data.params["trainer.epochs"] == "30"
    assert "'drop_path_rate': 0.05" in run.data.params["model.encoder_config"]
    recorded = json.dumps({"finetuned_classifier": CHANGED}, sort_keys=True)
    assert metadata_of(second, "evaluation_report")["trained_with"] == recorded
    version = house.client.get_model_version("waves", "2")
    assert version.tags["roma.run_config"] == recorded
    assert "| run config |" in version.description and "drop\\_path\\_rate" in version.description
    assert recorded in operate(house, "lineage", "waves/2")
    assert "run config" not in operate(house, "lineage", "waves/1")


def test_a_wrong_run_config_of_a_later_asset_fails_before_anything_is_queued(house, second):
    jobs = set((house.folder / "roma" / "jobs").iterdir())
    for wrong, sentence in (
        (
            {"trainer": {"epoch": 1}},
            "finetuning.trainer.epoch: not a setting; the closest one is epochs",
        ),
        ({"target": "slurm", "profile": "nope"}, "there is no SLURM profile 'nope'"),
    ):
        given = {"finetuned_classifier": wrong}
        run = house.materialise("pretrained_encoder", "finetuned_classifier", run_config=given)
        assert sentence in failure_of(run, "pretrained_encoder").message
    assert set((house.folder / "roma" / "jobs").iterdir()) == jobs


def test_the_second_version_replaces_the_first(house, second):
    facts = metadata_of(second, "registered_classifier")

    assert (facts["version"], facts["aliases"]) == ("2", "champion, candidate")
    assert house.aliases() == {"champion": "2", "previous": "1"}
    assert metadata_of(second, "evaluation_report")["champion_version"] == "1"
    events = audit(house.client, "waves")
    assert [(event.version, event.replaced) for event in events] == [("1", None), ("2", "1")]
    assert events[1].evidence["dagster_run_id"] == second.run_id


@pytest.fixture(scope="module")
def refused(house, second):
    gate = {"max_calibration_error": 0.0, "max_latency_ratio": 1000}
    return house.materialise(*tiny.ASSET_NAMES[3:], gate=gate)


def test_a_candidate_that_fails_the_gate_changes_nothing(house, refused):
    assert not refused.success
    checks = {e.check_name: e for e in refused.get_asset_check_evaluations()}
    assert {name for name, check in checks.items() if not check.passed} == {"calibration"}
    assert checks["calibration"].description.endswith("; at most 0")
    assert refused.asset_materializations_for_node("waves__registered_classifier") == []
    assert [v.version for v in house.client.search_model_versions("name = 'waves'")] == [2, 1]
    assert house.aliases() == {"champion": "2", "previous": "1"}
    assert metadata_of(refused, "evaluation_report")["champion_version"] == "2"


def operate(house, *arguments, ok=True, process=False):
    """``roma-pipeline`` on the house's state, in this process or in its own; what it says."""
    settings = {"ROMA_STORAGE_ROOT": str(house.folder / "roma")}
    if process:
        done = forked.run(
            "roma_pipelines.cli", *arguments, cwd=house.folder, environment=os.environ | settings
        )
        code, said = done.returncode, done.stdout + done.stderr
    else:
        result = CliRunner().invoke(main, arguments, env=settings)
        code, said = result.exit_code, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
    assert (code == 0) is ok, said
    assert "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def waiting(house, first, refused):
    """A candidate that waits for approval, and the champion's predictions of the data set."""
    data = metadata_of(first, "dataset")["path"]
    return house.materialise(
        *(*tiny.ASSET_NAMES[3:], "batch_predictions"),
        gate={"mode": "needs_approval", "max_latency_ratio": 1000},
        predictions={"input": data},
    )


def test_a_candidate_waits_until_a_person_decides_and_one_command_goes_back(house, waiting):
    assert waiting.success
    facts = metadata_of(waiting, "registered_classifier")
    assert (facts["version"], facts["aliases"]) == ("3", "candidate")
    assert "roma-pipeline promote waves 3 --reason" in facts["approval"]
    assert house.aliases() == {"champion": "2", "previous": "1"}

    said = operate(
        house, "promote", "waves", "3", "--reason", "seen by me", "--actor", "ada", process=True
    )
    assert "version 3 is champion; previous is 2" in said
    again = operate(house, "promote", "waves", "3", "--reason", "once more")
    assert "version 3 is already champion, nothing was changed; previous is 2" in again
    event = audit(house.client, "waves")[-1]
    assert (event.actor, event.reason, event.evidence["gate"]) == ("ada", "seen by me", "passed")
    assert event.evidence["evaluation_job"] == metadata_of(waiting, "evaluation_report")["job_key"]
    assert version_at(house.client, "waves_encoder", "champion") == "3"

    said = operate(house, "rollback", "waves", "--reason", "drifts", process=True)
    seconds = float(re.search(r"version 2 is champion again \((.*) s\)", said).group(1))
    print(f"rollback took {seconds} s")
    assert seconds < within(5)
    assert house.aliases() == {"champion": "2", "previous": "1"}
    said = operate(house, "promote", "waves", "3", "--reason", "again", ok=False)
    assert "was rolled back" in said and "drifts" in said


def test_a_report_says_how_often_its_test_split_has_decided(waiting):
    config = read_json(
        Path(metadata_of(waiting, "evaluation_report")["job_folder"]) / "config.json"
    )
    assert config["decided_before"] == 3
    page = Path(metadata_of(waiting, "evaluation_report")["report"]).read_text()
    assert "Decisions by this test split" in page
    assert "Comparison with the champion" in page


def test_batch_predictions_are_the_champions_and_show_drift(waiting):
    facts = metadata_of(waiting, "batch_predictions")
    rows = pq.read_table(facts["path"]).to_pylist()
    assert (facts["series"], facts["model_version"]) == (24, "2") == (len(rows), "2")
    assert {row["dagster_run_id"] for row in rows} == {waiting.run_id}
    assert sum(facts["classes"].values()) == 24
    compared = {name.partition(" ")[0] for name in facts["drift_sizes"]}
    assert compared == {"value.c01", "value.c02", "gap.step", "span.step", "length"}
    assert facts["drift"].startswith("![drift against the training data](data:image/png;base64,")


def test_lineage_leads_there_and_back(house, first, second, waiting):
    said = operate(house, "lineage", "waves@champion", process=True)
    assert "waves version 2" in said
    digest = metadata_of(first, "dataset")["digest"]
    finetuning = metadata_of(second, "finetuned_classifier")
    pretraining = metadata_of(first, "pretrained_encoder")
    for known in (
        *(digest, finetuning["job_key"], finetuning["mlflow_run_id"], pretraining["job_key"]),
        *(second.run_id, "promote by automatic gate", "against champion 1"),
    ):
        assert known in said
    back = operate(house, "lineage", finetuning["job_key"])
    assert "waves version 2 (finetuning job)" in back and "waves version 1" not in back
    assert "waves version 1 (data set)" in operate(house, "lineage", digest[:8])
    assert "no registered version comes from" in operate(house, "lineage", "f" * 12, ok=False)
    assert "models:/waves@canary is not in" in operate(house, "lineage", "waves@canary", ok=False)


def test_a_replay_plans_the_same_training_and_gives_the_same_weights(house, second, waiting):
    said = operate(house, "replay", "waves", "2", "--run-dir", "again", process=True)
    assert "roma finetune --job" in said and "roma evaluate --job" in said
    facts = metadata_of(second, "finetuned_classifier")
    recorded = read_json(Path(facts["job_folder"]) / "config.json")
    assert recorded["trainer"]["epochs"] == 30  # as the run config had it
    planned = read_json(house.folder / "again" / "finetune" / "config.json")
    same = {"weights": None}
    assert planned | same == recorded | same
    there = str(house.folder / "again")
    assert "is not empty" in operate(house, "replay", "waves", "2", "--run-dir", there, ok=False)

    # from the same pretrained weights: pretraining used two processes
    planned["weights"] = recorded["weights"]
    write_json(house.folder / "again" / "finetune" / "config.json", planned)
    command = ["roma_core.cli", "finetune", "--job", str(house.folder / "again" / "finetune")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as the launcher sets it
    done = forked.run(*command, cwd=ROOT, environment=env)
    assert done.returncode == 0, done.stderr
    weights = house.folder / "again" / "finetune" / "outputs" / "model" / "model.safetensors"
    assert weights.read_bytes() == (Path(facts["weights"]) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def damaged(house, waiting):
    """The champion's files were changed in the store."""
    place = house.client.get_model_version_download_uri("waves", "2").removeprefix("file://")
    program = Path(place) / "artifacts" / "package" / "model.pt2"
    sound = program.read_bytes()
    shutil.rmtree(house.folder / "roma" / "cache" / "models")
    program.write_bytes(b"x" + sound[1:])
    yield house.materialise("evaluation_report")
    program.write_bytes(sound)


def test_a_damaged_champion_is_a_failed_check_that_says_so(house, damaged):
    checks = {e.check_name: e for e in damaged.get_asset_check_evaluations()}
    failed = {name for name, check in checks.items() if not check.passed}
    assert failed == {"comparable", "not_worse_than_champion"}
    assert "model.pt2 was changed" in checks["comparable"].description
    assert "roma-pipeline rollback" in checks["comparable"].description
    assert house.aliases() == {"champion": "2", "previous": "1"}


@pytest.fixture(scope="module")
def continued(house, damaged):
    """The champion, finetuned further."""
    return house.materialise(*tiny.ASSET_NAMES[2:4], start_from="champion")


def test_the_champion_is_finetuned_further(house, second, continued):
    champion = metadata_of(second, "finetuned_classifier")
    facts = metadata_of(continued, "finetuned_classifier")
    assert facts["started_from"] == champion["job_key"]
    config = read_json(Path(facts["job_folder"]) / "config.json")
    assert config["weights"] == champion["weights"]
    assert "not used 0" in Path(facts["log"]).read_text()  # its head was kept
    evaluation = Path(metadata_of(continued, "evaluation_report")["job_folder"])
    planned = read_json(evaluation / "config.json")
    assert planned["lineage"]["started_from"] == champion["job_key"]
    assert planned["trained_on"] == [config["dataset"]]


@pytest.fixture(scope="module")
def failed(house, continued):
    settings = {"epochs": 4, "base_lr": 1e30, "warmup_steps": 0}
    return house.materialise("pretrained_encoder", pretraining={"trainer": settings})


def test_a_loss_that_is_not_finite_names_the_series(house, failed):
    assert not failed.success
    error = failure_of(failed, "pretrained_encoder")
    assert error.cls_name == "Failure"
    assert re.search(r"the loss is not finite in step \d+ .*sample ids \[\d+, ", error.message)
    assert "lower base_lr" in error.message

    run = house.runs()[-1]
    assert run.data.tags["roma.dagster_run_id"] == failed.run_id
    assert run.info.status == "FAILED"
    assert house.aliases() == {"champion": "2", "previous": "1"}
