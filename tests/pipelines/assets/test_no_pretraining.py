"""``pretraining: null``: the model is trained from new weights, and no encoder is made or registered."""

from pathlib import Path

import dagster as dg
import pytest

from roma_core.files import read_json
from roma_pipelines.components import RomaExperiment
from roma_pipelines.definitions import load_experiments
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.targets import launcher_for
from roma_pipelines.registry.lineage import lineage_of, plan_replay
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.search_space import default_space
from roma_pipelines.storage import Storage
from roma_pipelines.tuning import Search
from tests.pipelines import tiny
from tests.pipelines.forked_jobs import jobs_are_forked

WITHOUT = ("dataset", "finetuned_classifier", "evaluation_report", "registered_classifier")


def attributes(folder, **changes):
    sections = tiny.attributes(folder)
    stack = sections["pretraining"]["model"]["encoder_config"]
    model = {"encoder_config": stack | {"drop_path_rate": 0.1}, "use_cls": False}
    sections["finetuning"]["model"] = model
    sections["finetuning"]["trainer"]["epochs"] = 20
    sections["gate"]["min_primary"] = 0.0
    return sections | {"pretraining": None} | changes


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder, and the metadata of all assets of two runs; the second starts from the champion."""
    folder = tmp_path_factory.mktemp("new")
    (folder / "dagster").mkdir()
    runs = []
    with (
        pytest.MonkeyPatch.context() as patch,
        dg.DagsterInstance.local_temp(str(folder / "dagster")) as instance,
        jobs_are_forked(),
    ):
        patch.setenv("ROMA_STORAGE_ROOT", str(folder / "roma"))
        for start_from in ("encoder", "champion"):
            definitions = tiny.definitions(attributes(folder, start_from=start_from))
            job = definitions.resolve_implicit_global_asset_job_def()
            done = job.execute_in_process(instance=instance, raise_on_error=False)
            assert done.success
            runs.append(
                {
                    event.asset_key.path[-1]: {
                        k: v.value for k, v in event.materialization.metadata.items()
                    }
                    for event in done.get_asset_materialization_events()
                }
            )
        yield folder, runs


@pytest.mark.slow
def test_it_becomes_champion_without_an_encoder(house):
    folder, (first, _) = house
    assert tuple(first) == WITHOUT
    trained = read_json(Path(first["finetuned_classifier"]["job_folder"]) / "config.json")
    assert trained["weights"] is None
    assert trained["model"]["encoder_config"]["d_model"] == 16
    outputs = Path(first["evaluation_report"]["report"]).parent
    assert (outputs / "plots" / "embedding_map.png").exists()
    assert not (outputs / "encoder_package").exists()
    card = (outputs / "package" / "MODEL_CARD.md").read_text()
    assert "Rotary Masked Autoencoder, trained on 3 classes" in card and "retrained" not in card
    client = connect(MlflowSettings(), folder / "roma" / "mlflow")
    assert [model.name for model in client.search_registered_models()] == ["waves"]
    facts = lineage_of(client, "waves/1").facts
    assert "pretraining job" not in facts and "encoder" not in facts
    assert facts["finetuning job"] == first["finetuned_classifier"]["job_key"]


@pytest.mark.slow
def test_a_replay_trains_from_new_weights_and_the_second_version_from_the_champion(house, tmp_path):
    folder, (first, second) = house
    client = connect(MlflowSettings(), folder / "roma" / "mlflow")
    plan = plan_replay(client, "waves", "1", tmp_path / "first", folder / "roma" / "datasets")
    assert tuple(plan.folders) == ("finetune", "evaluate")
    assert read_json(plan.folders["finetune"] / "config.json")["weights"] is None
    assert read_json(plan.folders["evaluate"] / "config.json")["autoencoder"] is None

    key = Path(first["finetuned_classifier"]["job_folder"]).name
    assert second["finetuned_classifier"]["started_from"] == key
    plan = plan_replay(client, "waves", "2", tmp_path / "second", folder / "roma" / "datasets")
    assert key in read_json(plan.folders["finetune"] / "config.json")["weights"]


@pytest.mark.slow
def test_trials_of_a_search_pretrain_nothing(house):
    folder, (first, _) = house
    storage, lines = Storage(folder / "roma"), []
    sections = attributes(folder, tuning={"trials": 2, "parallel": 1})
    sections["finetuning"]["trainer"]["epochs"] = 2
    dataset = Path(first["dataset"]["path"])
    with jobs_are_forked():
        search = Search(
            Experiment.parse(sections),
            dataset,
            storage,
            lines.append,
            lambda *place: launcher_for(*place, storage),
        )
        found = search.run()
    assert found.best.value > 0
    assert not any("pretrains" in line for line in lines)


def test_its_section_finetuning_is_validated_as_a_whole(tmp_path):
    assert default_space(Experiment.parse(attributes(tmp_path)))
    for model, sentence in (
        ({"n_channels": 2}, r"finetuning\.model\.n_channels: determined by the data set"),
        ({"mask_ratio": 0.5}, r"finetuning\.model\.mask_ratio: of pretraining, which is null"),
        ({"encoder_config": {"depth": -1}}, r"finetuning\.model\.encoder_config\.depth"),
    ):
        sections = attributes(tmp_path)
        stack = sections["finetuning"]["model"]["encoder_config"] | model.pop("encoder_config", {})
        sections["finetuning"]["model"] = {"encoder_config": stack, **model}
        with pytest.raises(ValueError, match=sentence):
            Experiment.parse(sections)


def test_an_empty_section_is_not_taken_for_one_with_default_settings(tmp_path):
    sections = tiny.attributes(tmp_path) | {"pretraining": None}  # as `pretraining:` in YAML
    with pytest.raises(ValueError, match=r"expected d_model, depth, nhead of the new weights"):
        Experiment.parse(sections)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pretrained_from": "tides"}, "pretraining: null means new weights"),
        ({"resources": {"pretraining": {"nodes": 1}}}, "resources.pretraining: has no effect"),
        (
            {"task": "interpolation", "finetuning": {}},
            "pretraining: null: an interpolation registers",
        ),
        (
            {"tuning": {"space": {"pretraining.trainer.epochs": {"low": 1, "high": 2}}}},
            r"tuning.space.pretraining.trainer.epochs: pretraining is null; remove it",
        ),
    ],
)
def test_what_needs_a_pretraining_is_refused_without_one(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Experiment.parse(attributes(tmp_path, **changes))


def test_settings_for_a_pretraining_are_refused_and_nobody_shares_its_encoder(tmp_path):
    experiment = Experiment.parse(attributes(tmp_path))
    assert experiment.own_assets == WITHOUT
    with pytest.raises(ValueError, match="pretraining: null: there is no such training"):
        experiment.with_settings(pretraining={"trainer": {"epochs": 2}})
    with pytest.raises(ValueError, match="pretrained_encoder: no such asset"):
        experiment.with_run_config({"pretrained_encoder": {"nodes": 1}})
    sharing = tiny.attributes(tmp_path) | {"name": "ripples", "pretrained_from": "waves"}
    del sharing["pretraining"]
    given = {"waves": RomaExperiment(**attributes(tmp_path)), "ripples": RomaExperiment(**sharing)}
    _, errors = load_experiments(given)
    assert "no valid experiment of that name pretrains an encoder" in errors["ripples"]
