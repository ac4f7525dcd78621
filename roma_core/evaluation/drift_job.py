"""The drift job: how far recent series are from the training data of a model.

outputs/drift.png    stability indices, and histograms of the most drifted quantities
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from roma_core.data.manifest import read_manifest
from roma_core.data.store import StoredDataset
from roma_core.evaluation.drift import (
    Effect,
    InputSample,
    ReferenceProfile,
    drift_effects,
    embedding_distance,
    reference_profile,
    sample_from_parquet,
)
from roma_core.files import read_json, write_bytes
from roma_core.job import Attempt, JobFolder
from roma_core.progress import Progress
from roma_core.run_job import Work
from roma_core.serving.batch import Row, count_series, read_series
from roma_core.serving.registry_client import load, series_of
from roma_core.settings import Frozen

_N_EMBEDDED = 1000  # series, evenly spaced


class DriftJobConfig(Frozen):
    """The frozen configuration of a comparison."""

    schema_version: Literal[1] = 1
    files: tuple[str, ...]  # Parquet files of recent series, a row each
    inputs: str  # digest of their names, sizes and times
    dataset: str  # folder of the data that the newest model was trained on: the reference without
    package: str | None = None  # the package of a champion, whose profile is the reference
    encoder: str | None = None  # model folder of the champion's encoder
    encoder_problem: str = ""  # why there is none
    class_column: str | None = None  # with the predicted class


def run_drift_job(folder: JobFolder, attempt: Attempt) -> Work:
    """Compare as ``config.json`` describes; features are left out, with a remark, if they cannot be.

    Raises:
        DataError: a file cannot be read as Parquet, or lacks a column.
    """
    config = DriftJobConfig.model_validate(read_json(folder.config, schema_version=1))
    files, dataset = [Path(file) for file in config.files], Path(config.dataset)
    with Progress("drift", total_steps=1, first_step=0) as progress:
        schema = read_manifest(dataset).data_schema
        sample = sample_from_parquet(files, schema, config.class_column)
        progress.say(f"{sample.n} series of {len(files)} files")
        if config.package:
            document = read_json(Path(config.package) / "profile.json")
            profile = ReferenceProfile.model_validate(document)
        else:
            profile = reference_profile(StoredDataset(dataset))
        features, remark = [], config.encoder_problem
        if config.encoder is not None:
            try:
                features.append(_features(profile, Path(config.encoder), files))
            except (ValueError, RuntimeError, OSError) as error:
                remark = " ".join(str(error).split())
    facts, outputs = compare(profile, sample, folder, features)
    facts |= {"features": f"not compared: {remark}" if remark else "compared", "series": sample.n}
    return Work("completed", facts=facts, outputs=outputs)


def compare(
    profile: ReferenceProfile, sample: InputSample, folder: JobFolder, more: Sequence[Effect] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Facts of a job's result, with the effect sizes by name; its outputs, with the figure of them."""
    from roma_core.evaluation.plots import drift_figure

    found, outputs = [*drift_effects(profile, sample), *more], {}
    if any(effect.measure == "psi" for effect in found):
        folder.outputs.mkdir(exist_ok=True)
        write_bytes(folder.outputs / "drift.png", drift_figure(profile, sample))
        outputs = {"drift": "outputs/drift.png"}
    return {"effects": {effect.name: round(effect.size, 6) for effect in found}}, outputs


def _features(profile: ReferenceProfile, encoder: Path, files: Sequence[Path]) -> Effect:
    """Shift of the medians of encoder features; ValueError if the series have none."""
    if profile.embedding is None:
        raise ValueError("the reference has no embedding profile")
    package = load(encoder)
    step = -(-sum(count_series(file, "test") for file in files) // _N_EMBEDDED) or 1
    rows = chain.from_iterable(read_series(file, "test", package) for file in files)
    found = (_observed(package, row) for row in islice(rows, 0, None, step))
    series = series_of(package, (one for one in found if one is not None))
    center = np.median(package.outputs(series), axis=0).tolist()
    size = embedding_distance(profile.embedding, center, len(series))
    return Effect(quantity="features", measure="embedding", size=size)


def _observed(package: Any, row: Row) -> Row | None:
    """A row without observations that are not finite; None if none is left.

    A value that is not finite is missing, if the model accepts missing values.
    """
    keys = [("positions", one["name"]) for one in package.axes]
    keys += [("values", one["name"]) for one in package.channels]
    columns = [
        [x if isinstance(x, str) or (x is not None and np.isfinite(x)) else None for x in entries]
        for entries in (row[part].get(name) or [] for part, name in keys)
    ]
    if len({len(column) for column in columns}) != 1:
        raise ValueError(f"series {row['id']!r}: its lists differ in length, or one is missing")
    n_axes = len(package.axes)
    enough = any if getattr(package, "may_miss", False) else all
    kept = [
        entries
        for entries in zip(*columns, strict=True)
        if None not in entries[:n_axes] and enough(x is not None for x in entries[n_axes:])
    ]
    found: dict[str, dict[str, list[Any]]] = {"positions": {}, "values": {}}
    for (part, name), column in zip(keys, zip(*kept, strict=True), strict=bool(kept)):
        found[part][name] = list(column)
    return row | found if kept else None
