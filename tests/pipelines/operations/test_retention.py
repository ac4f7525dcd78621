import os
import time

import dagster as dg
import pytest
from click.testing import CliRunner

from roma_core.files import read_json, write_json
from roma_pipelines.cli import main
from roma_pipelines.operations.retention import removals
from roma_pipelines.registry.runs import find_or_create_run

A, B, C = "a" * 12, "b" * 12, "c" * 12


def registered(client, storage, evaluation, classifier):
    """A version as the pipeline registers it."""
    run = find_or_create_run(client, "roma/waves", classifier * 20, "finetune", {}, {})
    client.create_registered_model("waves")
    tags = {"roma.job_key": evaluation * 20, "roma.dataset_digest": A + "0" * 52}
    source = client.get_run(run).info.artifact_uri
    client.create_model_version("waves", source, run, tags=tags)
    return run


def whats(found):
    return sorted(" ".join(one.what.replace(":", "").split()[:4]) for one in found)


def test_what_a_registered_version_was_made_of_stays_whatever_its_age(
    storage, instance, client, job, data
):
    path = str(storage.jobs)
    encoder = job("a", config={"dataset": f"{storage.datasets}/waves/{B}"})
    job("b", config={"weights": f"{path}/{'a' * 20}/outputs/model"})
    job("c", config={"classifier": f"{path}/{'b' * 20}/outputs/model"})
    job("d", asset="waves/unregistered")
    job("e", how="failed")
    for digest, days in ((A, 100), (B, 100), (C, 100), ("d" * 12, 99), ("e" * 12, 98)):
        data("waves", digest, days)
    registered(client, storage, "c", "b")

    found = removals(storage, instance, client, days=30, keep_versions=2)

    assert whats(found) == sorted(
        [
            f"checkpoints of job {'a' * 20}",
            f"checkpoints of job {'b' * 20}",
            f"checkpoints of job {'c' * 20}",
            f"data set waves {C}",  # A is tagged, B is named by the encoder, d and e are newest
            f"job {'d' * 20} waves/unregistered, completed",
            f"job {'e' * 20} waves/pretrained_encoder, failed",
        ]
    )
    for one in found:
        assert one.remove()
    assert (encoder.outputs / "model").exists() and not encoder.checkpoints.exists()
    left = removals(storage, instance, client, days=30, keep_versions=2)
    assert left == []


def test_references_are_read_from_records_under_any_name_and_root(
    storage, instance, client, job, data
):
    """Names that no pattern expected, a root that was moved, and keys in tags and lineage."""
    data("my.waves v2", A), data("my.waves v2", B, 1), data("my.waves v2", C, 2)
    job("a", config={"dataset": f"/old root/datasets/my.waves v2/{A}"}, asset="waves/finetuned")
    job("b", asset="waves/pretrained")
    job("c", config={"lineage": {"finetuning_job": "b" * 20}})
    client.create_registered_model("waves")
    tags = {"roma.evaluation_job": "c" * 20, "roma.finetuning_job": "a" * 20}
    client.create_model_version("waves", (storage.mlflow / "artifacts").as_uri(), tags=tags)

    found = removals(storage, instance, client, days=30, keep_versions=2)

    assert whats(found) == [f"checkpoints of job {letter * 20}" for letter in "abc"]


@pytest.mark.parametrize("kind", ["job", "experiment"])
def test_a_record_that_cannot_be_read_removes_nothing(
    kind, storage, instance, client, job, tmp_path, monkeypatch
):
    young = job("a", days=1)
    job("e", how="failed")
    if kind == "job":
        young.config.write_text('{"dataset": ')
    else:
        monkeypatch.setenv("ROMA_PROJECT", str(tmp_path))
        (tmp_path / "defs").mkdir()
        (tmp_path / "defs" / "defs.yaml").write_text("attributes: [")

    with pytest.raises(RuntimeError, match=r"cannot be read .* Nothing was removed"):
        removals(storage, instance, client, days=30, keep_versions=2)


def test_what_runs_is_young_or_was_materialised_last_stays(storage, instance, client, job):
    job("a", how="open")
    job("b", days=5)
    job("c")
    running = job("d", how="continue")

    @dg.asset
    def noun() -> dg.MaterializeResult:
        return dg.MaterializeResult(metadata={"job_folder": f"{storage.jobs}/{'c' * 20}"})

    assert dg.materialize([noun], instance=instance).success
    found = removals(storage, instance, client, days=30, keep_versions=2)
    assert whats(found) == [f"checkpoints of job {'c' * 20}"]
    assert running.checkpoints.exists()


