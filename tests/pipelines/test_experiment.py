"""Settings of an experiment that are validated before the data are known."""

import pytest

from roma_pipelines.experiment import Experiment, Stage, training_errors
from roma_pipelines.run_config import Resources
from tests.pipelines import tiny


@pytest.mark.parametrize(
    "pretraining, wrong",
    [
        ({"mask_strategy": "channel", "channel_axis": 1}, []),
        ({"mask_strategy": {"channel": 1, "value": 1}}, []),  # if the data have missing values
        ({"normalize_targets": True, "mask_strategy": "channel"}, ["needs channel_axis"]),
        ({"normalize_targets": True}, []),
        ({"mask_strategy": "channel"}, []),  # of the axis with categories, if the data have one
        ({"covariates": [0]}, ["covariates: determined by the data set"]),
        ({"missing_values": True}, ["missing_values: determined by the data set"]),
        (
            {"mask_strategy": "channel", "channel_axis": -1},
            ["channel_axis: must be greater"],
        ),
        ({"position_axes": []}, ["position_axes: determined by the data set"]),
        ({"missing_values": True}, ["missing_values: determined by the data set"]),
    ],
)
def test_masks_of_channels_name_an_axis_of_the_data(pretraining, wrong):
    errors = training_errors(Stage(model=pretraining), Stage())
    assert len(errors) == len(wrong)
    for text, part in zip(errors, wrong, strict=True):
        assert part in text


SLURM = {"target": "slurm", "profile": "a", "nodes": 2, "processes_per_node": 4, "gpus_per_node": 4}


@pytest.mark.parametrize(
    ("sections", "stage", "expected"),
    [
        ({}, "pretraining", ("slurm", "a", 2, 4, 4)),
        ({}, "evaluation", ("slurm", "a", 1, 1, 1)),
        ({}, "dataset", ("slurm", "a", 1, 1, 0)),
        ({"finetuning": {"nodes": 1}}, "finetuning", ("slurm", "a", 1, 4, 4)),
        ({"finetuning": {"nodes": 1}}, "pretraining", ("slurm", "a", 2, 4, 4)),
        ({"evaluation": {"target": "local"}}, "evaluation", ("local", None, 1, 1, 1)),
        ({"evaluation": {"target": "slurm", "profile": "b"}}, "evaluation", ("slurm", "b", 1, 1, 1)),
        ({"predictions": {"nodes": 3, "processes_per_node": 2}}, "predictions", ("slurm", "a", 3, 2, 2)),
        ({"predictions": {"gpus_per_node": 0}}, "predictions", ("slurm", "a", 1, 1, 0)),
    ],
)  # fmt: skip
def test_a_stage_has_the_resources_of_its_section_over_the_others(sections, stage, expected):
    found = Resources(**SLURM, **sections).of(stage)

    assert tuple(getattr(found, name) for name in SLURM) == expected


def test_another_target_is_that_of_all_stages():
    sections = {"evaluation": {"target": "local", "memory_gb": 3}, "finetuning": {"profile": "b"}}
    given = Resources(**SLURM, **sections)

    def places(resources):
        stages = ("pretraining", "finetuning", "evaluation")
        return [(found.target, found.profile) for found in map(resources.of, stages)]

    assert places(given.at(None, None)) == [("slurm", "a"), ("slurm", "b"), ("local", None)]
    assert places(given.at("kubernetes", "c")) == [("kubernetes", "c")] * 3
    assert places(given.at(None, "c")) == [("slurm", "c")] * 3
    assert given.at("slurm", None).of("evaluation").memory_gb == 3
    with pytest.raises(ValueError, match="--profile c names a cluster, but the target is local"):
        given.at("local", "c")


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"evaluation": {"target": "local", "profile": "b"}}, "evaluation.profile: b names a clust"),
        ({"evaluation": {"nodes": 2}}, "evaluation: one process does it; remove nodes"),
        ({"pretraining": {"node": 2}}, "pretraining.node: not a setting; the closest one is"),
    ],
)  # fmt: skip
def test_a_section_without_effect_is_refused(tmp_path, sections, sentence):
    with pytest.raises(ValueError, match=sentence):
        Experiment.parse(tiny.attributes(tmp_path, resources=SLURM | sections))


def test_settings_over_those_of_the_file_are_merged_and_validated_like_the_file(tmp_path):
    sections = {"evaluation": {"profile": "b", "memory_gb": 3}}
    experiment = Experiment.parse(tiny.attributes(tmp_path, resources=SLURM | sections))

    changed = experiment.with_settings(
        pretraining={"model": {"encoder_config": {"depth": 2}}, "trainer": {"epochs": 2}},
        resources={"evaluation": {"target": "local"}, "pretraining": {"nodes": 1}},
    )

    before = experiment.pretraining
    assert changed.pretraining.model["encoder_config"] == {"d_model": 16, "nhead": 2, "depth": 2}
    assert changed.pretraining.model["decoder_config"] == before.model["decoder_config"]
    assert changed.pretraining.trainer == before.trainer | {"epochs": 2}
    evaluation = changed.resources.of("evaluation")
    assert (evaluation.target, evaluation.profile, evaluation.memory_gb) == ("local", None, 3)
    assert changed.resources.of("pretraining").nodes == 1 and changed.resources.nodes == 2
    same = experiment.with_settings(resources={"evaluation": {"target": "slurm", "nodes": 1}})
    assert same.resources.of("evaluation").profile == "b"
    assert experiment.with_settings() == experiment
    with pytest.raises(
        ValueError, match=r"finetuning\.trainer\.epoch: not a setting; the closest one"
    ):
        experiment.with_settings(finetuning={"trainer": {"epoch": 1}})
    shared = Experiment.parse(
        {"name": "two", "dataset": experiment.dataset, "pretrained_from": "waves"}
    )
    assert shared.with_settings(resources={"nodes": 2}).resources.nodes == 2
    with pytest.raises(ValueError, match="so `pretraining` has no effect"):
        shared.with_settings(pretraining={"trainer": {"epochs": 1}})
