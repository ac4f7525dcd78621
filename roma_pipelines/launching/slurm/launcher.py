"""The target ``slurm``: attempts as batch jobs of a cluster.

An attempt is known by its name, ``roma-<key>-<n>``, which is there before it is submitted, and by
its job id afterwards. Three are asked, in this order, and the first that knows wins: ``squeue``
(one shared question for all jobs), ``scontrol`` (some minutes after the end), ``sacct`` (where a
site has it). None of them proves success; that is the result file's part.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roma_core.files import read_json, write_bytes
from roma_core.job import JobFolder
from roma_pipelines.launching.launcher import Price, Rejected, Unreachable, passthrough_env
from roma_pipelines.launching.slurm.cluster import (
    SQUEUE,
    Answer,
    Jobs,
    Places,
    Poll,
    SharedPoll,
    Shell,
    ours_of,
    places_in_queue,
    rows_of,
    waiting,
)
from roma_pipelines.launching.slurm.profile import SlurmProfile
from roma_pipelines.launching.slurm.script import batch_script, job_name
from roma_pipelines.launching.spec import JobHandle, JobSpec, JobState, Phase

# fmt: off
PHASES: dict[str, Phase] = {
    "PENDING": Phase.WAITING, "CONFIGURING": Phase.WAITING, "SUSPENDED": Phase.WAITING,
    "STOPPED": Phase.WAITING, "REQUEUED": Phase.WAITING, "REQUEUE_FED": Phase.WAITING,
    "REQUEUE_HOLD": Phase.WAITING, "SPECIAL_EXIT": Phase.WAITING, "RESV_DEL_HOLD": Phase.WAITING,
    "RUNNING": Phase.RUNNING, "COMPLETING": Phase.RUNNING, "SIGNALING": Phase.RUNNING,
    "STAGE_OUT": Phase.RUNNING, "RESIZING": Phase.RUNNING,
    "COMPLETED": Phase.ENDED_OK,
    "FAILED": Phase.ENDED_BAD,
    "OUT_OF_MEMORY": Phase.OUT_OF_MEMORY,
    "PREEMPTED": Phase.INTERRUPTED, "NODE_FAIL": Phase.INTERRUPTED, "BOOT_FAIL": Phase.INTERRUPTED,
    "TIMEOUT": Phase.INTERRUPTED, "DEADLINE": Phase.INTERRUPTED,
    "CANCELLED": Phase.CANCELLED, "REVOKED": Phase.CANCELLED,
}
"""Every word SLURM says of a job; a word that is not here is unknown, and never an end."""
# fmt: on

_AWAY = re.compile(
    r"timed? ?out|unable to contact|connection (refused|reset)|communication|zero bytes|"
    r"temporarily unavailable|not responding",
    re.IGNORECASE,
)
_MEMORY = re.compile(r"oom[-_]kill|Out Of Memory|exceeded (job |step )?memory limit", re.IGNORECASE)
_LOG_BYTES = 16 * 1024


class SlurmLauncher:
    """Runs attempts on one SLURM cluster."""

    backend = "slurm"

    def __init__(
        self,
        site: SlurmProfile,
        clusters: Path,
        python: str = sys.executable,
        gone_after_s: float = 60.0,
        cancel_timeout_s: float = 120.0,
        fs_lag_s: float = 30.0,
    ) -> None:
        """
        Args:
            clusters: folder of what processes share about clusters, ``<clusters>/<site>/poll.json``.
            python: interpreter on the nodes, unless the site names one.
            gone_after_s: a job that SLURM has forgotten and that left no word counts as gone once
                nothing of its folder moved for so long.
            cancel_timeout_s: how long a cancelled job may take to be gone.
            fs_lag_s: how long this computer may take to see what a node wrote; network file
                systems remember for so long that a file was not there.
        """
        self.site, self.python = site, python
        self.gone_after_s, self.cancel_timeout_s = gone_after_s, cancel_timeout_s
        self.fs_lag_s = fs_lag_s
        self.shell = Shell(site.ssh)
        self.poll = SharedPoll(clusters / site.name, self._ask, site.poll_s, site.slowest_poll_s)
        self._missed_at: dict[str, float] = {}  # job id -> when it was first not in an answer
        self._exits: dict[str, Path] = {}  # job id -> its exit.json
        self._left_at: dict[str, float] = {}  # job id -> when its exit.json was first seen

    @property
    def price(self) -> Price | None:
        rate = self.site.price_per_gpu_hour
        return None if rate is None else Price(rate, self.site.currency)

    def plan(self, spec: JobSpec, folder: str = "JOB_FOLDER", attempt: int = 1) -> str:
        return batch_script(spec, self.site, folder, attempt, self.python)

    def submit(
        self, spec: JobSpec, folder: JobFolder, attempt: int, environment: Mapping[str, str]
    ) -> JobHandle:
        script = self._write_script(spec, folder, attempt)
        variables = passthrough_env(spec, environment)
        answer = self.shell.run("sbatch", "--parsable", str(script), environment=variables)
        found = re.search(r"^(\d+)(;\S+)?$", answer.output.strip(), re.MULTILINE)
        if answer.code == 0 and found:
            return self._handle(folder, attempt, found[1])
        if _AWAY.search(answer.text) or answer.code == 0:
            raise Unreachable(f"sbatch: {answer.text}")  # it may have been accepted all the same
        raise Rejected([f"sbatch: {answer.text}"])

    def find(self, folder: JobFolder, attempt: int) -> JobHandle | None:
        if owner := self._owner(folder, attempt):
            return owner
        spec = JobSpec.model_validate(read_json(folder.spec, schema_version=1))
        name = job_name(spec, attempt)
        path = str(folder.path.resolve())
        jobs = self._named(name, path) or self._named_by_sacct(name, path)
        if not jobs:
            return None
        alive = [job for job, word in jobs if not _ended(word)]
        return self._handle(folder, attempt, min(alive or [job for job, _ in jobs], key=int))

    def watch(self, handle: JobHandle) -> JobState:
        job = handle.external["job_id"]
        poll = self.poll.look(newer_than=self._newer_than(handle))
        if poll.error:
            return JobState(Phase.UNKNOWN, poll.error)
        row = poll.jobs.get(job)
        if row is None:
            return self._missing(handle, poll)
        self._missed_at.pop(job, None)
        phase = PHASES.get(row["state"], Phase.UNKNOWN)
        if phase is Phase.WAITING:
            return waiting(job, row, poll.places.get(job))
        if phase in (Phase.RUNNING, Phase.UNKNOWN):
            return JobState(phase, f"job {job} {row['state']} on {row['nodes'] or '?'}")
        self._cancel_doubles(handle, poll)
        return self._state(handle, row["state"], row["reason"], self._record(job))

    def cancel(self, handle: JobHandle) -> None:
        """End every job of the attempt: it may have been accepted twice."""
        spec = JobSpec.model_validate(read_json(JobFolder(handle.folder).spec, schema_version=1))
        name = job_name(spec, handle.attempt)
        deadline = time.monotonic() + self.cancel_timeout_s
        told: set[str] = set()
        while True:
            named = self._named(name, handle.folder)
            alive = {job: word for job, word in named if not _ended(word)}
            if not alive:
                return
            if new := sorted(alive.keys() - told):
                self._checked("scancel", *new)
                told |= alive.keys()
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{name} is still {alive} {self.cancel_timeout_s:g} s after scancel; look at it with "
                    f"`scontrol show job {min(alive)}`"
                )
            time.sleep(min(self.site.poll_s, 1.0))

    def preflight(self, spec: JobSpec, folder: JobFolder) -> list[str]:
        from roma_pipelines.launching.slurm.preflight import refusals  # it needs a launcher

        return refusals(self, spec, folder)

    # -- the parts ---------------------------------------------------------------------------

    def _owner(self, folder: JobFolder, attempt: int) -> JobHandle | None:
        """The job that claimed the attempt, if one has."""
        owner = folder.attempt(attempt).owner
        if not owner.exists():
            return None
        document = read_json(owner, schema_version=1)
        return self._handle(folder, attempt, document["external"]["SLURM_JOB_ID"])

    def _write_script(self, spec: JobSpec, folder: JobFolder, attempt: int) -> Path:
        path = folder.path.resolve()
        script = folder.attempt(attempt).script
        script.parent.mkdir(parents=True, exist_ok=True)
        text = batch_script(spec, self.site, path, attempt, self.python)
        write_bytes(script, text.encode())
        return script.resolve()

    def _handle(self, folder: JobFolder, attempt: int, job: str) -> JobHandle:
        external = {"job_id": job, "site": self.site.name}
        return JobHandle(str(folder.path.resolve()), attempt, self.backend, external)

    def _ask(self, before: Poll) -> tuple[Jobs, Places | None]:
        """Our jobs; now and then, while one of them waits, everybody's: one question in any case.

        Where a site hides other people's jobs, a place in the queue is that among our own.
        """
        waits = any(PHASES.get(row["state"]) is Phase.WAITING for row in before.jobs.values())
        if not waits or time.time() - before.placed_at < self.site.slowest_poll_s:
            return ours_of(rows_of(self._checked(*SQUEUE, "--me").output)), None
        me = next(iter(before.jobs.values()))["user"]
        rows = rows_of(self._checked(*SQUEUE).output)
        ours = ours_of({job: row for job, row in rows.items() if row["user"] == me})
        return ours, places_in_queue(rows, ours)

    def _checked(self, *argv: str) -> Answer:
        """The answer of a client command that only fails if SLURM is away."""
        answer = self.shell.run(*argv)
        if answer.code:
            raise Unreachable(f"{argv[0]}: {answer.text}")
        return answer

    def _named(self, name: str, folder: str) -> list[tuple[str, str]]:
        """(id, state) of all jobs of this name and folder that slurmctld remembers."""
        lines = self._checked(
            "squeue", "-h", "--me", "-t", "all", f"--name={name}", "-o", "%i|%T|%Z"
        ).output.splitlines()
        rows = (line.split("|", 2) for line in lines)
        return [(job, word) for job, word, where in rows if where == folder]

    def _named_by_sacct(self, name: str, folder: str) -> list[tuple[str, str]]:
        """The same from the accounting, where there is one; it goes further back."""
        columns = ("-X", "-n", "-P", "-S", "now-7days", "-o", "jobid,state,workdir")
        answer = self.shell.run("sacct", *columns, f"--name={name}")
        rows = (line.split("|", 2) for line in answer.output.splitlines() if line.count("|") > 1)
        return [(job, word.split()[0]) for job, word, where in rows if word and where == folder]

    def _newer_than(self, handle: JobHandle) -> float:
        """From when on an answer counts: since the job was missed, or left its last word."""
        job = handle.external["job_id"]
        if job not in self._left_at:
            if job not in self._exits:  # asked very often, so built once
                self._exits[job] = JobFolder(handle.folder).attempt(handle.attempt).exit
            if self._exits[job].exists():
                self._left_at[job] = time.time()
        return max(self._missed_at.get(job, 0.0), self._left_at.get(job, 0.0))

    def _record(self, job: str) -> dict[str, str]:
        """What scontrol knows of a job; empty once it has forgotten it, or is away."""
        answer = self.shell.run("scontrol", "-o", "show", "job", job)
        if answer.code:
            return {}
        words = (word.partition("=") for word in answer.output.split())
        return {name: value for name, equals, value in words if equals}

    def _state(
        self, handle: JobHandle, word: str, reason: str, record: Mapping[str, str]
    ) -> JobState:
        """The end of a job, from SLURM's word and what else is known."""
        phase = PHASES[word]
        said = f"SLURM says {word}"
        if reason not in ("", "None"):
            said += f" ({reason})"
        if (code := record.get("ExitCode", "0:0")) != "0:0":
            said += f", exit code {code.partition(':')[0]}, signal {code.partition(':')[2]}"
        if record.get("Restarts", "0") != "0":
            phase, said = Phase.INTERRUPTED, f"{said}, after the site restarted it"
        if phase is Phase.ENDED_BAD and _MEMORY.search(_end_of(handle)):
            # an srun step that is killed for memory ends as FAILED; only its output tells
            phase, said = Phase.OUT_OF_MEMORY, f"{said}: out of memory; ask for more memory_gb"
        if phase is Phase.ENDED_BAD and code == "0:53":
            said += "; its log could not be opened: do the nodes see the job folder?"
        return JobState(phase, said, _usage(record))

    def _missing(self, handle: JobHandle, poll: Poll) -> JobState:
        """The job is in no answer: too early, too late, or slurmctld lost it."""
        job = handle.external["job_id"]
        since = self._missed_at.setdefault(job, time.time())
        if poll.asked_at <= since:
            return JobState(Phase.UNKNOWN, f"no answer about job {job} yet")
        record = self._record(job)
        if word := record.get("JobState"):
            if _ended(word):
                return self._state(handle, word, record.get("Reason", ""), record)
            return JobState(Phase.UNKNOWN, f"squeue does not show job {job}, which is {word}")
        if word := self._word_of_sacct(job):
            return self._state(handle, word, "by sacct", {})
        attempt = JobFolder(handle.folder).attempt(handle.attempt)
        if attempt.exit.exists():
            return JobState(Phase.GONE, f"SLURM has forgotten job {job}")
        moved = [path.stat().st_mtime for path in (attempt.log, attempt.heartbeat) if path.exists()]
        if time.time() - max([since, *moved]) < self.gone_after_s:
            return JobState(Phase.UNKNOWN, f"SLURM does not know job {job}; it may still run")
        return JobState(Phase.GONE, f"SLURM has forgotten job {job}, and nothing of it moves")

    def _word_of_sacct(self, job: str) -> str | None:
        """How a job ended by the accounting; None if there is none, or it does not say."""
        answer = self.shell.run("sacct", "-X", "-D", "-n", "-P", "-j", job, "-o", "state")
        words = [line.split()[0] for line in answer.output.splitlines() if line.strip()]
        if answer.code or not words or not _ended(words[-1]):  # it lags: RUNNING proves nothing
            return None
        return words[-1]

    def _cancel_doubles(self, handle: JobHandle, poll: Poll) -> None:
        """A second job of an attempt would wait in the queue only to leave at once: end it.

        Only once the one that claimed the attempt is over: this one may be the second itself.
        """
        job = handle.external["job_id"]
        owner = self._owner(JobFolder(handle.folder), handle.attempt)
        if owner is None or owner.external != handle.external:
            return
        ours = [poll.jobs[job][key] for key in ("name", "folder")]
        for other, row in poll.jobs.items():
            same = [row["name"], row["folder"]] == ours
            if other != job and same and not _ended(row["state"]):
                self.shell.run("scancel", other)


def _ended(word: str) -> bool:
    phase = PHASES.get(word, Phase.UNKNOWN)
    return JobState(phase).ended


def _end_of(handle: JobHandle) -> str:
    log = JobFolder(handle.folder).attempt(handle.attempt).log
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_BYTES))
        return file.read().decode(errors="replace")


def _usage(record: Mapping[str, str]) -> dict[str, Any]:
    """What an attempt used: seconds, and the names of its nodes."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", record.get("RunTime", ""))
    if not found:
        return {}
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    ran_s = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return {"ran_s": float(ran_s), "nodes": record.get("NodeList", "")}
