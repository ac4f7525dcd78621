"""Drift of recent inputs: the asset that compares them with the training data, and what follows from it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import dagster as dg

from roma_core.files import read_json
from roma_pipelines.assets.registered_model import drift_metadata
from roma_pipelines.automation import state
from roma_pipelines.automation.alerts import send_alert
from roma_pipelines.automation.settings import Drift
from roma_pipelines.automation.state import Decision, newest_trained
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.pipes import job_folder
from roma_pipelines.registry import versions
from roma_pipelines.registry.promotion import CHAMPION
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import registry, run_tracked_job

_MAX_PLOTTED = 60  # effect sizes; of more, only the largest of each measure are plotted over time
_UNSEEN: dict[str, Any] = {"looked_at": 0.0, "trained_at": 0.0, "decided": "", "files": ""}
_UNSEEN |= {"tried": "", "tried_at": 0.0, "waits": ""}  # a decision that is not settled


def recent_inputs_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The asset ``recent_inputs``: effect sizes of drift, each a number that the UI plots over time."""
    section = experiment.automation.drift
    assert section is not None
    text = "No effect size reaches its threshold."
    spec = dg.AssetCheckSpec(
        "inputs_as_trained", asset=experiment.key("recent_inputs"), description=text
    )

    @dg.asset(
        **experiment.asset_arguments("recent_inputs"),
        kinds={"parquet"},
        output_required=False,
        check_specs=[spec],
        description=f"Recent inputs against the training data. {experiment.description}",
    )
    def recent_inputs(
        context: dg.AssetExecutionContext,
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        from roma_core.evaluation.drift_job import DriftJobConfig

        storage = Storage.open()
        begun = job_folder(context).config
        if begun.exists():  # a retry adopts the job, and so the champion and the files of that time
            config = DriftJobConfig.model_validate(read_json(begun))
        else:
            files, inputs = section.newest_files()
            trained = newest_trained(context.instance, experiment).on
            if trained is None or not files:
                patterns = ", ".join(map(str, section.files))
                missing = f"no file matches {patterns}" if trained else "no model was trained yet"
                yield _check(True, f"{missing}, so there is nothing to compare")
                return
            with registry(context) as client:
                config = DriftJobConfig(
                    files=tuple(str(file.absolute()) for file in files),
                    inputs=inputs,
                    dataset=str(storage.datasets / experiment.dataset.name / trained[0][:12]),
                    class_column=section.class_column,
                    **_reference(client, experiment.name, storage.cache / "models"),
                )
        resources, params = experiment.resources.of("evaluation"), {"files": len(config.files)}
        job = run_tracked_job(context, experiment, "drift", config, resources, params=params)
        n, effects = job.result.facts["series"], job.result.facts["effects"]
        ratios = section.thresholds.ratios(effects)
        n_far = sum(ratio >= 1 for ratio in ratios.values())
        lines = [f"{name} is {x:.2g} times its threshold" for name, x in ratios.items()]
        few = n < section.min_series
        text = f"{n} series are too few; at least {section.min_series} are needed"
        check = _check(few or not n_far, text if few else "; ".join(lines[: max(1, n_far)]))
        numbers = effects if len(effects) <= _MAX_PLOTTED else {}
        known = {"inputs": config.inputs, **drift_metadata(job), **numbers, **job.metadata()}
        yield dg.MaterializeResult(metadata=known, check_results=[check])

    return recent_inputs


def _check(passed: bool, text: str) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="inputs_as_trained",
        passed=passed,
        severity=dg.AssetCheckSeverity.WARN,
        description=text,
    )


def _reference(client: Any, name: str, cache: Path) -> dict[str, str]:
    """Folders of the champion's package and encoder; FetchError if the package is damaged."""
    from roma_core.serving.registry_client import FetchError, fetch, package_of, resolve

    if versions.version_at(client, name, CHAMPION) is None:
        return {"encoder_problem": "there is no champion"}
    champion = resolve(client, f"models:/{name}@{CHAMPION}")
    found = {}
    if champion.manifest_sha256 is not None:  # else a foreign package
        found["package"] = str(package_of(fetch(client, champion, cache)))
    try:
        if versions.ENCODER_TAG not in champion.tags:
            raise FetchError(
                "no encoder is registered with the champion, as after `pretraining: null`"
            )
        version = champion.tags[versions.ENCODER_TAG]
        encoder = resolve(client, f"models:/{versions.encoder_name(name)}/{version}")
        found["encoder"] = str(fetch(client, encoder, cache))
    except FetchError as error:
        found["encoder_problem"] = str(error)
    return found


