"""What each sensor does, one at a time."""

import json
import os
import re
import sys
import time

import dagster as dg
import pytest

from roma_core.evaluation.drift import profile_of_sample, sample_from_rows
from roma_core.evaluation.drift_job import DriftJobConfig, run_drift_job
from roma_core.files import write_json
from roma_core.job import JobFolder
from roma_pipelines._compat import shared_instance
from roma_pipelines.automation.alerts import (
    deliver_pending,
    read_alerts,
    send_alert,
)
from roma_pipelines.automation.drift import _reference, check_inputs
from roma_pipelines.automation.sensors import (
    check_champion,
    check_dataset,
    check_source,
)
from roma_pipelines.automation.settings import Drift, NewData
from roma_pipelines.automation.state import (
    TRAINED_WITH,
    Data,
    Step,
    Trained,
    TrainingState,
    hours_used,
    newest_comparison,
    next_step,
    request,
    state_of,
    step_of,
)
from roma_pipelines.components import RomaExperiment
from roma_pipelines.launching.spec import AttemptRecord, JobSpec
from roma_pipelines.registry.runs import find_or_create_run
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.registry.versions import EVIDENCE_TAGS, register
from tests.core.serving import toy
from tests.pipelines import tiny
from tests.pipelines.automation.played_month import write_series

OLD, NEW = "d" * 64, "e" * 64
STATE = TrainingState(
    data=Data(OLD, "R1", "f"),
    trained=Trained((OLD, "c"), "R0"),
    sound=True,
    code_version="c",
    unfinished=None,
)


def changed(**facts):
    return STATE._replace(**facts)


@pytest.mark.parametrize(
    ("state", "fingerprint", "do", "why"),
    [
        (STATE, "f", "nothing", "nothing changed"),
        (STATE, "g", "build", "files of the source changed"),
        (changed(data=Data()), "g", "build", "no data set was built yet"),
        (changed(data=Data(NEW, "R1", "f")), "f", "train", "data dddddddddddd → eeeeeeeeeeee"),
        (changed(code_version="k"), "f", "train", "settings c → k"),
        (changed(trained=Trained()), "f", "train", "no model was trained yet"),
        (changed(data=Data(NEW, "R1", "f"), sound=False), "f", "nothing", "failed its check"),
        (changed(data=Data(NEW, "R1", "f"), unfinished="R2"), "g", "wait", "run R2 is unfinished"),
    ],
)
def test_what_comes_next_follows_from_the_facts(state, fingerprint, do, why):
    step = next_step(state, fingerprint)
    assert step.do == do and why in step.why


def test_only_models_trained_with_automations_own_run_config_count(month):
    month.deliver()
    month.launch(check_source(month.experiment, NewData(), month.instance, month.now), "new")
    month.launch(check_dataset(month.experiment, month.instance), "train")
    trained = state_of(month.experiment, month.instance).trained
    given = {"finetuned_classifier": {"target": "local", "trainer": {"epochs": 5}}}
    passed = {"run_config": {n: {**given[n], "nodes": None} for n in given}}
    passed["run_config"]["batch_predictions"] = {"nodes": 1}
    predicted = {"predictions": {"input": "x"}, "automation": passed}
    configured = RomaExperiment(**month.experiment.model_dump(mode="json") | predicted)

    def by_hand():
        version = month.experiment.code_version("evaluation_report")
        tags = {
            "dagster/code_version": version,
            "dagster/input_data_version/waves/dataset": trained.on[0],
        }
        key, facts = month.experiment.key("evaluation_report"), {TRAINED_WITH: json.dumps(given)}
        month.instance.report_runless_asset_event(dg.AssetMaterialization(key, metadata=facts, tags=tags))  # fmt: skip

    step = step_of(configured, month.instance)
    assert step.do == "train" and re.search(r"settings (\w+) → \1 with run config \w+$", step.why)
    by_hand()
    assert state_of(month.experiment, month.instance).trained == trained
    assert step_of(month.experiment, month.instance).do == "nothing"
    assert step_of(configured, month.instance).do == "nothing"
    op = {"waves__finetuned_classifier": {"config": given["finetuned_classifier"]}}
    asked = request(configured, month.instance, "schedule", step, month.now, once=False)
    assert asked.run_config == {"ops": op}


