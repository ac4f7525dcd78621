"""The module graph: no circles, floors that import downwards only, and modules of a useful size.

Imports count wherever they stand: at the top, in functions and under ``TYPE_CHECKING``.
"""

import ast
import graphlib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("roma_core", "roma_pipelines")
MAX_LINES, MAX_MODULES, MAX_WITH_ONE_IMPORTER = 38_430, 170, 25

FLOORS = [
    {"roma_core.files", "roma_core.hashing", "roma_core.settings", "roma_core.schema"},
    {"roma_core.model", "roma_core.data", "roma_core.sources"},
    {"roma_core.trainer"},
    {"roma_core.evaluation", "roma_core.serving"},
    {"roma_core.cli"},
]
"""Lowest first; a package imports from its own floor and those below."""

ORCHESTRATORS = ("dagster", "kubernetes", "dagster_k8s", "roma_pipelines")


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Module -> everything it imports: our modules by name, other packages by dotted name."""
    graph: dict[str, set[str]] = {}
    for name, path in modules().items():
        found = graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None and not node.level, f"{name}: relative import"
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found.add(full if full in modules() else node.module)
        found.discard(name)
    return graph


def test_no_circles():
    ours = {name: found & modules().keys() for name, found in imports().items()}
    try:
        graphlib.TopologicalSorter(ours).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_floors_import_downwards():
    floor_of = {package: n for n, packages in enumerate(FLOORS) for package in packages}

    def floor(name: str) -> int | None:
        return floor_of.get(".".join(name.split(".")[:2]))

    upwards = [
        f"{name} imports {other}"
        for name, found in imports().items()
        for other in sorted(found & modules().keys())
        if None not in (here := floor(name), there := floor(other)) and there > here
    ]
    assert not upwards


def test_the_model_does_not_know_the_data():
    wrong = [
        f"{name} imports {other}"
        for name, found in imports().items()
        if name.startswith("roma_core.model")
        for other in found
        if other.startswith(("roma_core.data", "roma_core.sources"))
    ]
    assert not wrong


def test_the_science_does_not_know_an_orchestrator():
    wrong = [
        f"{name} imports {other}"
        for name, found in imports().items()
        if name.startswith("roma_core")
        for other in found
        if other.split(".")[0] in ORCHESTRATORS
    ]
    assert not wrong


def test_the_code_stays_small():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules().values())
    importers = defaultdict(set)
    for name, found in imports().items():
        for other in found & modules().keys():
            importers[other].add(name)
    with_one = sorted(name for name in modules() if len(importers[name]) == 1)

    assert lines <= MAX_LINES
    assert len(modules()) <= MAX_MODULES
    assert len(with_one) <= MAX_WITH_ONE_IMPORTER, with_one
