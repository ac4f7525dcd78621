"""Experiments by name, as their ``defs.yaml`` have them; no Dagster instance is needed.

YAML files that people write: what is in them, or in one sentence why they cannot be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from roma_core.settings import validation_errors
from roma_pipelines.components import RomaExperiment
from roma_pipelines.experiment import Experiment
from roma_pipelines.scaffold import DEFS, TYPE


def load_experiment(name: str) -> Experiment:
    """The experiment of this name under ``defs/``, or in the YAML file of this path.

    Raises:
        ValueError: there is none, or a setting of it is wrong.
    """
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name))
    paths = sorted(DEFS.glob("**/defs.yaml"))
    experiments = {path.parent.name: path for path in paths}
    if name not in experiments:
        raise ValueError(
            f"there is no experiment {name!r}; there are {', '.join(experiments)}. "
            f"The path of a defs.yaml will do, too"
        )
    return _read(experiments[name])


def all_experiments() -> dict[str, Experiment | str]:
    """Every experiment under ``defs/`` by the name of its folder; a text says why one is unusable."""
    found: dict[str, Experiment | str] = {}
    for path in sorted(DEFS.glob("**/defs.yaml")):
        try:
            found[path.parent.name] = _read(path)
        except ValueError as error:
            found[path.parent.name] = str(error)
    return found


def mistakes_in_defs() -> list[str]:
    """Why experiments under ``defs/`` have no assets, a text each; files of other components pass."""
    found = []
    for path in sorted(DEFS.glob("**/defs.yaml")):
        try:
            document = read_yaml(path)
            if isinstance(document, dict) and document.get("type", TYPE) == TYPE:
                _read(path).refuse_what_cannot_be_served()
        except ValueError as error:
            found.append(str(error))
    return found


def _read(path: Path) -> Experiment:
    document = read_yaml(path)
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict):
        raise ValueError(f"{path}: expected `type` and `attributes` of an experiment")
    try:
        return RomaExperiment(**attributes).experiment()
    except ValidationError as error:
        problems = [str(one) for one in validation_errors(error, RomaExperiment)]
    except ValueError as error:
        problems = str(error).removeprefix(f"experiment {attributes.get('name')}: ").splitlines()
    raise ValueError("\n".join(f"{path}: {one}" for one in problems))


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: there is no such file, or it is no YAML; the text names file, line and column.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{path} is not valid YAML: {place}{error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
