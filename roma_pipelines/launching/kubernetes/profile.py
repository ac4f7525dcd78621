"""What one Kubernetes cluster needs to be told: a profile, ``deploy/kubernetes/profiles/<name>.yaml``.

A profile holds what is the cluster's; what is the job's stands in its JobSpec, and what is the
user's (context, namespace, image, queue) may be set beside it by ``ROMA_KUBERNETES_…``. No value of
a secret is ever in here: pods take those from Secrets that the profile names.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_settings import SettingsConfigDict

from roma_core.settings import RomaSettings
from roma_pipelines.launching.launcher import DEPLOY, read_profile

Label = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]
"""Name of a namespace, a claim, a Secret, a queue, …"""
Key = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9_./-]*[A-Za-z0-9])?$")]
"""Key of a label or a taint, name of an extended resource."""
Image = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:/@-]*$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Mount = Annotated[str, StringConstraints(pattern=r"^/[^\n:]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Volume(_Part):
    """Storage a pod sees; exactly one of ``claim``, ``host_path`` and ``nfs``."""

    mount: Mount = Field(description="Path in the pod; for job folders, the orchestrator's own.")
    claim: Label | None = Field(None, description="Name of a PersistentVolumeClaim.")
    host_path: Mount | None = Field(None, description="Path on the nodes.")
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


class Toleration(_Part):
    """A taint that pods may ignore."""

    key: Key | None = Field(None, description="null: any.")
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class KubernetesProfile(_Part):
    """A Kubernetes cluster, as jobs have to ask it for things."""

    schema_version: Literal[1] = 1
    name: Label = Field(description="Of the profile; its file's.")
    description: str = Field("", description="Which cluster this is.")
    kubeconfig: Path | None = Field(
        None, description="null: KUBECONFIG, else the account of the pod this runs in."
    )
    context: str | None = Field(None, description="Of the kubeconfig; null: its current one.")
    namespace: Label = Field("roma", description="Where jobs run.")
    image: Image = Field("roma-pipeline:latest", description="Has Python and this project.")
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[Label, ...] = Field((), description="Names of Secrets.")
    python: str = Field("python", pattern=r"^[^\n]+$", description="Interpreter in the image.")
    command_prefix: tuple[str, ...] = Field((), description="Words in front of the interpreter.")
    service_account: Label = Field("default", description="Of the pods; needs no rights at all.")
    volumes: tuple[Volume, ...] = Field(
        (), description="One of them holds ROMA_STORAGE_ROOT, under the same path as here."
    )
    secrets: tuple[Label, ...] = Field((), description="Secrets whose keys become variables.")
    environment: dict[Variable, str] = Field({}, description="Variables of the job; no secrets.")
    kind: Literal["job", "jobset"] = Field("job", description="jobset needs its CRD.")
    queue: Label | None = Field(None, description="Kueue's LocalQueue.")
    priority_class: Label | None = None
    scheduler: Label | None = Field(None, description="null: the cluster's default.")
    node_selector: dict[Key, str] = Field({}, description="Labels nodes must have.")
    tolerations: tuple[Toleration, ...] = ()
    gpu_resource: Key = Field("nvidia.com/gpu", description="How GPUs are counted.")
    gpu_node_selector: dict[Key, str] = Field({}, description="For jobs with GPUs: their type.")
    gpu_tolerations: tuple[Toleration, ...] = Field((), description="For jobs with GPUs.")
    rdma_resource: Key | None = Field(None, description="For several nodes; null: plain network.")
    rdma_count: int = Field(1, gt=0)
    one_pod_per_node: bool = Field(True, description="Never two pods of a job on one node.")
    run_as_user: int | None = Field(None, gt=0, description="null: the image's.")
    run_as_group: int | None = Field(None, ge=0)
    fs_group: int | None = Field(None, ge=0, description="Group of the volumes' files.")
    cpus_per_process: float | None = Field(
        None, gt=0, description="To ask for; null: as many as a process has threads."
    )
    memory_gb: float | None = Field(None, gt=0, description="Per node, for jobs that name none.")
    shared_memory_gb: float = Field(1.0, gt=0, description="/dev/shm; counts into the memory.")
    time_limit_min: int = Field(1440, gt=0, description="Of an attempt, for jobs that name none.")
    grace_s: int = Field(120, gt=0, description="Between TERM and KILL; a checkpoint must fit.")
    start_timeout_s: float = Field(
        900.0, gt=0, description="For pods that cannot start: image, account, volume, half a gang."
    )
    queue_timeout_s: float = Field(
        86400.0, gt=0, description="For pods that find no node; a Kueue queue has no limit."
    )
    keep_days: float = Field(7.0, gt=0, description="Finished Jobs are removed after so long.")
    port: int = Field(29500, gt=1023, lt=65536, description="Where the processes of a job meet.")
    price_per_gpu_hour: float | None = Field(None, ge=0, description="For the cost on the asset.")
    currency: str = Field("EUR", description="Of the price.")

    def holds(self, folder: Path) -> bool:
        """Whether a writable volume is mounted at or above ``folder``."""
        path = PurePosixPath(folder)
        return any(path.is_relative_to(v.mount) for v in self.volumes if not v.read_only)


class KubernetesSettings(RomaSettings):
    """The Kubernetes cluster to use, and what is yours on it; the rest is in its profile."""

    model_config = SettingsConfigDict(env_prefix="ROMA_KUBERNETES_")

    profile: str = Field("generic", description="Profile of jobs that name none.")
    profiles: Path | None = Field(
        None,
        description="Folder of profiles; null takes deploy/kubernetes/profiles of this project.",
    )
    kubeconfig: Path | None = Field(None, description="null takes the profile's.")
    context: str | None = Field(None, description="Of the kubeconfig; null takes the profile's.")
    namespace: Label | None = Field(None, description="null takes the profile's.")
    image: Image | None = Field(None, description="Of the jobs; null takes the profile's.")
    queue: Label | None = Field(None, description="Kueue's LocalQueue; null takes the profile's.")


def load_kubernetes_profile(
    name: str | None = None, settings: KubernetesSettings | None = None
) -> KubernetesProfile:
    """The profile of this name, with the user's settings laid over it.

    Raises:
        ValueError: there is no such profile, or it is wrong; the text names file and field.
    """
    settings = settings or KubernetesSettings()
    folder = settings.profiles or DEPLOY / "kubernetes" / "profiles"
    ours = settings.model_dump(exclude={"profile", "profiles"}, exclude_none=True)
    return read_profile(KubernetesProfile, "Kubernetes", folder, name or settings.profile, ours)
