import pytest

from roma_core.progress import format_number


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
def test_numbers_have_four_digits_and_thousands_in_full(number, text):
    assert format_number(number) == text