def test_files_that_are_touched_are_built_but_not_trained_on(month, monkeypatch):
    settings = NewData(settle_s=60)
    path = month.deliver()
    asked = check_source(month.experiment, settings, month.instance, path.stat().st_mtime + 5)
    assert "it may be incomplete" in asked.skip_message
    for _ in range(2):  # the same request, served once
        month.launch(check_source(month.experiment, settings, month.instance, month.now), "new")
    month.launch(check_dataset(month.experiment, month.instance), "train")
    os.utime(path, (month.now - 100, month.now - 100))
    month.launch(check_source(month.experiment, settings, month.instance, month.now), "new")
    asked = check_dataset(month.experiment, month.instance)
    assert "was trained on already" in asked.skip_message
    training = "+".join(tiny.ASSET_NAMES[1:])
    assert [nouns for _, nouns, _ in month.runs] == ["dataset", training, "dataset"]

    month.receive_inputs(shift=3.0)
    drift = month.experiment.automation.drift.model_dump() | {"only_if_new": True}

    def look(cursor=None, now=month.now, experiment=month.experiment, **settings):
        """A tick, and the next one after the comparison that it requested."""
        found = Drift(**(drift | settings))
        asked, cursor = check_inputs(experiment, found, month.instance, cursor, now)
        if isinstance(asked, dg.RunRequest) and month.runs[-1][1] != "recent_inputs":
            assert month.launch(asked, "drift")
            asked, cursor = check_inputs(experiment, found, month.instance, cursor, now + 30)
        return asked, cursor

    asked, cursor = look()
    assert "value.value psi" in asked.skip_message
    assert "nothing is trained: nothing changed" in asked.skip_message
    for later in (60, 3600):  # the files are looked at once an hour
        asked, _ = look(cursor, month.now + later)
        assert asked.skip_message == "no new inputs"
    asked, _ = look(only_if_new=False, dry_run=True)
    assert "would train, but this is a dry run" in asked.skip_message
    asked, cursor = look(only_if_new=False)
    assert isinstance(asked, dg.RunRequest) and len(asked.asset_selection) == 4
    month.day = 1
    month.receive_inputs(shift=3.0)
    month.runs.append((1, "", ""))
    with monkeypatch.context() as patch:  # the source is not scanned for nothing
        patch.delattr("roma_pipelines.automation.state.step_of")
        for _ in range(2):  # it is not forgotten
            asked, cursor = look(cursor, month.now, only_if_new=False)
            assert "trained for drift 24 h ago; the cooldown is 168 h" in asked.skip_message
    asked, _ = look(cursor, month.now + 168 * 3600, only_if_new=False)
    assert isinstance(asked, dg.RunRequest)
    asked, _ = look(cursor, month.now + 7200, min_series=5000)
    assert "are too few" in asked.skip_message
    # the section has no budget, so that one is added here
    tight = month.experiment.automation.model_copy(update={"budget_hours_per_week": 1e-9})
    poor = month.experiment.model_copy(update={"automation": tight})
    assert hours_used(poor, month.storage.jobs) > 0
    cursor, now, asked_for = None, time.time(), []
    monkeypatch.setattr(
        "roma_pipelines.automation.state.step_of",
        lambda *given: asked_for.append(given) or step_of(*given),
    )
    for later, n in ((0, 1), (30, 1), (3600, 2)):  # decided again as often as files are looked at
        asked, cursor = look(cursor, now + later, poor, only_if_new=False)
        assert "CPU-hours of the weekly budget are used" in asked.skip_message
        assert len(asked_for) == n
    told = [alert["kind"] for alert in read_alerts(month.storage)]
    assert told.count("drift") == 2  # one for each of the inputs
    assert hours_used(poor, month.storage.jobs, time.time() + 8 * 86400) == 0
    reported = dg.AssetMaterialization(month.experiment.key("recent_inputs"))
    month.instance.report_runless_asset_event(reported)  # in the UI: it compares nothing
    assert newest_comparison(month.instance, month.experiment) is None


