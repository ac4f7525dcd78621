"""Drift sensor: compares recent inputs with the training data of the current model."""

from __future__ import annotations

import contextlib
import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg

from roma_core.files import fingerprint_of, read_json, write_json
from roma_core.schema import DataError
from roma_core.serving.batch import EmbeddingFailed, embed_medians
from roma_core.serving.registry_client import FetchError, fetch, package_of, resolve
from roma_pipelines.automation.alerts import send_alert
from roma_pipelines.automation.settings import Drift, DriftThresholds
from roma_pipelines.automation.state import Decision, Step, request, state_of, step_of
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.launcher import inherited
from roma_pipelines.registry.promotion import CHAMPION
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.registry.versions import ENCODER_TAG, encoder_name, version_at
from roma_pipelines.storage import Storage

if TYPE_CHECKING:
    from roma_core.evaluation.drift import Effect, ReferenceProfile

_EMBED_WITHIN_S = 40.0  # Dagster gives a tick of a sensor a minute


def check_inputs(
    experiment: Experiment,
    settings: Drift,
    instance: dg.DagsterInstance,
    cursor: str | None,
    now: float,
) -> tuple[Decision, str]:
    """Compare the newest files if they changed since the last tick, which returned ``cursor``."""
    before = json.loads(cursor) if cursor else {"inputs": "", "trained_at": 0.0}

    def skip(reason: str, seen: dict[str, Any] = before) -> tuple[Decision, str]:
        return dg.SkipReason(reason), json.dumps(seen)

    found_files = []
    for path in {Path(p) for pattern in settings.files for p in glob.glob(str(pattern))}:  # noqa: PTH207
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            found_files.append((path.stat().st_mtime, path.name, path))
    paths = [path for _, _, path in sorted(found_files)[-settings.newest :]]
    if not paths:
        return skip(f"no file matches {', '.join(map(str, settings.files))}")
    inputs = fingerprint_of(paths).digest
    if inputs == before["inputs"]:
        return skip("no new inputs")
    version = state_of(experiment, instance).trained.on
    if version is None:
        return skip("no model was trained yet, so there is no reference")
    seen = {**before, "inputs": inputs}
    storage, name = Storage.open(), experiment.name
    dataset = experiment.dataset.name
    try:
        n, found, remark = compare(name, dataset, version[0], settings, paths, storage)
    except (DataError, FetchError) as error:
        subject = f"{name}: inputs cannot be compared"
        send_alert(storage, "inputs", subject, str(error), key=[name, inputs])
        return skip(str(error), seen)
    if n < settings.min_series:
        return skip(f"{n} series are too few; at least {settings.min_series} are needed", seen)
    far = drifted(found, settings.thresholds)
    if not far:
        largest = max(found, key=lambda e: e.size / getattr(settings.thresholds, e.measure))
        return skip(f"no drift in {n} series; largest: {_describe(largest)}{remark}", seen)
    why = f"{n} recent series differ from the training data: "
    why += ", ".join(map(_describe, far[:6])) + remark
    decision, action, settled = _decide(experiment, settings, instance, seen, why, now)
    if isinstance(decision, dg.RunRequest):
        seen["trained_at"] = now
    subject = f"{name}: inputs have drifted"
    send_alert(storage, "drift", subject, f"{why}\n{action}", key=[name, inputs])
    return decision, json.dumps(seen if settled else before)


def _decide(
    experiment: Experiment,
    settings: Drift,
    instance: dg.DagsterInstance,
    seen: dict[str, Any],
    why: str,
    now: float,
) -> tuple[Decision, str, bool]:
    """The request, its description, and whether these inputs are settled: else they are compared
    again at the next tick, as the obstacle to training is temporary.
    """
    step = step_of(experiment, instance)
    cool_h = (now - seen["trained_at"]) / 3600
    obstacle, settled = "", True
    if cool_h < settings.cooldown_h:
        cooldown = f"the cooldown is {settings.cooldown_h:g} h"
        obstacle, settled = f"trained for drift {cool_h:.0f} h ago; {cooldown}", False
    elif step.do == "wait" or (step.do == "nothing" and settings.only_if_new):
        obstacle, settled = f"nothing is trained: {step.why}", step.do == "nothing"
    elif settings.dry_run:
        action = "build" if step.do == "build" else "train"
        obstacle = f"would {action}, but this is a dry run"
    if obstacle:
        return dg.SkipReason(f"{why}; {obstacle}"), obstacle, settled
    if step.do == "build":
        text = f"{step.why}: a data set is built, and trained on if it differs"
        todo = Step("build", why, step.key)
    else:
        text, todo = "training", Step("train", why, step.key or f"drift:{seen['inputs']}")
    decision = request(experiment, instance, "drift", todo, now)
    if isinstance(decision, dg.SkipReason):  # the weekly budget is used up, or it failed before
        return decision, str(decision.skip_message), False
    return decision, text, True


