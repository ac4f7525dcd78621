"""Planning a training again where encoder and classifier are of different data."""

import pytest

from roma_core.files import read_json, write_json
from roma_pipelines.registry import lineage as replay


def test_every_stage_gets_the_version_of_the_data_that_it_had(client, tmp_path, monkeypatch):
    for digest in ("a" * 64, "b" * 64):
        folder = tmp_path / "sets" / "waves" / digest[:16]
        folder.mkdir(parents=True)
        write_json(folder / "manifest.json", {"digest": digest})
    gone = str(tmp_path / "gone")
    configs = {
        "p1": {"dataset": gone, "dataset_digest": "a" * 64},
        "f1": {"dataset": gone, "dataset_digest": "b" * 64, "weights": "w"},
        "e1": {"dataset": gone, "dataset_digest": "b" * 64},
    }
    monkeypatch.setattr(replay, "_config_of", lambda _client, _name, job: dict(configs[job]))
    client.create_registered_model("waves")
    tags = dict(zip(replay._STAGES.values(), configs, strict=True))
    client.create_model_version("waves", (tmp_path / "model").as_uri(), None, tags)

    plan = replay.plan_replay(client, "waves", "1", tmp_path / "out", tmp_path / "sets")

    planned = {s: read_json(folder / "config.json") for s, folder in plan.folders.items()}
    first, second = (str(tmp_path / "sets" / "waves" / (k * 16)) for k in "ab")
    assert {s: config["dataset"] for s, config in planned.items()} == {
        "pretrain": first,
        "finetune": second,
        "evaluate": second,
    }
    assert planned["evaluate"]["trained_on"] == [first, second]
    configs["p1"]["dataset_digest"] = "c" * 64
    with pytest.raises(ValueError, match="the data set of version cccccccccccccccc is neither"):
        replay.plan_replay(client, "waves", "1", tmp_path / "other", tmp_path / "sets")
