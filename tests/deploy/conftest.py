"""The same real SLURM as the launching tests."""

from tests.pipelines.launching.conftest import cluster, shared_cluster

__all__ = ["cluster", "shared_cluster"]
