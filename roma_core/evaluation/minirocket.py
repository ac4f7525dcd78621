"""MiniRocket: random convolutional features of series interpolated to a common grid.

Source: A. Dempster, D. Schmidt, G. Webb (2021), MiniRocket, arXiv:2012.08791; channels are combined as in
the authors' multivariate variant.

Shapes:  B series   C channels   L grid points
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

MIN_LENGTH = 9  # of a grid: that of a kernel
_KERNEL, _N_FEATURES, _MAX_DILATIONS = MIN_LENGTH, 10_000, 32
_THREES = list(combinations(range(_KERNEL), 3))  # places of the weights 2; the other six are -1
_GOLDEN = (5**0.5 + 1) / 2
_NUMBERS_AT_ONCE = 20_000_000  # of convolved values: 80 MB


def interpolated(
    times: NDArray[np.float64], values: NDArray[np.floating], grid: NDArray[np.float64]
) -> NDArray[np.float32]:
    """``(N,)`` and ``(N, C)`` with NaN where missing → ``(C, L)`` at the times ``grid``.

    NaN after the last time, and in a channel without values; a channel is constant before its first
    value and after its last.
    """
    rows = np.full((values.shape[1], len(grid)), np.nan, np.float32)
    inside = grid <= times.max() + (grid[1] - grid[0]) / 2
    for row, column in zip(rows, values.T, strict=True):
        if (seen := ~np.isnan(column)).any():
            row[inside] = np.interp(grid[inside], times[seen], column[seen])
    return rows


@dataclass(frozen=True)
class _Combination:
    """One kernel at one dilation: its channels and the biases of its features."""

    dilation: int
    kernel: int
    channels: NDArray[np.int64]
    is_padded: bool
    biases: NDArray[np.float32]


class MiniRocket:
    """Maps ``(B, C, L)`` float32 series to ``(B, 9996)`` fractions of positive convolved values."""

    def fit(self, series: NDArray[np.float32], seed: int) -> Self:
        """Draw channels and biases from training series of at least MIN_LENGTH grid points."""
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
                is_padded = (d + kernel) % 2 == 0
                example = torch.from_numpy(series[int(g.integers(n_series))][None])
                products = _products(example, dilation)
                output = _outputs(products, dilation, kernel, channels, is_padded)
                quantiles = (np.arange(start + 1, start + n + 1) * _GOLDEN) % 1
                biases = np.quantile(output.numpy(), quantiles).astype(np.float32)
                self.combinations.append(
                    _Combination(dilation, kernel, channels, is_padded, biases)
                )
                start += n
        return self

    def transform(self, series: NDArray[np.float32]) -> NDArray[np.float32]:
        _, n_channels, length = series.shape
        at_once = max(1, _NUMBERS_AT_ONCE // (n_channels * len(_THREES) * length))
        parts = torch.from_numpy(series).split(at_once)
        return np.concatenate([self._transform(part).numpy() for part in parts])

    def _transform(self, series: torch.Tensor) -> torch.Tensor:
        features, dilation = [], None
        for one in self.combinations:
            if one.dilation != dilation:
                dilation = one.dilation
                products = _products(series, dilation)
            outputs = _outputs(products, one.dilation, one.kernel, one.channels, one.is_padded)
            biases = torch.from_numpy(one.biases)
            features.append((outputs[:, :, None] > biases).float().mean(1))
        return torch.cat(features, 1)


def _products(series: torch.Tensor, dilation: int) -> torch.Tensor:
    """``(B, C, 84, L)``: every channel with every kernel, padded with zeros at both ends."""
    weights = torch.full((len(_THREES), 1, _KERNEL), -1.0)
    for kernel, places in enumerate(_THREES):
        weights[kernel, 0, list(places)] = 2.0
    flat = F.conv1d(
        series.reshape(-1, 1, series.shape[2]), weights, padding="same", dilation=dilation
    )
    return flat.unflatten(0, series.shape[:2])


def _outputs(
    products: torch.Tensor, dilation: int, kernel: int, channels: NDArray[np.int64], is_padded: bool
) -> torch.Tensor:
    """``(B, L)``, or shorter by what a kernel at the ends would need of padding."""
    outputs = products[:, channels, kernel].sum(1)
    inner = (_KERNEL // 2) * dilation
    return outputs if is_padded else outputs[:, inner:-inner]
