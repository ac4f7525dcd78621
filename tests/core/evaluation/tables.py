"""Small tables of regressions and reconstructions."""

import numpy as np

from roma_core.evaluation.predictions import ReconstructionTable, RegressionTable
from roma_core.schema import Channel, PositionAxis

TIME = (PositionAxis(name="time", unit="s"),)
TARGETS = (Channel(name="depth", unit="m"), Channel(name="heat", unit="K"))


def regression_table(errors, lengths, true=None, **changes):
    """A table with these ``(T, 2)`` errors, of series of these lengths."""
    errors = np.array(errors, dtype=float)
    true = np.arange(errors.size, dtype=float).reshape(errors.shape) if true is None else true
    places = np.concatenate([np.arange(n, dtype=float) for n in lengths])
    return RegressionTable(
        ids=[f"s{k}" for k in range(len(lengths))],
        series=np.repeat(np.arange(len(lengths)), lengths),
        axes=TIME,
        positions=places[:, None],
        channels=TARGETS,
        true=true,
        predicted=true + errors,
        scale=np.array([1.0, 2.0]),
        lengths=np.array(lengths),
        **changes,
    )


def reconstruction_table(**changes):
    """Three hidden observations of two of three series; errors 1, 3 and 2 in the only channel."""
    fields = {
        "ids": ["a", "b", "c"],
        "series": np.array([0, 0, 2]),
        "channels": (Channel(name="v", unit="V"),),
        "index": np.array([1, 4, 0]),
        "true": np.array([[0.0], [1], [2]], np.float32),
        "predicted": np.array([[1.0], [4], [0]], np.float32),
        "std": None,
        "clean": None,
    }
    return ReconstructionTable(**{**fields, **changes})
