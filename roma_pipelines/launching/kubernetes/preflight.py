"""What can be found wrong with a Kubernetes job before it queues: every reason at once.

The API server checks each manifest in a dry run with strict fields: names, quantities, quotas,
rights and whatever its admission adds, and it creates nothing. It does not look at what pods need
(images, accounts, nodes); that is found when they start, within the profile's start timeout.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil

from roma_core.job import JobFolder
from roma_pipelines.launching.kubernetes.client import ApiError, Client
from roma_pipelines.launching.kubernetes.manifests import Manifest
from roma_pipelines.launching.kubernetes.profile import KubernetesProfile
from roma_pipelines.launching.launcher import Rejected
from roma_pipelines.launching.spec import JobSpec, Plan

SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|USERNAME|CREDENTIAL")
"""Names of variables whose values no manifest may hold."""
_MIN_FREE_MB = 200


def reasons_against(plan: Plan, profile: KubernetesProfile, client: Client) -> list[str]:
    """All reasons why the API server or the pods would not accept this job.

    Raises:
        Unreachable: the cluster does not answer.
    """
    found = [*_check_folder(plan.folder, profile), *_check_secrets(plan.spec, profile)]
    try:
        for manifest in plan.content:
            found += _check_manifest(manifest, client)
    except Rejected as error:  # no cluster is configured
        found += error.reasons
    return list(dict.fromkeys(found))


def _check_folder(folder: JobFolder, profile: KubernetesProfile) -> list[str]:
    """Whether jobs can be written here, and pods would see what is written."""
    root = folder.path.resolve().parent
    if not profile.holds(root):
        mounts = ", ".join(v.mount for v in profile.volumes if not v.read_only) or "none"
        return [
            f"{root} is in no writable volume of the profile {profile.name} (there: {mounts}), so "
            f"pods would not see the job folder; set ROMA_STORAGE_ROOT to a folder in one of them, "
            f"or add its volume to `volumes`"
        ]
    probe = root / f".preflight-{secrets.token_hex(4)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return [f"cannot write to {root} ({error.strerror}); set ROMA_STORAGE_ROOT"]
    free_mb = shutil.disk_usage(root).free / 1e6
    if free_mb < _MIN_FREE_MB:
        return [f"{root} has {free_mb:.0f} MB of free space; {_MIN_FREE_MB} MB are needed"]
    return []


def _check_secrets(spec: JobSpec, profile: KubernetesProfile) -> list[str]:
    """Secrets that are set here and would not reach the pods."""
    if profile.secrets:
        return []  # their content may not be readable from here
    return [
        f"{name} is set here, and manifests hold no secrets; put it into a Secret of the namespace "
        f"{profile.namespace} and name that under `secrets` of the profile {profile.name}, or unset it"
        for name in spec.env_names
        if SECRET.search(name) and os.environ.get(name)
    ]


def _check_manifest(manifest: Manifest, client: Client) -> list[str]:
    try:
        client.create(manifest, dry_run=True)
    except ApiError as error:
        if error.code == 409:
            return []  # an object of this name exists: the submission adopts it
        if error.code == 404:
            return [f"Kubernetes: there is no namespace {client.namespace} ({error})"]
        if error.code == 401:
            return [f"Kubernetes does not accept this account ({error}); check the kubeconfig"]
        return [f"Kubernetes: {reason}" for reason in error.reasons]
    return []
