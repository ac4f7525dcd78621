"""Accuracy of the measured baselines on a data set, whatever the shape of its series.

    python -m tests.benchmarks.baselines DATASET… [--seeds 3] [--on validation]

DATASET is a folder made by ``roma data build``: the same split and the same values dropped as the model's.
Trained on train and validation, or on train alone to be evaluated on validation. Prints the mean and
standard deviation over seeds, and the seconds of one.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from roma_core.data.store import StoredDataset, Subset
from roma_core.evaluation.baselines import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dataset", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--on", choices=["validation", "test"], default="test")
    arguments = parser.parse_args()
    for folder in arguments.dataset:
        data = StoredDataset(folder)
        names = ("train",) if arguments.on == "validation" else ("train", "validation")
        train = Subset(data, np.concatenate([data.split(name).indices for name in names]))
        test = data.split(arguments.on)
        for name, predict in METHODS.items():
            found, start = [], time.perf_counter()
            for seed in range(arguments.seeds):
                classes = np.unique(data.labels[train.indices])
                scores = predict(train, data.labels[train.indices], test, seed)
                hits = classes[scores.argmax(axis=1)] == data.labels[test.indices]
                found.append(hits.mean())
            seconds = (time.perf_counter() - start) / arguments.seeds
            spread = np.std(found, ddof=1) if len(found) > 1 else 0
            print(f"{folder}: {name}: {np.mean(found):.4f} ± {spread:.4f}, {seconds:.1f} s")


if __name__ == "__main__":
    main()
