"""The target ``kubernetes``: attempts as Indexed Jobs of a cluster.

An attempt is identified by its Job's name, ``roma-<key>-<n>``, which is unique in the namespace,
and by the Job's uid. The Job is created first and owns the Service. An attempt ends with the Job's
condition Complete or Failed, which comes once all pods have ended; success is proven by
``result.json`` alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from roma_core.job import JobFolder
from roma_pipelines.launching.kubernetes import states
from roma_pipelines.launching.kubernetes.client import ApiError, Client, Object, shared_client
from roma_pipelines.launching.kubernetes.manifests import (
    CONTROLLER_LABEL,
    as_text,
    labels,
    manifests,
    with_variables,
)
from roma_pipelines.launching.kubernetes.profile import KubernetesProfile
from roma_pipelines.launching.launcher import (
    PLANNED_FOLDER,
    Rejected,
    Unreachable,
    check_writable,
    passthrough_env,
)
from roma_pipelines.launching.outcome import log_tail, write_ending
from roma_pipelines.launching.spec import JobHandle, JobSpec, JobState, Phase, Plan

_SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|USERNAME|CREDENTIAL")  # in names of variables
_URL_WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")
_CANCEL_INTERVAL_S = 0.5
_ORPHANED_AFTER_S = 5.0


@dataclass
class _Watched:
    """What one launcher remembers of a Job between two polls; times are monotonic."""

    has_service: bool = False
    ending_since: float | None = None
    missing_since: float | None = None
    waiting: tuple[bool, float] | None = None  # whether urgently, since


class KubernetesLauncher:
    backend = "kubernetes"

    def __init__(self, profile: KubernetesProfile, fs_lag_s: float = 30.0) -> None:
        """``fs_lag_s``: seconds until this computer sees what a node wrote."""
        self.profile, self.fs_lag_s = profile, fs_lag_s
        self._watched: defaultdict[str, _Watched] = defaultdict(_Watched)  # by the Job's uid

    @property
    def client(self) -> Client:
        profile = self.profile
        return shared_client(profile.kubeconfig, profile.context, profile.namespace)

    def plan(self, spec: JobSpec, folder: JobFolder = PLANNED_FOLDER, attempt: int = 1) -> Plan:
        documents = manifests(spec, self.profile, folder.path, attempt)
        return Plan(spec, folder, attempt, as_text(documents, spec), documents)

    def preflight(self, plan: Plan) -> list[str]:
        root, profile = plan.folder.path.resolve().parent, self.profile
        if profile.holds(root):
            found = check_writable(root)
        else:
            mounts = ", ".join(v.mount for v in profile.volumes if not v.read_only) or "none"
            found = [
                f"{root} is in no writable volume of the profile {profile.name} (there: {mounts}), so "
                f"pods would not see the job folder; set ROMA_STORAGE_ROOT to a folder in one of "
                f"them, or add its volume to `volumes`"
            ]
        secret = [n for n in plan.spec.env_names if _SECRET.search(n) and os.environ.get(n)]
        for name in secret if not profile.secrets else []:  # their content may not be readable here
            found.append(
                f"{name} is set here, and manifests hold no secrets; put it into a Secret of the "
                f"namespace {profile.namespace} and name that under `secrets` of the profile "
                f"{profile.name}, or unset it"
            )
        # The server checks names, quantities, quotas, rights and what its admission adds, but not
        # what pods need (images, accounts, nodes): that is found within the start timeout.
        namespace = f"Kubernetes: there is no namespace {profile.namespace} "
        account = "Kubernetes does not accept this account; check the kubeconfig "
        for manifest in plan.content:
            try:
                self.client.create(manifest, dry_run=True)
            except Rejected as error:  # no cluster is configured
                found += error.reasons
            except ApiError as error:
                if error.code != 409:  # an object of this name exists: the submission adopts it
                    why = {404: namespace, 401: account}.get(error.code, "Kubernetes: ")
                    found += [f"{why}{reason}" for reason in error.reasons]
        return list(dict.fromkeys(found))

    def submit(self, plan: Plan, environment: Mapping[str, str]) -> JobHandle:
        plan.write_script()
        variables = _without_secrets(passthrough_env(plan.spec, environment), environment)
        try:
            created = self.client.create(with_variables(plan.content[0], variables))
        except ApiError as error:
            if error.code == 401:
                raise Unreachable(f"Kubernetes: {error}") from error  # the token is being renewed
            if error.code != 409:
                raise Rejected([f"Kubernetes: {why}" for why in error.reasons]) from error
            found = self.find(plan)  # it was submitted before: adopt that one
            if found is None:
                raise Unreachable(f"Job {plan.name} exists, and then does not") from error
            return found
        handle = self._handle(plan, created["metadata"]["uid"])
        try:
            self._create_service(handle)
        except ApiError as error:
            self.cancel(handle)  # without host names its pods would wait for one another
            raise Rejected([f"Kubernetes: {why}" for why in error.reasons]) from error
        return handle

    def find(self, plan: Plan) -> JobHandle | None:
        if owner := plan.files.read_owner():
            return self._handle(plan, owner["external"]["job_uid"])
        job = self._read_job(plan.name)
        if job is None:
            return None
        if not labels(plan.spec, plan.attempt).items() <= job["metadata"].get("labels", {}).items():
            why = "belongs to something else (its labels are not this job's); delete it"
            raise Rejected([f"the Job {plan.name} in {self.profile.namespace} {why}"])
        if job["metadata"].get("deletionTimestamp"):
            raise Unreachable(f"Job {plan.name} is still being deleted")
        return self._handle(plan, job["metadata"]["uid"])

    def watch(self, handle: JobHandle) -> JobState:
        if reason := self.client.sync():
            return JobState(Phase.UNKNOWN, reason)
        uid = handle.external["uid"]
        job = next(iter(self.client.jobs.present(uid)), None)
        if job is None:
            return self._missing(handle)
        snapshot = self._snapshot(job, self.client.pods.present(uid))
        watched = self._watched[uid]
        if not watched.has_service:  # the submitter may have died before it created the Service
            with contextlib.suppress(ApiError):  # its pods report that a host name is missing
                self._create_service(handle)
        now = time.monotonic()
        if states.is_ending(job) and watched.ending_since is None:
            watched.ending_since = now
        state = states.state_of(snapshot, now - (watched.ending_since or now))
        if state.phase is Phase.WAITING:
            return self._limited(handle, snapshot, state)
        watched.waiting = None
        if state.ended:  # the informer of the Jobs may be ahead of that of the pods
            try:
                pods = self.client.pods_of({CONTROLLER_LABEL: uid})
            except (ApiError, Unreachable) as error:
                return JobState(Phase.UNKNOWN, f"{state.reason}; its pods are not known: {error}")
            snapshot = self._snapshot(job, pods)
            state = states.state_of(snapshot, now - (watched.ending_since or now))
            self._append_failed_log(handle, snapshot)
        return state

    def cancel(self, handle: JobHandle) -> None:
        start = time.monotonic()
        path = self.client.path("jobs", handle.external["name"])
        self._delete(path, preconditions={"uid": handle.external["uid"]})
        of_attempt = labels(handle.plan.spec, handle.plan.attempt)
        while True:
            try:
                pods = self.client.pods_of(of_attempt)
            except ApiError as error:  # rights or tokens may be missing for a while
                raise Unreachable(f"Kubernetes: {error}") from error
            names = [pod["metadata"]["name"] for pod in pods if not states.is_finished(pod)]
            if not names:
                return
            waited_s = time.monotonic() - start
            for pod in pods if waited_s > _ORPHANED_AFTER_S else []:
                if pod["metadata"]["name"] in names and "deletionTimestamp" not in pod["metadata"]:
                    self._delete(self.client.path("pods", pod["metadata"]["name"]))
            if waited_s > self.profile.grace_s + 60.0:
                raise RuntimeError(
                    f"pods {', '.join(names)} still exist {waited_s:.0f} s after their Job was "
                    f"deleted; inspect them with `kubectl -n {self.profile.namespace} describe pod "
                    f"{' '.join(names)}`"
                )
            time.sleep(_CANCEL_INTERVAL_S)

    # -- objects -----------------------------------------------------------------------------

    def _handle(self, plan: Plan, uid: str) -> JobHandle:
        profile = self.profile
        external = {"name": plan.name, "namespace": profile.namespace, "uid": uid}
        return JobHandle(plan, {**external, "profile": profile.name})

    def _read_job(self, name: str) -> Object | None:
        try:
            return self.client.request("GET", self.client.path("jobs", name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise Unreachable(f"Kubernetes: {error}") from error

    def _delete(self, path: str, **options: Any) -> None:
        # by default the API would leave the pods behind, holding their GPUs
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        try:
            self.client.request("DELETE", path, body={**body, **options})
        except ApiError as error:
            if error.code not in (404, 409):  # it is gone, or another one has its name
                raise Unreachable(f"Kubernetes: {error}") from error

    def _create_service(self, handle: JobHandle) -> None:
        """Create the Service of a job of several nodes, owned by the Job; raises ApiError."""
        name, uid = handle.external["name"], handle.external["uid"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
        for service in handle.plan.content[1:]:
            metadata = {**service["metadata"], "ownerReferences": [owner]}
            try:
                self.client.create({**service, "metadata": metadata})
            except ApiError as error:
                if error.code != 409:
                    raise
            except Unreachable:
                return  # the next poll tries again
        self._watched[uid].has_service = True

    # -- states ------------------------------------------------------------------------------

    def _snapshot(self, job: Object, pods: list[Object]) -> states.Snapshot:
        """What is known of a Job with these existing pods."""
        uid, there = job["metadata"]["uid"], {pod["metadata"]["uid"] for pod in pods}
        known = [*self.client.pods.present(uid), *self.client.pods.deleted(uid)]
        gone = [pod for pod in known if pod["metadata"]["uid"] not in there]
        return states.Snapshot(job, pods, gone, self.client.warnings_about([job, *pods, *gone]))

    def _missing(self, handle: JobHandle) -> JobState:
        """State of a Job that is not among the existing ones: not reported yet, or deleted."""
        uid, name = handle.external["uid"], handle.external["name"]
        left = [pod for pod in self.client.pods.present(uid) if not states.is_finished(pod)]
        if left:  # they are terminating, or the Job was deleted without its pods
            return JobState(Phase.RUNNING, f"Job {name} was deleted, {len(left)} pods are left")
        try:
            job = self._read_job(name)
        except Unreachable as error:
            return JobState(Phase.UNKNOWN, str(error))
        if job is not None and job["metadata"]["uid"] == uid:
            return JobState(Phase.UNKNOWN, f"Job {name} is not reported yet")
        # a Job is removed keep_days after its end; whoever deletes one before cancels it
        files, kept_s = handle.plan.files, self.profile.keep_days * 86400
        alive = [
            p.stat().st_mtime for p in (files.script, files.heartbeat, files.log) if p.exists()
        ]
        watched = self._watched[uid]
        watched.missing_since = watched.missing_since or time.monotonic()
        if handle.plan.folder.result.exists() or time.time() - max(alive, default=0.0) > kept_s:
            return JobState(Phase.GONE, f"Job {name} no longer exists")
        if time.monotonic() - watched.missing_since < self.fs_lag_s:  # it may have finished before
            return JobState(Phase.UNKNOWN, f"Job {name} was deleted; its result may follow")
        return JobState(Phase.CANCELLED, f"Job {name} was deleted in the cluster")

    def _limited(self, handle: JobHandle, snapshot: states.Snapshot, state: JobState) -> JobState:
        """A waiting state; asks for its end after the profile's time limit: Kubernetes has none."""
        watched = self._watched[handle.external["uid"]]
        if snapshot.job["spec"].get("suspend"):
            watched.waiting = None  # its queue decides
            return state
        there = states.newest(snapshot.pods)
        # holds nodes or cannot start without help; else all its pods wait in a queue for a node
        urgent = not there or any(pod["spec"].get("nodeName") for pod in there)
        if watched.waiting is None or watched.waiting[0] != urgent:
            watched.waiting = urgent, time.monotonic()
        limit_s = self.profile.start_timeout_s if urgent else self.profile.queue_timeout_s
        if time.monotonic() - watched.waiting[1] < limit_s:
            return state
        reason = f"it did not start within {limit_s:g} s: {state.reason}"
        write_ending(handle.plan.files, JobState(Phase.ENDED_BAD, reason))
        return state

    def _append_failed_log(self, handle: JobHandle, snapshot: states.Snapshot) -> None:
        """Append the end of the failed pod's log to the attempt's log, which is that of pod 0."""
        pod = states.failed_first(snapshot)
        if pod is None or states.index_of(pod) == 0:
            return
        log = handle.plan.files.log
        tail = log_tail(log.with_name(f"log.{states.index_of(pod)}"))
        title = f"--- end of the log of pod {pod['metadata']['name']}, which failed:"
        if tail and not (log.exists() and title in log.read_text(errors="replace")):
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{title}\n{tail}\n")


# -- secrets -------------------------------------------------------------------------------------


def _without_secrets(variables: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Variables that a manifest may hold; Rejected for a password, or a secret name that was given."""
    plain = {name: value for name, value in variables.items() if not _SECRET.search(name)}
    wrong = [
        f"{name} holds a password or is named so, and manifests hold no secrets; put them into a Secret "
        f"that the profile names (such as MLFLOW_TRACKING_USERNAME, …_PASSWORD)"
        for name, value in {**plain, **given}.items()
        if _URL_WITH_PASSWORD.search(value) or (name in given and _SECRET.search(name))
    ]
    if wrong:
        raise Rejected(wrong)
    return plain
