"""Medians of an encoder's features over files of series, in a process of its own: it needs torch.

    python -m roma_core.serving.embedding MODEL_FOLDER AT_MOST FILE...

prints ``{"n": 640, "center": [...]}``, or ends with exit code 1 and one sentence. Observations that
are not finite are left out, as whoever calls the model must do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_AT_MOST = 1000


class Medians(NamedTuple):
    """Of every feature, over n series."""

    n: int
    center: list[float]


class NotEmbedded(RuntimeError):
    """The features could not be computed; the text says why."""


def embed_medians(
    model: Path, files: Sequence[Path], environment: Mapping[str, str], timeout_s: float
) -> Medians:
    """Embed series, evenly spaced ones if there are many, in a fresh process.

    Args:
        model: verified folder of a registered encoder.
        environment: of that process; nothing else of ours is handed on.

    Raises:
        NotEmbedded: no result within ``timeout_s``, or the encoder takes no such series.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(model), str(_AT_MOST), *map(str, files)],
            env={**environment, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise NotEmbedded(f"the encoder did not answer within {timeout_s:g} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise NotEmbedded(lines[-1])
    return Medians(**json.loads(done.stdout.splitlines()[-1]))


def _series(package: Any, files: Sequence[Path], at_most: int) -> Iterator[Any]:
    from roma_core.serving.batch import count_series, read_series

    step = -(-sum(count_series(file, "test") for file in files) // at_most) or 1
    rows = chain.from_iterable(read_series(file, "test", package) for file in files)
    for row in islice(rows, 0, None, step):
        if (series := _finite(package, row)) is not None:
            yield series


def _finite(package: Any, row: Mapping[str, Any]) -> Any:
    """The series of a row without observations that were not made; None if none is left."""
    axes, channels = ([one["name"] for one in part] for part in (package.axes, package.channels))
    columns = {
        (part, name): np.array(row[part].get(name) or [], np.float64)
        for part, names in (("positions", axes), ("values", channels))
        for name in names
    }
    if len({len(column) for column in columns.values()}) != 1:
        raise ValueError(f"series {row['id']!r}: its lists differ in length, or one is missing")
    made = np.isfinite(np.stack(list(columns.values()))).all(axis=0)
    if not made.any():
        return None
    kept: dict[str, dict[str, list[float]]] = {"positions": {}, "values": {}}
    for (part, name), column in columns.items():
        kept[part][name] = column[made].tolist()
    return package.module.Series(id=row["id"], units=row.get("units"), **kept)


def main(model: str, at_most: str, *files: str) -> None:
    """See the module."""
    import torch

    from roma_core.serving.registry_client import load

    torch.set_num_threads(1)
    try:
        package = load(Path(model))
        series = list(_series(package, [Path(file) for file in files], int(at_most)))
        features = package.outputs(series)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(" ".join(str(error).split()))
    print(json.dumps({"n": len(series), "center": np.median(features, axis=0).tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
