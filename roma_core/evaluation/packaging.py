"""Packages of an evaluated classifier and of its encoder, and predictions of packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from roma_core.data.store import Subset, raw_series
from roma_core.evaluation.config import EvaluationJobConfig, ServingChecks
from roma_core.evaluation.drift import ReferenceProfile
from roma_core.evaluation.predictions import Floats, PredictionTable, missing_fractions
from roma_core.evaluation.report import CardContent, render_card
from roma_core.files import read_json
from roma_core.model.export import export_classifier, export_encoder
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.serving.client import Series as RequestSeries
from roma_core.serving.package import MAX_LENGTH, build_package, size_mb
from roma_core.serving.pyfunc_model import Series, open_package
from roma_core.serving.smoke_test import SmokeTest, SmokeTestFailed, smoke_test_package

_N_PARITY = 1000  # series compared between training and serving code, at most
_N_GOLDEN = 10


class NotComparable(ValueError):
    """A package cannot predict these series; the text says why."""


def prediction_table(
    test: Subset, probabilities: Floats, lineage: dict[str, str]
) -> PredictionTable:
    """The table of ``(N, K)`` probabilities of a split."""
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


def predict_packaged(package: Path, test: Subset) -> PredictionTable:
    """Probabilities of every series of a split, by a served package, from raw rows.

    Raises:
        NotComparable: it is damaged, or was made for another schema.
    """
    try:
        classifier = open_package(package)
    except Exception as error:  # a damaged file may raise anything
        raise NotComparable(
            f"the package does not load: {type(error).__name__}: {error}"
        ) from error
    classes = list(test.dataset.schema.classes)
    if classifier.classes != classes:
        raise NotComparable(
            f"its classes are {classifier.classes}, those of the data are {classes}"
        )
    try:
        outputs = classifier.outputs([Series(**s) for s in raw_series(test, range(len(test)))])
    except Exception as error:
        raise NotComparable(f"it rejects these series: {error}") from error
    return prediction_table(test, outputs, {"package": str(package)})


def package_classifier(
    config: EvaluationJobConfig,
    model: RoMAForClassification,
    test: Subset,
    profile: ReferenceProfile,
    folder: Path,
    **card: Any,
) -> str:
    """Build the package folder; returns the sha256 of its manifest.

    Args:
        card: further fields of the model card.
    """
    assert config.classifier is not None
    content = _card(config, test, name=config.name, kind="classifier", **card)
    return _package(
        export_classifier(model), Path(config.classifier), test, content, profile, folder
    )


def package_encoder(
    config: EvaluationJobConfig,
    encoder: RoMAForPreTraining,
    test: Subset,
    profile: ReferenceProfile,
    folder: Path,
) -> str:
    """Build the package of the pretrained encoder, whose features are the mean of its tokens."""
    assert config.autoencoder is not None
    content = _card(
        config,
        test,
        name=f"{config.name}_encoder",
        kind="encoder",
        n_features=encoder.config.encoder_config.d_model,
    )
    return _package(
        export_encoder(encoder), Path(config.autoencoder), test, content, profile, folder
    )


def _card(config: EvaluationJobConfig, test: Subset, **fields: Any) -> CardContent:
    return CardContent(
        data_schema=test.dataset.schema,
        # no series of its own data set is too long for the package
        max_length=max(MAX_LENGTH, int(test.dataset.lengths.max())),
        facts=config.facts,
        lineage={"dataset_digest": config.dataset_digest, **config.lineage},
        **fields,
    )


def _package(
    program: torch.export.ExportedProgram,
    weights: Path,
    test: Subset,
    card: CardContent,
    profile: ReferenceProfile,
    folder: Path,
) -> str:
    by_length = np.argsort(test.lengths, kind="stable")
    golden = by_length[np.linspace(0, len(test) - 1, min(_N_GOLDEN, len(test))).astype(int)]
    return build_package(
        folder,
        program,
        weights / "model.safetensors",
        read_json(weights / "model_config.json"),
        test.dataset.schema,
        [RequestSeries(**s) for s in raw_series(test, golden.tolist())],
        card.lineage,
        name=card.name,
        kind=card.kind,
        n_features=card.n_features,
        card=render_card(card),
        profile=profile.model_dump(mode="json"),
        max_length=card.max_length,
    )


def check_serving(
    config: EvaluationJobConfig,
    package: Path,
    table: PredictionTable,
    test: Subset,
    champion_problem: str | None,
) -> ServingChecks:
    """Test the package, and right after it the champion's, so that latencies are comparable."""
    rows = range(0, len(test), -(-len(test) // _N_PARITY))
    served = open_package(package).outputs([Series(**s) for s in raw_series(test, rows)])
    smoke_test, problem = _smoke_test(package)
    champion = None
    if config.champion is not None and champion_problem is None:
        champion, champion_problem = _smoke_test(Path(config.champion))
    return ServingChecks(
        serving_difference=float(np.abs(served - table.probabilities[list(rows)]).max()),
        size_mb=size_mb(package),
        smoke_test=smoke_test,
        smoke_test_problem=problem,
        champion_smoke_test=champion,
        champion_problem=champion_problem,
    )


def _smoke_test(package: Path) -> tuple[SmokeTest | None, str | None]:
    try:
        return smoke_test_package(package), None
    except SmokeTestFailed as error:
        return None, str(error)
