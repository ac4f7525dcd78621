"""Dagster definitions that ``workspace.yaml`` names: the experiments shipped and of the project."""

from __future__ import annotations

import logging
import sys
import types
import warnings
from collections.abc import Mapping

import dagster as dg

from roma_pipelines.automation.alerts import alert_on_failure
from roma_pipelines.automation.sensors import reconcile_jobs
from roma_pipelines.components import RomaExperiment
from roma_pipelines.experiment import ENCODER, DagsterSettings, Experiment, all_experiments
from roma_pipelines.resources import JOB_CLIENTS
from roma_pipelines.storage import defs_files, project_folder

INVALID = "invalid_experiment"
"""Asset in the place of an experiment that is left out; its description is the error."""
_log = logging.getLogger(__name__)


def executor() -> dg.ExecutorDefinition:
    """The executor chosen by ``ROMA_DAGSTER_EXECUTOR``.

    In process, a step only waits for a job: the reconcile sensor fails the run of a killed worker,
    and its retry adopts the job. On Kubernetes a new run worker finds its steps running.
    """
    if DagsterSettings().executor == "k8s_job":
        from dagster_k8s import k8s_job_executor  # imports the cluster client: one second

        return k8s_job_executor
    return dg.in_process_executor


@dg.definitions
def defs() -> dg.Definitions:
    """All experiments, and the sensors that maintain jobs. Loads without torch, mlflow or wandb.

    An invalid file does not stop the others; ``INVALID`` is in its place. Components of other types
    and Python files under ``defs/`` are then left out, too.
    """
    loaded, errors = load()
    for name, text in errors.items():
        _log.error("the experiment %s is left out: %s", name, text)
    return loaded


def load() -> tuple[dg.Definitions, dict[str, str]]:
    """The definitions, and errors of what is left out, by folder."""
    operations = dg.Definitions(
        executor=executor(), sensors=[reconcile_jobs, alert_on_failure], resources=JOB_CLIENTS
    )
    reason: BaseException | None = None
    given = all_experiments()
    if not any(isinstance(one, str) for one in given.values()):
        try:
            return _from_folder(given, operations), {}
        except Exception as error:  # of several types; ours is a distant cause
            reason = error
    found, errors = load_experiments(given)
    root, others = project_folder(), {n: p for n, p in defs_files().items() if n not in given}
    for path in (root / "defs").rglob("*.py"):
        if not path.with_name("defs.yaml").exists():  # else a component's
            others[path.parent.relative_to(root).as_posix()] = path
    text = "left out, as Dagster loads it only if all experiments are valid"
    if reason is not None and not errors:
        while reason.__cause__ is not None:  # the others show Dagster's tree of all files
            reason = reason.__cause__
        text = f"{type(reason).__name__}: {reason}"
        errors = {} if others else {"defs": text}
    errors |= {name: f"{path}: {text}" for name, path in others.items()}
    marks = [dg.AssetSpec([*name.split("/"), INVALID], description=e) for name, e in errors.items()]
    return dg.Definitions.merge(*found.values(), dg.Definitions(assets=marks), operations), errors


def _from_folder(
    given: Mapping[str, Experiment | str], operations: dg.Definitions
) -> dg.Definitions:
    """The shipped experiments, and all that Dagster finds in the project's ``defs/``."""
    folder, paths = project_folder() / "defs", defs_files()
    shipped = {name: given[name] for name in given if not paths[name].is_relative_to(folder)}
    made, errors = load_experiments(shipped)
    if errors:
        raise ValueError("; ".join(errors.values()))
    found = [*made.values(), operations]
    # else a tree has no root
    if any(path.suffix in (".py", ".yaml") for path in folder.rglob("*")):
        # load_from_defs_folder would need a pyproject.toml, and definitions of two trees cannot be merged
        module = sys.modules["defs"] = types.ModuleType("defs")
        module.__path__, module.__file__ = [str(folder)], None
        tree = dg.ComponentTree.from_module(module, project_root=folder.parent)
        with warnings.catch_warnings():
            for kind in (dg.BetaWarning, dg.PreviewWarning):  # of Dagster's own calls
                warnings.simplefilter("ignore", kind)
            found.append(tree.build_defs())
    definitions = dg.Definitions.merge(*found)
    unknown = definitions.resolve_asset_graph().external_asset_keys
    # Dagster takes an unknown key for an external asset, which would never be materialised
    if any(key.path[-1] == ENCODER for key in unknown):
        raise ValueError("an experiment names one in pretrained_from that pretrains no encoder")
    return definitions


def load_experiments(
    given: Mapping[str, Experiment | str],
) -> tuple[dict[str, dg.Definitions], dict[str, str]]:
    """Definitions of the valid experiments, by their names, and errors of the others, by folder."""
    found: dict[str, dg.Definitions] = {}
    encoders: set[str] = set()
    errors = {folder: error for folder, error in given.items() if isinstance(error, str)}
    valid = {folder: one for folder, one in given.items() if isinstance(one, Experiment)}
    # those that pretrain an encoder first: others may share it;
    # those in the folder of their name before copies of them
    valid = dict(sorted(valid.items(), key=lambda item: item[0] != item[1].name))
    for folder, one in sorted(valid.items(), key=lambda item: item[1].pretrained_from or ""):
        try:
            if one.name in found:
                raise ValueError(
                    f"name: another experiment is called {one.name}; every experiment needs its own"
                )
            if one.pretrained_from is not None and one.pretrained_from not in encoders:
                raise ValueError(
                    f"pretrained_from: {one.pretrained_from}: no valid experiment of that name "
                    f"pretrains an encoder"
                )
            component = RomaExperiment.model_construct(**dict(one))
            found[one.name] = dg.build_defs_for_component(component)
            if ENCODER in one.own_assets:
                encoders.add(one.name)
        except Exception as error:
            errors[folder] = f"{defs_files().get(folder, folder)}: {error}"
    return found, errors
