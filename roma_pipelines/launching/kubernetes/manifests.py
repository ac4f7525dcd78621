"""From a JobSpec and a site to the manifests of one attempt: pure, pinned by golden files.

An attempt is one Indexed Job, a pod per node, and for several nodes a headless Service that gives
the pods names. A gang cannot replace a member, so nothing is retried inside (``backoffLimit: 0``):
one failed pod fails the Job, and the supervisor alone makes the next attempt. ``podFailurePolicy``
adds no retries; it makes the Job's own condition say why it failed, which outlives the pods.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from roma_core.claim import CONTINUE_EXIT_CODE
from roma_pipelines.launching.kubernetes.profile import KubernetesProfile, Toleration, Volume
from roma_pipelines.launching.launcher import process_variables, program
from roma_pipelines.launching.spec import JobSpec

Manifest = dict[str, Any]

CONTAINER = "main"
MANAGED_BY = {"app.kubernetes.io/managed-by": "roma-pipeline"}
KEY_LABEL = "roma-pipeline/job-key"
ATTEMPT_LABEL = "roma-pipeline/attempt"
FOLDER_ANNOTATION = "roma-pipeline/folder"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
CONTROLLER_LABEL = "batch.kubernetes.io/controller-uid"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
REPLICATED_JOB = "gang"
"""Name of the only part of a JobSet; it ends up in the pods' host names."""


def job_name(spec: JobSpec, attempt: int) -> str:
    """Name of an attempt's Job, Service and pods: the same whoever submits it."""
    return f"{spec.name}-{attempt}"


def first_host(spec: JobSpec, site: KubernetesProfile, attempt: int) -> str:
    """Name by which all pods find the one with global rank 0."""
    name = job_name(spec, attempt)
    if spec.nodes == 1:
        return "127.0.0.1"
    return f"{name}-{REPLICATED_JOB}-0-0.{name}" if site.kind == "jobset" else f"{name}-0.{name}"


def manifests(
    spec: JobSpec,
    site: KubernetesProfile,
    folder: Path | str,
    attempt: int,
) -> list[Manifest]:
    """What is to be created for an attempt, in this order.

    Args:
        folder: path of the job folder, the same here and in the pods.

    Raises:
        ValueError: no cluster could ever run the spec.
    """
    job = _job(spec, site, str(folder), attempt)
    if site.kind == "jobset":
        return [_jobset(spec, site, attempt, job)]
    return [job, _service(spec, site, attempt)] if spec.nodes > 1 else [job]


def with_variables(manifest: Manifest, variables: Mapping[str, str]) -> Manifest:
    """The manifest of a job with further variables of its processes; no secrets."""
    changed = copy.deepcopy(manifest)
    spec = changed["spec"]
    if changed["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    kept = [entry for entry in container["env"] if entry["name"] not in variables]
    given = [{"name": name, "value": _literal(value)} for name, value in variables.items()]
    container["env"] = [*given, *kept]
    return changed


def as_text(documents: list[Manifest], spec: JobSpec) -> str:
    """Manifests as people read them, and as ``kubectl apply -f`` takes them."""
    lines = [
        f"# {spec.nodes} node(s) x {spec.processes_per_node} process(es) "
        f"x {spec.threads_per_process} thread(s), {spec.gpus_per_node} GPU(s) a node",
        f"# variables handed on: {' '.join(spec.env_names) or 'none'}",
    ]
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # five times as fast
    text = yaml.dump_all(documents, Dumper=dumper, sort_keys=False, width=1000, allow_unicode=True)
    return "\n".join(lines) + "\n" + str(text)


def labels(spec: JobSpec, attempt: int) -> dict[str, str]:
    """Labels of everything that belongs to an attempt."""
    return {**MANAGED_BY, KEY_LABEL: spec.key[:63], ATTEMPT_LABEL: str(attempt)}


def _metadata(spec: JobSpec, site: KubernetesProfile, attempt: int, **more: Any) -> Manifest:
    name = {"name": job_name(spec, attempt), "namespace": site.namespace}
    return {**name, "labels": labels(spec, attempt), **more}


def _job(spec: JobSpec, site: KubernetesProfile, folder: str, attempt: int) -> Manifest:
    metadata = _metadata(spec, site, attempt, annotations={FOLDER_ANNOTATION: folder})
    if site.queue and site.kind == "job":
        metadata["labels"] = {**metadata["labels"], QUEUE_LABEL: site.queue}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": spec.nodes,
            "parallelism": spec.nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": _failure_policy(),
            "activeDeadlineSeconds": (spec.time_limit_min or site.time_limit_min) * 60,
            "ttlSecondsAfterFinished": math.ceil(site.keep_days * 86400),
            "template": {
                "metadata": {
                    "labels": labels(spec, attempt),
                    "annotations": {FOLDER_ANNOTATION: folder},
                },
                "spec": _pod(spec, site, folder, attempt),
            },
        },
    }


