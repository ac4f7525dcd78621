"""Writes the commit that a wheel is built from into it, as ``roma_pipelines/COMMIT``.

Of git's checkout, or of the variable SOURCE_COMMIT where there is none (as in an image's build).
"""

import os
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


def source_commit() -> str:
    if given := os.environ.get("SOURCE_COMMIT"):
        return given
    if not (Path(__file__).parent / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the wheel will not name its commit: {error}")
        return ""


class BuildWithCommit(build_py):
    def run(self) -> None:
        super().run()
        if (commit := source_commit()) and not self.editable_mode:
            package = Path(self.build_lib) / "roma_pipelines"
            package.mkdir(parents=True, exist_ok=True)
            (package / "COMMIT").write_text(f"{commit}\n", encoding="utf-8")


setup(cmdclass={"build_py": BuildWithCommit})