def check_inputs(
    experiment: Experiment,
    settings: Drift,
    instance: dg.DagsterInstance,
    cursor: str | None,
    now: float,
) -> tuple[Decision, str]:
    """Decide about the newest comparison, once; request one of the newest files if they are others."""
    seen = _UNSEEN | json.loads(cursor or "{}")
    decision: Decision | None = None
    found = state.newest_comparison(instance, experiment)
    every_s = settings.every_min * 60
    if found and found.run == seen["tried"] and now < seen["tried_at"] + every_s:
        decision = dg.SkipReason(seen["waits"])
    elif found is not None and found.run != seen["decided"]:
        decision, settled = _decide(experiment, settings, instance, seen, found, now)
        seen |= {"decided": found.run} if settled else {"tried": found.run, "tried_at": now}
        if isinstance(decision, dg.RunRequest):
            seen["trained_at"] = now
            return decision, json.dumps(seen)
        seen["waits"] = decision.skip_message
    if now >= seen["looked_at"] + every_s:
        paths, inputs = settings.newest_files()
        seen |= {"looked_at": now, "files": ""}
        if not paths:
            seen["files"] = f"no file matches {', '.join(map(str, settings.files))}"
        elif found is None or inputs != found.inputs:
            step = state.Step("compare", f"new inputs: {paths[-1].name}", f"compare:{inputs}")
            asked: Decision = dg.SkipReason("no model was trained yet, so there is no reference")
            if state.newest_trained(instance, experiment).on is not None:
                asked = state.request(experiment, instance, "drift", step, now)
            if isinstance(asked, dg.RunRequest):
                return asked, json.dumps(seen)
            seen["files"] = asked.skip_message
    return decision or dg.SkipReason(seen["files"] or "no new inputs"), json.dumps(seen)


def _decide(
    experiment: Experiment,
    settings: Drift,
    instance: dg.DagsterInstance,
    seen: dict[str, Any],
    found: state.Comparison,
    now: float,
) -> tuple[Decision, bool]:
    """The decision about a comparison, and whether it is settled: else it is taken again after
    ``every_min``, as the obstacle to training is temporary.
    """
    ratios = settings.thresholds.ratios(found.effects)
    shown = [f"{name} {found.effects[name]:.2f}" for name in ratios]
    n_far = sum(ratio >= 1 for ratio in ratios.values())
    if found.n < settings.min_series:
        few = f"{found.n} series are too few; at least {settings.min_series} are needed"
        return dg.SkipReason(few), True
    if not n_far:
        text = f"no drift in {found.n} series; largest: {', '.join(shown[:1])}{found.remark}"
        return dg.SkipReason(text), True
    why = f"{found.n} recent series differ from the training data: "
    why += ", ".join(shown[: min(n_far, 6)]) + found.remark
    decision, settled = None, True
    cool_h = (now - seen["trained_at"]) / 3600
    if cool_h < settings.cooldown_h:
        cooldown = f"the cooldown is {settings.cooldown_h:g} h"
        action, settled = f"trained for drift {cool_h:.0f} h ago; {cooldown}", False
    elif (step := state.step_of(experiment, instance)).do == "wait" or (
        step.do == "nothing" and settings.only_if_new
    ):
        action, settled = f"nothing is trained: {step.why}", step.do == "nothing"
    elif settings.dry_run:
        action = f"would {'build' if step.do == 'build' else 'train'}, but this is a dry run"
    else:
        todo: Literal["build", "train"] = "build" if step.do == "build" else "train"
        wanted = state.Step(todo, why, step.key or f"drift:{found.inputs}")
        decision = state.request(experiment, instance, "drift", wanted, now)
        action = f"{step.why}: a data set is built, and trained on if it differs"
        action = action if todo == "build" else "training"
        if isinstance(decision, dg.SkipReason):  # the weekly budget is used up, or it failed before
            action, settled = str(decision.skip_message), False
    subject, key = f"{experiment.name}: inputs have drifted", [experiment.name, found.inputs]
    send_alert(Storage.open(), "drift", subject, f"{why}\n{action}", key=key)
    return decision or dg.SkipReason(f"{why}; {action}"), settled
