import pytest

from roma_core.trainer.run_logger import as_people_read


@pytest.mark.parametrize(
    "number, text",
    [
        (12123.4, "12,123"),
        (0.05242, "0.05242"),
        (6.3e-7, "6.3e-07"),
        (999.94, "999.9"),
        (-1e4, "-10,000"),
    ],
)
def test_numbers_are_shown_as_people_read_them(number, text):
    assert as_people_read(number) == text
