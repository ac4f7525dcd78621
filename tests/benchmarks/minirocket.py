"""MiniRocket with a ridge classifier, on series interpolated to a common grid, beside the model's figures.

    python -m tests.benchmarks.minirocket DATASET

DATASET is a folder made by ``roma data build``: the same split and the same values dropped. Every channel
is interpolated linearly between its own observed values, and all series are stretched to one length.
Prints the test accuracy, mean and standard deviation over seeds.

Source: A. Dempster, D. Schmidt, G. Webb (2021), MiniRocket, arXiv:2012.08791; channels are combined as in
the authors' multivariate variant.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from roma_core.data.store import StoredDataset

_KERNEL, _N_FEATURES, _MAX_DILATIONS, _MAX_LENGTH = 9, 10_000, 32, 512
_THREES = list(combinations(range(_KERNEL), 3))  # places of the weights 2; the other six are -1
_GOLDEN = (5**0.5 + 1) / 2


def interpolated(
    positions: NDArray[np.float64], values: NDArray[np.float64], length: int
) -> NDArray[np.float64]:
    """``(N,)`` and ``(N, C)`` with NaN where missing → ``(C, length)``; 0 for a channel without values."""
    grid = np.linspace(positions.min(), positions.max(), length)
    rows = []
    for column in values.T:
        seen = ~np.isnan(column)
        rows.append(np.interp(grid, positions[seen], column[seen]) if seen.any() else 0 * grid)
    return np.array(rows)


@dataclass
class _Combination:
    """One kernel at one dilation: its channels and the biases of its features."""

    dilation: int
    kernel: int
    channels: NDArray[np.int64]
    is_padded: bool
    biases: NDArray[np.float32]


class MiniRocket:
    """``(B, C, L)`` series → ``(B, 9996)`` shares of positive values."""

    def fit(self, series: torch.Tensor, seed: int) -> MiniRocket:
        g = np.random.default_rng(seed)
        n_series, n_channels, length = series.shape
        per_kernel = _N_FEATURES // len(_THREES)
        n_dilations = min(per_kernel, _MAX_DILATIONS)
        exponents = np.linspace(0, np.log2((length - 1) / (_KERNEL - 1)), n_dilations)
        dilations, counts = np.unique((2**exponents).astype(int), return_counts=True)
        n_features = (counts * (per_kernel / n_dilations)).astype(int)
        for k in range(per_kernel - int(n_features.sum())):
            n_features[k % len(n_features)] += 1
        self.combinations: list[_Combination] = []
        start = 0
        for d, (dilation, n) in enumerate(
            zip(dilations.tolist(), n_features.tolist(), strict=True)
        ):
            for kernel in range(len(_THREES)):
                size = int(2 ** g.uniform(0, np.log2(min(n_channels, _KERNEL) + 1)))
                channels = g.choice(n_channels, size, replace=False)
                found = _Combination(dilation, kernel, channels, (d + kernel) % 2 == 0, np.empty(0))
                example = series[int(g.integers(n_series))][None]
                output = self._outputs(found, self._products(example, dilation))
                quantiles = (np.arange(start + 1, start + n + 1) * _GOLDEN) % 1
                found.biases = np.quantile(output.numpy(), quantiles).astype(np.float32)
                self.combinations.append(found)
                start += n
        return self

    def transform(self, series: torch.Tensor) -> NDArray[np.float32]:
        features, dilation = [], None
        for combination in self.combinations:
            if combination.dilation != dilation:
                dilation = combination.dilation
                products = self._products(series, dilation)
            outputs = self._outputs(combination, products)
            biases = torch.from_numpy(combination.biases)
            features.append((outputs[:, :, None] > biases).float().mean(1))
        return torch.cat(features, 1).numpy()

    @staticmethod
    def _products(series: torch.Tensor, dilation: int) -> torch.Tensor:
        """``(B, C, 84, L)``: every channel with every kernel, padded with zeros at both ends."""
        n_series, n_channels, _ = series.shape
        weights = torch.full((len(_THREES), 1, _KERNEL), -1.0)
        for kernel, places in enumerate(_THREES):
            weights[kernel, 0, list(places)] = 2.0
        flat = F.conv1d(
            series.reshape(-1, 1, series.shape[2]), weights, padding="same", dilation=dilation
        )
        return flat.unflatten(0, (n_series, n_channels))

    @staticmethod
    def _outputs(combination: _Combination, products: torch.Tensor) -> torch.Tensor:
        outputs = products[:, combination.channels, combination.kernel].sum(1)
        inner = (_KERNEL // 2) * combination.dilation
        return outputs if combination.is_padded else outputs[:, inner:-inner]


def accuracies(folder: Path, seeds: tuple[int, ...], evaluated_on: str = "test") -> list[float]:
    """Accuracy on that split for every seed of the kernels, trained on train and validation."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = StoredDataset(folder)
    splits: dict[str, Any] = {}
    longest = max(len(data.joint(i)[0]) for i in range(len(data)))
    length = min(_MAX_LENGTH, max(_KERNEL, longest))
    used = ("train",) if evaluated_on == "validation" else ("train", "validation")
    for name, parts in {"train": used, "test": (evaluated_on,)}.items():
        rows, labels = [], []
        for part in parts:
            split = data.split(part)
            for k in range(len(split)):
                index = int(split.indices[k])
                positions, values = data.joint(index)
                rows.append(interpolated(positions[:, 0], values, length))
                labels.append(int(data.labels[index]))
        splits[name] = np.array(rows), np.array(labels)
    mean = splits["train"][0].mean((0, 2), keepdims=True)
    std = splits["train"][0].std((0, 2), keepdims=True)
    series = {
        k: torch.from_numpy(((x - mean) / std).astype(np.float32)) for k, (x, _) in splits.items()
    }
    found = []
    for seed in seeds:
        rocket = MiniRocket().fit(series["train"], seed)
        ridge = RidgeClassifierCV(alphas=np.logspace(-3, 3, 10))
        model = make_pipeline(StandardScaler(with_mean=False), ridge)
        model.fit(rocket.transform(series["train"]), splits["train"][1])
        found.append(float(model.score(rocket.transform(series["test"]), splits["test"][1])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dataset", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    for folder in arguments.dataset:
        found = accuracies(folder, tuple(range(arguments.seeds)))
        print(
            f"{folder}: {np.mean(found):.4f} ± {np.std(found, ddof=1) if len(found) > 1 else 0:.4f}"
        )


if __name__ == "__main__":
    main()
