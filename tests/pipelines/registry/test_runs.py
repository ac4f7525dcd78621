import pytest

from roma_pipelines.registry.runs import end_run, ensure_experiment, find_or_create_run


def test_a_job_has_one_run_however_often_it_is_asked_for(client, caplog):
    params = {f"p{i}": i for i in range(150)}
    first = find_or_create_run(client, "roma/vowels", "k1", "finetune", {"a": "b"}, params)
    end_run(client, first, "FAILED")
    assert client.get_run(first).info.status == "FAILED"

    changed = {"p0": "other", "new": 1}
    again = find_or_create_run(client, "roma/vowels", "k1", "finetune", {"a": "b"}, changed)
    other = find_or_create_run(client, "roma/vowels", "k2", "finetune", {}, {})

    assert again == first != other
    run = client.get_run(first)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "finetune"
    assert run.data.params == {k: str(v) for k, v in params.items()} | {"new": "1"}
    assert "these differ now: {'p0': ('0', 'other')}" in caplog.text
    assert run.data.tags["roma.job_key"] == "k1" and run.data.tags["a"] == "b"


def test_artifacts_of_an_experiment_are_in_the_store(client, store_root):
    experiment = ensure_experiment(client, "roma/vowels")
    assert experiment.artifact_location == (store_root / "artifacts" / "roma__vowels").as_uri()


def test_bad_names_and_a_deleted_experiment_are_named(client):
    for name in ("it's", "a b", "../x", "", "a//b"):
        with pytest.raises(ValueError, match="expected letters"):
            find_or_create_run(client, name, "k", "n", {}, {})
        with pytest.raises(ValueError, match="job key"):
            find_or_create_run(client, "e", name, "n", {}, {})
    client.delete_experiment(ensure_experiment(client, "gone").experiment_id)
    with pytest.raises(RuntimeError, match=r"'gone' was deleted; restore it with .*-x 1"):
        ensure_experiment(client, "gone")
