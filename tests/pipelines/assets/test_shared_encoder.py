"""``pretrained_from``: a second experiment finetunes the first one's encoder."""

import dagster as dg
import pytest

from roma_pipelines.assets.training import finetuned_model_asset
from roma_pipelines.automation.state import Step, request
from roma_pipelines.components import RomaExperiment
from roma_pipelines.definitions import load_experiments
from tests.pipelines import tiny
from tests.pipelines.forked_jobs import jobs_are_forked

pytestmark = pytest.mark.slow


def sharing(folder, **changes):
    """The tiny experiment again, under another name and without a pretraining of its own."""
    sections = tiny.attributes(folder, **changes)
    del sections["pretraining"]
    return {**sections, "name": "ripples", "pretrained_from": "waves"}


def both(folder, **changes):
    return dg.Definitions.merge(
        tiny.definitions(tiny.attributes(folder)), tiny.definitions(sharing(folder, **changes))
    )


@pytest.fixture
def instance(tmp_path, monkeypatch):
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "roma"))
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance:
        yield instance


def materialise(definitions, instance, *keys):
    with jobs_are_forked():
        return definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance, asset_selection=list(keys), raise_on_error=False
        )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder, its instance, and the metadata of the encoder that was trained there."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "dagster").mkdir()
    keys = [dg.AssetKey(["waves", noun]) for noun in tiny.ASSET_NAMES[:2]]
    with (
        pytest.MonkeyPatch.context() as patch,
        dg.DagsterInstance.local_temp(str(folder / "dagster")) as instance,
    ):
        patch.setenv("ROMA_STORAGE_ROOT", str(folder / "roma"))
        done = materialise(both(folder), instance, *keys)
        (made,) = done.asset_materializations_for_node("waves__pretrained_encoder")
        yield folder, instance, made.metadata


@pytest.fixture
def finetuned(pretrained, monkeypatch):
    """Materialises the second experiment's data set and classifier, with some settings changed."""
    folder, instance, _ = pretrained
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(folder / "roma"))
    keys = [dg.AssetKey(["ripples", noun]) for noun in ("dataset", "finetuned_classifier")]
    return lambda **changes: materialise(both(folder, **changes), instance, *keys)


def test_it_has_four_assets_and_depends_on_the_other_encoder(tmp_path):
    graph = both(tmp_path).resolve_asset_graph()

    own = {key.path[1] for key in graph.materializable_asset_keys if key.path[0] == "ripples"}
    assert own == set(tiny.ASSET_NAMES) - {"pretrained_encoder"}
    classifier = graph.get(dg.AssetKey(["ripples", "finetuned_classifier"]))
    assert dg.AssetKey(["waves", "pretrained_encoder"]) in classifier.parent_keys


def test_what_it_shares_decides_its_classifier_but_is_not_trained_by_it(instance, tmp_path):
    sections = sharing(tmp_path)
    here, there = (
        RomaExperiment(**(sections | {"pretrained_from": name})) for name in ("waves", "tides")
    )
    versions = [
        spec.code_version
        for e in (here, there)
        for spec in finetuned_model_asset(e, "finetuned_classifier").specs
    ]
    assert versions[0] != versions[1]

    asked = request(here, instance, "schedule", Step("train", "a test"), once=False)

    selected = {key.to_user_string() for key in asked.asset_selection}
    assert selected == {f"ripples/{noun}" for noun in tiny.ASSET_NAMES[2:]}


def test_the_encoder_of_the_other_experiment_is_finetuned(finetuned, pretrained):
    done = finetuned(dataset={"drop_rate": 0.4})

    assert done.success
    made = {
        event.asset_key.to_user_string(): event.materialization.metadata
        for event in done.get_asset_materialization_events()
    }
    assert "ripples/pretrained_encoder" not in made
    assert made["ripples/finetuned_classifier"]["weights"] != pretrained[2]["weights"]


def test_an_encoder_of_other_axes_is_refused_before_a_job_starts(finetuned, pretrained):
    source = tiny.attributes(pretrained[0])["dataset"]["source"]
    in_seconds = {**source, "format": {"kind": "ts", "axis": "time", "axis_unit": "s"}}

    done = finetuned(dataset={"source": in_seconds})

    (failure,) = [event for event in done.all_events if event.is_step_failure]
    assert failure.step_key == "ripples__finetuned_classifier"
    assert "was pretrained on the axes" in str(failure.step_failure_data.error)


def test_experiments_load_in_any_order(tmp_path):
    given = {"ripples": RomaExperiment(**sharing(tmp_path))}
    given["waves"] = RomaExperiment(**tiny.attributes(tmp_path))
    found, errors = load_experiments(given)
    assert set(found) == {"waves", "ripples"} and not errors
    _, errors = load_experiments({"a_copy": given["waves"]} | given)
    assert set(errors) == {"a_copy"} and "another experiment is called waves" in errors["a_copy"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pretrained_from": "ripples"}, "is this experiment"),
        ({"pretraining": {"trainer": {"epochs": 3}}}, "the encoder comes from that experiment"),
    ],
)
def test_two_encoders_or_its_own_are_refused(tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        RomaExperiment(**(sharing(tmp_path) | changes))
