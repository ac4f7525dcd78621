"""What is wrong with a description of data, a sentence each: which field, what is allowed, what came."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

_SHOWN = 60  # letters of a value
_OUR_WORDS = re.compile(r"^(Input|String|List|Tuple|Dictionary|Value) should")


def mistakes(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """The errors that pydantic found in values for ``model``, in our words."""
    found: list[str] = []
    alternatives: dict[
        tuple[str, str], list[str]
    ] = {}  # a field of several types has a complaint of each
    details = error.errors(include_url=False)
    for detail in details:
        if _only_follows(detail, details):
            continue
        names = [str(part) for part in detail["loc"] if not _is_branch(part)]
        name = ".".join(names)
        kind = detail["type"]
        if kind == "extra_forbidden":
            known = _fields_beside(model, detail["loc"])
            closest = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.0)
            meant = f"; did you mean {closest[0]!r}? There are {', '.join(known)}" if known else ""
            sentence = f"{name} is not a setting{meant}"
        elif kind == "missing":
            sentence = f"{name} is missing"
        elif kind == "value_error":
            cause = detail["ctx"]["error"]  # raised by a check of ours, a whole sentence
            sentence = f"{name}: {cause}" if name else str(cause)
        else:
            allowed = _OUR_WORDS.sub("must", detail["msg"], count=1)
            place = alternatives.setdefault((name, _shown(detail["input"])), [])
            place += [allowed] if allowed not in place else []
            continue
        if sentence not in found:
            found.append(sentence)
    found += [
        f"{name}: {' or '.join(all_)}, got {came}" for (name, came), all_ in alternatives.items()
    ]
    return found


def _only_follows(detail: Any, details: Sequence[Any]) -> bool:
    """Whether a list is called too short for no other reason than that its entries are wrong."""
    place = detail["loc"]
    return detail["type"] == "too_short" and any(
        len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in details
    )


def _is_branch(part: int | str) -> bool:
    """Whether this part of a place is pydantic's name for one of several types, not a field's."""
    return isinstance(part, str) and (
        "[" in part or part in ("float", "int", "str") or part.startswith("constrained-")
    )


def _fields_beside(model: Any, place: tuple[int | str, ...]) -> list[str]:
    """The names that would have been right in the section of the last part of ``place``."""
    for part in place[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        if field is not None:
            model = field.annotation
        for inner in getattr(model, "__args__", ()):  # of tuple[X, ...], dict[str, X] or X | None
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                model = inner
    return list(getattr(model, "model_fields", {}))


def _shown(value: Any) -> str:
    text = (
        f"a mapping of {', '.join(map(str, value))}" if isinstance(value, Mapping) else repr(value)
    )
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
