"""Experiments by name, as their ``defs.yaml`` have them; no Dagster instance is needed."""

from __future__ import annotations

from pathlib import Path

import yaml

from roma_pipelines.components import RomaExperiment
from roma_pipelines.experiment import Experiment

DEFS = Path(__file__).parent / "defs"


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


def _read(path: Path) -> Experiment:
    try:
        document = yaml.safe_load(path.read_text())
        attributes = document["attributes"]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected `type` and `attributes` of an experiment") from error
    return RomaExperiment(**attributes).experiment()
