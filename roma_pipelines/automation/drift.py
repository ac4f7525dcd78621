"""Sensor: recent inputs are compared with what the present model was trained on."""

from __future__ import annotations

import contextlib
import glob
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import dagster as dg

from roma_core.data.config import fingerprint_of
from roma_core.files import read_json, write_json
from roma_core.schema import DataError
from roma_core.serving.embedding import NotEmbedded, embed_medians
from roma_core.serving.registry_client import FetchError
from roma_pipelines.automation.alerts import alert
from roma_pipelines.automation.settings import Drift, DriftThresholds
from roma_pipelines.automation.state import Automated, Decision, Step
from roma_pipelines.launching.launcher import inherited
from roma_pipelines.storage import Storage, instance_of

if TYPE_CHECKING:
    from roma_core.evaluation.drift import Effect, EmbeddingProfile, ReferenceProfile

_EMBED_WITHIN_S = 40.0  # Dagster gives a tick of a sensor a minute


def drift_sensor(automated: Automated, settings: Drift) -> dg.SensorDefinition:
    """``NAME_drift``; starts switched off."""

    @dg.sensor(
        name=f"{automated.name}_drift",
        target=dg.AssetSelection.groups(automated.name),
        minimum_interval_seconds=round(settings.every_min * 60),
        description=f"Compares recent inputs with the training data of {automated.name}; tells "
        "people of drift, and trains anew within the budget.",
    )
    def drift(context: dg.SensorEvaluationContext) -> Decision:
        decision, cursor = look_at_inputs(
            automated, settings, instance_of(context), context.cursor, time.time()
        )
        context.update_cursor(cursor)
        return decision

    return drift


def look_at_inputs(
    automated: Automated,
    settings: Drift,
    instance: dg.DagsterInstance,
    cursor: str | None,
    now: float,
) -> tuple[Decision, str]:
    """Compare the newest files, if there are new ones.

    Args:
        cursor: what the look before returned; None at first.
    """
    seen = json.loads(cursor) if cursor else {"inputs": "", "trained_at": 0.0}
    paths = _newest(settings)
    inputs = fingerprint_of(paths).digest
    if not paths or inputs == seen["inputs"]:
        why = (
            "no new inputs"
            if paths
            else f"there are no files {', '.join(map(str, settings.files))}"
        )
        return dg.SkipReason(why), json.dumps(seen)
    state = automated.state(instance)
    if state.trained_on is None:
        return dg.SkipReason("nothing was trained yet, so there is nothing to compare with"), (
            json.dumps(seen)
        )
    storage = Storage.open()
    before, seen = seen, {**seen, "inputs": inputs}
    dataset = automated.experiment.dataset.name
    try:
        compared = compare(automated.name, dataset, state.trained_on[0], settings, paths, storage)
    except (DataError, FetchError) as error:
        alert(
            storage,
            "inputs",
            f"{automated.name}: inputs cannot be compared",
            str(error),
            once=[automated.name, inputs],
        )
        return dg.SkipReason(str(error)), json.dumps(seen)
    n, found, remark = compared
    if n < settings.min_series:
        why = f"{n} series are too few to judge; {settings.min_series} are needed"
        return dg.SkipReason(why), json.dumps(seen)
    far = drifted(found, settings.thresholds)
    if not far:
        largest = max(found, key=lambda e: e.size / getattr(settings.thresholds, e.measure))
        why = f"no drift in {n} series; largest: {_said(largest)}{remark}"
        return dg.SkipReason(why), json.dumps(seen)
    why = f"{n} recent series are not as the training data: " + ", ".join(map(_said, far[:6]))
    why += remark
    decision, what, settled = _decide(automated, settings, instance, seen, why, now)
    if isinstance(decision, dg.RunRequest):
        seen["trained_at"] = now
    alert(
        storage, "drift", f"{automated.name}: inputs have drifted", f"{why}\n{what}",
        once=[automated.name, inputs],
    )  # fmt: skip
    return decision, json.dumps(seen if settled else before)


def _decide(
    automated: Automated,
    settings: Drift,
    instance: dg.DagsterInstance,
    seen: dict,
    why: str,
    now: float,
) -> tuple[Decision, str, bool]:
    """What is done about drift, in words, and whether that settles it: else these inputs are looked
    at again, for what kept them from being trained for passes.
    """

    def no(text: str, settled: bool) -> tuple[Decision, str, bool]:
        return dg.SkipReason(f"{why}; {text}"), text, settled

    cool_h = (now - seen["trained_at"]) / 3600
    if cool_h < settings.cooldown_h:
        return no(
            f"trained for drift {cool_h:.0f} h ago, not again within {settings.cooldown_h:g} h",
            settled=False,
        )
    step = automated.step(instance)
    if step.do == "wait" or (step.do == "nothing" and settings.only_if_new):
        return no(f"nothing is trained: {step.why}", settled=step.do == "nothing")
    if settings.dry_run:
        return no(
            f"would {'build' if step.do == 'build' else 'train'}, but this is a dry run", True
        )
    if step.do == "build":
        text = f"{step.why}: a new data set is built, and trained on if it is another one"
        return automated.build("drift", Step("build", why), step.key), text, True
    key = step.key or f"drift:{seen['inputs']}"
    decision = automated.train("drift", Step("train", why, key), key, now)
    if isinstance(decision, dg.SkipReason):  # the budget of the week is used up
        return decision, str(decision.skip_message), False
    return decision, "training", True