def test_the_budget_counts_attempts_that_run(month):
    """Ten days long, on 2 x 4 GPUs; one more waits in a queue, and others have budgets of their own."""
    now, hours = time.time(), 240
    jobs = (("a", "waves/encoder", True), ("b", "waves/encoder", False))
    jobs += (("c", "tides/encoder", True), ("d", "waves/tuning_study", True))
    for key, asset, runs in jobs:
        folder = JobFolder(month.storage.jobs / (key * 20))
        attempt = folder.attempt(1)
        attempt.path.mkdir(parents=True)
        spec = JobSpec(key=key * 20, command=("x",), config_digest="", nodes=2, gpus_per_node=4)
        write_json(folder.spec, spec.model_dump(mode="json"))
        record = AttemptRecord(attempt=1, backend="slurm", intended_at=now - 3600 * hours)
        write_json(folder.attempt_record(1), record.model_dump(mode="json"))
        write_json(folder.lease, {"schema_version": 1, "host": "x", "beat": now, "asset_key": asset})  # fmt: skip
        then = now - 3600 * hours
        if runs:
            attempt.owner.write_text("{}")
            os.utime(attempt.owner, (then, then))
        os.utime(folder.path / "attempts", (then, then))

    assert hours_used(month.experiment, month.storage.jobs, now) == pytest.approx(hours * 8)
    tight = month.experiment.automation.model_copy(update={"budget_hours_per_week": 1000})
    poor = month.experiment.model_copy(update={"automation": tight})
    asked = request(poor, month.instance, "drift", Step("train", "drifted", "k"), now)
    assert "1920.0 of 1000 CPU-hours of the weekly budget are used" in asked.skip_message
    on_gpus = month.experiment.with_settings(resources={"pretraining": {"gpus_per_node": 1}})
    assert hours_used(on_gpus, month.storage.jobs, now) == pytest.approx(hours * 8)
    spec = JobSpec(key="a" * 20, command=("x",), config_digest="", threads_per_process=64)
    write_json(month.storage.jobs / ("a" * 20) / "spec.json", spec.model_dump(mode="json"))
    assert hours_used(on_gpus, month.storage.jobs, now) == 0  # CPU-hours are no GPU-hours


def test_a_comparison_or_a_search_holds_up_no_training(month):
    for names in (["recent_inputs"], ["tuning_study"], ["tuning_study", "dataset"]):
        selection = frozenset(map(month.experiment.key, names))
        run = dg.DagsterRun("job", status=dg.DagsterRunStatus.STARTED, asset_selection=selection)
        month.instance.add_run(run)
        expected = run.run_id if "dataset" in names else None
        assert state_of(month.experiment, month.instance).unfinished == expected


def test_an_unsound_data_set_is_not_trained_on(month):
    first = month.deliver()
    month.launch(check_source(month.experiment, NewData(), month.instance, month.now), "new")
    month.launch(check_dataset(month.experiment, month.instance), "train")
    # objects of equal content in two splits: an error of the check, not of the builder
    copy = first.with_name("copy.parquet")
    write_copy(first, copy)
    month.launch(check_source(month.experiment, NewData(), month.instance, month.now), "new")
    asked = check_dataset(month.experiment, month.instance)
    assert isinstance(asked, dg.SkipReason) and "failed its check" in asked.skip_message
    month.send_failure_alerts()
    (told,) = read_alerts(month.storage)
    assert told["subject"] == "waves: check failed: sound of dataset"


def write_copy(first, copy):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(first)
    ids = pa.array([f"copy-{name}" for name in table["id"].to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index("id"), "id", ids), copy)
    then = first.stat().st_mtime
    os.utime(copy, (then, then))


