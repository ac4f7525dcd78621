"""What a Kubernetes job can be told before it queues: every reason at once.

The API server knows best: a dry run with strict fields is its own word on names, quantities,
quotas, rights and whatever its admission adds, and creates nothing. It does not look at what pods
need (images, accounts, nodes); that is found when they start, within the profile's start timeout.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from roma_core.job import JobFolder
from roma_pipelines.launching.kubernetes.client import ApiError
from roma_pipelines.launching.launcher import Rejected, check_writable
from roma_pipelines.launching.spec import JobSpec, Plan

if TYPE_CHECKING:
    from roma_pipelines.launching.kubernetes.launcher import KubernetesLauncher


def refusals(launcher: KubernetesLauncher, plan: Plan) -> list[str]:
    """All reasons why this job would not run on this cluster.

    Raises:
        NoAnswer: the cluster is away.
    """
    found = [*_about_folder(launcher, plan.folder), *_about_secrets(launcher, plan.spec)]
    try:
        for manifest in plan.content:
            found += _about_manifest(launcher, manifest)
    except Rejected as error:  # there is no cluster to ask
        found += error.reasons
    return list(dict.fromkeys(found))


def _about_folder(launcher: KubernetesLauncher, folder: JobFolder) -> list[str]:
    """Whether jobs may be written here, and pods would see what is written."""
    root, site = folder.path.resolve().parent, launcher.site
    if not site.holds(root):
        mounts = ", ".join(v.mount for v in site.volumes if not v.read_only) or "none"
        return [
            f"{root} is in no writable volume of the profile {site.name} (there: {mounts}), so pods "
            f"would not see the job folder; set ROMA_STORAGE_ROOT to a folder in one of them, or name "
            f"the volume under `volumes`"
        ]
    return check_writable(root)


def _about_secrets(launcher: KubernetesLauncher, spec: JobSpec) -> list[str]:
    """Secrets that are set here and would not arrive."""
    from roma_pipelines.launching.kubernetes.launcher import SECRET

    if launcher.site.secrets:
        return []  # what is in them is not ours to read
    return [
        f"{name} is set here, and a manifest is no place for a secret; put it into a Secret of the "
        f"namespace {launcher.site.namespace} and name that under `secrets` of the profile "
        f"{launcher.site.name}, or unset it"
        for name in spec.env_names
        if SECRET.search(name) and os.environ.get(name)
    ]


def _about_manifest(launcher: KubernetesLauncher, manifest: dict[str, object]) -> list[str]:
    site = launcher.site
    try:
        launcher.create(manifest, dry_run=True)
    except ApiError as no:
        if no.code == 409:
            return []  # there is one by that name: to be adopted
        if no.code == 404 and site.kind == "jobset":
            return ["this cluster has no JobSet (its CRD is missing); set `kind: job`"]
        if no.code == 404:
            return [f"Kubernetes: there is no namespace {site.namespace} ({no})"]
        if no.code == 401:
            return [f"Kubernetes does not know this account ({no}); look at the kubeconfig"]
        return [f"Kubernetes: {reason}" for reason in no.reasons]
    return []
