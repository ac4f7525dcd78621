"""Why a step of a Dagster run failed, in the words of the error that began it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dagster._utils.error import SerializableErrorInfo


def first_of(error: SerializableErrorInfo) -> SerializableErrorInfo:
    """The error that caused the others, which are Dagster's own."""
    while error.cause is not None:
        error = error.cause
    return error


def words_of(error: SerializableErrorInfo) -> str:
    """Its message without the class that Dagster puts before it, if a sentence is left.

    Of an error that nobody foresaw, such as ``KeyError: 'path'``, the class is half of what it says.
    """
    text = error.message.strip()
    before, _, words = text.partition(": ")
    is_class = before.rpartition(".")[-1] == error.cls_name
    return words.strip() if is_class and " " in words.strip() else text