def _failure_policy() -> Manifest:
    """Every failure fails the Job at once; what matched is in the message of its condition."""

    def exit_codes(operator: str) -> Manifest:
        codes = {"containerName": CONTAINER, "operator": operator, "values": [CONTINUE_EXIT_CODE]}
        return {"action": "FailJob", "onExitCodes": codes}

    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "rules": [
            {"action": "FailJob", "onPodConditions": disrupted},
            exit_codes("In"),
            exit_codes("NotIn"),
        ]
    }


def _pod(spec: JobSpec, site: KubernetesProfile, folder: str, attempt: int) -> Manifest:
    gpus = spec.gpus_per_node > 0
    selector = {**site.node_selector, **(site.gpu_node_selector if gpus else {})}
    tolerations = [*site.tolerations, *(site.gpu_tolerations if gpus else ())]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": site.grace_s,
        "serviceAccountName": site.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "subdomain": job_name(spec, attempt) if spec.nodes > 1 else None,
        "priorityClassName": site.priority_class,
        "schedulerName": site.scheduler,
        "nodeSelector": selector,
        "tolerations": [_toleration(toleration) for toleration in tolerations],
        "affinity": _apart(spec, attempt) if site.one_pod_per_node and spec.nodes > 1 else None,
        "imagePullSecrets": [{"name": name} for name in site.image_pull_secrets],
        "securityContext": _pod_security(site),
        "volumes": [*_volumes(site), {"name": "shared-memory", "emptyDir": _memory(site)}],
        "containers": [_container(spec, site, folder, attempt)],
    }
    return {name: value for name, value in pod.items() if value not in (None, {}, [])}


def _container(spec: JobSpec, site: KubernetesProfile, folder: str, attempt: int) -> Manifest:
    mounts = [_mount(n, volume) for n, volume in enumerate(site.volumes)]
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": site.image,
        "imagePullPolicy": site.image_pull_policy,
        "command": _command(spec, site, folder, attempt),
        "workingDir": folder,
        "envFrom": [{"secretRef": {"name": name}} for name in site.secrets],
        "env": _environment(spec, site),
        "resources": _resources(spec, site),
        "volumeMounts": [*mounts, {"name": "shared-memory", "mountPath": "/dev/shm"}],
        # the end of the log becomes the reason, also where nobody read the log in time
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {
                "drop": ["ALL"],
                **({"add": ["IPC_LOCK"]} if _rdma(spec, site) else {}),
            },
        },
    }
    return {name: value for name, value in container.items() if value not in ({}, [])}


def _command(spec: JobSpec, site: KubernetesProfile, folder: str, attempt: int) -> list[str]:
    """``python -m roma_core.pod … -- program``; the program learns its rank from its index."""
    host = first_host(spec, site, attempt)
    scratch = f"{folder}/attempts/{attempt}/torchrun"
    argv = program(spec, site.python, "RANK", host, str(site.port), scratch)
    meet = ["--meet", host] if spec.nodes > 1 else []
    words = [*site.command_prefix, site.python, "-m", "roma_core.pod", folder, str(attempt), *meet]
    escaped = [_literal(word) for word in [*words, "--", *argv]]
    rank = "--node-rank=$(JOB_COMPLETION_INDEX)"  # set by the Job's controller
    return [rank if word == "--node-rank=RANK" else word for word in escaped]


def _literal(text: str) -> str:
    """Text that Kubernetes is to leave alone: in commands and variables it expands ``$(NAME)``."""
    return text.replace("$", "$$")


def _environment(spec: JobSpec, site: KubernetesProfile) -> list[Manifest]:
    fixed = {
        **process_variables(spec),
        # torchrun must not kill its workers while they save
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, site.grace_s - 10)),
    }
    if spec.gpus_per_node:
        fixed |= {
            "NCCL_DEBUG": "WARN",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "300",
        }
    values = {**fixed, **site.environment}
    uid = {"fieldRef": {"fieldPath": f"metadata.labels['{CONTROLLER_LABEL}']"}}
    return [
        *({"name": name, "value": _literal(value)} for name, value in values.items()),
        {"name": "ROMA_JOB_UID", "valueFrom": uid},
    ]


