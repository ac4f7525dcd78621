"""Settings of an experiment that are validated before the data are known."""

import pytest

from roma_pipelines.experiment import Stage, training_errors


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
