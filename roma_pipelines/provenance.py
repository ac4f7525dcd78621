"""Which code this is."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

DISTRIBUTION = "roma-pipeline"


def code_version() -> str:
    """The git commit, with ``-dirty`` if files differ from it; outside a checkout the release."""
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    if described.returncode == 0 and described.stdout.strip():
        return described.stdout.strip()
    return f"release {importlib.metadata.version(DISTRIBUTION)}"
