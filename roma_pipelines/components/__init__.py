"""Dagster components: what a ``defs.yaml`` may name."""

from roma_pipelines.components.roma_experiment import RomaExperiment

__all__ = ["RomaExperiment"]
