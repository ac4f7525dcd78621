"""What is cut out of a URL, and what is not."""

import pytest

from roma_core.settings import without_credentials


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://user:pass@host:5000/a@b", "https://host:5000/a@b"),
        ("https://user:p@ss@host", "https://host"),
        ("API request to http://token@h/x failed; http://h/y, too", "API request to http://h/x failed; http://h/y, too"),
        ("sqlite:////a/b@c/mlflow.db", "sqlite:////a/b@c/mlflow.db"),
        ("http://host/?mail=a@b", "http://host/?mail=a@b"),
    ],
)  # fmt: skip
def test_only_what_is_before_the_host_goes(text, left):
    assert without_credentials(text) == left
