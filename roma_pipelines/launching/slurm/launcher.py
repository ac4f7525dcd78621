"""The target ``slurm``: attempts as batch jobs of a cluster.

An attempt is found by its name, ``roma-<key>-<n>``, which is known before it is submitted, and by
its job id afterwards. Three commands are asked in this order, and the first that knows the job
counts: ``squeue`` (one shared query for all jobs), ``scontrol`` (some minutes after the end),
``sacct`` (where the cluster has it). None of them proves success; only the result file does.
"""

from __future__ import annotations

import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from roma_core.job import JobFolder
from roma_pipelines.launching.launcher import (
    PLANNED_FOLDER,
    Rejected,
    Unreachable,
    check_writable,
    passthrough_env,
)
from roma_pipelines.launching.outcome import tail_of
from roma_pipelines.launching.slurm import cluster
from roma_pipelines.launching.slurm.cluster import minutes
from roma_pipelines.launching.slurm.profile import SlurmProfile, batch_script, cpus_per_node
from roma_pipelines.launching.spec import JobHandle, JobSpec, JobState, Phase, Plan

# fmt: off
PHASES: dict[str, Phase] = {
    "PENDING": Phase.WAITING, "CONFIGURING": Phase.WAITING, "SUSPENDED": Phase.WAITING,
    "STOPPED": Phase.WAITING, "REQUEUED": Phase.WAITING, "REQUEUE_FED": Phase.WAITING,
    "REQUEUE_HOLD": Phase.WAITING, "SPECIAL_EXIT": Phase.WAITING, "RESV_DEL_HOLD": Phase.WAITING,
    "POWER_UP_NODE": Phase.WAITING,
    "RUNNING": Phase.RUNNING, "COMPLETING": Phase.RUNNING, "SIGNALING": Phase.RUNNING,
    "STAGE_OUT": Phase.RUNNING, "RESIZING": Phase.RUNNING, "UPDATE_DB": Phase.RUNNING,
    "COMPLETED": Phase.ENDED_OK,
    "FAILED": Phase.ENDED_BAD,
    "OUT_OF_MEMORY": Phase.OUT_OF_MEMORY,
    "PREEMPTED": Phase.INTERRUPTED, "NODE_FAIL": Phase.INTERRUPTED, "BOOT_FAIL": Phase.INTERRUPTED,
    "TIMEOUT": Phase.INTERRUPTED, "DEADLINE": Phase.INTERRUPTED,
    "LAUNCH_FAILED": Phase.INTERRUPTED, "RECONFIG_FAIL": Phase.INTERRUPTED,
    "CANCELLED": Phase.CANCELLED, "REVOKED": Phase.CANCELLED,
}
"""Every state SLURM reports; one that is not here is UNKNOWN, and never an end."""
# fmt: on

_MEMORY = re.compile(r"oom[-_]kill|Out Of Memory|exceeded (job |step )?memory limit", re.IGNORECASE)
_LOG_BYTES = 16 * 1024


