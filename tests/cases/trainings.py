"""Trainings by the command line, for the cases: a small data set, and attempts that are interrupted."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from click.testing import CliRunner

from roma_core.cli import main
from tests import forked
from tests.time_limits import wait_until, within

STACK = "{d_model: 16, nhead: 2, depth: 1}"
SMALL = ["--set", f"model.encoder_config={STACK}"]
DECODER = ["--set", f"model.decoder_config={STACK}"]


def roma(*arguments: Any, cwd: Path, code: int = 0) -> str:
    """Output and warnings of a command in this process, which must end with this exit code."""
    warned = io.StringIO()
    handler = logging.StreamHandler(warned)
    logging.getLogger("roma_core").addHandler(handler)
    with contextlib.chdir(cwd):
        result = CliRunner().invoke(main, list(map(str, arguments)))
    logging.getLogger("roma_core").removeHandler(handler)
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output + warned.getvalue()


def interrupted(*arguments: Any, run: Path, cwd: Path, **environment: str) -> str:
    """Output of a training that was asked to stop after its next checkpoint."""
    before = {path.name for path in run.glob("checkpoints/step-*")}
    saved = lambda: {path.name for path in run.glob("checkpoints/step-*")} - before  # noqa: E731
    with tempfile.NamedTemporaryFile("r") as output:
        started = forked.start(
            *(forked.run_module, "roma_core.cli", *map(str, arguments)),
            output=Path(output.name),
            cwd=cwd,
            environment=os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(cwd)} | environment,
        )
        try:
            wait_until(lambda: saved() or not started.is_alive(), 40, "a checkpoint")
            started.terminate()
            started.join(within(30))
        finally:
            started.kill()
        said = output.read()
    assert started.exitcode == 75, said
    return said


def build(folder: Path, lengths: list[int], name: str = "s") -> Path:
    """A data set below ``folder/data`` of two classes, with series of these lengths."""
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(len(lengths)), lengths)
    time = np.concatenate([np.sort(rng.uniform(0, 30, n)) for n in lengths])
    columns = {"object_id": ids, "time": time, "flux": rng.normal(size=len(ids))}
    pq.write_table(
        pa.table(columns | {"label": np.where(ids % 2, "a", "b")}), folder / "in.parquet"
    )
    source = {
        "kind": "table",
        "files": ["in.parquet"],
        "columns": {
            "object": "object_id",
            "axes": [{"column": "time", "unit": "d"}],
            "channels": [{"column": "flux", "unit": "mJy"}],
            "metadata": {"label": "label"},
        },
    }
    (folder / "s.yaml").write_text(yaml.safe_dump({"name": name, "source": source}))
    roma("data", "build", "s.yaml", "--out", "data", cwd=folder)
    return next((folder / "data" / name).glob("[0-9a-f]*")).relative_to(folder)
