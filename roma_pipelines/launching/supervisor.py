"""Run a job effectively once: submit, watch, continue, judge.

Everything known is in the job folder, so a supervisor may die at any line and another one goes on
from what it finds there. Its order of writing is what makes that safe: the intent
(``attempts/<n>.json``) before the submission, the external id after it, the end last. An intent
without an end is adopted; an intent that was never submitted is submitted under the same number;
and should two start the same attempt after all, the job's own claim lets one of them run.

Who watches a job now, ``watcher.json``: written by the watcher, believed while it lives.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

from roma_core.claim import is_running, process_start
from roma_core.files import create_json, digest_of, read_json, write_json
from roma_core.job import JobFolder
from roma_pipelines.launching.launcher import Launcher, Rejected, Unreachable
from roma_pipelines.launching.outcome import (
    Event,
    ExitReport,
    append_decision,
    judge,
    log_tail,
    newest_checkpoint,
    read_records,
    said_by,
)
from roma_pipelines.launching.spec import (
    AttemptRecord,
    End,
    JobFailed,
    JobHandle,
    JobSpec,
    JobState,
    Outcome,
    Phase,
    id_of,
)

WATCHER_SILENT_S = 60.0
"""A watcher on another computer that has not said for so long that it is alive is dead."""

POD_SILENT_S = 300.0
"""The same where steps are pods: one that dies is noticed, waited for and started again meanwhile."""

_BEAT_S = 5.0


class Lease:
    """This process, as the watcher of a job."""

    def __init__(self, folder: JobFolder, about: Mapping[str, Any]) -> None:
        """
        Args:
            about: who this is: ``asset_key``, ``dagster_run_id``.
        """
        self.folder, self.about = folder, dict(about)
        self._state, self._beat_at = "", -float("inf")

    def beat(self, state: str | None = None) -> None:
        """Say that it is alive, and how things stand where that is known: at once if it changed."""
        if state is not None and state != self._state:
            self._state, self._beat_at = state, -float("inf")
        if time.monotonic() - self._beat_at < _BEAT_S:
            return
        self._beat_at = time.monotonic()
        me = {"pid": os.getpid(), "start": process_start(os.getpid()), "beat": time.time()}
        me |= {"host": socket.gethostname(), "state": self._state}
        write_json(self.folder.watcher, {"schema_version": 1, **self.about, **me})


def is_watched(watcher: Mapping[str, Any]) -> bool:
    """Whether the process that wrote this ``watcher.json`` still lives."""
    if not watcher:
        return False
    if watcher.get("host", socket.gethostname()) == socket.gethostname():
        return is_running(watcher["pid"], watcher["start"])
    from roma_pipelines.executor import DagsterSettings  # it imports dagster: a second

    in_pods = DagsterSettings().executor == "k8s_job"
    silent_s = POD_SILENT_S if in_pods else WATCHER_SILENT_S
    return time.time() - float(watcher["beat"]) < silent_s


Leave = Literal["detach", "cancel"]
T = TypeVar("T")

FAULT_POINTS = (
    "before intent",
    "after intent",
    "before submit",
    "after submit",
    "after record",
    "before end",
    "after end",
)
"""Where a test may kill the supervisor: around every effect that others see."""

_AGAIN_S = 5.0  # between two tries to reach a target; what it was asked for may still arrive


def request_cancel(folder: JobFolder, by: str) -> None:
    """Ask whoever watches the job to end it."""
    write_json(folder.cancel, {"schema_version": 1, "by": by, "at": time.time()})


class _Unwanted(Exception):
    """The end was asked for while no attempt ran; the text says by whom."""


class Supervisor:
    """One job, from its intent to its outcome."""

    def __init__(
        self,
        launcher: Launcher,
        folder: JobFolder,
        spec: JobSpec,
        config: Any,
        *,
        environment: Mapping[str, str] | None = None,
        watcher: Mapping[str, Any] | None = None,
        on_poll: Callable[[JobState], None] = lambda state: None,
        on_note: Callable[[str], None] = lambda note: None,
        on_interrupt: Callable[[BaseException], Leave] = lambda error: "detach",
        poll_every_s: float = 0.5,
        heartbeat_timeout_s: float | None = 600.0,
        max_attempts: int = 20,
        fault_point: Callable[[str], None] = lambda name: None,
    ) -> None:
        """
        Args:
            config: the resolved configuration, JSON; ``spec.config_digest`` is its digest.
            environment: variables for a submission, with values; never written anywhere.
            watcher: who this is, for ``watcher.json``.
            on_poll: called with every state seen, once more at the end.
            on_note: called with every decision, in words.
            on_interrupt: called when an exception ends the watch; says whether the job goes on.
            heartbeat_timeout_s: an attempt whose heartbeat stands still so long is hung. Counts
                from its first heartbeat; None: never.
            max_attempts: how many attempts in a row may continue one another.
            fault_point: called at every one of FAULT_POINTS; tests raise there.
        """
        self.launcher, self.folder, self.spec, self.config = launcher, folder, spec, config
        self.environment = dict(environment or {})
        self.watcher = Lease(folder, watcher or {})
        self.on_poll, self.on_note, self.on_interrupt = on_poll, on_note, on_interrupt
        self.poll_every_s, self.heartbeat_timeout_s = poll_every_s, heartbeat_timeout_s
        self.max_attempts, self.fault_point = max_attempts, fault_point

    def run(self) -> Outcome:
        """The job's outcome, after waiting for it.

        Raises:
            Refused: the target will not run the spec; nothing was written and nothing queued.
            ValueError: it never could, or the folder belongs to another job.
        """
        self.launcher.plan(self.spec)
        if not self.records():
            wrong = self._patiently(lambda: self.launcher.preflight(self.spec, self.folder))
            if wrong:
                raise Rejected(wrong)
        self._prepare()
        try:
            done = self._done_before()
            while done is None:
                handle = self._open_attempt()
                done = self._close_attempt(handle.attempt, self._watch(handle))
            return done
        except _Unwanted as end:
            return self._outcome("cancelled", str(end))
        except BaseException as error:  # an interrupt is no Exception
            self._leave(error)
            raise

    # -- before ------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if digest_of(self.config) != self.spec.config_digest:
            raise ValueError(
                f"config_digest {self.spec.config_digest} is not that of the configuration given, "
                f"{digest_of(self.config)}; make it with files.digest_of(config)"
            )
        (self.folder.path / "attempts").mkdir(parents=True, exist_ok=True)
        if not self.folder.spec.exists():  # so nothing was submitted yet
            write_json(self.folder.config, self.config)
            create_json(self.folder.spec, self.spec.model_dump(mode="json"))
        kept = JobSpec.model_validate(read_json(self.folder.spec, schema_version=1))
        if kept.key != self.spec.key:
            raise ValueError(
                f"{self.folder.path} belongs to job {kept.key}, not to {self.spec.key}; "
                f"every job needs a folder of its own"
            )
        if kept != self.spec:
            before, now = kept.model_dump(), self.spec.model_dump()
            changed = [f"{k}: {before[k]!r} -> {now[k]!r}" for k in before if before[k] != now[k]]
            self._decide(None, f"the specification changed: {'; '.join(changed)}", "kept the first")
        self.spec = kept
        records = self.records()
        if records and records[-1].end is None and records[-1].backend != self.launcher.backend:
            raise ValueError(
                f"attempt {records[-1].attempt} in {self.folder.path} runs on the target "
                f"{records[-1].backend}, and this is {self.launcher.backend}; set the target back to "
                f"adopt it, or end it with `roma-pipeline jobs cancel {self.spec.key}`"
            )
        if records and records[-1].end and records[-1].end.how in ("failed", "cancelled"):
            self.folder.cancel.unlink(missing_ok=True)  # it was for an attempt that is over
        self.watcher.beat()

    def _done_before(self) -> Outcome | None:
        """The outcome, if an earlier supervisor came to one, and it was good."""
        records = self.records()
        if records and (records[-1].end is None or records[-1].end.how != "completed"):
            return None
        said, why = said_by(self.folder, self.spec, records[-1].attempt if records else None)
        if said is ExitReport.PROOF:
            self._decide(None, "the job is completed", "nothing to do")
            return self._outcome("completed", "completed before")
        if records:
            raise ValueError(
                f"{self.folder.path} was completed, but its result is no more what it was: {why}; "
                f"put result.json back or start a new job"
            )
        return None

    # -- attempts ----------------------------------------------------------------------------

    def records(self) -> list[AttemptRecord]:
        """All attempts on record, ascending."""
        return read_records(self.folder)

    def _open_attempt(self) -> JobHandle:
        """Adopt the attempt that has no end, or begin the next one."""
        records = self.records()
        if records and records[-1].end is None:
            return self._adopt(records[-1])
        n = records[-1].attempt + 1 if records else 1
        intent = AttemptRecord(attempt=n, backend=self.launcher.backend, intended_at=time.time())
        self.fault_point("before intent")
        if not create_json(self.folder.attempt_record(n), intent.model_dump(mode="json")):
            return self._open_attempt()  # another supervisor was quicker: adopt what it began
        self.fault_point("after intent")
        return self._submit(intent)

    def _adopt(self, record: AttemptRecord) -> JobHandle:
        handle = self._patiently(lambda: self._find(record))
        if handle is None:
            self._decide(record.attempt, "an intent that was never submitted", "submit it now")
            return self._submit(record)
        self._decide(
            record.attempt, f"an attempt without an end: {id_of(handle.external)}", "adopted it"
        )
        return self._submitted(record, handle)

    def _find(self, record: AttemptRecord) -> JobHandle | None:
        """The attempt as its owner or the target knows it, else as it was written down."""
        found = self.launcher.find(self.folder, record.attempt)
        if found is not None or record.external is None:
            return found
        path = str(self.folder.path.resolve())
        return JobHandle(path, record.attempt, record.backend, record.external)

    def _submit(self, record: AttemptRecord) -> JobHandle:
        if self.folder.cancel.exists():
            reason = f"{self._asked_for()} before it was submitted"
            state = JobState(Phase.CANCELLED)
            self._end(record.attempt, "cancelled", state, reason, newest_checkpoint(self.folder))
            raise _Unwanted(reason)
        self.fault_point("before submit")
        try:
            handle = self.launcher.submit(self.spec, self.folder, record.attempt, self.environment)
        except Unreachable as error:
            self._decide(record.attempt, f"submitted without an answer: {error}", "look for it")
            self._wait(JobState(Phase.UNKNOWN, str(error)))
            return self._adopt(record)
        except Rejected as error:
            self._end(record.attempt, "failed", JobState(Phase.ENDED_BAD), str(error), None)
            raise
        self.fault_point("after submit")
        self._submitted(record, handle)
        self.fault_point("after record")
        self._decide(record.attempt, "nothing running", f"submitted as {id_of(handle.external)}")
        return handle

    def _submitted(self, record: AttemptRecord, handle: JobHandle) -> JobHandle:
        if record.external != handle.external:
            known = {"external": handle.external, "submitted_at": time.time()}
            self._write(record.model_copy(update=known))
        return handle

    def _write(self, record: AttemptRecord) -> None:
        path = self.folder.attempt_record(record.attempt)
        write_json(path, record.model_dump(mode="json"))

    # -- watching ----------------------------------------------------------------------------

    def _watch(self, handle: JobHandle) -> JobState:
        heartbeat = self.folder.attempt(handle.attempt).heartbeat
        beat, beat_seen = None, time.monotonic()
        phase = None
        while True:
            state = self.launcher.watch(handle)
            if state.phase != phase:
                phase = state.phase
                self._decide(handle.attempt, str(state), "judge" if state.ended else "watch")
            self.watcher.beat(str(state))
            self.on_poll(state)
            if self.folder.cancel.exists():
                return self._end_it(handle, Phase.CANCELLED, self._asked_for())
            if state.ended:
                owner = self._patiently(partial(self.launcher.find, self.folder, handle.attempt))
                if owner is None or owner.external == handle.external:
                    return state
                self._decide(
                    handle.attempt, f"{id_of(owner.external)} runs the attempt", "watch that one"
                )
                handle = self._submitted(self._record(handle.attempt), owner)
                continue
            if heartbeat.exists() and (content := heartbeat.read_bytes()) != beat:
                beat, beat_seen = content, time.monotonic()
            if state.phase is Phase.WAITING:  # its queue took it back; it beats again later
                beat_seen = time.monotonic()
            silent_s = time.monotonic() - beat_seen
            limit_s = self.heartbeat_timeout_s
            if beat is not None and limit_s is not None and silent_s > limit_s:
                return self._end_it(handle, Phase.HUNG, f"no heartbeat for {limit_s:g} s")
            time.sleep(self.poll_every_s)

    def _asked_for(self) -> str:
        request = read_json(self.folder.cancel, schema_version=1)
        return f"asked for by {request['by']}"

    def _end_it(self, handle: JobHandle, phase: Phase, reason: str) -> JobState:
        self._decide(handle.attempt, reason, "cancel the attempt")
        self._patiently(lambda: self.launcher.cancel(handle))
        state = JobState(phase, reason)
        self.on_poll(state)
        return state

    def _patiently(self, ask: Callable[[], T]) -> T:
        """What the target says, however long it is away."""
        while True:
            try:
                return ask()
            except Unreachable as error:
                self._wait(JobState(Phase.UNKNOWN, str(error)))

    def _wait(self, state: JobState) -> None:
        if self.folder.path.exists():
            self.watcher.beat(str(state))
        self.on_poll(state)
        time.sleep(max(self.poll_every_s, min(_AGAIN_S, 20 * self.poll_every_s)))

    # -- the end -----------------------------------------------------------------------------

    def _close_attempt(self, n: int, state: JobState) -> Outcome | None:
        """Judge an ended attempt and write its end; None if another one is to follow."""
        said, why = self._said_at_last(n)
        before = [record for record in self.records() if record.attempt < n]
        checkpoint = newest_checkpoint(self.folder)
        began = self.folder.attempt(n).owner.exists()
        how, seen = judge(state.phase, said, checkpoint, before, self.max_attempts, began)
        reason = "; ".join(part for part in (why, state.reason, seen) if part)
        self._end(n, how, state, reason, checkpoint)
        return None if how == "continue" else self._outcome(how, reason)

    def _end(self, n: int, how: Any, state: JobState, reason: str, checkpoint: int | None) -> None:
        end = End(
            how=how, reason=reason, checkpoint=checkpoint, ended_at=time.time(), **state.usage
        )
        self.fault_point("before end")
        self._write(self._record(n).model_copy(update={"end": end}))
        self.fault_point("after end")
        if how != "continue":  # else it is for the attempt that would follow
            self.folder.cancel.unlink(missing_ok=True)
        self._decide(n, reason, how)

    def _record(self, n: int) -> AttemptRecord:
        return next(record for record in self.records() if record.attempt == n)

    def _said_at_last(self, n: int) -> tuple[ExitReport, str]:
        """What the job's files say, once its last word can be seen here, or must have been."""
        deadline = time.monotonic() + self.launcher.fs_lag_s
        while True:
            said, why = said_by(self.folder, self.spec, n)
            if (
                said not in (ExitReport.NOTHING, ExitReport.COMPLETED)
                or time.monotonic() >= deadline
            ):
                return said, why
            self.watcher.beat()
            time.sleep(self.poll_every_s)

    def _outcome(self, status: Literal["completed", "failed", "cancelled"], reason: str) -> Outcome:
        records = tuple(self.records())
        completed = status == "completed"
        last = self.folder.attempt(records[-1].attempt).log if records and not completed else None
        return Outcome(
            status=status,
            key=self.spec.key,
            folder=str(self.folder.path),
            attempts=records,
            result=self.folder.read_result() if completed else None,
            reason=reason,
            log_tail=log_tail(last) if last else "",
        )

    def _leave(self, error: BaseException) -> None:
        """The watch ends by an exception: leave the job running, or end it too."""
        leave = self.on_interrupt(error)
        seen = f"the watch ended by {type(error).__name__}"
        records = self.records()
        if not records or records[-1].end is not None:
            self._decide(None, seen, "nothing is running")
            return
        n = records[-1].attempt
        if leave == "detach":
            self._decide(n, seen, "left the job as it is; a retry adopts it")
            return
        try:
            self._decide(n, seen, "cancel the job")
        finally:  # a full disk may be why the watch ended; the job must end all the same
            try:
                if handle := self._find(records[-1]):
                    self.launcher.cancel(handle)
            except Unreachable as away:
                request_cancel(self.folder, f"the watch that {seen}, while {away}")
                raise
        state = JobState(Phase.CANCELLED)
        self._end(n, "cancelled", state, f"{seen}; cancelled", newest_checkpoint(self.folder))

    def _decide(self, attempt: int | None, seen: str, done: str) -> None:
        """Write a decision down, and say it."""
        decision = Event(time.time(), attempt, seen, done)
        append_decision(self.folder, decision)
        self.on_note(str(decision))


def supervise(
    launcher: Launcher, folder: JobFolder, spec: JobSpec, config: Any, **options: Any
) -> Outcome:
    """Run a job and return its outcome once it is completed; options as of Supervisor.

    Raises:
        JobFailed: it failed or was cancelled; the message has the reason and the end of the log.
    """
    outcome = Supervisor(launcher, folder, spec, config, **options).run()
    if outcome.status != "completed":
        raise JobFailed(outcome)
    return outcome
