"""Baselines trained and evaluated in the same run: same split, same observations, same series.

``summary_features`` describes each series by numbers such as the mean and slope of every channel, for
gradient boosting. Series whose positions lie on one grid are also given to MiniRocket, random
convolutional features, with a ridge classifier.

Source of MiniRocket: A. Dempster, D. Schmidt, G. Webb (2021), arXiv:2012.08791; channels are combined
as in the authors' multivariate variant.

Shapes:
    S series   T observed numbers   Q quantities (channels, of every category)   F features
    B series   C channels   L grid points, of MiniRocket
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from roma_core.data.store import StoredDataset, Subset
from roma_core.evaluation.metrics import Estimate, MeasuredBaseline
from roma_core.evaluation.predictions import Floats, Ints

Targets = Ints | NDArray[np.float32]  # (S,) classes, or (S, K) numbers
FEATURES = (
    "count", "mean", "std", "min", "10 %", "25 %", "median", "75 %", "90 %", "max", "first", "last",
    "slope", "mean_change", "mean_gap", "max_gap", "time_of_min", "time_of_max",
)  # fmt: skip
"""Features of each quantity, in this order; all but the count are NaN without observations."""
QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)  # from "min" to "max"; the lower of two values
MAX_QUANTITIES = 128  # beyond them, such as the pixels of images, a summary says little
MAX_NUMBERS = 10_000_000  # of training; more series are left out at random
MAX_SERIES_ON_GRID = 3000  # the ridge's time grows with their third power
MAX_LENGTH = 512  # of the grid, to which longer series are shortened
_NUMBERS_AT_ONCE = 2_000_000
_GRID_TOLERANCE = 0.05  # of a step
_MAX_STEPS = 10  # of the median gap: times rounded to a fine unit are no grid
_EARLY_STOPPING = 10_000  # more series than these, in scikit-learn
_N_GRID_SERIES = 500  # behind the decision whether there is a grid
MIN_LENGTH = 9  # of a grid: that of a kernel
_KERNEL, _N_FEATURES, _MAX_DILATIONS = MIN_LENGTH, 10_000, 32
# places of the weights 2; the other six are -1
_THREES = list(itertools.combinations(range(_KERNEL), 3))
_GOLDEN = (5**0.5 + 1) / 2
_CONVOLVED_AT_ONCE = 20_000_000  # of convolved values: 80 MB


class _Quantities(NamedTuple):
    """Observed numbers of some series in long form; ``(T,)`` each."""

    series: Ints
    quantity: Ints  # channel by channel, each with all categories
    time: Floats  # on the first axis
    value: Floats


def n_quantities(dataset: StoredDataset) -> int:
    """Q: channels and numeric axes but the first, each for every category of the first categorical axis."""
    axes = dataset.schema.given_axes
    n_numeric = sum(not axis.categories for axis in axes[1:])
    return (len(dataset.schema.channels) + n_numeric) * _n_categories(dataset)


def _n_categories(dataset: StoredDataset) -> int:
    axes = dataset.schema.given_axes
    return next((len(axis.categories) + axis.unknown for axis in axes if axis.categories), 1)


def _in_long_form(split: Subset, rows: range) -> _Quantities:
    """The numbers of those series of a split; series are numbered from 0."""
    dataset, axes = split.dataset, split.dataset.schema.given_axes
    parts = [dataset.joint(int(split.indices[row])) for row in rows]
    positions = np.concatenate([at for at, _ in parts])
    values = np.concatenate([of for _, of in parts]).astype(np.float64)
    series = np.repeat(np.arange(len(parts)), [len(at) for at, _ in parts])
    numeric = [k for k, axis in enumerate(axes) if k and not axis.categories]
    values = np.hstack([values, positions[:, numeric]])
    categorical = next((k for k, axis in enumerate(axes) if axis.categories), None)
    row, channel = np.nonzero(~np.isnan(values))
    quantity = channel * _n_categories(dataset)
    if categorical is not None:
        quantity = quantity + positions[row, categorical].astype(np.int64)
    return _Quantities(series[row], quantity, positions[row, 0], values[row, channel])


def summary_features(split: Subset) -> NDArray[np.float32]:
    """``(S, F)``: FEATURES of every quantity in the units of the data, then the covariates.

    A numeric axis beyond the first counts as a channel. Slopes are least squares per unit of the first
    axis; times are relative to the series' first observation.
    """
    parts = [_features(split, rows) for rows in _row_ranges(split)]
    features = np.concatenate(parts) if parts else np.empty((0, 0))
    covariates = split.dataset.covariates
    if covariates is not None:
        features = np.hstack([features, covariates[split.indices]])
    return features.astype(np.float32)


def _row_ranges(split: Subset) -> Iterator[range]:
    """Ranges of rows with a bounded number of values each."""
    n_channels = len(split.dataset.schema.channels)
    part = np.cumsum(split.lengths * n_channels) // _NUMBERS_AT_ONCE
    edges = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(split)]
    yield from (range(a, b) for a, b in itertools.pairwise(edges) if b > a)


def _features(split: Subset, rows: range) -> Floats:
    numbers = _in_long_form(split, rows)
    n_all = n_quantities(split.dataset)
    found = np.full((len(rows), n_all, len(FEATURES)), np.nan)
    found[:, :, 0] = 0
    if not len(numbers.value):
        return found.reshape(len(rows), -1)
    group = numbers.series * n_all + numbers.quantity
    order = np.lexsort((numbers.time, group))
    group, x = group[order], numbers.value[order]
    origin = np.full(len(rows), np.inf)
    np.minimum.at(origin, numbers.series, numbers.time)
    t = numbers.time[order] - origin[numbers.series[order]]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    n = np.diff(starts, append=len(group))
    ends = starts + n - 1

    def mean(y: Floats) -> Floats:
        return np.add.reduceat(y, starts) / n

    level, middle = mean(x), mean(t)
    dx, dt = x - np.repeat(level, n), t - np.repeat(middle, n)
    gaps, changes = np.diff(t, prepend=0.0), np.abs(np.diff(x, prepend=0.0))
    gaps[starts] = changes[starts] = 0  # between two quantities
    by_value = np.lexsort((x, group))
    in_order = x[by_value]
    quantiles = [in_order[starts + (q * (n - 1)).astype(int)] for q in QUANTILES]
    with np.errstate(invalid="ignore", divide="ignore"):
        columns = [n, level, np.sqrt(mean(dx**2)), *quantiles, x[starts], x[ends]]
        columns += [mean(dx * dt) / mean(dt**2), np.add.reduceat(changes, starts) / (n - 1)]
        longest = np.where(n > 1, np.maximum.reduceat(gaps, starts), np.nan)
        columns += [
            (t[ends] - t[starts]) / (n - 1),
            longest,
            t[by_value][starts],
            t[by_value][ends],
        ]
    found.reshape(-1, len(FEATURES))[group[starts]] = np.stack(columns, axis=1)
    found[~np.isfinite(found)] = np.nan  # slopes and gaps of a single observation
    return found.reshape(len(rows), -1)


def _boosted(train: Subset, targets: Targets, test: Subset, seed: int) -> Floats:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    features = summary_features(train)
    counts = np.unique(targets, return_counts=True)[1] if targets.ndim == 1 else np.array([2])
    varied = (features != features[:1]).any(axis=0) & ~np.isnan(features).all(axis=0)
    if not varied.any():
        raise ValueError("all training series have equal summary features")
    settings: dict[str, Any] = {
        "l2_regularization": 1.0,  # without it rare classes make it diverge
        "max_features": 0.5,
        "min_samples_leaf": min(20, max(2, len(train) // 50)),  # its 20 splits no set of 40 series
        # as by default, but its validation set needs two series of every class
        "early_stopping": len(train) > _EARLY_STOPPING and bool(counts.min() > 1),
        "random_state": seed,
    }
    known, asked = features[:, varied], summary_features(test)[:, varied]
    if targets.ndim == 1:
        return HistGradientBoostingClassifier(**settings).fit(known, targets).predict_proba(asked)
    models = [HistGradientBoostingRegressor(**settings).fit(known, y) for y in targets.T]
    return np.stack([model.predict(asked) for model in models], axis=1)


def _rocket(train: Subset, targets: Targets, test: Subset, seed: int) -> Floats:
    """Probabilities are a softmax of the ridge's decision values: they rank, but are not calibrated."""
    from scipy.special import softmax
    from sklearn.linear_model import RidgeClassifierCV, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    grid = _grid_of(train)
    series = _on_grid(train, grid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a channel without values
        mean, std = (
            np.nanmean(series, (0, 2), keepdims=True),
            np.nanstd(series, (0, 2), keepdims=True),
        )
    std = np.where(std > 0, std, 1)
    series = np.nan_to_num((series - mean) / std)  # 0, the mean, after the end of a series
    rocket = MiniRocket().fit(series, seed)
    known = rocket.transform(series)
    alphas = np.logspace(-3, 3, 10)
    ridge = RidgeClassifierCV(alphas) if targets.ndim == 1 else RidgeCV(alphas)
    model = make_pipeline(StandardScaler(with_mean=False), ridge).fit(known, targets)
    predict, found = model.predict if targets.ndim == 2 else model.decision_function, []
    # a part at a time: the features of a series have 40 kB
    for rows in np.array_split(test.indices, -(-len(test) // MAX_SERIES_ON_GRID)):
        part = (_on_grid(Subset(test.dataset, rows), grid) - mean) / std
        found.append(predict(rocket.transform(np.nan_to_num(part))))
    scores = np.concatenate(found)
    if targets.ndim == 2:
        return scores.reshape(len(test), -1)
    return softmax(np.stack([-scores, scores], axis=1) if scores.ndim == 1 else scores, axis=1)


def _grid_of(split: Subset) -> Floats:
    """``(L,)`` times from 0 to the longest duration, in the smallest step, within limits."""
    positions = [np.unique(split.dataset.joint(int(row))[0][:, 0]) for row in split.indices]
    span = max(at[-1] - at[0] for at in positions)
    step = min((np.diff(at).min() for at in positions if len(at) > 1), default=span)
    length = round(span / step) + 1 if step else MIN_LENGTH
    return np.linspace(0, span or 1, min(MAX_LENGTH, max(MIN_LENGTH, length)))


def _on_grid(split: Subset, grid: Floats) -> NDArray[np.float32]:
    """``(S, C, L)`` at times since the first observation, NaN after the last."""
    parts = [split.dataset.joint(int(row)) for row in split.indices]
    return np.stack([interpolated(at[:, 0] - at[:, 0].min(), of, grid) for at, of in parts])


def why_not_on_grid(split: Subset) -> str | None:
    """Why these series do not lie on one grid; None if all gaps are few multiples of the smallest."""
    dataset = split.dataset
    if len(dataset.schema.given_axes) > 1:
        return "its series have several axes"
    some = split.indices[:: -(-len(split) // _N_GRID_SERIES)]
    gaps = [np.diff(np.unique(dataset.joint(int(row))[0][:, 0])) for row in some]
    found = np.concatenate(gaps)
    if not len(found):
        return "its series have one observation"
    steps = found / found.min()
    if np.abs(steps - np.round(steps)).max() > _GRID_TOLERANCE or np.median(steps) > _MAX_STEPS:
        return "the times of its observations do not lie on one grid"
    return None


METHODS: dict[str, Callable[[Subset, Targets, Subset, int], Floats]] = {
    "summary features + gradient boosting": _boosted,
    "MiniRocket + ridge": _rocket,
}
"""Name -> function of training series, their targets, test series and a seed; it returns predicted
targets, or probabilities ``(S, K)`` of the classes among the targets, in ascending order."""


def why_not(method: str, train: Subset) -> str | None:
    """Why a baseline is not measured on these data; None if it is."""
    if method.startswith("MiniRocket"):
        return why_not_on_grid(train)
    n = n_quantities(train.dataset)
    return f"{n} quantities are more than {MAX_QUANTITIES}" if n > MAX_QUANTITIES else None


def measure_baselines(
    test: Subset,
    targets: Targets,
    metric: str,
    samples_of: Callable[[Floats], Floats],
    ours: Floats,
    *,
    train_fraction: float = 1.0,
    fraction_seed: int = 0,
    seed: int = 0,
) -> tuple[MeasuredBaseline, ...]:
    """Train every baseline that suits the data, and compare the model with it on the test series.

    Train and validation series are used, as no baseline selects anything; of train the fraction that
    the model was trained on.

    Args:
        targets: of all series of the data set, ``(n_series,)`` int64 classes or ``(n_series, K)``.
        metric: name of the primary metric.
        samples_of: the metric of ``(S, K)`` predicted targets or probabilities of classes 0 to K - 1,
            of all series and of each resample, ``(1 + R,)``.
        ours: those samples of the model.
        fraction_seed: the seed of the training that drew the fraction.
    """
    dataset, found = test.dataset, []
    train = dataset.split("train").subsample(train_fraction, fraction_seed)
    rows = np.concatenate([train.indices, dataset.split("validation").indices])
    for method, predict in METHODS.items():
        limit = MAX_SERIES_ON_GRID if predict is _rocket else len(rows)
        used = Subset(dataset, _few(dataset, rows, limit, seed))
        known = targets[used.indices]
        reason = why_not(method, used)
        if reason is None and len(np.unique(known, axis=0)) < 2:
            reason = "its training series are all of one class or target"
        if reason is not None:
            print(f"no baseline {method!r}: {reason}", flush=True)
            continue
        start = time.perf_counter()
        predicted = predict(used, known, test, seed).astype(np.float64)
        if targets.ndim == 1:
            scores, classes = predicted, np.unique(known)
            predicted = np.zeros((len(test), len(dataset.schema.classes)))
            predicted[:, classes] = scores / scores.sum(axis=1, keepdims=True)
        theirs = samples_of(predicted)
        found.append(
            MeasuredBaseline(
                name=method,
                metric=metric,
                value=Estimate.of(theirs),
                difference=Estimate.of(ours - theirs),
                n_train=len(used),
                seconds=round(time.perf_counter() - start, 1),
            )
        )
    return tuple(found)


def _few(dataset: StoredDataset, rows: Ints, limit: int, seed: int) -> Ints:
    """At most ``limit`` of these series, and MAX_NUMBERS values; random ones, in the given order."""
    order = np.random.default_rng(seed).permutation(len(rows))[:limit]
    numbers = np.cumsum(dataset.lengths[rows[order]]) * len(dataset.schema.channels)
    return rows[np.sort(order[: max(1, int((numbers <= MAX_NUMBERS).sum()))])]


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
        at_once = max(1, _CONVOLVED_AT_ONCE // (n_channels * len(_THREES) * length))
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
