"""``.env.example``, with every setting and its default: ``python -m tests.env_example``."""

from __future__ import annotations

import json
import shlex
import textwrap
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from roma_core.model.config import RoMAForClassificationConfig, RoMAForPreTrainingConfig
from roma_core.settings import RomaSettings, leaves_of, variable_of
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.trackers import WandbConfig
from roma_pipelines.automation.alerts import AlertSettings
from roma_pipelines.experiment import DagsterSettings
from roma_pipelines.launching.kubernetes.profile import KubernetesSettings
from roma_pipelines.launching.slurm.profile import SlurmSettings
from roma_pipelines.registry.store import MlflowSettings
from roma_pipelines.storage import StorageSettings
from roma_pipelines.tracked_job import PageSettings

SETTINGS: tuple[type[RomaSettings], ...] = (
    TrainerConfig,
    RoMAForPreTrainingConfig,
    RoMAForClassificationConfig,
    WandbConfig,
    MlflowSettings,
    StorageSettings,
    AlertSettings,
    SlurmSettings,
    KubernetesSettings,
    DagsterSettings,
    PageSettings,
)
_HEAD = """\
Settings of RoMA. Copy this file to `.env` and uncomment what you change; the values shown are the
defaults. What is given in code wins over the environment, the environment over this file. The
nearest `.env` at or above the working directory counts, or the file that ROMA_ENV_FILE names.
The folder that ROMA_PROJECT names, here or in the environment (the working directory by default),
has your experiments in defs/ and your clusters in profiles/.

Two underscores lead into a section. Lists and dictionaries are JSON, `null` means none, and an
empty variable counts as not set. A name with one of these prefixes that is no setting is an error.
"""


def env_example(classes: Iterable[type[RomaSettings]]) -> str:
    """The file's text; everything in it is commented out."""
    text = _comment(_HEAD)
    for cls in classes:
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        text += "\n\n" + _comment(f"--- {cls.__name__} ---\n{summary}")
        fields = leaves_of(cls)
        for name, value, _ in cls.from_values({}).resolved():
            about = " ".join((fields[name].description or "").split())  # a docstring has lines
            choices = [str(choice) for choice in _choices(fields[name].annotation)]
            if not all(choice in about for choice in choices):
                about += f" One of: {', '.join(choices)}."
            written = str(value) if isinstance(value, str | Path) else json.dumps(value)
            # quoted so that a shell and a .env reader take it the same way
            text += f"\n{_comment(about)}# {variable_of(cls, name)}={shlex.quote(written)}\n"
    return text


def _choices(annotation: Any) -> list[Any]:
    """The values of a ``Literal``, ``Optional`` or not."""
    arguments = list(typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return arguments
    return [choice for argument in arguments for choice in _choices(argument)]


def _comment(text: str) -> str:
    lines = (w for line in text.splitlines() for w in textwrap.wrap(line, 98) or [""])
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


if __name__ == "__main__":
    print(env_example(SETTINGS), end="")
