"""Profiles of clusters: one YAML file each, in a folder of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from roma_core.data.mistakes import mistakes

Profile = TypeVar("Profile", bound=BaseModel)
DEPLOY = Path(__file__).parents[2] / "deploy"
"""Where the profiles that ship are, in a checkout."""


def read_profile(
    profile: type[Profile], kind: str, folder: Path, name: str, ours: Mapping[str, Any]
) -> Profile:
    """The profile of this name, with the user's settings laid over it.

    Args:
        kind: SLURM or Kubernetes, as people write it.

    Raises:
        ValueError: there is no such profile, or it is wrong; the text names file and field.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(
            f"there is no {kind} profile {name!r} in {folder}; there are {', '.join(known) or 'none'}. "
            f"Copy generic.yaml, or set ROMA_{kind.upper()}_PROFILES to the folder of yours"
        )
    path = folder / f"{name}.yaml"
    try:
        document = yaml.safe_load(path.read_text())
        document = {} if document is None else document
        if not isinstance(document, dict):
            raise ValueError("expected `setting: value` lines")
        return profile.model_validate({**document, "name": name, **ours})
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(mistakes(error, profile))}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None
