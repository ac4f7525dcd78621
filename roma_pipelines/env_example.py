"""Prints ``.env.example``: ``python -m roma_pipelines.env_example > .env.example``."""

from __future__ import annotations

from roma_core.env_example import env_example
from roma_core.model.config import RoMAForClassificationConfig, RoMAForPreTrainingConfig
from roma_core.settings import RomaSettings
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.trackers import WandbConfig
from roma_pipelines.automation.alerts import AlertSettings
from roma_pipelines.executor import DagsterSettings
from roma_pipelines.launching.kubernetes_site import KubernetesSettings
from roma_pipelines.launching.site import SlurmSettings
from roma_pipelines.pages.links import PageSettings
from roma_pipelines.registry.store import MlflowSettings
from roma_pipelines.storage import StorageSettings

SETTINGS: tuple[type[RomaSettings], ...] = (
    TrainerConfig,
    RoMAForPreTrainingConfig,
    RoMAForClassificationConfig,
    WandbConfig,
    MlflowSettings,
    StorageSettings,
    AlertSettings,
    SlurmSettings,
    KubernetesSettings,
    DagsterSettings,
    PageSettings,
)
"""Every settings class of both packages, in the order of the file."""

if __name__ == "__main__":
    print(env_example(SETTINGS), end="")