class Comparison(NamedTuple):
    """Number of recent series, all effect sizes, and a remark on what was not compared."""

    n: int
    effects: list[Effect]
    remark: str


def compare(
    name: str, dataset: str, version: str, settings: Drift, paths: Sequence[Path], storage: Storage
) -> Comparison:
    """Compare with the reference profile in the champion's package.

    Without a champion, or for a foreign package, the profile of the data set that was trained on
    last is used, which has no embedding profile. A separate process computes the features of the
    champion's encoder: the daemon does not import torch.

    Raises:
        FetchError: the champion's package is missing or differs from what was registered.
    """
    from roma_core.data.manifest import read_manifest
    from roma_core.evaluation.drift import (
        Effect,
        ReferenceProfile,
        drift_effects,
        embedding_distance,
        sample_from_parquet,
    )

    folder, models = storage.datasets / dataset / version[:12], storage.cache / "models"
    series = sample_from_parquet(paths, read_manifest(folder).data_schema, settings.class_column)
    client = connect(MlflowSettings(), storage.mlflow)
    document: Any = None
    tags: Mapping[str, str] = {}
    if version_at(client, name, CHAMPION) is not None:
        champion = resolve(client, f"models:/{name}@{CHAMPION}")
        tags = champion.tags
        if champion.manifest_sha256 is not None:
            document = read_json(package_of(fetch(client, champion, models)) / "profile.json")
    if document:
        profile = ReferenceProfile.model_validate(document)
    else:
        profile = _profile(folder, version, storage)
    found = drift_effects(profile, series)
    if series.n < settings.min_series:
        return Comparison(series.n, found, "")
    try:
        if profile.embedding is None:
            raise EmbeddingFailed("the reference has no embedding profile")
        if ENCODER_TAG not in tags:
            raise EmbeddingFailed("the champion has no encoder tag")
        encoder = resolve(client, f"models:/{encoder_name(name)}/{tags[ENCODER_TAG]}")
        encoder_folder = fetch(client, encoder, models)
        medians = embed_medians(encoder_folder, paths, inherited(), _EMBED_WITHIN_S)
        size = embedding_distance(profile.embedding, medians.center, medians.n)
    except (EmbeddingFailed, FetchError, ValueError) as error:
        return Comparison(series.n, found, f"; features were not compared: {error}")
    found.append(Effect(quantity="features", measure="embedding", size=size))
    return Comparison(series.n, found, "")


def drifted(found: Sequence[Effect], thresholds: DriftThresholds) -> list[Effect]:
    """Effects at or above their threshold, the largest ratio first."""
    far = [effect for effect in found if effect.size >= getattr(thresholds, effect.measure)]
    return sorted(far, key=lambda e: e.size / getattr(thresholds, e.measure), reverse=True)


def _profile(folder: Path, version: str, storage: Storage) -> ReferenceProfile:
    """Profile of a data set version, cached under the storage root."""
    from roma_core.data.store import StoredDataset
    from roma_core.evaluation.drift import ReferenceProfile, reference_profile

    path = storage.cache / "profiles" / f"{version}.json"
    if path.exists():
        return ReferenceProfile.model_validate(read_json(path, schema_version=1))
    profile = reference_profile(StoredDataset(folder))
    path.parent.mkdir(exist_ok=True)
    write_json(path, profile.model_dump(mode="json"))
    return profile


def _describe(effect: Effect) -> str:
    return f"{effect.quantity} {effect.measure} {effect.size:.2f}"
