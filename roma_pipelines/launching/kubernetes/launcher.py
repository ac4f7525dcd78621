"""The target ``kubernetes``: attempts as Indexed Jobs of a cluster.

An attempt is known by the name of its Job, ``roma-<key>-<n>``, which there can be only once, and by
the Job's uid. Its Job is created first and owns the Service. Its end is the Job's condition Complete
or Failed, which comes when all pods are over; none of it proves success; that is the result file's
part.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from typing import Any

from roma_core.files import read_json, write_bytes
from roma_core.job import JobFolder
from roma_pipelines.launching.kubernetes.client import (
    ApiError,
    ClusterView,
    Connection,
    LogFollower,
    end_of_log,
    shared_view,
)
from roma_pipelines.launching.kubernetes.manifests import (
    Manifest,
    as_text,
    labels,
    manifests,
    with_variables,
)
from roma_pipelines.launching.kubernetes.profile import KubernetesProfile
from roma_pipelines.launching.kubernetes.states import (
    Snapshot,
    failed_first,
    has_started,
    holds_or_cannot_start,
    index_of,
    is_ending,
    is_over,
    state_of,
)
from roma_pipelines.launching.launcher import (
    PLANNED_FOLDER,
    Price,
    Rejected,
    Unreachable,
    passthrough_env,
)
from roma_pipelines.launching.spec import JobHandle, JobSpec, JobState, Phase, Plan

SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|USERNAME|CREDENTIAL")
"""Names of variables whose values no manifest may hold."""
_URL_WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")
_ASK_ABOUT_MISSING_S = 10.0
_LOG_COMES_WITHIN_S = 15.0
_LOG_LINES = 200
_CANCEL_EVERY_S = 0.5
_ORPHANED_AFTER_S = 5.0


class KubernetesLauncher:
    """Runs attempts on one Kubernetes cluster."""

    backend = "kubernetes"

    def __init__(self, site: KubernetesProfile, fs_lag_s: float = 30.0) -> None:
        """
        Args:
            fs_lag_s: how long this computer may take to see what a node wrote.
        """
        self.site, self.fs_lag_s = site, fs_lag_s
        self.connection = Connection(site.kubeconfig, site.context)
        self._followers: dict[str, LogFollower] = {}  # uid of the Job -> its first pod's log
        self._served: set[str] = set()  # uids of Jobs whose Service is there
        self._seen: set[str] = set()  # uids of Jobs that existed
        self._ending: dict[str, float] = {}  # uid of a Job -> since when it is
        self._asked_at: dict[str, float] = {}  # uid of a Job -> when it was last looked for
        self._waits: dict[str, tuple[bool, float]] = {}  # uid -> (should not wait long, since)

    @property
    def price(self) -> Price | None:
        rate = self.site.price_per_gpu_hour
        return None if rate is None else Price(rate, self.site.currency)

    @property
    def view(self) -> ClusterView:
        return shared_view(self.connection, self.site.namespace)

    def plan(self, spec: JobSpec, folder: JobFolder = PLANNED_FOLDER, attempt: int = 1) -> Plan:
        documents = manifests(spec, self.site, folder.path, attempt)
        return Plan(spec, folder, attempt, as_text(documents, spec), documents)

    def preflight(self, plan: Plan) -> list[str]:
        from roma_pipelines.launching.kubernetes.preflight import refusals  # it needs a launcher

        return refusals(self, plan)

    def submit(self, plan: Plan, environment: Mapping[str, str]) -> JobHandle:
        script = plan.files.script
        script.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(script, plan.text.encode())
        variables = _for_a_manifest(passthrough_env(plan.spec, environment))
        first = with_variables(plan.content[0], variables)
        try:
            made = self.create(first)
        except ApiError as no:
            if no.code == 401:
                raise Unreachable(f"Kubernetes: {no}") from no  # credentials are being replaced
            if no.code != 409:
                raise Rejected([f"Kubernetes: {reason}" for reason in no.reasons]) from no
            found = self.find(plan)  # it was submitted before: adopt that one
            if found is None:
                raise Unreachable(f"Job {plan.name} is there, and then not") from no
            return found
        handle = self._handle(plan, made["metadata"]["uid"])
        try:
            self._serve(handle)
        except ApiError as no:
            self.cancel(handle)  # without names its pods would only wait for one another
            raise Rejected([f"Kubernetes: {reason}" for reason in no.reasons]) from no
        return handle

    def find(self, plan: Plan) -> JobHandle | None:
        owner = plan.files.owner
        if owner.exists() and self.site.kind == "job":  # a JobSet's pods know only their Job
            document = read_json(owner, schema_version=1)
            return self._handle(plan, document["external"]["job_uid"])
        name = plan.name
        there = self._get(name)
        if there is None:
            return None
        if (mine := labels(plan.spec, plan.attempt)) != {
            label: there["metadata"].get("labels", {}).get(label) for label in mine
        }:
            raise Rejected(
                [
                    f"the {self.site.kind} {name} in {self.site.namespace} is not this job's: remove it"
                ]
            )
        if there["metadata"].get("deletionTimestamp"):
            raise Unreachable(f"{name} is being deleted, and not gone yet")
        return self._handle(plan, there["metadata"]["uid"])

    def watch(self, handle: JobHandle) -> JobState:
        if away := self.view.look():
            return JobState(Phase.UNKNOWN, away)
        seen = self._sighting(handle)
        if seen is None:
            return self._missing(handle)
        uid = handle.external["uid"]
        self._seen.add(uid)
        self._serve_once(handle)
        self._follow_log(handle, seen)
        if is_ending(seen.job):
            self._ending.setdefault(uid, time.monotonic())
        state = state_of(seen, time.monotonic() - self._ending.get(uid, time.monotonic()))
        if state.phase is Phase.WAITING:
            return self._waiting(handle, seen, state)
        self._waits.pop(uid, None)
        if state.ended:
            self._complete_log(handle, seen)
        return state

    def cancel(self, handle: JobHandle) -> None:
        """Delete the Job and its pods, whoever owns them by now."""
        kill_s = self.site.grace_s + 60.0
        start = time.monotonic()
        self._delete_job(handle)
        mine = labels(handle.plan.spec, handle.plan.attempt).items()
        query = {"labelSelector": ",".join(f"{label}={value}" for label, value in mine)}
        while True:
            pods = self._checked("GET", self._core("pods"), query=query)["items"]
            pods = [pod for pod in pods if not _is_finished(pod)]
            if not pods:
                return
            waited_s = time.monotonic() - start
            for pod in pods:
                if waited_s > _ORPHANED_AFTER_S and "deletionTimestamp" not in pod["metadata"]:
                    self._delete(f"{self._core('pods')}/{pod['metadata']['name']}")  # an orphan
            if waited_s > kill_s:
                names = ", ".join(pod["metadata"]["name"] for pod in pods)
                raise RuntimeError(
                    f"pods {names} are still there {waited_s:.0f} s after their Job was deleted; "
                    f"look at them with `kubectl -n {self.site.namespace} describe pod {names}`"
                )
            time.sleep(_CANCEL_EVERY_S)

    def create(self, manifest: Manifest, dry_run: bool = False) -> dict[str, Any]:
        """POST a manifest; unknown fields are errors.

        Raises:
            Denied, NoAnswer: it was not created; nobody knows.
        """
        query = {"fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        return self.connection.request(
            "POST", self._place(manifest["kind"]), query=query, body=manifest
        )

    # -- the parts ---------------------------------------------------------------------------

    def _core(self, kind: str) -> str:
        return f"/api/v1/namespaces/{self.site.namespace}/{kind}"

    def _place(self, kind: str) -> str:
        """Where objects of a kind are."""
        group = {"Job": "batch/v1", "JobSet": "jobset.x-k8s.io/v1alpha2"}.get(kind)
        if group is None:
            return self._core(f"{kind.lower()}s")
        return f"/apis/{group}/namespaces/{self.site.namespace}/{kind.lower()}s"

    def _own(self, name: str) -> str:
        """Path of what was created for an attempt."""
        return f"{self._place('JobSet' if self.site.kind == 'jobset' else 'Job')}/{name}"

    def _handle(self, plan: Plan, uid: str) -> JobHandle:
        site = self.site
        external = {"name": plan.name, "namespace": site.namespace, "uid": uid}
        return JobHandle(plan, {**external, "profile": site.name})

    def _checked(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """An answer that only a server in trouble does not give; a right may be missing for now."""
        try:
            return self.connection.request(method, path, **options)
        except ApiError as no:
            raise Unreachable(f"Kubernetes: {no}") from no

    def _get(self, name: str) -> dict[str, Any] | None:
        try:
            return self.connection.request("GET", self._own(name))
        except ApiError as no:
            if no.code == 404:
                return None
            raise Unreachable(f"Kubernetes: {no}") from no

    def _delete(self, path: str, **options: Any) -> None:
        # the API's own default would leave the pods behind, holding their GPUs
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        try:
            self.connection.request("DELETE", path, body={**body, **options})
        except ApiError as no:
            if no.code not in (404, 409):  # gone, or another one by that name
                raise Unreachable(f"Kubernetes: {no}") from no

    def _delete_job(self, handle: JobHandle) -> None:
        if self.site.kind == "jobset":  # its uid is not the Job's
            self._delete(self._own(handle.external["name"]))
        else:
            only = {"uid": handle.external["uid"]}
            self._delete(self._own(handle.external["name"]), preconditions=only)

    def _serve(self, handle: JobHandle) -> None:
        """Create what goes with the Job: the Service of several pods.

        Raises:
            Denied: the server does not want it.
        """
        name, uid = handle.external["name"], handle.external["uid"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
        for service in handle.plan.content[1:]:
            metadata = {**service["metadata"], "ownerReferences": [owner]}
            try:
                self.create({**service, "metadata": metadata})
            except ApiError as no:
                if no.code != 409:
                    raise
            except Unreachable:
                return  # the watch tries again
        self._served.add(uid)

    def _serve_once(self, handle: JobHandle) -> None:
        """Whoever submitted the Job may have died before the Service."""
        if handle.external["uid"] in self._served:
            return
        with contextlib.suppress(ApiError):  # its pods will say that they find no name
            self._serve(handle)

    def _sighting(self, handle: JobHandle) -> Snapshot | None:
        view, uid = self.view, handle.external["uid"]
        job = next(iter(view.jobs.present(uid)), None)
        if job is None and self.site.kind == "jobset":
            job = self._job_of_set(handle)
        if job is None:
            return None
        uid = job["metadata"]["uid"]
        present, departed = view.pods.present(uid), view.pods.departed(uid)
        gone = frozenset(pod["metadata"]["uid"] for pod in departed)
        pods = [*present, *departed]
        return Snapshot(job, pods, gone, view.warnings_about([job, *pods]))

    def _job_of_set(self, handle: JobHandle) -> dict[str, Any] | None:
        """The one Job of a JobSet, by the labels both have."""
        mine = labels(handle.plan.spec, handle.plan.attempt).items()
        for job in self.view.jobs.all_present():
            if mine <= job["metadata"].get("labels", {}).items():
                return job
        return None

    def _missing(self, handle: JobHandle) -> JobState:
        """The Job is not among those that exist: too early, or it was deleted."""
        uid, name = handle.external["uid"], handle.external["name"]
        present = [pod for pod in self.view.pods.present(uid) if not _is_finished(pod)]
        if present:  # deleted without its pods, or they are still ending
            return JobState(Phase.RUNNING, f"Job {name} was deleted, {len(present)} pods are left")
        last_word = handle.plan.files.exit.exists()
        if uid in self._seen and not last_word:
            return JobState(Phase.CANCELLED, f"somebody deleted Job {name}")
        if time.monotonic() - self._asked_at.get(uid, -1e9) < _ASK_ABOUT_MISSING_S:
            return JobState(Phase.UNKNOWN, f"no news of Job {name} yet")
        self._asked_at[uid] = time.monotonic()
        try:
            there = self._get(name)
        except Unreachable as away:
            return JobState(Phase.UNKNOWN, str(away))
        if there is not None and there["metadata"]["uid"] == uid:
            return JobState(Phase.UNKNOWN, f"no news of Job {name} yet")
        return JobState(Phase.GONE, f"there is no Job {name} any more")

    def _waiting(self, handle: JobHandle, seen: Snapshot, state: JobState) -> JobState:
        """The state, or its end: Kubernetes itself would wait for ever."""
        uid = handle.external["uid"]
        if seen.job["spec"].get("suspend"):
            self._waits.pop(uid, None)  # its queue decides
            return state
        soon = holds_or_cannot_start(seen)
        kind, since = self._waits.setdefault(uid, (soon, time.monotonic()))
        if kind != soon:
            kind, since = self._waits[uid] = (soon, time.monotonic())
        limit_s = self.site.start_timeout_s if soon else self.site.queue_timeout_s
        if time.monotonic() - since < limit_s:
            return state
        try:
            self.cancel(handle)
        except (Unreachable, RuntimeError) as error:
            return JobState(Phase.UNKNOWN, f"{state.reason}; it is to be removed: {error}")
        return JobState(Phase.ENDED_BAD, f"it did not start within {limit_s:g} s: {state.reason}")

    # -- logs --------------------------------------------------------------------------------

    def _follow_log(self, handle: JobHandle, seen: Snapshot) -> None:
        """Follow the log of the first pod once it has one."""
        uid = handle.external["uid"]
        running = [p for p in seen.pods if index_of(p) == 0 and has_started(p)]
        if uid in self._followers or not running:
            return
        pod = running[-1]["metadata"]
        pods, group = self.view.pods, seen.job["metadata"]["uid"]

        def over() -> bool:
            there = [p for p in pods.present(group) if p["metadata"]["uid"] == pod["uid"]]
            return pods.synced.is_set() and (not there or is_over(there[0]))

        log = handle.plan.files.log
        self._followers[uid] = LogFollower(
            self.connection, self.site.namespace, pod["name"], log, over
        )

    def _complete_log(self, handle: JobHandle, seen: Snapshot) -> None:
        """Wait for the rest of the log, and add the end of the failed pod's."""
        if follower := self._followers.pop(handle.external["uid"], None):
            follower.finish(_LOG_COMES_WITHIN_S)
        pod = failed_first(seen)
        if pod is None or index_of(pod) == 0 or not has_started(pod):
            return
        name = pod["metadata"]["name"]
        log = handle.plan.files.log
        its_own = log.with_name(f"log.{index_of(pod)}")
        if its_own.exists():
            return
        end = end_of_log(self.connection, self.site.namespace, name, _LOG_LINES)
        write_bytes(its_own, end.encode())
        with log.open("a", encoding="utf-8") as file:
            file.write(f"--- end of the log of pod {name}, which failed:\n{end}\n")


def _is_finished(pod: Mapping[str, Any]) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def _for_a_manifest(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables without those that are secrets: pods take these from the profile's Secrets.

    Raises:
        Refused: a value holds a password where none belongs.
    """
    plain = {name: value for name, value in variables.items() if not SECRET.search(name)}
    if wrong := [name for name, value in plain.items() if _URL_WITH_PASSWORD.search(value)]:
        raise Rejected(
            [
                f"{name} holds a password, and manifests are no place for one; put user and password "
                f"into a Secret that the profile names (MLFLOW_TRACKING_USERNAME, …_PASSWORD)"
                for name in wrong
            ]
        )
    return plain
