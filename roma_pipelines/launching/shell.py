"""Runs a scheduler's commands, on this computer or through ssh on one connection that is kept.

Over ssh only commands travel: files lie on storage that both sides see. Secrets go through the
standard input of the remote shell, so no process list and no file shows them.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from roma_pipelines.launching.environment import inherited
from roma_pipelines.launching.launcher import NoAnswer

_KEPT_FOR = "10m"
_OF_THIS_COMPUTER = ("CUDA_VISIBLE_DEVICES", "TMPDIR", "XDG_")  # a node has its own, or none


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    output: str
    error: str

    @property
    def text(self) -> str:
        """Both outputs as one line for people."""
        return " ".join(f"{self.error} {self.output}".split())


class Shell:
    """Where a scheduler's commands run."""

    def __init__(self, ssh: str | None = None, timeout_s: float = 60.0) -> None:
        """
        Args:
            ssh: host, as ssh knows it; None: this computer.
            timeout_s: how long a command may take; SLURM's own give up after some ten seconds.
        """
        self.ssh, self.timeout_s = ssh, timeout_s

    def run(self, *argv: str, environment: Mapping[str, str] | None = None) -> Answer:
        """Run a command to its end.

        Args:
            environment: variables of the command beside those every job inherits.

        Raises:
            NoAnswer: it took too long, or ssh did not get there; it may have been carried out.
            ValueError: there is no such command here.
        """
        try:
            if self.ssh is None:
                return self._here(argv, {**_ours(), **(environment or {})})
            return self._there(argv, environment or {})
        except subprocess.TimeoutExpired as error:
            raise NoAnswer(f"{argv[0]} gave no answer within {self.timeout_s:g} s") from error

    def _here(self, argv: tuple[str, ...], environment: Mapping[str, str]) -> Answer:
        try:
            done = subprocess.run(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout_s,
            )
        except FileNotFoundError as error:
            raise ValueError(
                f"there is no command {argv[0]!r} on this computer; run on a login node of the "
                f"cluster, or name one as `ssh` in its profile"
            ) from error
        return Answer(done.returncode, done.stdout, done.stderr)

    def _there(self, argv: tuple[str, ...], environment: Mapping[str, str]) -> Answer:
        lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
        script = "\n".join([*lines, f"exec {shlex.join(argv)}", ""])
        sockets = Path(os.environ.get("XDG_RUNTIME_DIR", Path.home() / ".ssh"))
        done = subprocess.run(
            [
                *("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
                *("-o", "ControlMaster=auto", "-o", f"ControlPersist={_KEPT_FOR}"),
                *("-o", f"ControlPath={sockets}/roma-%C", self.ssh or "", "bash", "-s"),
            ],
            input=script,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=self.timeout_s,
        )
        if done.returncode == 255:  # ssh's own
            raise NoAnswer(f"ssh {self.ssh}: {' '.join(done.stderr.split())}")
        if done.returncode == 127:
            raise ValueError(f"ssh {self.ssh}: {' '.join(done.stderr.split())}")
        return Answer(done.returncode, done.stdout, done.stderr)


def _ours() -> dict[str, str]:
    """This process's environment as SLURM's commands and the job may see it."""
    kept = {k: v for k, v in os.environ.items() if k.startswith("SLURM_CONF")}
    variables = {k: v for k, v in inherited().items() if not k.startswith(_OF_THIS_COMPUTER)}
    return variables | kept
