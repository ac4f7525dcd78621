"""The asset of the champion's predictions, on a toy model: no champion, other input, two at once."""

import dagster as dg
import pytest

from roma_pipelines.registry.promotion import promote
from roma_pipelines.registry.store import MlflowSettings, connect
from tests.core.serving import toy
from tests.pipelines import tiny
from tests.pipelines.registry.conftest import registered_as

KEY = dg.AssetKey(["waves", "batch_predictions"])


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(toy.series(3, seed=1).model_dump_json() + "\n")
    return path


@pytest.fixture
def definitions(tmp_path, source):
    return tiny.definitions(tiny.attributes(tmp_path, predictions={"input": str(source)}))


@pytest.fixture
def predicted(storage, definitions):
    """Materialises the asset alone; returns its data versions, one or none."""
    job = definitions.resolve_implicit_global_asset_job_def()

    def materialise():
        result = job.execute_in_process(asset_selection=[KEY], raise_on_error=False)
        assert result.success
        made = result.asset_materializations_for_node("waves__batch_predictions")
        return [event.tags["dagster/data_version"] for event in made]

    return materialise


def test_another_input_is_another_version_and_no_champion_is_no_failure(
    predicted, source, storage, toy_package
):
    assert predicted() == []
    client = connect(MlflowSettings(), storage.mlflow)
    registered_as(client, toy_package, "waves", "k1")
    promote(client, "waves", "1", reason="first", actor="tester", evidence={})

    first, again = predicted(), predicted()
    source.write_text(toy.series(4, seed=2).model_dump_json() + "\n")

    assert len(first) == 1 and first == again != predicted()


def test_one_run_at_a_time_writes_the_parts(definitions):
    assert definitions.resolve_assets_def(KEY).op.pool == "predictions_waves"
