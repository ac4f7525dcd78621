"""What an evaluation leaves to be registered: the packages of the classifier and of its encoder.

Tables of predictions of a test split: by the trained model, and by packages that are served.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roma_core.data.store import Subset, raw_series
from roma_core.evaluation.compare import Change
from roma_core.evaluation.config import EvaluationJobConfig, ServingChecks
from roma_core.evaluation.drift import ReferenceProfile
from roma_core.evaluation.leakage import missing_fractions
from roma_core.evaluation.metrics import Metrics
from roma_core.evaluation.predictions import PredictionTable
from roma_core.evaluation.report import CardContent, render_card
from roma_core.files import read_json
from roma_core.model.export import export_classifier, export_encoder
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.serving.client import Series as RequestSeries
from roma_core.serving.package import MAX_LENGTH, build_package, size_mb
from roma_core.serving.pyfunc_model import Series, open_package
from roma_core.serving.smoke_test import SmokeTest, SmokeTestFailed, smoke_test_package
from roma_core.trainer.dataloader import Collate
from roma_core.trainer.evaluator import classify

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
        classifier = open_package(package_folder)
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
    served = open_package(package_folder).outputs([Series(**s) for s in raw_series(test, rows)])
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
        missing=missing_fractions(test),
    )


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


_N_GOLDEN = 10


def package_classifier(
    config: EvaluationJobConfig,
    model: RoMAForClassification,
    test: Subset,
    metrics: Metrics,
    changes: tuple[Change, ...],
    champion_problem: str | None,
    profile: ReferenceProfile,
    folder: Path,
) -> str:
    """Build the package folder; the sha256 of its manifest stands for it."""
    schema = test.dataset.schema
    card = CardContent(
        name=config.name,
        kind="classifier",
        data_schema=schema,
        max_length=_max_length(test),
        facts=config.facts,
        metrics=metrics,
        changes=changes,
        champion_version=config.champion_version,
        champion_problem=champion_problem,
        baselines=config.baselines,
        decided_before=config.decided_before,
        lineage={"dataset_digest": config.dataset_digest, **config.lineage},
    )
    return build_package(
        folder,
        export_classifier(model),
        Path(config.classifier) / "model.safetensors",
        read_json(Path(config.classifier) / "model_config.json"),
        schema,
        _golden(test),
        {"dataset_digest": config.dataset_digest, **config.lineage},
        name=config.name,
        card=render_card(card),
        profile=profile.model_dump(mode="json"),
        max_length=_max_length(test),
    )


def package_encoder(
    config: EvaluationJobConfig,
    encoder: RoMAForPreTraining,
    test: Subset,
    profile: ReferenceProfile,
    folder: Path,
) -> str:
    """Build the package of the pretrained encoder; its features are the mean of its tokens."""
    assert config.autoencoder is not None
    weights, schema = Path(config.autoencoder), test.dataset.schema
    lineage = {"dataset_digest": config.dataset_digest, **config.lineage}
    name, width = f"{config.name}_encoder", encoder.config.encoder_config.d_model
    card = CardContent(
        name=name,
        kind="encoder",
        data_schema=schema,
        max_length=_max_length(test),
        n_features=width,
        facts=config.facts,
        lineage=lineage,
    )
    return build_package(
        folder,
        export_encoder(encoder),
        weights / "model.safetensors",
        read_json(weights / "model_config.json"),
        schema,
        _golden(test),
        lineage,
        name=name,
        kind="encoder",
        n_features=width,
        card=render_card(card),
        profile=profile.model_dump(mode="json"),
        max_length=_max_length(test),
    )


def measure(
    config: EvaluationJobConfig,
    package: Path,
    table: PredictionTable,
    test: Subset,
    leaks: tuple[str, ...],
    test_split: str,
    champion_problem: str | None,
) -> ServingChecks:
    """Try the package, and the champion's right after it, so that times can be compared."""
    trial, trial_problem = _tried(package)
    champion_trial = None
    if config.champion is not None and champion_problem is None:
        champion_trial, champion_problem = _tried(Path(config.champion))
    return ServingChecks(
        serving_difference=serving_difference(package, table, test),
        size_mb=size_mb(package),
        trial=trial,
        trial_problem=trial_problem,
        champion_trial=champion_trial,
        champion_problem=champion_problem,
        leaks=leaks,
        test_split=test_split,
    )


def _tried(package: Path) -> tuple[SmokeTest | None, str | None]:
    try:
        return smoke_test_package(package), None
    except SmokeTestFailed as error:
        return None, str(error)


def _max_length(test: Subset) -> int:
    """Observations that the package takes: no series of its own data set is too long for it."""
    return max(MAX_LENGTH, int(test.dataset.lengths.max()))


def _golden(test: Subset) -> list[RequestSeries]:
    by_length = np.argsort(test.lengths, kind="stable")
    rows = by_length[np.linspace(0, len(test) - 1, min(_N_GOLDEN, len(test))).astype(int)]
    return [RequestSeries(**s) for s in raw_series(test, rows.tolist())]
