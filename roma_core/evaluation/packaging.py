"""Packages of an evaluation: written, compared with the trained model, and the champion's applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from roma_core.data.store import Subset, raw_series
from roma_core.evaluation import report
from roma_core.evaluation.config import EvaluationJobConfig
from roma_core.evaluation.drift import ReferenceProfile
from roma_core.evaluation.predictions import (
    Floats,
    PredictionTable,
    ReconstructionTable,
    RegressionTable,
)
from roma_core.evaluation.reconstruction import requests, with_squared
from roma_core.model.config import read_config
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.serving.package import (
    MAX_LENGTH,
    SmokeTest,
    SmokeTestFailed,
    build_package,
    smoke_test_package,
)
from roma_core.serving.pyfunc_model import Package, Series, open_package

N_PARITY = 1000
"""Series compared between training and serving code, at most."""
_N_GOLDEN = 10


class NotComparable(ValueError):
    """A package cannot predict these series; the text says why."""


def predict_packaged(
    folder: Path, test: Subset, table_class: type[PredictionTable] | type[RegressionTable]
) -> PredictionTable | RegressionTable:
    """Predictions of every series of a split, by a served package, from raw rows.

    Raises:
        NotComparable: it is damaged, or was made for another schema.
    """
    schema, is_regression = test.dataset.schema, table_class is RegressionTable
    package = _opened(folder, "a regressor" if is_regression else "a classifier")
    what, own, wanted = "classes", str(package.classes), str(list(schema.classes))
    if is_regression:
        what, targets = "targets", {target.name: target.unit for target in schema.targets}
        level = "observation" if package.per_observation else "series"
        own = f"{package.targets} of every {level}"
        wanted = f"{targets} of every {schema.target_level}"
    if own != wanted:
        raise NotComparable(f"its {what} are {own}, those of the data are {wanted}")
    try:
        outputs = package.outputs(raw_series(test, range(len(test))))
    except Exception as error:
        raise NotComparable(f"it rejects these series: {error}") from error
    return table_class.of_split(test, outputs, {"package": str(folder)})


def _opened(folder: Path, expected: str) -> Package:
    try:
        package = open_package(folder)
    except Exception as error:  # a damaged file may raise anything
        raise NotComparable(
            f"the package does not load: {type(error).__name__}: {error}"
        ) from error
    if package.kind != expected.split()[1]:
        raise NotComparable(f"it is a package of kind {package.kind}, expected {expected}")
    return package


def interpolate_packaged(
    folder: Path, table: ReconstructionTable, test: Subset
) -> ReconstructionTable:
    """The hidden values of a table, predicted by a served package from the visible ones.

    Raises:
        NotComparable: it is damaged, no autoencoder, or was made for another schema.
    """
    package = _opened(folder, "an autoencoder")
    try:
        answers = package.predict(series for _, series in requests(table, test))
        columns = [[answer.mean[channel.name] for channel in table.channels] for answer in answers]
    except Exception as error:
        raise NotComparable(f"it rejects these series: {error}") from error
    predicted = np.concatenate([np.array(one, np.float32).T for one in columns])
    predicted[np.isnan(table.true)] = np.nan  # visible numbers of an observation with hidden ones
    return with_squared(replace(table, predicted=predicted, std=None), test)


def serving_difference(folder: Path, test: Subset, outputs: Floats) -> float:
    """Largest difference between a package's outputs and ``(n, K)`` of the trained model.

    Targets are float32 numbers in their units: one unit in the last place is no difference.
    """
    rows = np.arange(0, len(test), -(-len(test) // N_PARITY))
    package, at = open_package(folder), rows
    if package.per_observation:
        at = np.flatnonzero(np.isin(np.repeat(np.arange(len(test)), test.lengths), rows))
    served = package.outputs(raw_series(test, rows.tolist()))
    difference = np.abs(served - outputs[at])
    if package.targets:
        difference = (difference - np.spacing(np.abs(outputs[at]).astype(np.float32))).clip(min=0)
    return float((difference / package.scale).max())


def shared_fields(config: EvaluationJobConfig) -> dict[str, Any]:
    """The fields that report and model card take from the configuration as they are."""
    names = ("facts", "champion_version", "baselines", "decided_before")
    return {name: getattr(config, name) for name in names}


def write_package(
    config: EvaluationJobConfig,
    model: RoMAForClassification | RoMAForPreTraining,
    test: Subset,
    profile: ReferenceProfile,
    folder: Path,
    golden: Sequence[Series] = (),
    **card: Any,
) -> str:
    """Build the package of a finetuned model, or of the encoder, whose features are a mean of tokens.

    ``golden`` are series with queries, for the package of the whole autoencoder, which answers them;
    ``card`` further fields of the model card. Returns the sha256 of the package's manifest.
    """
    kind: Literal["classifier", "regressor", "encoder", "autoencoder"]
    n_outputs, program = model.config.encoder_config.d_model, model.cpu().export
    weights = config.classifier
    if isinstance(model, RoMAForClassification):
        kind = "regressor" if model.config.problem_type == "regression" else "classifier"
        n_outputs = model.require_head().linear.out_features
    else:
        kind, weights = "autoencoder" if golden else "encoder", config.autoencoder
        program = model.export_reconstruction if golden else program
    assert weights is not None
    content = report.CardContent(
        name=f"{config.name}_encoder" if kind == "encoder" else config.name,
        kind=kind,
        n_features=n_outputs,
        data_schema=test.dataset.schema,
        # no series of its own data set is too long for the package
        max_length=max(MAX_LENGTH, int(test.dataset.lengths.max())),
        lineage={"dataset_digest": config.dataset_digest, **config.lineage},
        **shared_fields(config) | card,
    )
    if not golden:
        few = evenly_spaced(np.argsort(test.lengths, kind="stable").tolist())
        golden = [Series(**one) for one in raw_series(test, few)]
    return build_package(
        folder,
        program(),
        Path(weights, "model.safetensors"),
        read_config(Path(weights)),
        test.dataset.schema,
        golden,
        content.lineage,
        name=content.name,
        kind=content.kind,
        n_outputs=n_outputs,
        card=report.render_card(content),
        profile=profile.model_dump(mode="json"),
        max_length=content.max_length,
    )


def evenly_spaced(rows: list[Any]) -> list[Any]:
    """A few of them, evenly spaced, from the first to the last."""
    return [rows[k] for k in np.linspace(0, len(rows) - 1, min(_N_GOLDEN, len(rows))).astype(int)]


def try_smoke_test(package: Path) -> tuple[SmokeTest | None, str | None]:
    """The measurements, or why there are none."""
    try:
        return smoke_test_package(package), None
    except SmokeTestFailed as error:
        return None, str(error)
