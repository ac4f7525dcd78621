"""What a job inherits of the environment of whoever starts it."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import roma_core
from roma_pipelines.launching.job import JobSpec

# Settings are frozen in config.json, and variables of an outer torchrun or scheduler would mislead
# this one: so a list of what may pass beside env_names, not of what may not.
# fmt: off
_INHERITED = frozenset([
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "VIRTUAL_ENV",
    "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "no_proxy",
])
# fmt: on
_INHERITED_PREFIXES = ("LC_", "XDG_", "NCCL_")


def inherited() -> dict[str, str]:
    """Variables every job gets from this process, with the search path of its modules."""

    def passes(name: str) -> bool:
        return name in _INHERITED or name.startswith(_INHERITED_PREFIXES)

    variables = {name: value for name, value in os.environ.items() if passes(name)}
    return {**variables, "PYTHONPATH": _python_path(os.environ.get("PYTHONPATH"))}


def handed_on(spec: JobSpec, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables this job gets besides: those its spec names, and those given with their values."""
    named = {name: os.environ[name] for name in spec.env_names if name in os.environ}
    return {**named, **environment}


def _python_path(inherited: str | None) -> str:
    """Module search path of the job, which starts in its own folder: ours first, all absolute."""
    source = Path(roma_core.__file__).parents[1]
    entries = [
        str(Path(entry).absolute()) for entry in (inherited or "").split(os.pathsep) if entry
    ]
    if str(source) != sysconfig.get_path("purelib") and str(source) not in entries:
        entries.insert(0, str(source))
    return os.pathsep.join(entries)
