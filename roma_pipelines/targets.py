"""Where jobs run, by name."""

from __future__ import annotations

from roma_pipelines.launching.launcher import Launcher
from roma_pipelines.launching.local import LocalLauncher


def launcher_for(target: str) -> Launcher:
    """The launcher of a target.

    Raises:
        ValueError: there is no such target.
    """
    if target == "local":
        return LocalLauncher()
    raise ValueError(f"unknown target {target!r}; there is local, this computer")
