"""Predictions of a made-up classifier."""

import numpy as np
import pytest

from roma_core.evaluation.predictions import PredictionTable


@pytest.fixture(scope="session")
def simulated():
    def make(n=370, k=9, sharpness=3.0, seed=1):
        rng = np.random.default_rng(seed)
        labels = rng.integers(k, size=n)
        logits = rng.normal(size=(n, k)) + sharpness * np.eye(k)[labels]
        p = np.exp(logits)
        return PredictionTable(
            ids=[str(i) for i in range(n)],
            classes=tuple(f"class {c}" for c in range(k)),
            labels=labels,
            probabilities=p / p.sum(axis=1, keepdims=True),
            lengths=rng.integers(5, 30, size=n),
        )

    return make
