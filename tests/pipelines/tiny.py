"""A tiny real experiment: three kinds of short waves in ``.ts`` files, learnt in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import psutil

from roma_pipelines.components import RomaExperiment
from roma_pipelines.resources import JOB_CLIENTS

ASSET_NAMES = (
    "dataset",
    "pretrained_encoder",
    "finetuned_classifier",
    "evaluation_report",
    "registered_classifier",
)
_CLASSES = {"slow": 0.3, "medium": 0.9, "fast": 1.8}  # radians a step


def write_waves(folder: Path) -> list[dict[str, str]]:
    """60 training and 24 test series of two channels, 9 to 16 steps; the entries of ``files``."""
    rng = np.random.default_rng(0)
    files = []
    for split, n in (("train", 60), ("test", 24)):
        lines = ["@dimensions 2", "@equalLength false", "@classLabel true " + " ".join(_CLASSES)]
        lines.append("@data")
        for k in range(n):
            name, speed = list(_CLASSES.items())[k % len(_CLASSES)]
            phase = speed * np.arange(rng.integers(9, 17)) + rng.uniform(0, 6.3)
            channels = (np.sin(phase), np.cos(phase))
            lines.append(":".join(",".join(f"{v:.4f}" for v in c) for c in channels) + f":{name}")
        path = folder / f"waves_{split}.ts"
        path.write_text("\n".join(lines) + "\n")
        files.append({"path": str(path), "split": split})
    return files


def attributes(folder: Path, **changes: Any) -> dict[str, Any]:
    """The content of a ``defs.yaml``; ``changes`` replace settings inside sections, and others whole."""
    stack = {"d_model": 16, "nhead": 2, "depth": 1}
    sections: dict[str, Any] = {
        "name": "waves",
        "dataset": {
            "source": {"kind": "ts", "files": write_waves(folder)},
            "drop_rate": 0.2,
            "validation_fraction": 0.2,
        },
        "pretraining": {
            "model": {"encoder_config": stack, "decoder_config": stack, "use_cls": False},
            "trainer": {"epochs": 4, "batch_size": 16, "log_every": 2, "eval_every": 6},
        },
        "finetuning": {
            "model": {"encoder_config": {"drop_path_rate": 0.1}},
            "trainer": {"epochs": 40, "batch_size": 8, "base_lr": 0.01, "log_every": 2},
        },
        "resources": {},
        "measure_baselines": False,
        "gate": {
            "max_primary_drop": 0.5,
            "max_latency_ratio": 1000,
        },  # a busy computer decides no test
    }
    for name, value in changes.items():
        section = isinstance(value, Mapping)
        sections[name] = sections.get(name, {}) | dict(value) if section else value
    return sections


def definitions(sections: Mapping[str, Any]) -> dg.Definitions:
    """What the component makes of it, with the clients of ``definitions.py``."""
    made = RomaExperiment(**sections).build_defs(None)  # type: ignore[arg-type]
    return dg.Definitions.merge(made, dg.Definitions(resources=JOB_CLIENTS))


def living_jobs(folder: Path) -> list[psutil.Process]:
    """Processes of training jobs whose job folder lies under ``folder``."""
    return [
        process
        for process in psutil.process_iter(["environ", "status"])
        if (process.info["environ"] or {}).get("ROMA_JOB_FOLDER", "").startswith(str(folder))
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]
