"""What an experiment's file may say of its models before the data are known."""

import pytest

from roma_pipelines.experiment import about_trainings


@pytest.mark.parametrize(
    "pretraining, wrong",
    [
        ({"mask_strategy": "channel", "channel_axis": 1}, []),
        ({"mask_strategy": "channel"}, ["needs channel_axis"]),
        (
            {"mask_strategy": "channel", "channel_axis": -1},
            ["channel_axis: must be greater"],
        ),
        ({"position_axes": []}, ["position_axes: the data decide it"]),
    ],
)
def test_masks_of_channels_name_an_axis_of_the_data(pretraining, wrong):
    said = about_trainings(pretraining, {}, {}, {})
    assert len(said) == len(wrong)
    for text, part in zip(said, wrong, strict=True):
        assert part in text
