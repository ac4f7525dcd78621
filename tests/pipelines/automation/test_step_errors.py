"""What people are told of a failed step: the first error's own words."""

import sys

import dagster as dg
import pytest
from dagster._utils.error import serializable_error_info_from_exc_info

from roma_pipelines.automation.alerts import message_of, root_cause
from roma_pipelines.registry.store import StoreError


def reported(error):
    """As Dagster keeps it, around which it has put an error of its own."""
    try:
        try:
            raise error
        except Exception as cause:
            raise dg.DagsterInvariantViolationError("step failed") from cause
    except dg.DagsterError:
        return serializable_error_info_from_exc_info(sys.exc_info())


def test_an_error_with_advice_is_told_in_place_of_the_one_it_was_raised_from():
    error = StoreError("the disk is full; free some space")
    error.__cause__ = OSError("no space left")
    assert message_of(root_cause(reported(error))) == "the disk is full; free some space"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (StoreError("the server refuses us: set a name"), "the server refuses us: set a name"),
        (ValueError("first line\nsecond"), "first line\nsecond"),
        (KeyError("path"), "KeyError: 'path'"),
    ],
)
def test_a_class_is_told_only_where_it_says_something(error, words):
    assert message_of(root_cause(reported(error))) == words
