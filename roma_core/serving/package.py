"""Write, verify and smoke-test the package folder of a model; ``pyfunc_model.py`` has its files.

Importing this module imports neither torch nor MLflow.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from roma_core.files import sha256_of, write_bytes, write_json
from roma_core.schema import Covariate, DataSchema, PositionAxis
from roma_core.serving import pyfunc_model
from roma_core.serving.pyfunc_model import Package, Series, answer_type
from roma_core.serving.registry_client import code_of
from roma_core.settings import Frozen

if TYPE_CHECKING:
    import torch

MODEL_CODE = Path(__file__).with_name("pyfunc_model.py")
"""The file to log with ``mlflow.pyfunc.log_model(python_model=...)``, artifact ``package``."""

MAX_LENGTH = 4096
_TOLERANCE = 1e-4  # of golden rows
# so many times a number, the tolerance is two units in its last place of float32
_ROUNDING = 2 * 2**-23 / _TOLERANCE
_REQUIREMENTS = ("mlflow", "numpy", "pydantic", "torch")
_SMOKE_TEST_TIMEOUT_S = 300
_SMOKE_TEST = """
import importlib.util, json, pathlib, statistics, sys, time
import torch
code, folder, repeats = sys.argv[1:]
for blocked in ("roma_core", "roma_pipelines"):
    sys.modules[blocked] = None  # importing it raises
spec = importlib.util.spec_from_file_location("model_code", code)
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)
torch.set_num_threads(1)
folder = pathlib.Path(folder)
try:
    model.open_package(folder)  # warm-up: the first load imports a thousand modules of torch
    start = time.perf_counter()
    package = model.open_package(folder)
    load_s = time.perf_counter() - start
    golden = folder / "golden.jsonl"
    difference = package.check_golden(golden)
except model.PackageError as error:
    sys.exit(str(error))
rows = [model.Series(**json.loads(line)["series"]) for line in golden.read_text().splitlines()]
times = []
for _ in range(int(repeats)):
    for row in rows:
        start = time.perf_counter()
        package.predict([row])
        times.append(time.perf_counter() - start)
