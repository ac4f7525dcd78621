"""A fake cluster behind a real HTTP API, and tiny real jobs in its pods."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import roma_core
from roma_pipelines.launching.kubernetes import client as kubernetes_client
from roma_pipelines.launching.kubernetes.launcher import KubernetesLauncher
from roma_pipelines.launching.kubernetes.profile import KubernetesProfile, Volume
from tests.pipelines.launching.conftest import (
    eventually,
    folder,
    make_spec,
    nothing_is_left_running,
    processes,
    starts,
)
from tests.pipelines.launching.kubernetes.fake_api import FakeApi
from tests.pipelines.launching.kubernetes.fake_cluster import FakeCluster
from tests.pipelines.launching.kubernetes.fake_replay import Replay

__all__ = [
    "eventually",
    "folder",
    "make_spec",
    "nothing_is_left_running",
    "processes",
    "starts",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shorter intervals than for a real cluster, and no watch outlives its test."""
    monkeypatch.setattr(kubernetes_client, "_clients", {})
    monkeypatch.setattr("roma_pipelines.launching.kubernetes.launcher._ORPHANED_AFTER_S", 0.3)
    monkeypatch.setattr("roma_pipelines.launching.kubernetes.launcher._CANCEL_INTERVAL_S", 0.05)
    yield
    for client in kubernetes_client._clients.values():
        for informer in (client.jobs, client.pods, client.warnings):
            informer._read_at = float("-inf")


@pytest.fixture
def api() -> Iterator[FakeApi]:
    api = FakeApi()
    yield api
    api.close()


@pytest.fixture
def cluster(api: FakeApi) -> Iterator[FakeCluster]:
    """Two nodes whose pods are processes of this computer."""
    cluster = FakeCluster(api)
    yield cluster
    cluster.close()


@pytest.fixture
def replay(api: FakeApi) -> Iterator[Callable[..., Replay]]:
    """Puts a recording in the place of the cluster."""
    api.store.add("namespaces", {"metadata": {"name": "roma"}})
    playing: list[Replay] = []

    def play(*scenarios: str) -> Replay:
        playing.append(Replay(api, *scenarios))
        return playing[-1]

    yield play
    for one in playing:
        one.close()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def profile(api: FakeApi, tmp_path: Path, free_port: int) -> KubernetesProfile:
    """The fake cluster's profile: this interpreter, and the test's folder on every node."""
    return KubernetesProfile(
        name="fake",
        kubeconfig=api.write_kubeconfig(tmp_path / "kubeconfig"),
        image="localhost/python:3.11",
        python=sys.executable,
        volumes=(Volume(mount=str(tmp_path), host_path=str(tmp_path)),),
        environment={
            "PYTHONPATH": str(Path(roma_core.__file__).parents[1]),
            "GLOO_SOCKET_IFNAME": "lo",
        },
        grace_s=3,
        time_limit_min=5,
        port=free_port,
    )


@pytest.fixture
def launcher(profile: KubernetesProfile) -> KubernetesLauncher:
    return KubernetesLauncher(profile, fs_lag_s=0.0)