def test_every_move_of_champion_asks_once_for_predictions(month):
    client = connect(MlflowSettings(), month.storage.mlflow)
    asked, cursor = check_champion(month.experiment, None)
    assert "no champion yet" in asked.skip_message
    client.create_registered_model("waves")
    keys = []
    for _ in range(2):
        client.create_model_version("waves", (month.storage.mlflow / "artifacts").as_uri())
    for version in ("1", "1", "2", "1"):  # the last one is a rollback
        client.set_registered_model_alias("waves", "champion", version)
        asked, cursor = check_champion(month.experiment, cursor)
        if isinstance(asked, dg.RunRequest):
            keys.append(asked.run_key)
            assert asked.asset_selection == [dg.AssetKey(["waves", "batch_predictions"])]
    assert keys == ["champion:1:1", "champion:2:2", "champion:3:1"]


def test_a_registry_that_is_away_is_one_sentence_and_keeps_the_cursor(month, monkeypatch):
    monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    asked, cursor = check_champion(month.experiment, "3:2")
    assert asked.skip_message.startswith("the MLflow server http://127.0.0.1:9 does not answer (")
    assert cursor == "3:2"


def test_inputs_are_compared_with_what_the_champion_carries(month, tmp_path):
    """Not with the data that were trained on last, whose model the gate may have refused."""
    month.deliver()
    month.launch(check_source(month.experiment, NewData(), month.instance, month.now), "new")
    month.launch(check_dataset(month.experiment, month.instance), "train")
    version = state_of(month.experiment, month.instance).trained.on[0]
    write_series(tmp_path / "inbox" / "a.parquet", 200, 5, month.now)
    folder = JobFolder(tmp_path / "job")
    folder.path.mkdir()

    def psi():
        client = connect(MlflowSettings(), month.storage.mlflow)
        known = _reference(client, "waves", month.storage.cache / "models")
        config = DriftJobConfig(
            files=(str(tmp_path / "inbox" / "a.parquet"),),
            inputs="",
            dataset=str(month.storage.datasets / "waves" / version[:12]),
            **known,
        )
        write_json(folder.config, config.model_dump(mode="json"))
        work = run_drift_job(folder, folder.attempt(1))
        assert (folder.path / work.outputs["drift"]).read_bytes().startswith(b"\x89PNG")
        assert work.facts["series"] == 200
        reason = "no encoder is registered with the champion, as after `pretraining: null`"
        assert work.facts["features"] == f"not compared: {reason}"
        return work.facts["effects"]["value.value psi"]

    assert psi() < 0.1
    far = sample_from_rows(
        ({"positions": {"time": [0, 1, 3]}, "values": {"value": [9, 9.5, 8]}} for _ in range(99)),
        [{"name": "time"}],
        [{"name": "value"}],
    )
    client = connect(MlflowSettings(), month.storage.mlflow)
    toy.build_toy(tmp_path / "package", profile=profile_of_sample(far, "d").model_dump(mode="json"))
    run_id = find_or_create_run(client, "roma/waves", "1" * 20, "finetuned_classifier", {}, {})
    tags = dict.fromkeys(EVIDENCE_TAGS, "0")
    made = register(client, tmp_path / "package", "waves", "1" * 20, run_id, tags, {})
    client.set_registered_model_alias("waves", "champion", made)

    assert psi() > 1


def test_ticks_share_one_instance_and_another_takes_its_place(storage, tmp_path):
    def ticked(instance):
        context = dg.SensorEvaluationContext(instance_ref=instance.get_ref())
        return shared_instance(context), context.instance

    with (
        dg.DagsterInstance.get() as here,
        dg.DagsterInstance.local_temp(str(tmp_path)) as there,
    ):
        (first, seen), (second, _), (other, _) = ticked(here), ticked(here), ticked(there)
        assert first is second is seen and first is not here
        assert other.root_directory == there.root_directory
        given = dg.build_sensor_context(instance=here)
        assert shared_instance(given) is here


