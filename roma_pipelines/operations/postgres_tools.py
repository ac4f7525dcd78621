"""PostgreSQL's own programs for dumps, wherever the system keeps them."""

from __future__ import annotations

import shutil
from pathlib import Path


def postgres_tool(name: str) -> str:
    """Path of pg_dump or pg_restore, the newest version there is.

    Raises:
        RuntimeError: it is not installed.
    """
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=_version)
    if debian:
        return str(debian[-1])
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(
            f"{name} is not installed here; it is in the package postgresql-client, and must be at "
            f"least as new as the server"
        )
    return found


def _version(path: Path) -> int:
    number = path.parents[1].name
    return int(number) if number.isdigit() else 0
