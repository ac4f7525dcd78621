"""A registered version at Weights & Biases: a reference, where W&B is in use. MLflow keeps the model.

Online, an artifact that refers to the version and holds its checksums is logged and linked into the
W&B registry. Offline there is no registry: the artifact is left for `wandb sync`. Nothing here ever
fails a registration.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roma_core.credentials import without_credentials
from roma_core.trainer.trackers import WandbConfig, import_tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

WANDB_TAG = "roma.weights_and_biases"
"""Of a version that W&B was told of: what was done."""

_OFF, _FAILED = "off", "failed"
log = logging.getLogger(__name__)
_COLLECTION = "wandb-registry-model"


def link_once(
    client: MlflowClient,
    config: WandbConfig,
    trainer: Mapping[str, Any],
    name: str,
    version: str,
    facts: Mapping[str, Any],
    folder: Path,
) -> str:
    """Tell W&B of a registered version where its training was logged, unless that was done before.

    Args:
        trainer: settings of the training; its project and entity are taken.

    Returns:
        As ``link_version``, perhaps of an earlier call.
    """
    if (done := client.get_model_version(name, version).tags.get(WANDB_TAG)) is not None:
        return done
    done = link_version(
        config,
        trainer["project_name"],
        trainer["entity_name"],
        name,
        version,
        f"models:/{name}/{version}",
        {"mlflow_tracking_uri": without_credentials(client.tracking_uri), **facts},
        folder,
    )
    if not done.startswith((_OFF, _FAILED)):
        client.set_model_version_tag(name, version, WANDB_TAG, done)
    return done


def link_version(
    config: WandbConfig,
    project: str,
    entity: str | None,
    name: str,
    version: str,
    reference: str,
    facts: Mapping[str, Any],
    folder: Path,
) -> str:
    """Tell W&B of a version, if it is in use.

    Args:
        project: of the trainings, and ``entity``; None is the key's own.
        reference: ``models:/NAME/VERSION``, which W&B shows and does not follow.
        facts: metadata of the artifact; plain JSON.
        folder: for W&B's own files.

    Returns:
        What was done, in a word or two: ``off``, ``linked``, ``left for sync``, or why it failed.
    """
    mode = config.effective_mode
    if mode == "disabled":
        return _OFF
    try:
        return _link(config, mode, project, entity, name, version, reference, facts, folder)
    except Exception as error:  # W&B is a guest here
        log.warning("Weights & Biases was not told of %s version %s: %s", name, version, error)
        return f"{_FAILED}: {error}"


def _link(
    config: WandbConfig,
    mode: str,
    project: str,
    entity: str | None,
    name: str,
    version: str,
    reference: str,
    facts: Mapping[str, Any],
    folder: Path,
) -> str:
    import_tracker("wandb")
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    key = config.api_key
    settings = wandb.Settings(
        api_key=None if key is None else key.get_secret_value(),
        init_timeout=config.init_timeout_s,
        login_timeout=config.init_timeout_s,
        finish_timeout=config.finish_timeout_s,
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
    )
    flat = re.sub(r"[^\w.-]", "-", name)
    with wandb.init(
        mode=mode,  # type: ignore[arg-type]
        project=project,
        entity=entity,
        job_type="register",
        name=f"{flat} version {version}",
        dir=str(folder),
        settings=settings,
    ) as run:
        artifact = wandb.Artifact(flat, type="model", metadata=dict(facts))
        artifact.add_reference(reference, name="model", checksum=False)
        logged = run.log_artifact(artifact, aliases=[f"v{version}"] if mode == "offline" else None)
        if mode == "offline":
            return "left for sync"
        logged.wait()
        run.link_artifact(logged, f"{_COLLECTION}/{flat}", aliases=[f"mlflow-{version}"])
    return "linked"
