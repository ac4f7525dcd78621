"""What goes into a served model and what comes out: ``list[Series] -> list[Prediction]``.

``LOGGED_MODEL`` (``logged_model.py``) must run where this package is not installed and therefore
repeats these classes; a test keeps both in step. ``json_schema`` is the same for one model, with
the names, units and limits of its data: what other languages validate against.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from roma_core.schema import DataSchema


class Series(BaseModel):
    """One irregular series: positions and values of its observations, by name.

    Every list of one series has the same length, its number of observations (at least 1). Names
    and units are those of the model's schema. Series of one request may differ in length.
    """

    model_config = ConfigDict(extra="forbid")

    id: str | None = Field(None, description="Returned with the prediction; free text.")
    positions: dict[str, list[float]] = Field(
        description="Axis name -> one number per observation."
    )
    values: dict[str, list[float]] = Field(
        description="Channel name -> one number per observation."
    )
    units: dict[str, str] | None = Field(
        None,
        description="Axis or channel name -> unit, checked against the model's. Pure numbers (unit "
        "'1') and axes counted in themselves (frame, in frames) may be left out, no other.",
    )


class Prediction(BaseModel):
    """The class of one series, with the probability of every class."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    label: str = Field(description="The most probable class.")
    probabilities: dict[str, float] = Field(description="Class name -> probability; they sum to 1.")


class Features(BaseModel):
    """What the encoder makes of one series: the mean of its tokens."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    features: list[float] = Field(description="As many numbers for every series.")


def json_schema(schema: DataSchema, max_length: int, n_features: int | None = None) -> Any:
    """JSON Schema (2020-12) of one model's input and output.

    Args:
        n_features: outputs of an encoder; None for a classifier.
    """
    units = schema.units
    needed = [name for name, unit in units.items() if unit not in ("1", name)]
    series = {
        "title": "Series",
        "description": Series.__doc__,
        "type": "object",
        "properties": {
            "id": {"type": ["string", "null"], "description": "Returned with the prediction."},
            "positions": _object({a.name: _numbers(a.unit, max_length) for a in schema.axes}),
            "values": _object({c.name: _numbers(c.unit, max_length) for c in schema.channels}),
            "units": {
                **_object({name: {"const": unit} for name, unit in units.items()}, needed),
                "description": "Checked; pure numbers may be left out.",
            },
        },
        "required": ["positions", "values", *(["units"] if needed else [])],
        "additionalProperties": False,
    }
    answer: type[BaseModel] = Prediction if n_features is None else Features
    output = answer.model_json_schema()
    if n_features is None:
        probability = {"type": "number", "minimum": 0, "maximum": 1}
        output["properties"]["label"]["enum"] = list(schema.classes)
        output["properties"]["probabilities"] = _object(dict.fromkeys(schema.classes, probability))
    else:
        output["properties"]["features"] |= {"minItems": n_features, "maxItems": n_features}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {"Series": series, answer.__name__: output},
        "title": "Request of an inference server",
        "type": "object",
        "properties": {
            "inputs": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/Series"}}
        },
        "required": ["inputs"],
        "additionalProperties": False,
    }


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def _numbers(unit: str, max_length: int) -> dict[str, Any]:
    return {
        "type": "array",
        "items": {"type": "number"},
        "minItems": 1,
        "maxItems": max_length,
        "description": "One finite number per observation.",
        "unit": unit,
    }


_NEEDED = ("mlflow", "numpy", "pydantic", "torch")


def requirements() -> list[str]:
    """The packages that the file of the model imports, pinned to what is installed here.

    Without build suffixes such as ``+cpu``: any build of the version will do.
    """
    return [_pinned(name) for name in _NEEDED]


@cache
def locked() -> tuple[str, ...]:
    """Every installed package that those need, with their own needs, pinned and sorted.

    A constraints file for pip: packages that another platform does not need do no harm.
    """
    found: dict[str, str] = {}
    open_ends = list(_NEEDED)
    while open_ends:
        name = _normal(open_ends.pop())
        if name in found:
            continue
        try:
            found[name] = _pinned(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # needed on another platform, or by an extra that is not installed
        for line in importlib.metadata.requires(name) or ():
            if "extra ==" not in line:
                match = re.match(r"[A-Za-z0-9._-]+", line)
                assert match is not None, line
                open_ends.append(match.group())
    return tuple(found[name] for name in sorted(found))


def lock_hash() -> str:
    """sha256 of the lock: equal hash, equal versions."""
    return hashlib.sha256("\n".join(locked()).encode()).hexdigest()


def _pinned(name: str) -> str:
    return f"{_normal(name)}=={importlib.metadata.version(name).partition('+')[0]}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