def test_an_alert_is_sent_once(storage, tmp_path, monkeypatch):
    script = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"
    received = tmp_path / "received it.txt"
    monkeypatch.setenv("ROMA_ALERT_COMMAND", f"{sys.executable} -c '{script}' '{received}'")
    assert send_alert(storage, "failed", "a subject", "many\nlines", key=["1"])
    assert received.read_text() == "a subject\n\nmany\nlines\n"
    received.unlink()
    assert not send_alert(storage, "failed", "a subject", "many\nlines", key=["1"])
    assert deliver_pending(storage) == 0
    assert not received.exists()
    (alert,) = read_alerts(storage)
    assert alert["delivered"]


def test_an_alert_that_was_not_delivered_is_delivered_later(storage, tmp_path, monkeypatch, caplog):
    with (storage.root / "alerts.jsonl").open("a") as file:
        file.write('{"id": "cut sho')
    monkeypatch.setenv("ROMA_ALERT_COMMAND", "/nowhere/at/all")
    monkeypatch.setenv("ROMA_ALERT_WEBHOOK_URL", "http://127.0.0.1:1/geheim")
    assert send_alert(storage, "failed", "first", "text", key=["1"])
    assert "ROMA_ALERT_COMMAND failed" in caplog.text and "WEBHOOK_URL failed" in caplog.text
    monkeypatch.setenv("ROMA_ALERT_WEBHOOK_URL", "http://127.0.0.1:1/geheim with a space")
    assert send_alert(storage, "failed", "second", "", key=["2"])
    assert "InvalidURL" in caplog.text and "geheim" not in caplog.text
    assert deliver_pending(storage) == 0
    assert [one["delivered"] for one in read_alerts(storage)] == [False, False]

    script = 'import sys, pathlib; pathlib.Path(sys.argv[1]).open("a").write(sys.stdin.read())'
    received = tmp_path / "received.txt"
    monkeypatch.setenv("ROMA_ALERT_COMMAND", f"{sys.executable} -c '{script}' '{received}'")
    monkeypatch.delenv("ROMA_ALERT_WEBHOOK_URL")

    assert deliver_pending(storage) == 2
    assert deliver_pending(storage) == 0
    assert received.read_text() == "first\n\ntext\nsecond\n\n\n"
    assert [one["id"] for one in read_alerts(storage)] == ["failed:1", "failed:2"]


def test_many_failures_at_once_are_all_reported_once(month):
    month.send_failure_alerts()
    for k in range(30):
        retries = str(int(k == 0))  # a run that will be retried has not failed yet
        run = dg.DagsterRun(
            job_name="waves",
            status=dg.DagsterRunStatus.STARTED,
            tags={"dagster/max_retries": retries},
        )
        month.instance.add_run(run)
        month.instance.report_run_failed(run, "its process was killed")

    for _ in range(2):
        month.send_failure_alerts()

    assert len(read_alerts(month.storage)) == len(month.alerts) == 29


def sections(tmp_path, **automation):
    return tiny.attributes(tmp_path) | {"automation": automation}


def test_nothing_that_costs_starts_switched_on(tmp_path):
    section = {
        "new_data": None,
        "drift": {"files": ["x/*.parquet"]},
        "freshness_h": {"dataset": 24},
    }
    definitions = tiny.definitions(sections(tmp_path, **section) | {"schedule": "0 3 * * *"})
    status = {sensor.name: sensor.default_status.value for sensor in definitions.sensors}
    assert status == {
        "waves_new_data": "STOPPED",
        "waves_drift": "STOPPED",
        "waves_train_on_new_data": "RUNNING",  # acts on what the others built
    }
    (schedule,) = definitions.schedules
    assert schedule.default_status.value == "STOPPED"
    spec = definitions.resolve_assets_def(dg.AssetKey(["waves", "dataset"])).specs
    assert [one.freshness_policy.fail_window.to_timedelta().total_seconds() for one in spec] == [86400.0]  # fmt: skip
    dg.Definitions.validate_loadable(definitions)


