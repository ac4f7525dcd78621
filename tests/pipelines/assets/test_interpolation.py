"""The experiments of interpolation, and the exact answers that they are measured against."""

import numpy as np
import pytest

from roma_core.model.config import RoMAForPreTrainingConfig
from roma_core.sources.synthetic import PROCESSES
from roma_pipelines.experiment import load_experiment
from tests.benchmarks.interpolation import EXPERIMENTS, exact_rbf, exact_spirals, nearly_exact_sines

# what is seen is enough to know the series, but for its noise
CASES = {"spirals": (exact_spirals, 75), "rbf": (exact_rbf, 50), "sines": (nearly_exact_sines, 100)}


@pytest.mark.parametrize("process", CASES)
def test_the_exact_answer_knows_how_a_series_is_made(process):
    make, n = CASES[process]
    quiet = 1e-3
    drawn = PROCESSES[process].draw(np.random.default_rng(0), 12, quiet)
    seen = np.random.default_rng(1).permutation(n)[: n // 2]
    hidden = np.setdiff1d(np.arange(n), seen)

    for times, values, clean in zip(drawn.positions, drawn.values, drawn.targets, strict=True):
        found = make(quiet)(times[seen, 0], values[seen].astype(float), times[hidden, 0])
        assert np.abs(found - clean[hidden]).max() < 10 * quiet


@pytest.mark.parametrize(
    ("name", "seen"), [("spirals", {30}), ("rbf", set(range(3, 11))), ("sines", {50})]
)
def test_the_experiments_hide_what_was_published(name, seen):
    experiment = load_experiment(str(EXPERIMENTS / f"{name}.yaml"))
    n = CASES[name][1]
    config = RoMAForPreTrainingConfig.from_values(
        {"tubelet_size": (1, 1, 1), "n_pos_dims": 1, **experiment.pretraining.model}
    )

    least, most = (-(-n * share.numerator // share.denominator) for share in config.mask_fractions)

    assert {n - hidden for hidden in range(least, most + 1)} == seen
    assert experiment.dataset.axes["time"].scale != 1, "times in [0, 1] hardly turn at all"
