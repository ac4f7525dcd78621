"""The manifests of one attempt, from a JobSpec and a cluster's profile: pure, pinned by golden files.

An attempt is one Indexed Job with a pod per node and, for several nodes, a headless Service that
gives the pods host names. The processes of a job cannot continue without one another, so nothing is
retried inside (``backoffLimit: 0``): one failed pod fails the Job, and the supervisor alone makes
the next attempt. ``podFailurePolicy`` adds no retries; it puts the cause of the failure into the
Job's own condition, which outlives the pods.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from roma_core.claim import CONTINUE_EXIT_CODE
from roma_pipelines.launching.kubernetes.profile import KubernetesProfile
from roma_pipelines.launching.launcher import header, process_variables, program
from roma_pipelines.launching.spec import JobSpec

Manifest = dict[str, Any]

CONTAINER = "main"
MANAGED_BY = {"app.kubernetes.io/managed-by": "roma-pipeline"}
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
CONTROLLER_LABEL = "batch.kubernetes.io/controller-uid"


def labels(spec: JobSpec, attempt: int) -> dict[str, str]:
    """Labels of everything that belongs to an attempt."""
    job = {"roma-pipeline/job-key": spec.key[:63], "roma-pipeline/attempt": str(attempt)}
    return {**MANAGED_BY, **job}


def manifests(
    spec: JobSpec, profile: KubernetesProfile, folder: Path | str, attempt: int
) -> list[Manifest]:
    """The Job of an attempt, then its Service, in the order in which they are created.

    ``folder`` is the path of the job folder, here and in the pods. ValueError if no cluster could
    ever run the spec.
    """
    annotations = {"roma-pipeline/folder": str(folder)}
    metadata: Manifest = {
        "name": spec.attempt_name(attempt),
        "namespace": profile.namespace,
        "labels": labels(spec, attempt),
    }
    queue = {"kueue.x-k8s.io/queue-name": profile.queue} if profile.queue else {}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {**metadata, "labels": metadata["labels"] | queue, "annotations": annotations},
        "spec": {
            "completionMode": "Indexed",
            "completions": spec.nodes,
            "parallelism": spec.nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": _failure_policy(),
            "activeDeadlineSeconds": (spec.time_limit_min or profile.time_limit_min) * 60,
            "ttlSecondsAfterFinished": math.ceil(profile.keep_days * 86400),
            "template": {
                "metadata": {"labels": labels(spec, attempt), "annotations": {**annotations}},
                "spec": _pod(spec, profile, str(folder), attempt),
            },
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": "None",
            "selector": labels(spec, attempt),
            "publishNotReadyAddresses": True,  # rank 0 is looked up before its pod is ready
            "ports": [{"name": "rendezvous", "port": profile.port}],
        },
    }
    return [job, service] if spec.nodes > 1 else [job]


def with_variables(job: Manifest, variables: Mapping[str, str]) -> Manifest:
    """A Job whose processes get further environment variables; no secrets."""
    job = copy.deepcopy(job)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    kept = [entry for entry in container["env"] if entry["name"] not in variables]
    added = [{"name": name, "value": _literal(value)} for name, value in variables.items()]
    container["env"] = [*added, *kept]
    return job


def as_text(documents: list[Manifest], spec: JobSpec) -> str:
    """The manifests as YAML, as ``kubectl apply -f`` takes them, under two comment lines."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # five times as fast
    text = yaml.dump_all(documents, Dumper=dumper, sort_keys=False, width=1000, allow_unicode=True)
    return "\n".join([*header(spec), str(text)])


def _failure_policy() -> Manifest:
    """Every failure fails the Job at once; the matched rule is in the message of its condition."""

    def exit_codes(operator: str) -> Manifest:
        codes = {"containerName": CONTAINER, "operator": operator, "values": [CONTINUE_EXIT_CODE]}
        return {"action": "FailJob", "onExitCodes": codes}

    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    rule = {"action": "FailJob", "onPodConditions": disrupted}
    return {"rules": [rule, exit_codes("In"), exit_codes("NotIn")]}


