"""What can be reached at all on the rows of interpolation, and what simple methods reach.

    python -m tests.benchmarks.interpolation [spirals] [rbf] [sines] [--split validation]

Builds the data sets of the experiments and hides exactly what `roma evaluate` hides. The exact answer
knows how the series are made, noise and priors included, and gives the mean of what is still possible:
no model can expect to do better. Errors are mean squares per hidden value, against observed and against
clean values.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from roma_core.data.build import build_dataset
from roma_core.data.store import StoredDataset, Subset
from roma_core.evaluation.predictions import ReconstructionTable
from roma_core.evaluation.reconstruction import (
    channel_ranges,
    errors_by_class,
    linear_interpolation,
    mask_all_but,
    mask_as_trained,
    noise_error,
    reconstruct,
    reconstruction_errors,
    rows_by_series,
    train_mean,
)
from roma_core.model.config import RoMAForPreTrainingConfig
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.sources.synthetic import rbf_weights
from roma_core.trainer.job import data_fields
from roma_pipelines.experiment import Experiment, load_experiment
from tests.benchmarks.results.benchmarks import BENCHMARKS

Floats = NDArray[Any]
Method = Callable[[Floats, Floats, Floats], Floats]
"""Visible times (S,), visible values (S, C) and query times (Q,) → values (Q, C)."""

EXPERIMENTS = BENCHMARKS.parent / "experiments"


def exact_rbf(noise: float) -> Method:
    """The posterior of the ten standard normal numbers, which is normal."""

    def method(t: Floats, seen: Floats, asked: Floats) -> Floats:
        basis = rbf_weights(t)
        precision = np.eye(10) + basis.T @ basis / noise**2
        return rbf_weights(asked) @ np.linalg.solve(precision, basis.T @ seen / noise**2)

    return method


def exact_spirals(noise: float) -> Method:
    """Either way round a spiral is linear in its two normal numbers; the data weigh the two ways."""

    def design(t: Floats, clockwise: bool) -> tuple[Floats, Floats]:
        """``(2N, 2)`` and the ``(2N,)`` centre: x, then y, as functions of a and b."""
        if clockwise:
            # the recipe turns the order round: the k-th point has the z of the k-th last time
            z = 1 + t
            turn, factor, centre, sign = z, 50 / z, -5.0, -1.0
        else:
            turn, factor, centre, sign = t, t, 5.0, 1.0
        along = np.stack([np.ones_like(t), factor], axis=1)
        sides = [along * np.cos(turn)[:, None], sign * along * np.sin(turn)[:, None]]
        return np.concatenate(sides), np.repeat([centre, 0.0], len(t))

    def method(t: Floats, seen: Floats, asked: Floats) -> Floats:
        prior_mean, prior_precision = np.array([0.0, 0.3]), np.eye(2) / 0.02**2
        logs, means = [], []
        for clockwise in (False, True):
            matrix, centre = design(t, clockwise)
            left = seen.T.reshape(-1) - centre - matrix @ prior_mean
            precision = prior_precision + matrix.T @ matrix / noise**2
            shift = np.linalg.solve(precision, matrix.T @ left / noise**2)
            fit = left @ left / noise**2 - shift @ precision @ shift
            logs.append(-0.5 * fit - 0.5 * np.linalg.slogdet(precision)[1])
            matrix, centre = design(asked, clockwise)
            means.append((matrix @ (prior_mean + shift) + centre).reshape(2, -1).T)
        weights = np.exp(np.array(logs) - max(logs))
        return np.tensordot(weights / weights.sum(), np.array(means), axes=1)

    return method


def nearly_exact_sines(noise: float) -> Method:
    """All 24 tones and 276 pairs of them, weighed by the data; amplitudes are taken to be normal."""
    pairs = np.array(list(itertools.combinations(range(24), 2)))
    strength = 7 / 24  # variance of a coefficient whose amplitude is U(0.5, 1)

    def waves(t: Floats) -> Floats:
        angles = 2 * np.pi * t[:, None] * np.arange(1, 25)
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)  # (N, 48)

    def method(t: Floats, seen: Floats, asked: Floats) -> Floats:
        matrix, at, y = waves(t), waves(asked), seen[:, 0]
        gram, moment = matrix.T @ matrix / noise**2, matrix.T @ y / noise**2
        logs, sums = [], []
        for tones in (np.arange(24)[:, None], pairs):
            columns = np.concatenate([tones, tones + 24], axis=1)  # (M, 2k)
            width = columns.shape[1]
            precision = gram[columns[:, :, None], columns[:, None]] + np.eye(width) / strength
            means = np.linalg.solve(precision, moment[columns][:, :, None])[:, :, 0]  # (M, 2k)
            fit = 0.5 * (means * moment[columns]).sum(axis=1)
            fit -= 0.5 * np.linalg.slogdet(precision)[1] + 0.5 * width * np.log(strength)
            logs.append(fit - np.log(len(tones)))
            sums.append((columns, means))
        joint = np.concatenate(logs)
        weights = np.exp(joint - joint.max())
        weights /= weights.sum()
        coefficients = np.zeros(48)
        for (columns, means), part in zip(sums, np.split(weights, [24]), strict=True):
            np.add.at(coefficients, columns, part[:, None] * means)
        return (at @ coefficients)[:, None]

    return method


def spline(t: Floats, seen: Floats, asked: Floats) -> Floats:
    """A cubic spline through the seen values; level outside of them."""
    return CubicSpline(t, seen)(np.clip(asked, t[0], t[-1]))


def gaussian_process(t: Floats, seen: Floats, asked: Floats) -> Floats:
    """A Gaussian process per series and channel: scale, length and noise by maximum likelihood."""
    columns = []
    for y in seen.T:
        spread = float(y.std()) or 1.0
        kernel = ConstantKernel(1.0) * RBF(float(np.ptp(t)) / 10 or 1.0) + WhiteKernel(0.01)
        process = GaussianProcessRegressor(kernel, n_restarts_optimizer=1, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            process.fit(t[:, None], (y - y.mean()) / spread)
        columns.append(process.predict(asked[:, None]) * spread + y.mean())
    return np.stack(columns, axis=1)


def by_method(table: ReconstructionTable, split: Subset, method: Method) -> ReconstructionTable:
    """The same hidden observations, predicted series by series."""
    predicted = np.empty_like(table.true)
    for k, rows in rows_by_series(table.series):
        positions, values = split.dataset.raw(int(split.indices[k]))
        seen = np.ones(len(values), dtype=bool)
        seen[table.index[rows]] = False
        predicted[rows] = method(positions[seen, 0], values[seen], positions[~seen, 0])
    return replace(table, predicted=predicted)


ROW_METHODS: dict[str, tuple[dict[str, Callable[[float], Method]], tuple[int, ...]]] = {
    "spirals": (
        {
            "exact": exact_spirals,
            "Gaussian process": lambda _: gaussian_process,
            "cubic spline": lambda _: spline,
        },
        (),
    ),
    "rbf": ({"exact": exact_rbf}, (3, 10, 20)),
    "sines": ({"nearly exact": nearly_exact_sines}, ()),
}


def show(name: str, experiment: Experiment, split_name: Any, folder: Path) -> None:
    """Print the figures of one data set."""
    data = StoredDataset(build_dataset(experiment.dataset, folder, folder, progress=False))
    split = data.split(split_name)
    config = RoMAForPreTrainingConfig.from_values(
        experiment.pretraining.model | data_fields(data.schema)
    )
    untrained = RoMAForPreTraining(config)  # its predictions are replaced
    methods, seen = ROW_METHODS[name]
    deviation = experiment.dataset.source.noise or 0.1
    counts = ", ".join(f"{k} {v.n_series}" for k, v in data.manifest.counts.items())
    print(f"\n{name}, noise {deviation}: {counts}; evaluated on {split_name}")
    ranges = channel_ranges(data.split("train"))
    for hidden, hide in [
        ("as trained", mask_as_trained(config, 0)),
        *((f"{n} visible", mask_all_but(n, 0)) for n in seen),
    ]:
        table = reconstruct(untrained, split, hide, batch_size=256)
        print(f"  {hidden}: {len(table.series)} hidden; noise alone {value(noise_error(table))}")
        known = {
            "mean of train": train_mean(table, split),
            "lines": linear_interpolation(table, split),
        }
        for label, make in methods.items():
            known[label] = by_method(table, split, make(deviation))
        for label, predicted in known.items():
            observed, clean = (
                reconstruction_errors(predicted),
                reconstruction_errors(predicted, "clean", ranges),
            )
            print(
                f"    {label:17} mse {value(observed)}   clean mse {value(clean, 'clean_mse')}   "
                f"clean rmse {value(clean, 'clean_rmse')}   of the range "
                f"{value(clean, 'clean_nrmse')}"
            )
        if name == "sines":
            assert data.labels is not None
            groups = errors_by_class(
                known["nearly exact"], data.labels[split.indices], data.schema.classes
            )
            print(
                "    nearly exact, mse: " + ", ".join(f"{g.name} {g.mse.value:.4f}" for g in groups)
            )


def value(found: dict[str, Any], name: str = "") -> str:
    estimate = found[name or next(iter(found))]
    return f"{estimate.value:.5f} ({estimate.low:.5f}–{estimate.high:.5f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", default=list(ROW_METHODS), choices=list(ROW_METHODS))
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--noise", type=float, help="In place of the experiment's.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.rows:
            experiment = load_experiment(str(EXPERIMENTS / f"{name}.yaml"))
            if arguments.noise is not None:
                source = experiment.dataset.source.model_copy(update={"noise": arguments.noise})
                changed = experiment.dataset.model_copy(update={"source": source})
                experiment = experiment.model_copy(update={"dataset": changed})
            show(name, experiment, arguments.split, Path(folder))


if __name__ == "__main__":
    main()
