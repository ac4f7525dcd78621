"""The packages that an evaluation leaves."""

import pytest

from roma_core.data.store import StoredDataset
from roma_core.evaluation.config import EvaluationJobConfig
from roma_core.evaluation.drift import reference_profile
from roma_core.evaluation.job import write_package
from roma_core.files import read_json
from roma_core.model import RoMAForPreTraining, RoMAForPreTrainingConfig
from roma_core.serving.package import MAX_LENGTH
from roma_core.trainer.job import data_fields
from tests.core.hand_made import built, series


@pytest.mark.parametrize("longest", [9, MAX_LENGTH + 1])
def test_no_series_of_the_data_set_is_too_long_for_its_package(tmp_path, longest):
    folder = built(tmp_path, *[series(f"s{k}", seed=k) for k in range(9)], series("long", longest))
    dataset = StoredDataset(folder)
    stack = {"d_model": 8, "nhead": 2, "depth": 1}
    shape = data_fields(dataset.schema) | {"encoder_config": stack, "decoder_config": stack}
    model = RoMAForPreTraining(RoMAForPreTrainingConfig(**shape)).eval()
    model.save_pretrained(tmp_path / "weights")
    config = EvaluationJobConfig(
        name="waves",
        dataset=str(folder),
        dataset_digest=dataset.manifest.digest,
        classifier="",
        autoencoder=str(tmp_path / "weights"),
    )

    profile = reference_profile(dataset)
    write_package(config, model, dataset.split("train"), profile, tmp_path / "package")

    taken = read_json(tmp_path / "package" / "package.json")["max_length"]
    assert taken == max(MAX_LENGTH, longest)