class Comparison(NamedTuple):
    """Number of recent series, every effect size, and what could not be compared, in words."""

    n: int
    effects: list[Effect]
    remark: str


def compare(
    name: str, dataset: str, version: str, settings: Drift, paths: Sequence[Path], storage: Storage
) -> Comparison:
    """Compare with the profile that the champion called ``name`` carries.

    As long as there is no champion, the profile is that of the data set that was trained on last,
    which knows of no features.
    """
    from roma_core.data.store import read_manifest
    from roma_core.evaluation.drift import effects, series_from_parquet

    folder = storage.datasets / dataset / version[:12]
    series = series_from_parquet(paths, read_manifest(folder).data_schema, settings.class_column)
    profile = _champions_profile(name, storage) or _profile(folder, version, storage)
    found = effects(profile, series)
    if series.n < settings.min_series:
        return Comparison(series.n, found, "")
    if profile.embedding is None:
        return Comparison(series.n, found, "; features were not compared: no profile of them")
    try:
        found.append(_embedding_effect(name, profile.embedding, paths, storage))
    except (NotEmbedded, FetchError, ValueError) as error:
        return Comparison(series.n, found, f"; features were not compared: {error}")
    return Comparison(series.n, found, "")


def _embedding_effect(
    name: str, profile: EmbeddingProfile, paths: Sequence[Path], storage: Storage
) -> Effect:
    """How far recent series are among the features of the champion's encoder.

    They are computed in a process of its own: torch has no place in the daemon's.

    Raises:
        NotEmbedded, FetchError, ValueError: they cannot be computed, or are of another encoder.
    """
    from roma_core.evaluation.drift import Effect, embedding_distance
    from roma_core.serving.registry_client import fetch, resolve
    from roma_pipelines.registry.promotion import CHAMPION
    from roma_pipelines.registry.store import MlflowSettings, connect
    from roma_pipelines.registry.versions import ENCODER_TAG, encoder_name

    client = connect(MlflowSettings(), storage.mlflow)
    encoder = resolve(client, f"models:/{name}@{CHAMPION}").tags.get(ENCODER_TAG)
    if encoder is None:
        raise NotEmbedded("the champion names no encoder")
    version = resolve(client, f"models:/{encoder_name(name)}/{encoder}")
    folder = fetch(client, version, storage.cache / "models")
    medians = embed_medians(folder, paths, inherited(), _EMBED_WITHIN_S)
    size = embedding_distance(profile, medians.center, medians.n)
    return Effect(quantity="features", measure="embedding", size=size)


def drifted(found: Sequence[Effect], thresholds: DriftThresholds) -> list[Effect]:
    """Effects at or above their threshold, the farthest first."""
    far = [effect for effect in found if effect.size >= getattr(thresholds, effect.measure)]
    return sorted(far, key=lambda e: e.size / getattr(thresholds, e.measure), reverse=True)


def _champions_profile(name: str, storage: Storage) -> ReferenceProfile | None:
    """From its verified package; None without a champion, or if it is no package of ours.

    Raises:
        FetchError: its package is missing, or not what was registered.
    """
    from roma_core.evaluation.drift import ReferenceProfile
    from roma_core.serving.registry_client import fetch, package_of, resolve
    from roma_pipelines.registry.promotion import CHAMPION
    from roma_pipelines.registry.store import MlflowSettings, connect
    from roma_pipelines.registry.versions import version_at

    client = connect(MlflowSettings(), storage.mlflow)
    if version_at(client, name, CHAMPION) is None:
        return None
    version = resolve(client, f"models:/{name}@{CHAMPION}")
    if version.manifest_sha256 is None:
        return None
    folder = fetch(client, version, storage.cache / "models")
    document = read_json(package_of(folder) / "profile.json")
    return ReferenceProfile.model_validate(document) if document else None


def _profile(folder: Path, version: str, storage: Storage) -> ReferenceProfile:
    """Made once for a version of the data, and kept under the root's cache."""
    from roma_core.data.store import StoredDataset
    from roma_core.evaluation.drift import ReferenceProfile, reference_profile

    path = storage.cache / "profiles" / f"{version}.json"
    if path.exists():
        return ReferenceProfile.model_validate(read_json(path, schema_version=1))
    profile = reference_profile(StoredDataset(folder))
    path.parent.mkdir(exist_ok=True)
    write_json(path, profile.model_dump(mode="json"))
    return profile


def _newest(settings: Drift) -> list[Path]:
    names = {name for pattern in settings.files for name in glob.glob(str(pattern))}  # noqa: PTH207
    found = []
    for path in map(Path, names):
        with contextlib.suppress(FileNotFoundError):  # it went since
            found.append((path.stat().st_mtime, path.name, path))
    return [path for _, _, path in sorted(found)[-settings.newest :]]


def _said(effect: Effect) -> str:
    return f"{effect.quantity} {effect.measure} {effect.size:.2f}"