def _resources(spec: JobSpec, site: KubernetesProfile) -> Manifest:
    """CPUs are asked for and not limited: a limit only slows; GPUs must be asked for as limited."""
    cpus = max(spec.threads_per_process, site.cpus_per_process or 0) * spec.processes_per_node
    memory_gb = spec.memory_gb or site.memory_gb
    both: dict[str, str] = {}
    if memory_gb:
        both["memory"] = f"{math.ceil(memory_gb * 1000)}M"
    if spec.gpus_per_node:
        both[site.gpu_resource] = str(spec.gpus_per_node)
    if _rdma(spec, site):
        both[str(site.rdma_resource)] = str(site.rdma_count)
    requests = {"cpu": f"{math.ceil(cpus * 1000)}m", **both}
    return {"requests": requests, **({"limits": both} if both else {})}


def _rdma(spec: JobSpec, site: KubernetesProfile) -> bool:
    return site.rdma_resource is not None and spec.nodes > 1


def _memory(site: KubernetesProfile) -> Manifest:
    return {"medium": "Memory", "sizeLimit": f"{math.ceil(site.shared_memory_gb * 1000)}M"}


def _volumes(site: KubernetesProfile) -> list[Manifest]:
    found = []
    for n, volume in enumerate(site.volumes):
        source: Manifest
        if volume.claim:
            source = {"persistentVolumeClaim": {"claimName": volume.claim}}
        elif volume.host_path:
            source = {"hostPath": {"path": volume.host_path, "type": "Directory"}}
        else:
            server, _, path = str(volume.nfs).partition(":")
            source = {"nfs": {"server": server, "path": path}}
        found.append({"name": f"volume-{n}", **source})
    return found


def _mount(n: int, volume: Volume) -> Manifest:
    mount: Manifest = {"name": f"volume-{n}", "mountPath": volume.mount}
    if volume.sub_path:
        mount["subPath"] = volume.sub_path
    if volume.read_only:
        mount["readOnly"] = True
    return mount


def _pod_security(site: KubernetesProfile) -> Manifest:
    context: Manifest = {"seccompProfile": {"type": "RuntimeDefault"}}
    if site.run_as_user is not None:
        context |= {"runAsNonRoot": True, "runAsUser": site.run_as_user}
    if site.run_as_group is not None:
        context["runAsGroup"] = site.run_as_group
    if site.fs_group is not None:
        # files of a large volume are not changed one by one at every start
        context |= {"fsGroup": site.fs_group, "fsGroupChangePolicy": "OnRootMismatch"}
    return context


def _toleration(toleration: Toleration) -> Manifest:
    return toleration.model_dump(exclude_none=True)


def _apart(spec: JobSpec, attempt: int) -> Manifest:
    term = {
        "labelSelector": {"matchLabels": labels(spec, attempt)},
        "topologyKey": "kubernetes.io/hostname",
    }
    return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def _service(spec: JobSpec, site: KubernetesProfile, attempt: int) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(spec, site, attempt),
        "spec": {
            "clusterIP": "None",
            "selector": labels(spec, attempt),
            # rank 0 is to be found before anything in it is ready
            "publishNotReadyAddresses": True,
            "ports": [{"name": "rendezvous", "port": site.port}],
        },
    }


def _jobset(spec: JobSpec, site: KubernetesProfile, attempt: int, job: Manifest) -> Manifest:
    """The same Job inside a JobSet, which makes the Service itself."""
    metadata = _metadata(spec, site, attempt)
    if site.queue:
        metadata["labels"] = {**metadata["labels"], QUEUE_LABEL: site.queue}
    template = {"metadata": {k: job["metadata"][k] for k in ("labels", "annotations")}}
    name = job_name(spec, attempt)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {"maxRestarts": 0},
            "ttlSecondsAfterFinished": job["spec"]["ttlSecondsAfterFinished"],
            "replicatedJobs": [
                {
                    "name": REPLICATED_JOB,
                    "replicas": 1,
                    "template": {
                        **template,
                        "spec": {
                            k: v for k, v in job["spec"].items() if k != "ttlSecondsAfterFinished"
                        },
                    },
                }
            ],
        },
    }