def _pod(spec: JobSpec, profile: KubernetesProfile, folder: str, attempt: int) -> Manifest:
    gpus, several = spec.gpus_per_node > 0, spec.nodes > 1
    tolerations = [*profile.tolerations, *(profile.gpu_tolerations if gpus else ())]
    apart = {
        "labelSelector": {"matchLabels": labels(spec, attempt)},
        "topologyKey": "kubernetes.io/hostname",
    }
    affinity = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    shared = {"medium": "Memory", "sizeLimit": f"{math.ceil(profile.shared_memory_gb * 1000)}M"}
    volumes = []
    for n, volume in enumerate(profile.volumes):
        server, _, path = (volume.nfs or "").partition(":")
        source: Manifest = {"nfs": {"server": server, "path": path}}
        if volume.claim:
            source = {"persistentVolumeClaim": {"claimName": volume.claim}}
        elif volume.host_path:
            source = {"hostPath": {"path": volume.host_path, "type": "Directory"}}
        volumes.append({"name": f"volume-{n}", **source})
    return _filled(
        {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": profile.grace_s,
            "serviceAccountName": profile.service_account,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "subdomain": spec.attempt_name(attempt) if several else None,
            "priorityClassName": profile.priority_class,
            "schedulerName": profile.scheduler,
            "nodeSelector": profile.node_selector | (profile.gpu_node_selector if gpus else {}),
            "tolerations": [one.model_dump(exclude_none=True) for one in tolerations],
            "affinity": affinity if profile.one_pod_per_node and several else None,
            "imagePullSecrets": [{"name": name} for name in profile.image_pull_secrets],
            "securityContext": _filled(
                {
                    "seccompProfile": {"type": "RuntimeDefault"},
                    "runAsNonRoot": profile.run_as_user is not None or None,
                    "runAsUser": profile.run_as_user,
                    "runAsGroup": profile.run_as_group,
                    "fsGroup": profile.fs_group,
                    # the owner of each file of a large volume is not changed at every start
                    "fsGroupChangePolicy": None if profile.fs_group is None else "OnRootMismatch",
                }
            ),
            "volumes": [*volumes, {"name": "shared-memory", "emptyDir": shared}],
            "containers": [_container(spec, profile, folder, attempt)],
        }
    )


def _container(spec: JobSpec, profile: KubernetesProfile, folder: str, attempt: int) -> Manifest:
    rdma = profile.rdma_resource is not None and spec.nodes > 1
    mounts = []
    for n, volume in enumerate(profile.volumes):
        mount = {"name": f"volume-{n}", "mountPath": volume.mount, "subPath": volume.sub_path}
        mounts.append(_filled({**mount, "readOnly": volume.read_only or None}))
    return _filled(
        {
            "name": CONTAINER,
            "image": profile.image,
            "imagePullPolicy": profile.image_pull_policy,
            "command": _command(spec, profile, folder, attempt),
            "workingDir": folder,
            "envFrom": [{"secretRef": {"name": name}} for name in profile.secrets],
            "env": _environment(spec, profile),
            "resources": _resources(spec, profile, rdma),
            "volumeMounts": [*mounts, {"name": "shared-memory", "mountPath": "/dev/shm"}],
            # the end of the log becomes the reason even if the pod is deleted before it was read
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"], **({"add": ["IPC_LOCK"]} if rdma else {})},
            },
        }
    )


def _command(spec: JobSpec, profile: KubernetesProfile, folder: str, attempt: int) -> list[str]:
    """``python -m roma_core.pod … -- program``; the node rank is the pod's completion index."""
    name = spec.attempt_name(attempt)
    host = f"{name}-0.{name}" if spec.nodes > 1 else "127.0.0.1"  # of the pod with rank 0
    scratch = f"{folder}/attempts/{attempt}/torchrun"
    argv = program(spec, profile.python, "RANK", host, str(profile.port), scratch)
    meet = ["--meet", host] if spec.nodes > 1 else []
    words = [*profile.command_prefix, profile.python, "-m", "roma_core.pod", folder, str(attempt)]
    escaped = [_literal(word) for word in [*words, *meet, "--", *argv]]
    rank = "--node-rank=$(JOB_COMPLETION_INDEX)"  # set by the Job's controller
    return [rank if word == "--node-rank=RANK" else word for word in escaped]


def _literal(text: str) -> str:
    """Text protected from Kubernetes, which expands ``$(NAME)`` in commands and variables."""
    return text.replace("$", "$$")


def _environment(spec: JobSpec, profile: KubernetesProfile) -> list[Manifest]:
    values = {
        **process_variables(spec),
        # torchrun must not kill its workers while they save
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, profile.grace_s - 10)),
    }
    if spec.gpus_per_node:
        values |= {
            "NCCL_DEBUG": "WARN",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "300",
        }
    values |= profile.environment
    uid = {"fieldRef": {"fieldPath": f"metadata.labels['{CONTROLLER_LABEL}']"}}
    plain = [{"name": name, "value": _literal(value)} for name, value in values.items()]
    return [*plain, {"name": "ROMA_JOB_UID", "valueFrom": uid}]


def _resources(spec: JobSpec, profile: KubernetesProfile, rdma: bool) -> Manifest:
    """CPUs are requested without a limit, which would only slow the job; GPUs need request = limit."""
    cpus = (profile.cpus_per_process or spec.threads_per_process) * spec.processes_per_node
    limits: dict[str, str] = {}
    if memory_gb := spec.memory_gb or profile.memory_gb:
        limits["memory"] = f"{math.ceil(memory_gb * 1000)}M"
    if spec.gpus_per_node:
        limits[profile.gpu_resource] = str(spec.gpus_per_node)
    if rdma:
        limits[str(profile.rdma_resource)] = str(profile.rdma_count)
    return _filled({"requests": {"cpu": f"{math.ceil(cpus * 1000)}m", **limits}, "limits": limits})


def _filled(fields: Manifest) -> Manifest:
    return {name: value for name, value in fields.items() if value not in (None, {}, [])}
