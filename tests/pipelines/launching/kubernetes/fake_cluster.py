"""A cluster behind the fake API server: a Job controller, a scheduler and nodes.

Pods are processes of this computer, so a training in them is a real one. The steps of a Job and its
pods are those of the recordings, and tests hold them against these. Names of pods (``JOB-0.SERVICE``)
become 127.0.0.1 if the headless Service is there; a ``hostPath`` must be mounted as it is called.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from roma_pipelines.launching.kubernetes.manifests import CONTAINER
from tests.pipelines.launching.kubernetes.fake_api import FakeApi
from tests.pipelines.launching.kubernetes.fake_store import Object, now

_TICK_S = 0.02
_READS_MEMORY_EVERY_S = 1.0  # which scans all processes of this computer
_MARK = "FAKE_POD"
_TRACKING = "batch.kubernetes.io/job-tracking"


@dataclass
class Node:
    name: str
    gpus: int = 8
    lost: bool = False


@dataclass
class _Run:
    """A pod as its node runs it."""

    pod: str
    node: Node | None = None
    process: subprocess.Popen[bytes] | None = None
    ended_as: str = ""  # OOMKilled, in place of the exit code's reason
    kill_at: float | None = None
    threads: list[threading.Thread] = field(default_factory=list)


class FakeCluster:
    """Nodes and controllers; ``api`` is what launchers talk to.

    Attributes:
        images: those that can be pulled.
        accounts: service accounts there are.
        secrets: their data by name, for ``envFrom``.
        evicts_after_s: how long the pods of a lost node stay as they were.
    """

    def __init__(self, api: FakeApi, namespace: str = "roma", nodes: int = 2) -> None:
        self.api, self.store = api, api.store
        self.nodes = [Node(f"n{n + 1}") for n in range(nodes)]
        self.images, self.accounts = {"localhost/python:3.11"}, {"default"}
        self.secrets: dict[str, dict[str, str]] = {}
        self.evicts_after_s = 0.5
        self._runs: dict[str, _Run] = {}  # by pod uid
        self._ended = False
        self._threads: list[threading.Thread] = []
        self.store.add("namespaces", {"metadata": {"name": namespace}})
        api.on_deleted = self._deleted
        self._begin(self._control)

    def close(self) -> None:
        """End everything, processes included."""
        self._ended = True
        for run in list(self._runs.values()):
            _signal_all(run, signal.SIGKILL)
        for thread in self._threads:
            thread.join(10)

    # -- what tests do to it -----------------------------------------------------------------

    def pods(self, namespace: str = "roma") -> list[Object]:
        return self.store.all("pods", namespace)

    def pod(self, index: int = 0) -> Object:
        return next(p for p in self.pods() if p["metadata"]["name"].split("-")[-2] == str(index))

    def preempt(self, pod: Object) -> None:
        """The scheduler needs the place of a pod for a more important one."""
        self._disrupt(
            pod, "PreemptionByScheduler", "preempting to accommodate a higher priority pod"
        )
        self._end_pod(pod)

    def lose(self, node: str) -> None:
        """Cut a node off: what runs there stops, its pods are evicted, and never answer that."""
        there = next(n for n in self.nodes if n.name == node)
        there.lost = True
        lost = [p for p in self.pods() if p["spec"].get("nodeName") == node]
        for pod in lost:
            _signal_all(self._runs[pod["metadata"]["uid"]], signal.SIGKILL)

        def evict() -> None:
            time.sleep(self.evicts_after_s)
            for pod in lost:
                self._disrupt(pod, "DeletionByTaintManager", "due to NoExecute taint")
                self._end_pod(pod)

        self._begin(evict)

    def starve(self, pod: Object) -> None:
        """Kill a pod's processes as the kernel does when they are over their memory limit."""
        run = self._runs[pod["metadata"]["uid"]]
        run.ended_as = "OOMKilled"
        _signal_all(run, signal.SIGKILL)

    def suspend(self, job: str, suspended: bool, namespace: str = "roma") -> None:
        """What Kueue does: take a Job's pods away, or let it begin."""
        self.store.change("jobs", namespace, job, lambda o: o["spec"].update(suspend=suspended))

    # -- the Job controller ------------------------------------------------------------------

    def _begin(self, act: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=act, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _control(self) -> None:
        seen: set[str] = set()
        while not self._ended:
            for job in self.store.all("jobs"):
                if job["metadata"]["uid"] not in seen:
                    seen.add(job["metadata"]["uid"])
                    self._begin(self._job, job["metadata"]["namespace"], job["metadata"]["name"])
            time.sleep(_TICK_S)

    def _job(self, namespace: str, name: str) -> None:
        """One Job, until it is over or gone."""
        started = 0.0
        while not self._ended and (job := self.store.get("jobs", namespace, name)):
            pods = [p for p in self.pods(namespace) if _owner(p) == job["metadata"]["uid"]]
            if job["spec"].get("suspend"):
                started = 0.0
                self._suspend(job, pods)
            elif not started:
                started = time.monotonic()
                self._set_status(job, startTime=now(), active=job["spec"]["parallelism"], ready=0)
                self._make_pods(job)
            elif end := self._end_of(job, pods, time.monotonic() - started):
                self._end_job(job, *end)
                return
            time.sleep(_TICK_S)

    def _suspend(self, job: Object, pods: list[Object]) -> None:
        conditions = [{**_condition("Suspended", "JobSuspended"), "message": "Job suspended"}]
        if not any(c["type"] == "Suspended" for c in job["status"].get("conditions", [])):
            self._set_status(job, conditions=conditions)
        for pod in pods:
            if "deletionTimestamp" not in pod["metadata"]:
                self._end_pod(pod)

    def _make_pods(self, job: Object) -> None:
        spec, uid = job["spec"], job["metadata"]["uid"]
        account = spec["template"]["spec"].get("serviceAccountName", "default")
        if account not in self.accounts:
            self._cannot_make_pods(job, account)
            return
        for index in range(spec["parallelism"]):
            self._make_pod(job, index, uid)

    def _cannot_make_pods(self, job: Object, account: str) -> None:
        metadata = job["metadata"]
        message = (
            f'Error creating: pods "{metadata["name"]}-0-" is forbidden: error looking up service '
            f'account {metadata["namespace"]}/{account}: serviceaccount "{account}" not found'
        )
        self._event(job, "Warning", "FailedCreate", message)

    def _make_pod(self, job: Object, index: int, uid: str) -> None:
        metadata, template = job["metadata"], job["spec"]["template"]
        spec = {**template["spec"], "hostname": f"{metadata['name']}-{index}"}
        label = "batch.kubernetes.io/job-completion-index"
        own = {"name": "JOB_COMPLETION_INDEX", "valueFrom": _field(f"metadata.labels['{label}']")}
        spec["containers"] = [{**c, "env": [*c.get("env", []), own]} for c in spec["containers"]]
        pod = {
            "metadata": {
                "name": f"{metadata['name']}-{index}-{secrets.token_hex(3)[:5]}",
                "namespace": metadata["namespace"],
                "labels": {**template["metadata"]["labels"], label: str(index)},
                "annotations": template["metadata"].get("annotations", {}),
                "ownerReferences": [
                    {"kind": "Job", "name": metadata["name"], "uid": uid, "controller": True}
                ],
                "finalizers": [_TRACKING],
            },
            "spec": spec,
            "status": {"phase": "Pending"},
        }
        made = self.store.add("pods", pod)
        self._runs[made["metadata"]["uid"]] = _Run(made["metadata"]["name"])
        self._begin(self._run_pod, made)

    def _end_of(self, job: Object, pods: list[Object], ran_s: float) -> tuple[str, str, str] | None:
        """(condition, reason, message) of a Job that is to end."""
        phases = [pod["status"]["phase"] for pod in pods]
        if ran_s > job["spec"].get("activeDeadlineSeconds", 1e9):
            return "Failed", "DeadlineExceeded", "Job was active longer than specified deadline"
        if pods and phases.count("Succeeded") == job["spec"]["completions"]:
            return "Complete", "CompletionsReached", "Reached expected number of succeeded pods"
        for pod in pods:
            evicted = "deletionTimestamp" in pod["metadata"] and _disrupted(pod)
            if pod["status"]["phase"] == "Failed" or evicted:
                return "Failed", *_why(job, pod)
        return None

    def _end_job(self, job: Object, condition: str, reason: str, message: str) -> None:
        """Two steps, as the recordings show: what is to be, and once all pods are over, that it is."""
        first = {"Complete": "SuccessCriteriaMet", "Failed": "FailureTarget"}[condition]
        target = {**_condition(first, reason), "message": message}
        pods = [
            p
            for p in self.pods(job["metadata"]["namespace"])
            if _owner(p) == job["metadata"]["uid"]
        ]
        self._set_status(job, conditions=[target], active=None)
        for pod in pods:
            if pod["status"]["phase"] in ("Pending", "Running"):
                self._end_pod(pod)
        while not self._ended:
            pods = self.pods(job["metadata"]["namespace"])
            if not any(
                _owner(p) == job["metadata"]["uid"]
                and p["status"]["phase"] in ("Pending", "Running")
                for p in pods
            ):
                last = {**_condition(condition, reason), "message": message}
                self._set_status(job, conditions=[target, last])
                return
            time.sleep(_TICK_S)

    def _set_status(self, job: Object, **changes: Any) -> None:
        def edit(there: Object) -> None:
            there["status"] = {**there["status"], **changes}
            there["status"] = {k: v for k, v in there["status"].items() if v is not None}

        self.store.change("jobs", job["metadata"]["namespace"], job["metadata"]["name"], edit)

    def _deleted(self, resource: str, there: Object, policy: str) -> None:
        """What the garbage collector does after a deletion."""
        namespace = there["metadata"].get("namespace", "")
        if resource == "pods":
            self._end_pod(there)
        if resource != "jobs":
            return
        for pod in [p for p in self.pods(namespace) if _owner(p) == there["metadata"]["uid"]]:
            if policy == "Orphan":
                self._change_pod(pod, lambda o: o["metadata"].update(ownerReferences=[]))
            elif pod["status"]["phase"] in ("Pending", "Running"):
                self._end_pod(pod)
            else:
                self.store.remove("pods", namespace, pod["metadata"]["name"])
        for service in self.store.all("services", namespace):
            if _owner(service) == there["metadata"]["uid"]:
                self.store.remove("services", namespace, service["metadata"]["name"])

    # -- nodes -------------------------------------------------------------------------------

    def _run_pod(self, pod: Object) -> None:
        """One pod on its node, from being scheduled to its last state."""
        run = self._runs[pod["metadata"]["uid"]]
        container = pod["spec"]["containers"][0]
        if not self._schedule(pod, run):
            return None
        self._status(pod, "Pending", {"waiting": {"reason": "ContainerCreating"}})
        if container["image"] not in self.images:
            why = f'Failed to pull image "{container["image"]}": not found'
            self._status(pod, "Pending", {"waiting": {"reason": "ErrImagePull", "message": why}})
            return self._wait_for_deletion(pod, run)
        if missing := self._missing_secret(container):
            why = {
                "reason": "CreateContainerConfigError",
                "message": f'secret "{missing}" not found',
            }
            self._status(pod, "Pending", {"waiting": why})
            return self._wait_for_deletion(pod, run)
        output: list[str] = []
        start = now()
        try:
            run.process = self._start(pod, container)
        except OSError as error:
            message = f'exec: "{container["command"][0]}": {error.strerror}'
            end = {"exitCode": 128, "reason": "StartError", "message": message}
            times = {"startedAt": "1970-01-01T00:00:00Z", "finishedAt": now()}
            for phase in ("Pending", "Failed"):
                self._status(pod, phase, {"terminated": {**end, **times}})
            return None
        self._status(pod, "Running", {"running": {"startedAt": start}})
        reader = threading.Thread(target=_read, args=(run.process, output), daemon=True)
        reader.start()
        code = self._wait(run, _bytes(container["resources"].get("limits", {}).get("memory")))
        if run.node is not None and run.node.lost:
            return None  # a lost node reports nothing
        reader.join(2)
        end = {"exitCode": code, "reason": "Completed" if code == 0 else run.ended_as or "Error"}
        if code and container.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            end["message"] = "\n".join(output[-80:])[-2048:]
        state = {"terminated": {**end, "startedAt": start, "finishedAt": now()}}
        if run.kill_at is None:  # its phase follows a little later
            self._status(pod, "Running", state)
            time.sleep(_TICK_S)
        self._status(pod, "Failed" if code else "Succeeded", state)
        if run.kill_at is not None:  # it was deleted; it goes as soon as its Job has counted it
            self._wait_until_counted(pod)
            self.store.remove("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
        return None

    def _wait_until_counted(self, pod: Object) -> None:
        name = pod["metadata"]["name"].rsplit("-", 2)[0]
        while not self._ended and (
            job := self.store.get("jobs", pod["metadata"]["namespace"], name)
        ):
            if job["metadata"]["uid"] != _owner(pod) or job["status"].get("conditions"):
                return
            time.sleep(_TICK_S)

    def _schedule(self, pod: Object, run: _Run) -> bool:
        """Find a node; False if the pod was deleted before there was one."""
        limits = pod["spec"]["containers"][0].get("resources", {}).get("limits", {})
        gpus, said = int(limits.get("nvidia.com/gpu", 0)), False
        while not self._ended and run.kill_at is None:
            with self.store.changed:  # one pod at a time
                if node := self._node_for(pod, gpus):
                    run.node = node
                    self._change_pod(pod, lambda o: o["spec"].update(nodeName=run.node.name))
                    return True
            if not said:
                said = True
                why = f"0/{len(self.nodes)} nodes are available: Insufficient nvidia.com/gpu."
                unplaced = {**_condition("PodScheduled", "Unschedulable"), "message": why}
                unplaced["status"] = "False"
                self._change_pod(pod, _setting_conditions(unplaced))
                self._event(pod, "Warning", "FailedScheduling", why)
            time.sleep(_TICK_S)
        self.store.remove("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
        return False

    def _node_for(self, pod: Object, gpus: int) -> Node | None:
        alive = [p for p in self.pods(pod["metadata"]["namespace"]) if _is_alive(p)]
        for node in self.nodes:
            there = [p for p in alive if p["spec"].get("nodeName") == node.name]
            used = sum(
                int(
                    p["spec"]["containers"][0]["resources"]
                    .get("limits", {})
                    .get("nvidia.com/gpu", 0)
                )
                for p in there
            )
            apart = "affinity" in pod["spec"] and any(_owner(p) == _owner(pod) for p in there)
            if not node.lost and not apart and used + gpus <= node.gpus:
                return node
        return None

    def _start(self, pod: Object, container: Object) -> subprocess.Popen[bytes]:
        variables = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
        variables[_MARK] = pod["metadata"]["name"]
        for source in container.get("envFrom", []):
            variables |= self.secrets[source["secretRef"]["name"]]
        for entry in container.get("env", []):
            if "value" in entry:
                variables[entry["name"]] = _expand(entry["value"], variables)
            else:
                path = entry["valueFrom"]["fieldRef"]["fieldPath"]
                label = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
                variables[entry["name"]] = pod["metadata"]["labels"][label[1]] if label else ""
        argv = [_expand(word, variables) for word in container["command"]]
        argv = [self._resolved(word, pod) for word in argv]
        for volume in pod["spec"].get("volumes", []):
            if "hostPath" in volume:
                mount = next(m for m in container["volumeMounts"] if m["name"] == volume["name"])
                assert mount["mountPath"] == volume["hostPath"]["path"], "no mounts here"
        return subprocess.Popen(
            argv,
            cwd=container.get("workingDir", "/"),
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_hear_all_signals,
        )

    def _resolved(self, word: str, pod: Object) -> str:
        """DNS: names of pods under a headless Service, once that is there."""
        service = pod["spec"].get("subdomain")
        if not service or f".{service}" not in word:
            return word
        end = time.monotonic() + 5
        while self.store.get("services", pod["metadata"]["namespace"], service) is None:
            if time.monotonic() > end:
                return word
            time.sleep(_TICK_S)
        return re.sub(rf"[\w-]+\.{re.escape(service)}", "127.0.0.1", word)

    def _missing_secret(self, container: Object) -> str:
        names = [source["secretRef"]["name"] for source in container.get("envFrom", [])]
        return next((name for name in names if name not in self.secrets), "")

    def _wait(self, run: _Run, memory: float) -> int:
        """The exit code; a pod is killed once its grace period is over, or beyond its memory."""
        assert run.process is not None
        read_at = 0.0 if memory < float("inf") else float("inf")
        while (code := run.process.poll()) is None:
            if time.monotonic() > read_at:
                read_at = time.monotonic() + _READS_MEMORY_EVERY_S
                if _used(run.process.pid) > memory:
                    run.ended_as = "OOMKilled"
                    _signal_all(run, signal.SIGKILL)
            if self._ended or (run.kill_at is not None and time.monotonic() > run.kill_at):
                _signal_all(run, signal.SIGKILL)
            time.sleep(_TICK_S)
        _signal_all(run, signal.SIGKILL)  # what it left behind goes with its container
        return 128 - code if code < 0 else code

    def _wait_for_deletion(self, pod: Object, run: _Run) -> None:
        while not self._ended and run.kill_at is None:
            time.sleep(_TICK_S)
        self.store.remove("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])

    def _end_pod(self, pod: Object) -> None:
        """Delete a pod: TERM now, KILL after its grace period."""
        grace_s = pod["spec"].get("terminationGracePeriodSeconds", 30)
        run = self._runs[pod["metadata"]["uid"]]
        ends = {"deletionTimestamp": now(grace_s), "deletionGracePeriodSeconds": grace_s}
        self._change_pod(pod, lambda o: o["metadata"].update(ends))
        if not _is_alive(self.store.get("pods", pod["metadata"]["namespace"], run.pod) or pod):
            self.store.remove("pods", pod["metadata"]["namespace"], run.pod)
            return
        if run.kill_at is None:
            run.kill_at = time.monotonic() + grace_s
        if run.process is not None and run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)  # only process 1 gets it

    def _change_pod(self, pod: Object, edit: Any) -> None:
        self.store.change("pods", pod["metadata"]["namespace"], pod["metadata"]["name"], edit)

    def _disrupt(self, pod: Object, reason: str, message: str) -> None:
        condition = {**_condition("DisruptionTarget", reason), "message": message}
        self._change_pod(pod, lambda o: o["status"].setdefault("conditions", []).append(condition))

    def _status(self, pod: Object, phase: str, state: Object) -> None:
        container = pod["spec"]["containers"][0]["name"]
        assert container == CONTAINER
        statuses = [{"name": container, "state": state}]
        new = {"phase": phase, "containerStatuses": statuses}
        self._change_pod(pod, lambda o: o["status"].update(new))

    def _event(self, about: Object, kind: str, reason: str, message: str) -> None:
        metadata = about["metadata"]
        what = {k: metadata[k] for k in ("name", "namespace", "uid")}
        self.store.add(
            "events",
            {
                "metadata": {
                    "name": f"{metadata['name']}.{secrets.token_hex(6)}",
                    "namespace": metadata["namespace"],
                },
                "involvedObject": {"kind": about["kind"], **what},
                "type": kind,
                "reason": reason,
                "message": message,
                "count": 1,
                "lastTimestamp": now(),
            },
        )


def _bytes(quantity: str | None) -> float:
    return float("inf") if quantity is None else float(quantity.removesuffix("M")) * 1e6


def _used(pid: int) -> int:
    """Memory of a process and its children, in bytes."""
    try:
        first = psutil.Process(pid)
        return sum(p.memory_info().rss for p in [first, *first.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def _owner(there: Object) -> str:
    owners = there["metadata"].get("ownerReferences") or [{}]
    return str(owners[0].get("uid", ""))


def _is_alive(pod: Object) -> bool:
    return pod["status"]["phase"] in ("Pending", "Running")


def _disrupted(pod: Object) -> bool:
    return any(c["type"] == "DisruptionTarget" for c in pod["status"].get("conditions", []))


def _why(job: Object, pod: Object) -> tuple[str, str]:
    """Reason and message of a Job that a pod failed: the first rule of its policy that matches."""
    place = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    statuses = pod["status"].get("containerStatuses") or [{}]
    end = statuses[0].get("state", {}).get("terminated", {})
    for n, rule in enumerate(job["spec"].get("podFailurePolicy", {}).get("rules", [])):
        tail = f"matching {rule['action']} rule at index {n}"
        if "onPodConditions" in rule and _disrupted(pod):
            return "PodFailurePolicy", f"Pod {place} has condition DisruptionTarget {tail}"
        if "onExitCodes" in rule and end:
            code, codes = end["exitCode"], rule["onExitCodes"]
            if (code in codes["values"]) == (codes["operator"] == "In"):
                said = f"Container {CONTAINER} for pod {place} failed with exit code {code} {tail}"
                return "PodFailurePolicy", said
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def _setting_conditions(*conditions: Object) -> Callable[[Object], None]:
    return lambda there: there["status"].update(conditions=list(conditions))


def _condition(kind: str, reason: str) -> Object:
    return {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": now()}


def _field(path: str) -> Object:
    return {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}


def _expand(text: str, variables: dict[str, str]) -> str:
    """``$(NAME)`` as Kubernetes expands it; ``$$`` is a dollar."""

    def one(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        return variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)", one, text)


def _read(process: subprocess.Popen[bytes], output: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        output.append(line.decode(errors="replace").rstrip("\n"))


def _signal_all(run: _Run, number: signal.Signals) -> None:
    """Every process of the pod, in whatever session it is and whoever its parent is by now."""
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(_MARK) == run.pod:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _hear_all_signals() -> None:
    """A container begins with nothing ignored or blocked, unlike this process perhaps."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