latency = statistics.median(times) * 1e3
print(json.dumps({"load_s": load_s, "latency_ms": latency, "golden_difference": difference}))
"""


def build_package(
    folder: Path,
    program: torch.export.ExportedProgram,
    weights: Path,
    model_config: Mapping[str, Any],
    schema: DataSchema,
    golden: Sequence[Series],
    facts: Mapping[str, Any],
    *,
    name: str,
    kind: Literal["classifier", "regressor", "encoder", "autoencoder"] = "classifier",
    n_outputs: int | None = None,
    card: str = "",
    profile: Mapping[str, Any] | None = None,
    max_length: int = MAX_LENGTH,
    max_batch_tokens: int = 16_384,
) -> str:
    """Write the folder atomically, replacing an existing one.

    Args:
        program: maps values, positions and valid to logits or features (shapes in
            ``pyfunc_model.py``), exported in evaluation mode with dynamic batch and length.
        weights: safetensors file of the same weights.
        golden: real series, preferably of different lengths, with queries of an autoencoder; their
            expected outputs are computed by the code that will serve them.
        facts: plain JSON on the model's origin: digests, run ids, commit.
        n_outputs: of an encoder or a regressor; a classifier has one per class.
        max_batch_tokens: padding included.

    Returns:
        sha256 of ``MANIFEST.json``, which identifies the whole package.

    Raises:
        ValueError: no golden series, fewer than two classes or no target, or a golden series that does
            not fit the schema.
        PackageError: the program does not return finite outputs, one per class.
    """
    import torch

    if not golden or (kind == "classifier" and len(schema.classes) < 2):
        raise ValueError(
            f"a package needs golden series and at least 2 classes, got {len(golden)} and "
            f"{len(schema.classes)}"
        )
    n_outputs = len(schema.classes) if n_outputs is None else n_outputs
    if kind == "autoencoder":
        n_outputs = schema.n_values
    k = len(schema.targets)
    if kind == "regressor" and (not k or n_outputs not in (k, 2 * k)):
        raise ValueError(
            f"a regressor has an output per target, or two with a deviation: expected outputs for {k} "
            f"targets, got {n_outputs}"
        )
    step = model_config.get("grid_step")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        torch.export.save(program, aside / "model.pt2")
        shutil.copyfile(weights, aside / "weights.safetensors")
        write_json(aside / "model_config.json", dict(model_config))
        write_json(aside / "schema.json", schema.model_dump(mode="json"))
        write_json(aside / "series.schema.json", json_schema(schema, max_length, n_outputs, kind))
        write_json(aside / "profile.json", dict(profile or {}))
        write_bytes(aside / "requirements.lock", ("\n".join(locked()) + "\n").encode())
        write_bytes(aside / "MODEL_CARD.md", card.encode())
        about: dict[str, Any] = {"torch": torch.__version__, "facts": dict(facts)}
        about |= {"schema_version": pyfunc_model.SCHEMA_VERSION, "name": name, "kind": kind}
        about |= {"n_outputs": n_outputs, "units_required": True}
        about["per_observation"] = kind == "regressor" and schema.target_level == "observation"
        about |= {"max_length": max_length, "max_batch_tokens": max_batch_tokens}
        # of windows, in the unit of the first axis
        about["grid_step"] = None if step is None else step * schema.axes[0].scale
        write_json(aside / "package.json", about)
        package, rows = pyfunc_model.Package(aside), []
        for one, answer in zip(golden, package.answers(golden), strict=True):
            row = {"series": one.model_dump(), package.golden_field: answer}
            scales = _scales(package, schema, answer)
            rows.append(row | {"tolerance": _TOLERANCE} | ({"scale": scales} if scales else {}))
        write_bytes(aside / "golden.jsonl", "".join(json.dumps(x) + "\n" for x in rows).encode())
        files = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
        manifest = {"schema_version": pyfunc_model.SCHEMA_VERSION, "files": files}
        write_json(aside / pyfunc_model.MANIFEST, manifest)
        digest = sha256_of(aside / pyfunc_model.MANIFEST)
        aside.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return digest


def _scales(package: Package, schema: DataSchema, answer: Mapping[str, Any]) -> dict[str, float]:
    """Channel -> its units per unit of the model, at the largest predicted value; so of a target.

    Of a target far from 0 it is so large that the tolerance is two units in the last place of float32.
    """
    if package.kind != "autoencoder":
        targets = schema.targets if package.targets else ()
        return {one.name: max(one.std, _ROUNDING * abs(one.mean)) for one in targets}
    scales, constants = {}, package.normalisation
    for k, (name, values) in enumerate(answer["mean"].items()):
        largest = max((abs(x) for x in values if x is not None), default=0.0)
        scales[name] = max(
            c["std"] * (largest + c["transform_scale"] if c["transform"] == "arcsinh" else 1.0)
            for c in constants[k :: len(package.channels)] or constants
        )
    return scales


class SmokeTest(Frozen):
    """Measurements of a package that its own code alone loaded in a new process."""

    load_s: float  # to verify, load and compute the golden rows, without imports
    latency_ms: float  # median of one series among the golden rows
    golden_difference: float  # largest of an output; at most 1e-4


class SmokeTestFailed(RuntimeError):
    """A consumer cannot use the package; the message says why."""


def smoke_test_package(folder: Path) -> SmokeTest:
    """Load a package as a consumer does, in a new process, check its golden rows and time it.

    The process loads the model's own file of code by path, this project's for a package outside of a
    downloaded model, and cannot import this project.

    Raises:
        SmokeTestFailed: the package was rejected, or the process failed.
    """
    model = folder.parent.parent
    code = code_of(model) if (model / "MLmodel").is_file() else MODEL_CODE
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _SMOKE_TEST, str(code), str(folder), "5"],
            env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_SMOKE_TEST_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise SmokeTestFailed(f"{folder} did not load within {_SMOKE_TEST_TIMEOUT_S} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SmokeTestFailed(lines[-1])
    return SmokeTest.model_validate(json.loads(done.stdout.splitlines()[-1]))


def size_mb(folder: Path) -> float:
    """Size of all files of a package, in MB."""
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def json_schema(
    schema: DataSchema, max_length: int, n_outputs: int = 0, kind: str = "classifier"
) -> Any:
    """JSON Schema (2020-12) of the input and output of a model with so many outputs."""
    required = [name for name, unit in schema.units.items() if unit not in ("1", name)]
    series = Series.model_json_schema()
    may_miss = schema.missing_values or schema.layout == "per_channel"
    numbers = {c.name: _numbers(c.unit, max_length, may_miss) for c in schema.channels}
    axes = {axis.name: _positions(axis, max_length) for axis in schema.given_axes}
    one = {name: entry["items"] for name, entry in (axes | numbers).items()}
    one |= {"channel": {"enum": list(numbers)}, "value": {"type": ["number", "null"]}}
    series["properties"] |= {
        "positions": _object(axes),
        "values": _object(numbers, [] if may_miss else None),
        "observations": _list(_object(one, list(axes)), max_length),
        "covariates": _object({c.name: _covariate(c) for c in schema.covariates}, []),
        "units": _object({name: {"const": unit} for name, unit in schema.units.items()}, required)
        | {"description": "Checked; pure numbers may be left out."},
    }
    series["required"] = ["units"] if required else []
    series["oneOf"] = [{"required": ["positions", "values"]}, {"required": ["observations"]}]
    per_observation = schema.target_level == "observation"
    answer = answer_type(kind, per_observation)
    if kind == "autoencoder":
        series["required"].append("queries")
        asked = {axis.name: _positions(axis, max_length) for axis in schema.axes}
        each = {name: column["items"] for name, column in asked.items()}
        forms = [_object(asked, list(axes)), _list(_object(each, list(axes)), max_length)]
        description = series["properties"]["queries"]["description"]
        series["properties"]["queries"] = {"description": description, "oneOf": forms}
    else:
        del series["properties"]["queries"]
    output = answer.model_json_schema()
    lists: dict[str, Any] = {"type": "array", "items": {"type": ["number", "null"]}}
    if kind == "autoencoder":
        each = _object(dict.fromkeys(numbers, lists))
        output["properties"] |= {"mean": each, "std": {"anyOf": [each, {"type": "null"}]}}
    elif kind == "regressor":
        number = lists if per_observation else {"type": "number"}
        each = _object({t.name: number | {"unit": t.unit} for t in schema.targets})
        std = each if n_outputs > len(schema.targets) else {"type": "null"}
        output["properties"] |= {"values": each, "std": std}
    elif kind == "classifier":
        probability = {"type": "number", "minimum": 0, "maximum": 1}
        output["properties"]["label"]["enum"] = list(schema.classes)
        output["properties"]["probabilities"] = _object(dict.fromkeys(schema.classes, probability))
    else:
        output["properties"]["features"] |= {"minItems": n_outputs, "maxItems": n_outputs}
    inputs = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/Series"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {"Series": series, answer.__name__: output},
        "title": "Request of an inference server",
        **_object({"inputs": inputs}),
    }


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def _list(items: dict[str, Any], max_length: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": max_length}


def _numbers(unit: str, max_length: int, may_miss: bool = False) -> dict[str, Any]:
    text = "One finite number per observation" + (
        ", null where it is missing." if may_miss else "."
    )
    kind = ["number", "null"] if may_miss else "number"
    return _list({"type": kind}, max_length) | {"description": text, "unit": unit}


def _positions(axis: PositionAxis, max_length: int) -> dict[str, Any]:
    if not axis.categories:
        return _numbers(axis.unit, max_length)
    entry = {"type": "string"} if axis.unknown else {"enum": list(axis.categories)}
    text = f"One of {', '.join(axis.categories)} per observation."
    return _list(entry, max_length) | {"description": text}


def _covariate(covariate: Covariate) -> dict[str, Any]:
    if covariate.categories:
        return {"enum": [*covariate.categories, None]}
    return {"type": ["number", "null"], "unit": covariate.unit}


def requirements() -> list[str]:
    """The packages that ``pyfunc_model.py`` imports, pinned to the installed versions.

    Without build suffixes such as ``+cpu``: any build of the version serves.
    """
    return [_pinned(name) for name in _REQUIREMENTS]


@cache
def locked() -> tuple[str, ...]:
    """Those packages and everything they depend on, pinned and sorted.

    A constraints file for pip, so entries that another platform does not need are harmless.
    """
    found: dict[str, str] = {}
    pending = list(_REQUIREMENTS)
    while pending:
        name = _canonical(pending.pop())
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
                pending.append(match.group())
    return tuple(found[name] for name in sorted(found))


def lock_hash() -> str:
    """sha256 of ``locked()``: equal hashes mean equal versions."""
    return hashlib.sha256("\n".join(locked()).encode()).hexdigest()


def _pinned(name: str) -> str:
    return f"{_canonical(name)}=={importlib.metadata.version(name).partition('+')[0]}"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
