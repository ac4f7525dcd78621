import dagster as dg
from click.testing import CliRunner

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


def test_the_command_removes_nothing_unless_told_to(storage, job):
    folder = job("e", how="failed")
    runner = CliRunner()
    listed = runner.invoke(main, ["gc"])
    assert listed.exit_code == 0, listed.output
    assert f"job {'e' * 20}" in listed.output and "--yes removes it" in listed.output
    assert folder.path.exists()
    done = runner.invoke(main, ["gc", "--yes"])
    assert done.exit_code == 0 and "removed" in done.output and not folder.path.exists()
