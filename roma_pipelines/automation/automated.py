"""An experiment as its sensors and schedule see it, and the Dagster runs they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import dagster as dg

from roma_core.data.fingerprint import source_fingerprint
from roma_pipelines.automation.alerts import alert
from roma_pipelines.automation.budget import over_budget
from roma_pipelines.automation.training_state import (
    EXPERIMENT_TAG,
    TRAINING,
    Step,
    TrainingState,
    next_step,
    read_state,
)
from roma_pipelines.experiment import Experiment
from roma_pipelines.storage import Storage

TRIGGER_TAG = "roma/trigger"
Trigger = Literal["schedule", "new data", "drift", "promotion"]
Decision = dg.RunRequest | dg.SkipReason


@dataclass(frozen=True)
class Automated:
    """An experiment with the code versions of its assets, by noun."""

    experiment: Experiment
    code_versions: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.experiment.name

    def state(self, instance: dg.DagsterInstance) -> TrainingState:
        return read_state(instance, self.experiment, self.code_versions)

    def step(self, instance: dg.DagsterInstance) -> Step:
        """What is to be done now for the source as it is now."""
        fingerprint = source_fingerprint(self.experiment.dataset)
        return next_step(self.state(instance), fingerprint.digest)

    def build(self, trigger: Trigger, step: Step, run_key: str | None) -> dg.RunRequest:
        """A run that builds the data set; ``train_on_new_data`` goes on if it is another one."""
        return self._run(["dataset"], trigger, step.why, run_key)

    def train(
        self, trigger: Trigger, step: Step, run_key: str | None, now: float | None = None
    ) -> Decision:
        """A run from pretraining to the registry, unless the budget of the week is used up."""
        storage = Storage.open()
        if why := over_budget(self.experiment, storage.jobs, now):
            text = f"{why}, so nothing is trained now though there is reason to: {step.why}"
            alert(
                storage, "budget", f"{self.name}: out of budget", text, once=[self.name, step.key]
            )
            return dg.SkipReason(text)
        return self._run(TRAINING, trigger, step.why, run_key)

    def _run(
        self, nouns: tuple[str, ...] | list[str], trigger: Trigger, why: str, run_key: str | None
    ) -> dg.RunRequest:
        keys = [self.experiment.key(noun) for noun in nouns]
        return dg.RunRequest(
            run_key=run_key,
            # a shared encoder is made by its own experiment, on its data and its budget
            asset_selection=[key for key in keys if key.path[0] == self.name],
            tags={EXPERIMENT_TAG: self.name, TRIGGER_TAG: trigger, "roma/why": why[:200]},
        )