class SlurmLauncher:
    backend = "slurm"

    def __init__(
        self,
        profile: SlurmProfile,
        clusters: Path,
        python: str = sys.executable,
        gone_after_s: float = 60.0,
        cancel_timeout_s: float = 120.0,
        fs_lag_s: float = 30.0,
    ) -> None:
        """
        Args:
            clusters: folder of shared state, ``<clusters>/<profile>/poll.json``.
            python: interpreter on the nodes, unless the profile names one.
            gone_after_s: a job that SLURM no longer knows and that left no ``exit.json`` counts as
                gone once its log and heartbeat have not changed for so long.
        """
        self.profile, self.python = profile, python
        self.gone_after_s, self.cancel_timeout_s = gone_after_s, cancel_timeout_s
        self.fs_lag_s = fs_lag_s
        self.shell = cluster.Shell(profile.ssh)
        shared = clusters / profile.name
        self.poll = cluster.SharedPoll(shared, self._query, profile.poll_s, profile.slowest_poll_s)
        self._missing_since: dict[str, float] = {}  # job id -> when it was first not in an answer
        self._exited_at: dict[str, float] = {}  # job id -> when its exit.json was first seen

    def plan(self, spec: JobSpec, folder: JobFolder = PLANNED_FOLDER, attempt: int = 1) -> Plan:
        text = batch_script(spec, self.profile, folder, attempt, self.python)
        return Plan(spec, folder, attempt, text)

    def preflight(self, plan: Plan) -> list[str]:
        """Every reason at once. ``sbatch --test-only`` is the cluster's own decision on accounts, QOS
        and reservations; the checks with ``sinfo`` before it report what to change, which it does not.
        """
        profile, python = self.profile, self.profile.python or self.python
        in_profile = f"in the profile {profile.name}"
        missing = [] if profile.ssh else [name for name in _COMMANDS if shutil.which(name) is None]
        if missing:
            return [
                f"no {', '.join(missing)} on this computer; run on a login node of the cluster, or "
                f"name one as `ssh` {in_profile}"
            ]
        found = _check_folder(plan.folder.path.parent, self.shell)
        inside = profile.container or profile.setup or profile.modules  # only the node knows these
        if not inside and "/" in python and self.shell.run("test", "-x", python).code:
            found.append(f"there is no interpreter {python}; set `python` {in_profile}")
        answer = self.shell.run("sinfo", "-h", "-o", f"{cluster.MARK}%P|%a|%l|%D|%c|%m|%G")
        if _UNCONFIGURED.lower() in answer.text.lower():
            whose = profile.ssh or "this computer"
            remedy = f"name a login node as `ssh` {in_profile}"
            if not profile.ssh:
                remedy += ", run on one, or set SLURM_CONF to the cluster's slurm.conf"
            return [*found, f"the SLURM commands of {whose} know of no cluster; {remedy}"]
        if answer.code:
            raise Unreachable(f"sinfo: {answer.text}")
        nodes = [
            _Nodes(name, up == "up", minutes(limit), _n(count), _n(cpus), _n(memory), gpus_of(gres))
            for name, up, limit, count, cpus, memory, gres in cluster.marked(answer.output, 7)
        ]
        known = {kind.partition.rstrip("*") for kind in nodes}
        default = [kind.partition[:-1] for kind in nodes if kind.partition.endswith("*")]
        wanted = profile.partition.split(",") if profile.partition else default
        if unknown := ", ".join(name for name in wanted if name not in known):
            there = f"there are {', '.join(sorted(known))}"
            return [*found, f"there is no partition {unknown} at {profile.name}; {there}"]
        kinds = [kind for kind in nodes if kind.partition.rstrip("*") in wanted]
        found += _check_size(plan.spec, profile, kinds)
        if found:
            return found  # sbatch would only say the same again, in fewer words
        options = shlex.split(" ".join(re.findall(r"^#SBATCH (.+)$", plan.text, re.MULTILINE)))
        answer = self.shell.run("sbatch", "--test-only", *options, "--wrap=true")
        if answer.code and answer.passes:
            raise Unreachable(f"sbatch --test-only: {answer.text}")
        return [f"sbatch would refuse it: {answer.text}"] if answer.code else []

    def submit(self, plan: Plan, environment: Mapping[str, str]) -> JobHandle:
        variables = passthrough_env(plan.spec, environment)
        script = str(plan.write_script())
        answer = self.shell.run("sbatch", "--parsable", script, environment=variables)
        found = re.findall(r"^(\d+)(?:;(\S+))?$", answer.output, re.MULTILINE)
        if answer.code == 0 and len(found) == 1:  # several are told apart by ``find``
            ((job, other),) = found
            if other and job not in dict(self._jobs_named(plan)):
                there = ("scancel", f"--clusters={other}", job)
                left = f"; call `{shlex.join(there)}`" if self.shell.run(*there).code else ""
                raise Rejected(
                    [
                        f"sbatch sent it to another cluster, {other}, where it cannot be watched: "
                        f"unset SBATCH_CLUSTERS, or use a profile of that cluster{left}"
                    ]
                )
            return self._handle(plan, job)
        # a policy that took an attempt of the same size before stands for a limit in number
        by_number = plan.attempt > 1 and "accounting/QOS policy" in answer.text
        if answer.passes or by_number or answer.code == 0:
            raise Unreachable(f"sbatch: {answer.text}")  # it may have been accepted all the same
        raise Rejected([f"sbatch: {answer.text}"])

    def find(self, plan: Plan) -> JobHandle | None:
        if owner := self._owner(plan):
            return owner
        jobs = self._jobs_named(plan)
        if not jobs:  # the accounting goes further back
            columns = ("-S", "now-7days", "-o", "jobid,state,workdir", f"--name={plan.name}")
            rows = [line.split("|", 2) for line in self._sacct(*columns)]
            here = [row for row in rows if row[0].isdigit() and row[2:] == [str(plan.folder.path)]]
            jobs = [(row[0], row[1].partition(" ")[0]) for row in here]
        if not jobs:
            return None
        alive = [job for job, state in jobs if not _ended(state)]
        return self._handle(plan, min(alive or [job for job, _ in jobs], key=int))

    def watch(self, handle: JobHandle) -> JobState:
        try:
            return self._watch(handle)
        except Unreachable as error:
            return JobState(Phase.UNKNOWN, str(error))

    def _watch(self, handle: JobHandle) -> JobState:
        job = handle.external["job_id"]
        if job not in self._exited_at and handle.plan.files.exit.exists():
            self._exited_at[job] = time.time()
        since = max(self._missing_since.get(job, 0.0), self._exited_at.get(job, 0.0))
        poll = self.poll.look(newer_than=since)
        if poll.error:
            return JobState(Phase.UNKNOWN, poll.error)
        row = poll.jobs.get(job)
        if row is None:
            return self._missing(handle, poll)
        self._missing_since.pop(job, None)
        phase = PHASES.get(row["state"], Phase.UNKNOWN)
        if phase is Phase.WAITING:
            return cluster.waiting(job, row, poll.positions.get(job))
        if phase in (Phase.RUNNING, Phase.UNKNOWN):
            return JobState(phase, f"job {job} {row['state']} on {row['nodes'] or '?'}")
        self._cancel_duplicates(handle, poll)
        return self._end_state(handle, row["state"], row["reason"], self._scontrol(job))

    def cancel(self, handle: JobHandle) -> None:
        """End every job of the attempt: it may have been accepted twice."""
        deadline = time.monotonic() + self.cancel_timeout_s
        cancelled: set[str] = set()
        while True:
            named = self._jobs_named(handle.plan)
            alive = {job: state for job, state in named if not _ended(state)}
            if not alive:
                return
            if new := sorted(alive.keys() - cancelled):
                self._checked("scancel", *new)
                cancelled |= alive.keys()
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{handle.plan.name} is still {alive} {self.cancel_timeout_s:g} s after scancel; "
                    f"look at it with `scontrol show job {min(alive)}`"
                )
            time.sleep(min(self.profile.poll_s, 1.0))

    # -- queries -----------------------------------------------------------------------------

    def _handle(self, plan: Plan, job: str) -> JobHandle:
        return JobHandle(plan, {"job_id": job, "profile": self.profile.name})

    def _owner(self, plan: Plan) -> JobHandle | None:
        owner = plan.files.read_owner()
        return self._handle(plan, owner["external"]["SLURM_JOB_ID"]) if owner else None

    def _query(self, before: cluster.PollResult) -> tuple[cluster.Jobs, cluster.Positions | None]:
        """Our jobs by one query; now and then, while one of them waits, one for all users' jobs."""
        waits = any(PHASES.get(row["state"]) is Phase.WAITING for row in before.jobs.values())
        if not waits or time.time() - before.positions_at < self.profile.slowest_poll_s:
            return cluster.own_jobs(self._squeue("--me")), None
        me = next(iter(before.jobs.values()))["user"]
        rows = self._squeue()
        ours = cluster.own_jobs({job: row for job, row in rows.items() if row["user"] == me})
        return ours, cluster.queue_positions(rows, ours)

    def _squeue(self, *options: str) -> cluster.Jobs:
        return cluster.parse_squeue(self._checked(*cluster.SQUEUE, *options).output)

    def _checked(self, *argv: str) -> cluster.Answer:
        """The answer of a client command that fails only if SLURM does not answer."""
        answer = self.shell.run(*argv)
        if answer.code:
            raise Unreachable(f"{argv[0]}: {answer.text}")
        return answer

    def _jobs_named(self, plan: Plan) -> list[tuple[str, str]]:
        """(id, state) of all jobs of this attempt that slurmctld knows."""
        rows, path = self._squeue("--me", f"--name={plan.name}"), str(plan.folder.path)
        return [(job, row["state"]) for job, row in rows.items() if row["folder"] == path]

    def _sacct(self, *options: str) -> list[str]:
        """Lines of the accounting; none where the cluster has none. Raises Unreachable."""
        try:
            answer = self.shell.run("sacct", "-X", "-n", "-P", *options)
        except ValueError:  # it is not installed
            return []
        if answer.code and "accounting storage is disabled" not in answer.text:
            raise Unreachable(f"sacct: {answer.text}")
        return answer.output.splitlines()

    def _scontrol(self, job: str) -> dict[str, str]:
        """Fields of ``scontrol show job``; empty once slurmctld no longer knows the job."""
        answer = self.shell.run("scontrol", "-o", "show", "job", job)
        if answer.code and answer.passes:
            raise Unreachable(f"scontrol: {answer.text}")
        lines = [line for line in answer.output.splitlines() if line.startswith("JobId=")]
        words = (word.partition("=") for word in " ".join(lines).split())
        return {name: value for name, equals, value in words if equals}

    # -- states ------------------------------------------------------------------------------

    def _end_state(
        self, handle: JobHandle, state: str, reason: str, record: Mapping[str, str]
    ) -> JobState:
        """The end of a job, from SLURM's state and what else is known."""
        phase = PHASES[state]
        text = f"SLURM says {state}"
        if reason not in ("", "None"):
            text += f" ({reason})"
        if (code := record.get("ExitCode", "0:0")) != "0:0":
            text += f", exit code {code.partition(':')[0]}, signal {code.partition(':')[2]}"
        if record.get("Restarts", "0") != "0":
            phase, text = Phase.INTERRUPTED, f"{text}, after the cluster restarted it"
        log = handle.plan.files.log
        if phase is Phase.ENDED_BAD and _MEMORY.search(tail_of(log, _LOG_BYTES)):
            # an srun step that is killed for memory ends as FAILED; only its output shows why
            phase, text = Phase.OUT_OF_MEMORY, f"{text}: out of memory; ask for more memory_gb"
        if phase is Phase.ENDED_BAD and code == "0:53":
            text += "; its log could not be opened: do the nodes see the job folder?"
        ran_min, usage = minutes(record.get("RunTime", "")), {}
        if ran_min != float("inf"):
            usage = {"ran_s": round(ran_min * 60.0, 3), "nodes": record.get("NodeList", "")}
        return JobState(phase, text, usage)

    def _missing(self, handle: JobHandle, poll: cluster.PollResult) -> JobState:
        """The job is in no answer: too early, too late, or slurmctld lost it."""
        job = handle.external["job_id"]
        since = self._missing_since.setdefault(job, time.time())
        if poll.asked_at <= since:
            return JobState(Phase.UNKNOWN, f"no answer about job {job} yet")
        record = self._scontrol(job)
        if state := record.get("JobState"):
            if _ended(state):
                return self._end_state(handle, state, record.get("Reason", ""), record)
            return JobState(Phase.UNKNOWN, f"squeue does not show job {job}, which is {state}")
        files, gone = handle.plan.files, f"SLURM no longer knows job {job}"
        try:
            lines = self._sacct("-D", "-j", job, "-o", "state")
        except Unreachable:
            if not files.exit.exists():
                raise
            lines = []
        states = [word for line in lines for word in line.split()[:1] if word in PHASES]
        if states and _ended(states[-1]):  # it lags: RUNNING proves nothing
            return self._end_state(handle, states[-1], "by sacct", {})
        if files.exit.exists():
            return JobState(Phase.GONE, gone)
        changed = [path.stat().st_mtime for path in (files.log, files.heartbeat) if path.exists()]
        if time.time() - max([since, *changed]) < self.gone_after_s:
            return JobState(Phase.UNKNOWN, f"SLURM does not know job {job}; it may still run")
        return JobState(Phase.GONE, f"{gone}, and its log and heartbeat stopped")

    def _cancel_duplicates(self, handle: JobHandle, poll: cluster.PollResult) -> None:
        """A second job of an attempt would wait in the queue only to leave at once: cancel it."""
        owner = self._owner(handle.plan)
        if owner is None or owner.external != handle.external:
            return  # this one may be the second itself
        ours = (handle.plan.name, str(handle.plan.folder.path))
        for job, row in poll.jobs.items():
            if (row["name"], row["folder"]) == ours and not _ended(row["state"]):
                self.shell.run("scancel", job)


