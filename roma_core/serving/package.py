"""Write and verify the package folder of a model; ``logged_model.py`` describes its files.

What a logged model needs: four packages, pinned, and the lock of everything that they need.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from roma_core.files import sha256_of, write_bytes, write_json
from roma_core.schema import DataSchema
from roma_core.serving.pyfunc_model import KINDS, MANIFEST, SCHEMA_VERSION, open_package
from roma_core.serving.pyfunc_model import Series as LoggedSeries
from roma_core.serving.schema import Series, json_schema, locked

LOGGED_MODEL = Path(__file__).with_name("pyfunc_model.py")
"""The file to log with ``mlflow.pyfunc.log_model(python_model=...)``, artifact ``package``."""

GOLDEN_TOLERANCE = 1e-4
MAX_LENGTH = 4096
MAX_BATCH_TOKENS = 16_384


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
    kind: Literal["classifier", "encoder"] = "classifier",
    n_features: int | None = None,
    card: str = "",
    profile: Mapping[str, Any] | None = None,
    max_length: int = MAX_LENGTH,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> str:
    """Make the folder, whole or not at all; one that is there is replaced.

    Args:
        program: takes values, positions and valid, gives logits or features (shapes in
            ``logged_model.py``), exported in evaluation mode with dynamic batch and length.
        weights: safetensors file of the same weights.
        golden: real series, preferably of different lengths; their outputs are computed by the code
            that will serve them.
        facts: plain JSON on where the model comes from: digests, run ids, commit.
        n_features: outputs of an encoder; a classifier has one per class.
        card: model card, Markdown.
        profile: reference profile of the training data, plain JSON.
        max_length: observations of the longest series that it accepts.
        max_batch_tokens: tokens, with padding, that go through the program at once.

    Returns:
        sha256 of ``MANIFEST.json``, which stands for the whole package.

    Raises:
        ValueError: no golden series, no classes, or a golden series does not fit the schema.
        PackageError: the program does not give finite outputs, one per class.
    """
    if not golden or (kind == "classifier" and len(schema.classes) < 2):
        raise ValueError(
            f"a package needs golden series and at least 2 classes, got {len(golden)} and "
            f"{len(schema.classes)}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        torch.export.save(program, aside / "model.pt2")
        shutil.copyfile(weights, aside / "weights.safetensors")
        write_json(aside / "model_config.json", dict(model_config))
        write_json(aside / "schema.json", schema.model_dump(mode="json"))
        write_json(aside / "series.schema.json", json_schema(schema, max_length, n_features))
        write_json(aside / "profile.json", dict(profile or {}))
        write_bytes(aside / "requirements.lock", ("\n".join(locked()) + "\n").encode())
        write_bytes(aside / "MODEL_CARD.md", card.encode())
        write_json(
            aside / "package.json",
            {
                "schema_version": SCHEMA_VERSION,
                "name": name,
                "kind": kind,
                "n_outputs": len(schema.classes) if n_features is None else n_features,
                "units_required": True,
                "max_length": max_length,
                "max_batch_tokens": max_batch_tokens,
                "torch": torch.__version__,
                "facts": dict(facts),
            },
        )
        write_bytes(aside / "golden.jsonl", _golden_rows(aside, kind, golden))
        files = sorted(path.name for path in aside.iterdir())
        write_json(
            aside / MANIFEST,
            {"schema_version": SCHEMA_VERSION, "files": {f: sha256_of(aside / f) for f in files}},
        )
        digest = verify_package(aside)
        aside.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return digest


def verify_package(folder: Path) -> str:
    """Check every file and the golden rows; return the sha256 of ``MANIFEST.json``.

    Raises:
        PackageError: the package is damaged or computes something else here.
    """
    open_package(folder)
    return sha256_of(folder / MANIFEST)


def size_mb(folder: Path) -> float:
    """All files of a package."""
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def _golden_rows(folder: Path, kind: str, golden: Sequence[Series]) -> bytes:
    package = KINDS[kind](folder)
    outputs = package.outputs([LoggedSeries(**one.model_dump()) for one in golden])
    rows = [
        {
            "series": one.model_dump(),
            package.golden_field: package.named(row),
            "tolerance": GOLDEN_TOLERANCE,
        }
        for one, row in zip(golden, outputs, strict=True)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