@pytest.mark.parametrize(
    ("automation", "said"),
    [
        ({"freshness_h": {"datset": 1}}, "no such asset"),
        ({"freshness_h": {"dataset": -1}}, "greater than 0"),
        ({"predict_on_promotion": True}, "has no batch_predictions"),
        ({"drift": {}}, "files"),
        ({"new_dta": {}}, "new_dta"),
        ({"run_config": {"datset": {}}}, "run_config: datset: no such asset; expected one of data"),
        (
            {"run_config": {"evaluation_report": {"trainer": {}}}},
            "evaluation_report.trainer: not a setting of a run; there are target, profile",
        ),
        (
            {"run_config": {"finetuned_classifier": {"trainer": {"epoch": 1}}}},
            "run_config: finetuning.trainer.epoch: not a setting; the closest one is epochs",
        ),
        (
            {"run_config": {"finetuned_classifier": {"nodes": 0}}},
            "run_config: finetuned_classifier.nodes: ",
        ),
        (
            {"run_config": {"evaluation_report": {"nodes": 1}}},
            "evaluation_report.nodes: not a setting of",
        ),
    ],
)
def test_a_mistake_in_the_section_is_said_when_definitions_load(tmp_path, automation, said):
    with pytest.raises(ValueError, match=said):
        tiny.definitions(sections(tmp_path, **automation))


def test_real_sensors_evaluate(month, tmp_path):
    """Through Dagster's own machinery, cursor and all."""
    month.deliver()
    definitions = tiny.definitions(json.loads(month.experiment.model_dump_json()))
    repository = definitions.get_repository_def()
    for name, said in (
        ("waves_new_data", "no data set was built yet"),
        ("waves_drift", "no file matches"),
    ):
        context = dg.build_sensor_context(instance=month.instance, repository_def=repository)
        tick = repository.get_sensor_def(name).evaluate_tick(context)
        found = tick.skip_message or tick.run_requests[0].tags["roma/why"]
        assert said in found
    schedule = repository.get_schedule_def("waves_retraining")
    context = dg.build_schedule_context(instance=month.instance, repository_def=repository)
    tick = schedule.evaluate_tick(context)
    assert [key.path[-1] for key in tick.run_requests[0].asset_selection] == ["dataset"]


def test_series_like_the_training_data_are_seldom_far_from_it(tmp_path):
    """Chance alone: of 100 samples of the same distribution, next to none reaches a threshold."""
    from roma_core.data.build import build_dataset
    from roma_core.data.store import StoredDataset
    from roma_core.evaluation.drift import drift_effects, reference_profile, sample_from_parquet
    from roma_pipelines.automation.settings import DriftThresholds

    write_series(tmp_path / "data" / "all.parquet", 600, 0, 0.0)
    attributes = {
        "kind": "parquet",
        "files": [str(tmp_path / "data" / "all.parquet")],
        "axes": [{"column": "time"}],
        "channels": [{"column": "value"}],
        "metadata": {"label": "kind"},
    }
    from roma_core.data.config import DatasetConfig

    config = DatasetConfig(name="waves", source=attributes)
    dataset = StoredDataset(build_dataset(config, tmp_path / "d", tmp_path / "c", progress=False))
    profile = reference_profile(dataset)
    far = 0
    for seed in range(100):
        path = tmp_path / "inbox.parquet"
        write_series(path, 100, 100 + seed, 0.0)
        series = sample_from_parquet([path], dataset.schema, "kind")
        sizes = {effect.name: effect.size for effect in drift_effects(profile, series)}
        far += max(DriftThresholds().ratios(sizes).values()) >= 1
    assert far <= 2
    write_series(path, 50, 5, 0.0, bad=True)
    series = sample_from_parquet([path], dataset.schema, "kind")
    assert 0 < max(e.size for e in drift_effects(profile, series) if e.measure == "missing") < 0.01


def test_definitions_with_automation_load_without_what_is_heavy(tmp_path):
    import subprocess

    code = (
        "import sys, json; from tests.pipelines import tiny; "
        "tiny.definitions(json.loads(sys.argv[1])); "
        "print([m for m in ('torch', 'mlflow', 'wandb') if m in sys.modules])"
    )
    section = sections(tmp_path, new_data={}, drift={"files": ["x"]}) | {"schedule": "0 3 * * *"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(section)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