def _ended(state: str) -> bool:
    return JobState(PHASES.get(state, Phase.UNKNOWN)).ended


# -- preflight -------------------------------------------------------------------------------

_COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "sinfo")
_UNCONFIGURED = "Could not establish a configuration source"  # retrying would not help


@dataclass(frozen=True)
class _Nodes:
    """Nodes of one kind in a partition, as sinfo groups them."""

    partition: str
    up: bool
    limit_min: float  # infinity without a limit
    count: int
    cpus: int
    memory_mb: int
    gpus: dict[str, int]  # by type; "" where the cluster names none


def _n(text: str) -> int:
    return int(text.rstrip("+"))  # "at least", where the nodes differ


def _check_folder(root: Path, shell: cluster.Shell) -> list[str]:
    if (found := check_writable(root)) or not shell.ssh:
        return found
    probe = root / f".preflight-{secrets.token_hex(4)}"
    probe.write_text(f"{probe.name}\n")
    try:
        if probe.name in shell.run("cat", str(probe)).output.splitlines():
            return []
    finally:
        probe.unlink()
    return [
        f"{shell.ssh} does not see what is written to {root} here; jobs need a folder on a file system "
        f"that both sides see: set ROMA_STORAGE_ROOT to one"
    ]


def _check_size(spec: JobSpec, profile: SlurmProfile, kinds: list[_Nodes]) -> list[str]:
    """Resources that no kind of node of the partition has, each with the most there is."""
    kinds = [kind for kind in kinds if kind.up]
    if not kinds:
        return [f"partition {profile.partition or '(default)'} is not up"]
    where = f"partition {profile.partition}" if profile.partition else "the default partition"
    limit_min = spec.time_limit_min or profile.time_limit_min

    def gpus(kind: _Nodes) -> int:
        return kind.gpus.get(profile.gpu_type, 0) if profile.gpu_type else sum(kind.gpus.values())

    kind_of = f" of type {profile.gpu_type}" if profile.gpu_type else ""
    types = ", ".join(sorted({name for kind in kinds for name in kind.gpus if name}))
    there = f" (types there: {types})" if profile.gpu_type and types else ""
    memory_gb = spec.memory_gb or profile.memory_gb or 0
    per_node: list[tuple[float, str, float, str]] = [
        (spec.gpus_per_node, f"GPUs{kind_of}", max(map(gpus, kinds)), there),
        (cpus_per_node(spec, profile), "CPUs", max(kind.cpus for kind in kinds), ""),
        (memory_gb, "GB", max(kind.memory_mb for kind in kinds) / 1000, ""),
    ]
    found = [
        f"{asked:g} {unit} a node are asked for, a node of {where} has at most {most:g}{note}"
        for asked, unit, most, note in per_node
        if asked > most
    ]
    if spec.nodes > (count := sum(kind.count for kind in kinds)):
        found.insert(0, f"{spec.nodes} nodes are asked for, {where} has {count}")
    if limit_min > (longest := max(kind.limit_min for kind in kinds)):
        found.append(
            f"a time limit of {limit_min} min is asked for, the longest of {where} is {longest:g} "
            f"min; an attempt that reaches its limit is resumed by the next, so a shorter limit is "
            f"enough"
        )
    return found


def gpus_of(gres: str) -> dict[str, int]:
    """``gpu:a100:4(S:0-1),lustre:1`` → ``{"a100": 4}``; the type is "" where none is named."""
    found: dict[str, int] = {}
    for name, count in re.findall(r"(?:^|,)gpu:(?:([A-Za-z][^:,(]*):)?(\d+)", gres):
        found[name] = found.get(name, 0) + int(count)
    return found
