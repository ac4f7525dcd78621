"""The default experiment over several seeds: accuracy on the test split, and time.

    python -m tests.benchmarks.japanese_vowels --seeds 0 1 2

Runs the shipped settings as the pipeline does, each training in a process of its own, without
Dagster and MLflow around it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

import roma_pipelines
from roma_core.data.build import build_dataset
from roma_core.data.manifest import read_manifest
from roma_core.evaluation.config import EvaluationJobConfig
from roma_core.files import write_json
from roma_core.job import JobFolder
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.job import TrainingJobConfig
from roma_pipelines.experiment import Experiment

DEFS = Path(roma_pipelines.__path__[0]) / "defs" / "japanese_vowels" / "defs.yaml"


def shipped() -> Experiment:
    """The experiment as its YAML file says."""
    values = yaml.safe_load(DEFS.read_text(encoding="utf-8"))["attributes"]
    values["dataset"] = {"name": values["name"], **values["dataset"]}
    return Experiment.model_validate(values)


def run(command: str, folder: JobFolder, config: object) -> tuple[float, dict[str, float]]:
    """Wall seconds and metrics of one job, start of its process included."""
    folder.path.mkdir(parents=True)
    write_json(folder.config, config.model_dump(mode="json"))  # type: ignore[attr-defined]
    started = time.perf_counter()
    arguments = [sys.executable, "-m", "roma_core.cli", command, "--job", str(folder.path)]
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result = folder.read_result()
    assert result is not None
    return time.perf_counter() - started, result.metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path(".roma/cache"))
    arguments = parser.parse_args()
    experiment = shipped()
    accuracies, walls = [], []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        data = build_dataset(experiment.dataset, root / "data", arguments.cache, progress=False)
        manifest = read_manifest(data)
        print(
            "seed  pretrain s  finetune s  accuracy  log-loss  calibration error  serving difference"
        )
        for seed in arguments.seeds:
            here = root / str(seed)

            def settings(stage: dict[str, object], seed: int = seed) -> TrainerConfig:
                return TrainerConfig.from_values({**stage, "random_seed": seed})

            pretraining, finetuning = experiment.pretraining, experiment.finetuning
            first, _ = run(
                "pretrain",
                JobFolder(here / "pretrain"),
                TrainingJobConfig.resolve(
                    "pretrain", data, pretraining.model, settings(pretraining.trainer)
                ),
            )
            second, _ = run(
                "finetune",
                JobFolder(here / "finetune"),
                TrainingJobConfig.resolve(
                    "finetune",
                    data,
                    finetuning.model,
                    settings(finetuning.trainer),
                    weights=here / "pretrain/outputs/model",
                ),
            )
            _, metrics = run(
                "evaluate",
                JobFolder(here / "evaluate"),
                EvaluationJobConfig(
                    name=experiment.name,
                    dataset=str(data),
                    dataset_digest=manifest.digest,
                    classifier=str(here / "finetune/outputs/model"),
                ),
            )
            accuracies.append(metrics["accuracy"])
            walls.append(first + second)
            print(
                f"{seed:4d}  {first:10.1f}  {second:10.1f}  {metrics['accuracy']:8.4f}  "
                f"{metrics['log_loss']:8.4f}  {metrics['calibration_error']:17.4f}  "
                f"{metrics['serving_difference']:18.1e}",
                flush=True,
            )
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else float("nan")
    print(
        f"accuracy {statistics.mean(accuracies):.4f} ± {spread:.4f} (smallest {min(accuracies):.4f}), "
        f"pretraining + finetuning {statistics.mean(walls):.1f} s wall on average"
    )


if __name__ == "__main__":
    main()