def test_a_job_that_was_begun_again_is_not_removed(storage, instance, client, job):
    folder = job("e", how="failed")
    (found,) = removals(storage, instance, client, days=30, keep_versions=2)
    folder.attempt_record(1).unlink()
    assert found.remove() is False
    assert folder.path.exists()


def test_deleted_runs_go_unless_a_version_has_them(storage, instance, client, job):
    kept = registered(client, storage, "c", "b")
    gone = find_or_create_run(client, "roma/waves", "d" * 20, "other", {}, {})
    for run in (kept, gone):
        client.log_text(run, "x" * 300, "note.txt")
        client.set_terminated(run, "FINISHED", end_time=1_000_000)
        client.delete_run(run)

    (found,) = removals(storage, instance, client, days=30, keep_versions=2)

    assert gone in found.what and found.n_bytes == 300
    assert found.remove()
    assert removals(storage, instance, client, days=30, keep_versions=2) == []
    assert client.get_run(kept).info.lifecycle_stage == "deleted"


def test_the_command_removes_nothing_without_yes(storage, job):
    folder = job("e", how="failed")
    runner = CliRunner()
    listed = runner.invoke(main, ["gc"])
    assert listed.exit_code == 0, listed.output
    assert f"job {'e' * 20}" in listed.output and "--yes removes it" in listed.output
    assert folder.path.exists()
    done = runner.invoke(main, ["gc", "--yes"])
    assert done.exit_code == 0 and "removed" in done.output and not folder.path.exists()


def test_an_instance_that_knows_no_run_of_the_jobs_is_an_error(storage, instance, client, job):
    folder = job("e", how="failed")
    watcher = read_json(folder.lease)
    write_json(folder.lease, watcher | {"dagster_run_id": "of another DAGSTER_HOME"})
    with pytest.raises(RuntimeError, match="knows none of them"):
        removals(storage, instance, client, days=30, keep_versions=2)
    run = dg.DagsterRun(job_name="waves", status=dg.DagsterRunStatus.FAILURE)
    instance.add_run(run)
    write_json(folder.lease, watcher | {"dagster_run_id": run.run_id})
    assert len(removals(storage, instance, client, days=30, keep_versions=2)) == 1


def test_what_is_predicted_and_the_newest_version_stay(
    storage, instance, client, data, tmp_path, monkeypatch
):
    paths = [data("waves", digit * 12, days) for digit, days in (("a", 100), ("b", 99), ("c", 98))]
    defs = tmp_path / "defs" / "waves" / "defs.yaml"
    defs.parent.mkdir(parents=True)
    defs.write_text(f"attributes: {{predictions: {{input: {paths[0]}, split: test}}}}\n")
    monkeypatch.setenv("ROMA_PROJECT", str(tmp_path))
    (found,) = removals(storage, instance, client, days=30, keep_versions=1)
    assert found.what == f"data set waves {B}"
    with pytest.raises(ValueError, match="keep_versions"):
        removals(storage, instance, client, days=30, keep_versions=0)


def test_cached_models_without_an_alias_go(storage, instance, client, data):
    client.create_registered_model("waves")
    for _ in range(2):
        client.create_model_version("waves", (storage.mlflow / "artifacts").as_uri())
    client.set_registered_model_alias("waves", "champion", "2")
    then = time.time() - 100 * 86400
    for version in ("1", "2", "3"):
        folder = storage.cache / "models" / "waves" / version
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"w" * 70)
        if version != "3":  # young
            os.utime(folder, (then, then))
    profile = storage.cache / "profiles" / f"{'a' * 64}.json"
    profile.parent.mkdir()
    profile.write_text("{}")
    os.utime(profile, (then, then))
    found = removals(storage, instance, client, days=30, keep_versions=2)
    assert [(one.what, one.n_bytes) for one in found] == [
        ("cached model waves 1", 70),
        (f"cached profile of data {A}", 2),
    ]
    assert all(one.remove() for one in found)
    assert sorted(path.name for path in (storage.cache / "models" / "waves").iterdir()) == [
        "2",
        "3",
    ]


def test_a_registry_that_does_not_answer_is_a_sentence(storage, monkeypatch):
    monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = CliRunner().invoke(main, ["gc"])
    assert done.exit_code == 1 and done.output.startswith("Error: "), done.exception
