"""What share of a training's steps is spent waiting for data, in the experiments that ship.

    python -m tests.benchmarks.loader                          # about two minutes
    python -m tests.benchmarks.loader --experiments plasticc

Trains each experiment's models with the settings of its file, but for the number of epochs and
series, and reads ``train/data_wait_fraction`` from the metrics, as a user would. Each stage is trained
with series gathered a batch at a time, as a stored data set gives them, and read one by one, as any
data set may give them, in turns. Finetuning starts from new weights; it waits the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

import roma_pipelines
from roma_core.data.build import build_dataset
from roma_core.data.store import StoredDataset, Subset
from roma_core.model import (
    RoMAForClassification,
    RoMAForClassificationConfig,
    RoMAForPreTraining,
    RoMAForPreTrainingConfig,
)
from roma_core.trainer import Trainer, TrainerConfig
from roma_core.trainer.job import data_fields
from roma_core.trainer.metrics import read_records
from roma_pipelines.experiment import Experiment

SIZES = {"japanese_vowels": (243, 16), "plasticc": (1500, 2)}
"""Training series, and epochs."""


class OneByOne:
    """A stored data set that does not offer to give many series at once."""

    def __init__(self, subset: Subset) -> None:
        self.subset, self.lengths = subset, subset.lengths

    def __len__(self) -> int:
        return len(self.subset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.subset[i]


def shipped(name: str) -> Experiment:
    path = Path(roma_pipelines.__path__[0]) / "defs" / name / "defs.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))["attributes"]
    values["dataset"] = {"name": name, **values["dataset"]}
    return Experiment.model_validate(values)


def train(
    folder: Path,
    experiment: Experiment,
    stage: str,
    subset: Any,
    dataset: StoredDataset,
    epochs: int,
) -> list[float]:
    """Shares of waiting, one per record of the metrics but for the first, which is the start."""
    settings = getattr(experiment, stage)
    fields = settings.model | data_fields(dataset.schema)
    torch.manual_seed(0)
    model: RoMAForPreTraining | RoMAForClassification
    if stage == "pretraining":
        model = RoMAForPreTraining(RoMAForPreTrainingConfig(**fields))
    else:
        stack = experiment.pretraining.model["encoder_config"] | fields["encoder_config"]
        fields |= {"encoder_config": stack, "dim_output": len(dataset.schema.classes)}
        model = RoMAForClassification(RoMAForClassificationConfig(**fields))
    chosen = settings.trainer | {"epochs": epochs, "checkpoint_dir": folder / "checkpoints"}
    Trainer(TrainerConfig(**chosen)).train(subset, None, model, folder=folder)
    metrics = [record["metrics"] for _, record in read_records(folder / "metrics.jsonl")]
    found = [m["train/data_wait_fraction"] for m in metrics if "train/loss" in m]
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiments", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--cache", type=Path, default=Path(".roma/cache"))
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory(prefix="roma-bench-") as name:
        root = Path(name)
        for experiment in map(shipped, arguments.experiments):
            path = build_dataset(experiment.dataset, root, arguments.cache, progress=False)
            dataset = StoredDataset(path, verify=False)
            n, epochs = SIZES[experiment.name]
            train_split = dataset.split("train")
            subset = Subset(dataset, train_split.indices[:n])
            for stage in ("pretraining", "finetuning"):
                shares: dict[str, list[float]] = {"gathered": [], "one by one": []}
                for k in range(arguments.rounds):
                    for how, each in shares.items():
                        given = subset if how == "gathered" else OneByOne(subset)
                        folder = root / f"{experiment.name}-{stage}-{how}-{k}"
                        each += train(folder, experiment, stage, given, dataset, epochs)
                words = "   ".join(
                    f"{how} {statistics.mean(each):.1%} (median {statistics.median(each):.1%})"
                    for how, each in shares.items()
                )
                lines.append(f"{experiment.name:16} {stage:12} waiting for data: {words}")
    print("\n".join(["share of step time (bar: below 5 %)", *lines]))


if __name__ == "__main__":
    main()
