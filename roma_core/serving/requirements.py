"""What a logged model needs: four packages, pinned, and the lock of everything that they need."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from functools import cache

_NEEDED = ("mlflow", "numpy", "pydantic", "torch")


def requirements() -> list[str]:
    """The packages that the file of the model imports, pinned to what is installed here.

    Without build suffixes such as ``+cpu``: any build of the version will do.
    """
    return [_pinned(name) for name in _NEEDED]


@cache
def locked() -> tuple[str, ...]:
    """Every installed package that those need, with their own needs, pinned and sorted.

    A constraints file for pip: packages that another platform does not need do no harm.
    """
    found: dict[str, str] = {}
    open_ends = list(_NEEDED)
    while open_ends:
        name = _normal(open_ends.pop())
        if name in found:
            continue
        try:
            found[name] = _pinned(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # needed on another platform, or by an extra that is not installed
        for line in importlib.metadata.requires(name) or ():
            if "extra ==" not in line:
                match = re.match(r"[A-Za-z0-9._-]+", line)
                assert match is not None, line
                open_ends.append(match.group())
    return tuple(found[name] for name in sorted(found))


def lock_hash() -> str:
    """sha256 of the lock: equal hash, equal versions."""
    return hashlib.sha256("\n".join(locked()).encode()).hexdigest()


def _pinned(name: str) -> str:
    return f"{_normal(name)}=={importlib.metadata.version(name).partition('+')[0]}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
