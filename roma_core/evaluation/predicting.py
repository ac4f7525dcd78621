"""Tables of predictions of a test split: by the trained model, and by packages that are served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roma_core.data.series import raw_series
from roma_core.data.store import Subset
from roma_core.evaluation.held_out import missing_shares
from roma_core.evaluation.predictions import PredictionTable
from roma_core.model.classification import RoMAForClassification
from roma_core.serving.logged_model import Classifier, Series
from roma_core.trainer.batches import Collate
from roma_core.trainer.evaluating import classify

_PARITY_SERIES = 1000  # compared between training and serving code, at most


class NotComparable(ValueError):
    """A package cannot be asked about these series; the text says why."""


def predict(model: RoMAForClassification, test: Subset, batch_size: int) -> PredictionTable:
    """Probabilities of every series of a split, by the packed model."""
    outputs = classify(model, test, Collate(model.config, seed=0), batch_size)
    return _table(test, _softmax(outputs.logits), {"dataset_digest": test.dataset.manifest.digest})


def predict_packaged(package_folder: Path, test: Subset) -> PredictionTable:
    """Probabilities of every series of a split, by a served package, from raw rows.

    Raises:
        NotComparable: it is damaged, or was made for another schema.
    """
    try:
        classifier = Classifier.open(package_folder)
    except Exception as error:  # a damaged file may fail in any way at all
        raise NotComparable(
            f"the package does not load: {type(error).__name__}: {error}"
        ) from error
    ours = list(test.dataset.schema.classes)
    if classifier.classes != ours:
        raise NotComparable(f"its classes are {classifier.classes}, those of the data are {ours}")
    try:
        found = classifier.outputs([Series(**s) for s in raw_series(test, range(len(test)))])
    except Exception as error:
        raise NotComparable(f"it refuses these series: {error}") from error
    return _table(test, found, {"package": str(package_folder)})


def serving_difference(package_folder: Path, table: PredictionTable, test: Subset) -> float:
    """Largest difference of a probability between the packed model and the package."""
    rows = range(0, len(test), -(-len(test) // _PARITY_SERIES))
    served = Classifier.open(package_folder).outputs([Series(**s) for s in raw_series(test, rows)])
    return float(np.abs(served - table.probabilities[list(rows)]).max())


def _table(
    test: Subset, probabilities: NDArray[np.float64], lineage: dict[str, str]
) -> PredictionTable:
    dataset = test.dataset
    assert dataset.labels is not None
    return PredictionTable(
        ids=[dataset.ids[i] for i in test.indices],
        classes=dataset.schema.classes,
        labels=dataset.labels[test.indices],
        probabilities=probabilities,
        lengths=test.lengths,
        lineage=lineage,
        missing=missing_shares(test),
    )


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
