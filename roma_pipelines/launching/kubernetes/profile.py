"""The profile of a Kubernetes cluster: ``profiles/kubernetes/<name>.yaml`` of the project or shipped.

A profile describes the cluster; the JobSpec describes the job, and the user's own settings
(context, namespace, image, queue) may override the profile by ``ROMA_KUBERNETES_…``. It holds no
secrets: pods take those from Secrets that it names.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic_settings import SettingsConfigDict

from roma_core.settings import Frozen, RomaSettings
from roma_pipelines.launching.launcher import ClusterProfile

Label = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]
"""Name of a namespace, a claim, a Secret, a queue, …"""
Key = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9_./-]*[A-Za-z0-9])?$")]
"""Key of a label or a taint, name of an extended resource."""
Image = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:/@-]*$")]
Mount = Annotated[str, StringConstraints(pattern=r"^/[^\n:]*$")]


class Volume(Frozen):
    """Storage a pod sees; exactly one of ``claim``, ``host_path`` and ``nfs``."""

    mount: Mount = Field(description="Path in the pod; for job folders, the orchestrator's own.")
    claim: Label | None = Field(None, description="Name of a PersistentVolumeClaim.")
    host_path: Mount | None = None
    """Path on the nodes; needs a namespace with PodSecurity `privileged`."""
    nfs: str | None = Field(None, pattern=r"^[A-Za-z0-9.-]+:/[^\n]*$", description="SERVER:/PATH.")
    sub_path: str | None = Field(None, pattern=r"^[^/\n][^\n]*$", description="Folder inside it.")
    read_only: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [n for n in ("claim", "host_path", "nfs") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"the volume at {self.mount} needs exactly one of claim, host_path and nfs; "
                f"it has {', '.join(given) or 'none'}"
            )
        return self


class Toleration(Frozen):
    """A taint that pods may ignore."""

    key: Key | None = Field(None, description="null: any.")
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class KubernetesSettings(RomaSettings):
    """The Kubernetes cluster to use, and the user's overrides of its profile."""

    model_config = SettingsConfigDict(env_prefix="ROMA_KUBERNETES_")

    profile: str = Field("generic", description="Profile of jobs that select none.")
    profiles: Path | None = None
    """Folder of profiles; null takes profiles/kubernetes of the project, and those that are
    shipped."""
    kubeconfig: Path | None = Field(None, description="null takes the profile's.")
    context: str | None = Field(None, description="Of the kubeconfig; null takes the profile's.")
    namespace: Label | None = Field(None, description="null takes the profile's.")
    image: Image | None = Field(None, description="Of the jobs; null takes the profile's.")
    queue: Label | None = Field(None, description="Kueue's LocalQueue; null takes the profile's.")


class KubernetesProfile(ClusterProfile):
    """How jobs run on one Kubernetes cluster."""

    kind, settings = "Kubernetes", KubernetesSettings

    name: Label = Field(description="Name of the profile and of its file.")
    kubeconfig: Path | None = None
    """null: KUBECONFIG, else the service account of this pod."""
    context: str | None = Field(None, description="Its context; null: the current one.")
    namespace: Label = Field("roma", description="Namespace of the jobs.")
    image: Image = Field("roma-pipeline:latest", description="Image with Python and this project.")
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[Label, ...] = Field((), description="Names of Secrets.")
    python: str = Field("python", pattern=r"^[^\n]+$", description="Interpreter in the image.")
    command_prefix: tuple[str, ...] = Field((), description="Words in front of the interpreter.")
    service_account: Label = Field("default", description="Account of the pods; needs no rights.")
    volumes: tuple[Volume, ...] = ()
    """One of them holds ROMA_STORAGE_ROOT, under the same path as here."""
    secrets: tuple[Label, ...] = Field((), description="Secrets whose keys become variables.")
    queue: Label | None = Field(None, description="Kueue's LocalQueue.")
    priority_class: Label | None = None
    scheduler: Label | None = Field(None, description="null: the cluster's default.")
    node_selector: dict[Key, str] = Field({}, description="Labels nodes must have.")
    tolerations: tuple[Toleration, ...] = ()
    gpu_resource: Key = Field("nvidia.com/gpu", description="Extended resource that counts GPUs.")
    gpu_node_selector: dict[Key, str] = Field({}, description="Further ones for jobs with GPUs.")
    gpu_tolerations: tuple[Toleration, ...] = Field((), description="For jobs with GPUs.")
    rdma_resource: Key | None = Field(None, description="For several nodes; null: plain network.")
    rdma_count: int = Field(1, gt=0)
    one_pod_per_node: bool = Field(True, description="Place every pod of a job on its own node.")
    run_as_user: int | None = Field(None, gt=0, description="null: the image's.")
    run_as_group: int | None = Field(None, ge=0)
    fs_group: int | None = Field(None, ge=0, description="Group of the volumes' files.")
    cpus_per_process: float | None = Field(None, gt=0)
    """CPUs to request, also 0.5; null: as many as a process has threads."""
    shared_memory_gb: float = Field(1.0, gt=0, description="Size of /dev/shm; part of the memory.")
    time_limit_min: int = Field(1440, gt=0, description="Of an attempt; the default of jobs.")
    grace_s: int = Field(120, gt=0, description="Between TERM and KILL; a checkpoint must fit.")
    start_timeout_s: float = Field(900.0, gt=0)
    """For pods that cannot start: image, account, volume, some nodes."""
    queue_timeout_s: float = Field(86400.0, gt=0)
    """For pods that wait for a node; a Kueue queue has no limit."""
    keep_days: float = Field(7.0, gt=0, description="Finished Jobs are removed after this.")
    port: int = Field(29500, gt=1023, lt=65536, description="Port of the rendezvous.")

    def holds(self, folder: Path) -> bool:
        """Whether a writable volume is mounted at or above ``folder``."""
        path = PurePosixPath(folder)
        return any(path.is_relative_to(v.mount) for v in self.volumes if not v.read_only)
