"""Run a job effectively once: submit, watch, resume, decide the outcome.

All state is in the job folder, so a supervisor may die at any line and another one resumes from
there. The order of writing makes that safe: the intent (``attempts/<n>.json``) before the
submission, the external id after it, the end last. An intent without an end is adopted; an intent
that was never submitted is submitted under the same number; and should two start the same attempt
after all, the job's own claim lets one of them run.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, TypeVar

from roma_core.claim import is_running, process_start
from roma_core.files import create_json, digest_of, read_json, write_json
from roma_core.job import JobFolder
from roma_pipelines.launching.launcher import Launcher, Rejected, Unreachable
from roma_pipelines.launching.outcome import (
    Event,
    ExitReport,
    append_event,
    decide,
    log_tail,
    newest_checkpoint,
    read_ending,
    read_exit_report,
    read_records,
    write_ending,
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
    Plan,
    id_of,
)

# Without renewal the lease of a process on another computer expires after this time. It is longer
# in pods: Kubernetes notices a dead pod and starts another meanwhile.
LEASE_EXPIRES_S = 300.0 if "KUBERNETES_SERVICE_HOST" in os.environ else 60.0
_RENEW_EVERY_S = 5.0
_STUCK_AFTER_S = 900.0  # no call of a target or a tracker takes so long
_RETRY_S = 5.0  # between the first two requests to a target that does not answer

# fmt: off
FAULT_POINTS = (
    "before intent", "after intent", "before submit", "after submit", "after record", "before end",
    "after end",
)
"""Where a test may kill the supervisor: around every effect that others see."""
# fmt: on

Leave = Literal["detach", "cancel"]
T = TypeVar("T")


class Lease:
    """``lease.json``: which process supervises a job.

    A thread renews it, since a call may block for longer than a lease lasts, as long as the
    supervisor itself advances from one call to the next; none of them takes longer than ``grace_s``
    more than ``_STUCK_AFTER_S``. A lease that another process has taken is left to it.
    """

    def __init__(self, folder: JobFolder, holder: Mapping[str, Any], grace_s: float = 0.0) -> None:
        self.folder, self.holder, self.grace_s = folder, holder, grace_s
        self._token = uuid.uuid4().hex
        self._state, self._advanced_at, self._expires_s = "", 0.0, LEASE_EXPIRES_S
        self._writing, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        self.advance()
        self._write(take=True)
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        self._ended.set()
        if error is not None and issubclass(error, Exception):  # this process may live on
            self._expires_s = 0.0
            with contextlib.suppress(OSError):  # a full disk, say
                self._write()

    def advance(self, state: str | None = None) -> None:
        """The supervisor is not stuck; a new state of the job is written at once."""
        self._advanced_at = time.monotonic()
        if state is not None and state != self._state:
            self._state = state
            if self._thread is not None:
                self._write()

    def _renew(self) -> None:
        while not self._ended.wait(_RENEW_EVERY_S):
            if time.monotonic() - self._advanced_at < _STUCK_AFTER_S + self.grace_s:
                with contextlib.suppress(OSError):  # not renewed, it expires
                    self._write()

    def _write(self, take: bool = False) -> None:
        with self._writing:
            kept = {} if take or not self.folder.lease.exists() else read_json(self.folder.lease)
            if kept.get("token", self._token) != self._token:
                return
            me = {"pid": os.getpid(), "start": process_start(os.getpid()), "beat": time.time()}
            me |= {"host": socket.gethostname(), "state": self._state}
            me |= {"expires_s": self._expires_s, "token": self._token}
            write_json(self.folder.lease, {"schema_version": 1, **self.holder, **me})


def is_held(lease: Mapping[str, Any]) -> bool:
    """Whether the process that wrote this ``lease.json`` still supervises the job."""
    expires_s = lease.get("expires_s", LEASE_EXPIRES_S)
    if not lease or not expires_s:
        return False
    silent_s = time.time() - float(lease["beat"])
    if lease.get("host", socket.gethostname()) == socket.gethostname():
        return is_running(lease["pid"], lease["start"]) and silent_s < _STUCK_AFTER_S
    return silent_s < expires_s


def request_cancel(folder: JobFolder, by: str) -> None:
    """Ask the process that supervises the job to cancel it."""
    write_json(folder.cancel, {"schema_version": 1, "by": by, "at": time.time()})


class _Cancelled(Exception):
    """The cancel request came while no attempt ran; the text is the reason."""


@dataclass(repr=False, eq=False)  # its environment may hold secrets
class Supervisor:
    """One job, from its intent to its outcome."""

    launcher: Launcher
    folder: JobFolder
    spec: JobSpec
    config: Any  # the resolved configuration, JSON; spec.config_digest is its digest
    _: KW_ONLY
    environment: Mapping[str, str] = field(default_factory=dict)  # of a submission; never written
    holder: Mapping[str, Any] = field(default_factory=dict)  # facts for lease.json
    # called with every state, once more at the end; with every event, as text; with the exception
    # that ends the watch, to decide whether the job runs on
    on_poll: Callable[[JobState], None] = lambda state: None
    on_note: Callable[[str], None] = lambda note: None
    on_interrupt: Callable[[BaseException], Leave] = lambda error: "detach"
    poll_every_s: float = 0.5
    # an attempt whose heartbeat does not change for so long, counted from its first, is hung
    heartbeat_timeout_s: float | None = 600.0  # None: never
    max_attempts: int = 20  # that may end without a new checkpoint, in a row
    deadline: float | None = None  # time.monotonic(); Unreachable is raised then; None: never
    patience_s: float = 7 * 86400.0  # Unreachable is raised after so long without an answer
    fault_point: Callable[[str], None] = lambda name: None  # at all FAULT_POINTS; tests raise there

    def __post_init__(self) -> None:
        self.folder = JobFolder(self.folder.path.resolve())
        grace_s = getattr(self.launcher.profile, "grace_s", 0.0)  # cancelling waits for it
        self.lease = Lease(self.folder, self.holder, grace_s)

    def run(self) -> Outcome:
        """The job's outcome, after waiting for it.

        Raises:
            Rejected: the target will not run the spec; nothing was written and nothing queued.
            ValueError: it never could, or the folder belongs to another job.
            Unreachable: the target does not answer, and deadline or ``patience_s`` have passed.
        """
        self._check()
        plan = self._plan_next()
        if not self.records():
            if reasons := self._retry(lambda: self.launcher.preflight(plan)):
                raise Rejected(reasons)
            (self.folder.path / "attempts").mkdir(parents=True, exist_ok=True)
            if not self.folder.spec.exists():
                write_json(self.folder.config, self.config)
                create_json(self.folder.spec, self.spec.model_dump(mode="json"))
        old = self._failed_before(plan)
        with self.lease:
            try:
                outcome = self._completed_before()
                while outcome is None:
                    handle = self._open_attempt(plan)
                    handle, state = self._watch(handle)
                    outcome = self._close_attempt(handle.plan, state)
                    if outcome is not None and outcome.status == "failed" and old:
                        self._log(None, "that attempt failed in an earlier run", "start another")
                        outcome = None
                    if outcome is None:
                        plan, old = self._plan_next(), False
                return outcome
            except _Cancelled as end:
                return self._outcome("cancelled", str(end))
            except BaseException as error:  # an interrupt is no Exception
                self._leave(error)
                raise

    def records(self) -> list[AttemptRecord]:
        return read_records(self.folder)

    def _last(self) -> AttemptRecord | None:
        return next(reversed(self.records()), None)

    def _record(self, n: int) -> AttemptRecord:
        return next(record for record in self.records() if record.attempt == n)

    # -- before ------------------------------------------------------------------------------

    def _check(self) -> None:
        """Adopt the specification that the folder holds, if it is this job's; writes no files."""
        if digest_of(self.config) != self.spec.config_digest:
            raise ValueError(
                f"config_digest {self.spec.config_digest} is not that of the configuration given, "
                f"{digest_of(self.config)}; make it with files.digest_of(config)"
            )
        if not self.folder.spec.exists():
            return
        kept = JobSpec.model_validate(read_json(self.folder.spec, schema_version=1))
        if kept.key != self.spec.key:
            raise ValueError(
                f"{self.folder.path} belongs to job {kept.key}, not to {self.spec.key}; "
                f"every job needs a folder of its own"
            )
        if kept != self.spec:
            before, now = kept.model_dump(), self.spec.model_dump()
            changed = [f"{k}: {before[k]!r} -> {now[k]!r}" for k in before if before[k] != now[k]]
            self._log(None, f"the specification changed: {'; '.join(changed)}", "kept the first")
        self.spec = kept
        last = self._last()
        if last and last.end is None and last.backend != self.launcher.backend:
            raise ValueError(
                f"attempt {last.attempt} in {self.folder.path} runs on the target {last.backend}, "
                f"and this is {self.launcher.backend}; set the target back to adopt it, or end it "
                f"with `roma-pipeline jobs cancel {self.spec.key}`"
            )
        if last and last.end and last.end.status in ("failed", "cancelled"):
            self.folder.cancel.unlink(missing_ok=True)  # it was for an attempt that has ended

    def _plan_next(self) -> Plan:
        """The plan of the attempt that has no end, or of a new one."""
        last = self._last()
        n = 1 if last is None else last.attempt + (last.end is not None)
        return self.launcher.plan(self.spec, self.folder, n)

    def _completed_before(self) -> Outcome | None:
        """The outcome of a job that an earlier supervisor found completed."""
        last = self._last()
        if last and (last.end is None or last.end.status != "completed"):
            return None
        report, why = read_exit_report(self.folder, self.spec, last.attempt if last else None)
        if report is ExitReport.PROOF:
            self._log(None, "the job is completed", "nothing to do")
            return self._outcome("completed", "completed before")
        if last:
            raise ValueError(
                f"{self.folder.path} was completed, but result.json changed after that: {why}; "
                f"restore result.json or start a new job"
            )
        return None

    def _failed_before(self, plan: Plan) -> bool:
        """Whether the attempt failed in an earlier run, which could not record it: a full disk, say."""
        if not self.folder.lease.exists():
            return False
        run = read_json(self.folder.lease).get("dagster_run_id")
        report, _ = read_exit_report(self.folder, self.spec, plan.attempt)
        return report is ExitReport.FAILED and run != self.holder.get("dagster_run_id")

    # -- submitting --------------------------------------------------------------------------

    def _open_attempt(self, plan: Plan) -> JobHandle:
        """Adopt the attempt that has no end, or begin the next one."""
        path, n, refusal = self.folder.attempt_record(plan.attempt), 0, ""
        began = time.monotonic()
        look = path.exists()  # for one that was submitted before
        if not look:
            intent = AttemptRecord(
                attempt=plan.attempt, backend=self.launcher.backend, intended_at=time.time()
            )
            self.fault_point("before intent")
            if not create_json(path, intent.model_dump(mode="json")):
                return self._open_attempt(self._plan_next())  # adopt what another supervisor began
            self.fault_point("after intent")
        record = self._record(plan.attempt)
        while True:
            if look and (found := self._retry(lambda: self._find(plan, record))):
                seen = f"an attempt without an end: {id_of(found.external)}"
                self._log(plan.attempt, seen, "adopted it")
                return self._record_id(record, found)
            if look and not refusal:
                self._log(plan.attempt, "an intent that was never submitted", "submit it now")
            try:
                handle = self._submit(plan)
            except Unreachable as error:
                if refusal != (refusal := str(error)):
                    self._log(plan.attempt, f"submitted without an answer: {error}", "look for it")
                look, n = True, n + 1
                self._wait(error, n, began)
                continue
            self.fault_point("after submit")
            self._record_id(record, handle)
            self.fault_point("after record")
            self._log(plan.attempt, "nothing running", f"submitted as {id_of(handle.external)}")
            return handle

    def _find(self, plan: Plan, record: AttemptRecord) -> JobHandle | None:
        """The attempt as its owner or the target knows it, else as it is recorded."""
        found = self.launcher.find(plan)
        return found or (JobHandle(plan, record.external) if record.external else None)

    def _submit(self, plan: Plan) -> JobHandle:
        if self.folder.cancel.exists():
            reason = f"{self._cancel_reason()} before it was submitted"
            state = JobState(Phase.CANCELLED)
            self._end(plan.attempt, "cancelled", state, reason, newest_checkpoint(self.folder))
            raise _Cancelled(reason)
        self.fault_point("before submit")
        try:
            return self.launcher.submit(plan, self.environment)
        except Rejected as error:
            self._end(plan.attempt, "failed", JobState(Phase.ENDED_BAD), str(error), None)
            raise

    def _record_id(self, record: AttemptRecord, handle: JobHandle) -> JobHandle:
        if record.external != handle.external:
            known = {"external": handle.external, "submitted_at": time.time()}
            self._write(record.model_copy(update=known))
        return handle

    def _write(self, record: AttemptRecord) -> None:
        path = self.folder.attempt_record(record.attempt)
        write_json(path, record.model_dump(mode="json"))

    # -- watching ----------------------------------------------------------------------------

    def _watch(self, handle: JobHandle) -> tuple[JobHandle, JobState]:
        """Poll until the attempt has ended; the handle is that of the job which ran it."""
        n = handle.plan.attempt
        heartbeat = handle.plan.files.heartbeat
        beat, changed_at = None, time.monotonic()
        phase = None
        while True:
            state = self.launcher.watch(handle)
            if state.phase != phase:
                phase = state.phase
                self._log(n, str(state), "decide the outcome" if state.ended else "watch")
            self.lease.advance(str(state))
            self.on_poll(state)
            if self.folder.cancel.exists():
                return handle, self._cancel(handle, Phase.CANCELLED, self._cancel_reason())
            if ending := read_ending(handle.plan.files):  # the target may call it cancelled
                return handle, self._cancel(handle, ending.phase, ending.reason)
            if state.ended:
                plan = handle.plan
                owner = self._retry(lambda plan=plan: self.launcher.find(plan))  # type: ignore[misc]
                if owner is None or owner.external == handle.external:
                    return handle, state
                self._log(n, f"{id_of(owner.external)} runs the attempt", "watch that one")
                handle = self._record_id(self._record(n), owner)
                continue
            if heartbeat.exists() and (content := heartbeat.read_bytes()) != beat:
                beat, changed_at = content, time.monotonic()
            if state.phase is Phase.WAITING:  # requeued: its heartbeat continues later
                changed_at = time.monotonic()
            limit_s = self.heartbeat_timeout_s
            silent_s = time.monotonic() - changed_at
            if beat is not None and limit_s is not None and silent_s > limit_s:
                reason = f"no heartbeat for {limit_s:g} s"
                write_ending(handle.plan.files, JobState(Phase.HUNG, reason))
                continue
            time.sleep(self.poll_every_s)

    def _cancel_reason(self) -> str:
        return f"cancelled by {read_json(self.folder.cancel, schema_version=1)['by']}"

    def _cancel(self, handle: JobHandle, phase: Phase, reason: str) -> JobState:
        self._log(handle.plan.attempt, reason, "cancel the attempt")
        self._retry(lambda: self.launcher.cancel(handle))
        state = JobState(phase, reason)
        self.on_poll(state)
        return state

    def _retry(self, request: Callable[[], T]) -> T:
        """The target's answer; Unreachable is raised once waiting for it has to end."""
        n, began = 0, time.monotonic()
        while True:
            try:
                return request()
            except Unreachable as error:
                n += 1
                self._wait(error, n, began)

    def _wait(self, error: Unreachable, n: int, began: float) -> None:
        """Wait after request n in a row to a target that did not answer, ever longer."""
        now = time.monotonic()
        if self.deadline is not None and now > self.deadline:
            raise error
        if now - began > self.patience_s:
            raise Unreachable(f"gave up after {(now - began) / 3600:.1f} h of waiting: {error}")
        state = JobState(Phase.UNKNOWN, str(error))
        self.lease.advance(str(state))
        self.on_poll(state)
        first_s = max(self.poll_every_s, min(_RETRY_S, 20 * self.poll_every_s))
        time.sleep(first_s * 1.5 ** min(n - 1, 6))

    # -- the end -----------------------------------------------------------------------------

    def _close_attempt(self, plan: Plan, state: JobState) -> Outcome | None:
        """Apply the outcome policy and record the end; None if another attempt is to follow."""
        deadline = time.monotonic() + self.launcher.fs_lag_s  # until its last files are visible
        while True:
            report, why = read_exit_report(self.folder, self.spec, plan.attempt)
            unproven = report in (ExitReport.NOTHING, ExitReport.COMPLETED)
            if not unproven or state.phase is Phase.CANCELLED or time.monotonic() >= deadline:
                break
            self.lease.advance()
            time.sleep(self.poll_every_s)
        before = [record for record in self.records() if record.attempt < plan.attempt]
        checkpoint = newest_checkpoint(self.folder)
        status, seen = decide(state.phase, report, checkpoint, before, self.max_attempts)
        reason = "; ".join(part for part in (why, state.reason, seen) if part)
        self._end(plan.attempt, status, state, reason, checkpoint)
        return None if status == "continue" else self._outcome(status, reason)

    def _end(
        self, n: int, status: Any, state: JobState, reason: str, checkpoint: int | None
    ) -> None:
        now = time.time()
        end = End(status=status, reason=reason, checkpoint=checkpoint, ended_at=now, **state.usage)
        self.fault_point("before end")
        self._write(self._record(n).model_copy(update={"end": end}))
        self.fault_point("after end")
        if status != "continue":  # else it is for the attempt that would follow
            self.folder.cancel.unlink(missing_ok=True)
        self._log(n, reason, status)

    def _outcome(self, status: Literal["completed", "failed", "cancelled"], reason: str) -> Outcome:
        records = tuple(self.records())
        result = self.folder.read_result() if status == "completed" else None
        ends_badly = records and status != "completed"
        tail = log_tail(self.folder.attempt(records[-1].attempt).log) if ends_badly else ""
        return Outcome(status, self.spec.key, str(self.folder.path), records, result, reason, tail)

    def _leave(self, error: BaseException) -> None:
        """An exception ended the watch: leave the job running, or cancel it."""
        leave = self.on_interrupt(error)
        seen = f"the watch ended by {type(error).__name__}"
        record = self._last()
        if record is None or record.end is not None:
            self._log(None, seen, "nothing is running")
            return
        n = record.attempt
        if leave == "detach":
            self._log(n, seen, "left the job running; a retry adopts it")
            return
        try:
            self._log(n, seen, "cancel the job")
        finally:  # a full disk may be why the watch ended; the job must end all the same
            try:
                if handle := self._find(self.launcher.plan(self.spec, self.folder, n), record):
                    self.launcher.cancel(handle)
            except Unreachable as away:
                request_cancel(self.folder, f"the supervisor: {seen}, while {away}")
                raise
        step = newest_checkpoint(self.folder)
        self._end(n, "cancelled", JobState(Phase.CANCELLED), f"{seen}; cancelled", step)

    def _log(self, attempt: int | None, observed: str, action: str) -> None:
        event = Event(time.time(), attempt, observed, action)
        append_event(self.folder, event)
        self.on_note(str(event))


def supervise(
    launcher: Launcher, folder: JobFolder, spec: JobSpec, config: Any, **options: Any
) -> Outcome:
    """The outcome of a job once it is completed, else JobFailed; options as of Supervisor."""
    outcome = Supervisor(launcher, folder, spec, config, **options).run()
    if outcome.status != "completed":
        raise JobFailed(outcome)
    return outcome
