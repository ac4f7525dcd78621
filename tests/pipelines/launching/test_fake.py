import json
import time

import pytest

from roma_core.files import digest_of
from roma_core.job import Exit
from roma_pipelines.launching import supervisor
from roma_pipelines.launching.jobs import cancel, read_job
from roma_pipelines.launching.launcher import Rejected, Unreachable
from roma_pipelines.launching.outcome import read_events
from roma_pipelines.launching.spec import JobFailed, JobSpec, JobState, Phase
from roma_pipelines.launching.supervisor import request_cancel, supervise
from tests.pipelines.launching.fake import (
    FakeLauncher,
    completed,
    ended,
    running,
    unreachable,
    waiting,
)
from tests.time_limits import within

CONFIG = {"base_lr": 0.001}
FAST = {"poll_every_s": 0.0}
SPEC = JobSpec(
    key="0123456789abcdef0123",
    command=("-m", "x"),
    config_digest=digest_of(CONFIG),
    nodes=64,
    processes_per_node=4,
)


def test_a_job_is_played_to_its_result(folder):
    launcher = FakeLauncher([waiting("Priority"), running(1), completed(metrics={"loss": 0.5})])
    seen = []

    outcome = supervise(launcher, folder, SPEC, CONFIG, on_poll=seen.append, **FAST)

    assert [str(state) for state in seen] == ["waiting (Priority)", "running", "ended ok"]
    assert (outcome.result.world_size, outcome.result.metrics) == (256, {"loss": 0.5})
    assert launcher.submitted == [(str(folder.path), 1)]


def test_every_attempt_has_a_script_of_its_own(folder):
    preempted = [running(5, save=True), ended(Phase.INTERRUPTED, "preempted")]
    stopped = [running(9, save=True), ended(Phase.ENDED_BAD, report=Exit(status="continue"))]
    launcher = FakeLauncher(preempted, stopped, [running(12), completed()])

    outcome = supervise(launcher, folder, SPEC, CONFIG, **FAST)

    assert [a.end.status for a in outcome.attempts] == ["continue", "continue", "completed"]
    assert [a.end.checkpoint for a in outcome.attempts] == [5, 9, 9]


def test_a_target_that_is_away_ends_nothing(folder):
    launcher = FakeLauncher([running(), *[unreachable()] * 50, completed()])

    assert supervise(launcher, folder, SPEC, CONFIG, **FAST).status == "completed"


@pytest.mark.parametrize("request_", ["preflight", "submit"])
def test_waiting_for_a_target_has_a_bound_and_says_what_it_waited_for(
    folder, monkeypatch, request_
):
    launcher, asked = FakeLauncher(), []

    def refuse(*arguments):
        asked.append(arguments)
        raise Unreachable("sbatch: no partition is available")

    monkeypatch.setattr(launcher, request_, refuse)
    with pytest.raises(Unreachable, match=r"gave up after 0\.0 h of waiting: sbatch: no partition"):
        supervise(launcher, folder, SPEC, CONFIG, patience_s=0.05, **FAST)
    assert len(asked) > 1

    monkeypatch.undo()  # it is available: the next one goes on
    assert supervise(launcher, folder, SPEC, CONFIG, **FAST).status == "completed"
    assert len(launcher.submitted) == 1


def test_a_world_of_another_size_is_no_success(folder):
    with pytest.raises(JobFailed, match="1 processes made it, expected 256"):
        supervise(FakeLauncher([completed(world_size=1)]), folder, SPEC, CONFIG, **FAST)


def test_memory_is_not_tried_again(folder):
    launcher = FakeLauncher([running(5, save=True), ended(Phase.OUT_OF_MEMORY)])

    with pytest.raises(JobFailed, match="out of memory"):
        supervise(launcher, folder, SPEC, CONFIG, **FAST)

    assert len(launcher.submitted) == 1


def test_it_can_be_refused_and_cancelled(folder):
    with pytest.raises(Rejected, match=r"- too large\n- too long"):
        supervise(FakeLauncher(rejects=["too large", "too long"]), folder, SPEC, CONFIG)

    def ask(state):
        request_cancel(folder, "me")

    with pytest.raises(JobFailed, match="cancelled by me"):
        supervise(FakeLauncher([running(1)]), folder, SPEC, CONFIG, on_poll=ask, **FAST)


def test_an_end_asked_for_between_attempts_stops_the_next_one(folder):
    launcher = FakeLauncher([running(5, save=True), ended(Phase.INTERRUPTED, "preempted")])

    def on_note(note):
        if note.endswith(": continue"):
            request_cancel(folder, "me")

    with pytest.raises(JobFailed, match="cancelled by me before it was submitted") as caught:
        supervise(launcher, folder, SPEC, CONFIG, on_note=on_note, **FAST)

    outcome = caught.value.outcome
    assert outcome.status == "cancelled"
    assert [record.end.status for record in outcome.attempts] == ["continue", "cancelled"]
    assert len(launcher.submitted) == 1
    assert not folder.cancel.exists()


def test_an_unfinished_job_without_a_supervisor_is_cancelled_too(folder):
    class Gone(BaseException):
        pass

    def on_note(note):
        if note.endswith(": continue"):
            raise Gone

    launcher = FakeLauncher([running(5, save=True), ended(Phase.INTERRUPTED, "preempted")])
    with pytest.raises(Gone):
        supervise(launcher, folder, SPEC, CONFIG, on_note=on_note, **FAST)
    document = json.loads(folder.lease.read_text())
    folder.lease.write_text(json.dumps(document | {"start": "another process"}))
    job = read_job(folder.path)
    assert (job.status, job.is_unfinished) == ("continue", True)

    assert cancel(job, "me", lambda record: launcher) == "cancelled"
    assert len(launcher.submitted) == 1
    assert cancel(read_job(folder.path), "me", lambda record: launcher) == "cancelled"
    assert not folder.cancel.exists()


def test_the_lease_holds_the_state(folder):
    seen = []

    def on_poll(state):
        seen.append(json.loads(folder.lease.read_text())["state"])

    launcher = FakeLauncher([waiting("Priority"), running(1), completed()])
    supervise(launcher, folder, SPEC, CONFIG, on_poll=on_poll, **FAST)

    assert seen == ["waiting (Priority)", "running", "ended ok"]


class Away(FakeLauncher):
    """A target that stopped to answer."""

    def find(self, plan):
        raise Unreachable("the controller is away")

    cancel = find


def test_cancelling_is_bounded_while_the_target_is_away_and_done_once_it_is_back(folder):
    class Gone(BaseException):
        pass

    def die(state):
        raise Gone

    launcher = FakeLauncher([running(5, save=True), running(6)])
    with pytest.raises(Gone):
        supervise(launcher, folder, SPEC, CONFIG, on_poll=die, **FAST)
    document = json.loads(folder.lease.read_text())
    folder.lease.write_text(json.dumps(document | {"start": "another process"}))
    jobs = [read_job(folder.path)] * 2
    began = time.monotonic()

    for job in jobs:
        with pytest.raises(Unreachable, match="the controller is away"):
            cancel(job, "me", lambda record: Away(), wait_s=0.2)
        assert not read_job(folder.path).supervised  # this process lives on, and holds no lease

    assert time.monotonic() - began < within(20)
    assert cancel(jobs[0], "me", lambda record: launcher) == "cancelled"
    assert read_job(folder.path).records[-1].end.reason.startswith("cancelled by me")


class Full(FakeLauncher):
    """A target with a limit of submitted jobs, reached for a while."""

    refused = 0

    def submit(self, plan, environment):
        self.refused += 1
        if self.refused < 500:
            raise Unreachable("QOSMaxSubmitJobPerUserLimit")
        return super().submit(plan, environment)


def test_a_submit_limit_may_last_and_its_reason_is_shown(folder):
    launcher, seen = Full([running(1), completed()]), []

    outcome = supervise(launcher, folder, SPEC, CONFIG, on_poll=seen.append, **FAST)

    assert (outcome.status, len(outcome.attempts), len(launcher.submitted)) == ("completed", 1, 1)
    assert "QOSMaxSubmitJobPerUserLimit" in seen[0].reason
    assert len(read_events(folder)) < 10


def test_a_supervisor_that_was_asked_and_does_not_end_is_reported_in_time(folder):
    def ask(state):
        with pytest.raises(RuntimeError, match=r"not ended 0\.1 s after its supervisor was asked"):
            cancel(read_job(folder.path), "me", lambda record: launcher, wait_s=0.1)

    launcher = FakeLauncher([running(1)])
    with pytest.raises(JobFailed, match="cancelled by me"):
        supervise(launcher, folder, SPEC, CONFIG, on_poll=ask, **FAST)


@pytest.mark.parametrize("stuck", [False, True])
def test_a_lease_is_renewed_during_a_call_that_blocks_but_not_by_a_stuck_one(
    folder, monkeypatch, stuck
):
    """As another computer sees it, which knows nothing of the process."""
    monkeypatch.setattr(supervisor, "LEASE_EXPIRES_S", within(0.5))
    monkeypatch.setattr(supervisor, "_RENEW_EVERY_S", within(0.05))
    if stuck:
        monkeypatch.setattr(supervisor, "_STUCK_AFTER_S", within(0.2))
    held = []

    def is_held():
        return supervisor.is_held(json.loads(folder.lease.read_text()) | {"host": "elsewhere"})

    def block(folder_, attempt, spec):
        held.append(is_held())
        time.sleep(within(1.5))
        held.append(is_held())
        return JobState(Phase.RUNNING)

    supervise(FakeLauncher([block, completed()]), folder, SPEC, CONFIG, **FAST)

    assert held == [True, not stuck]


def test_a_lease_that_another_supervisor_took_is_left_to_it(folder):
    folder.path.mkdir(parents=True)
    first = supervisor.Lease(folder, {"dagster_run_id": "first"})
    second = supervisor.Lease(folder, {"dagster_run_id": "second"})
    first.__enter__()
    second.__enter__()

    first.advance("running")
    first.__exit__(RuntimeError)

    lease = json.loads(folder.lease.read_text())
    assert lease["dagster_run_id"] == "second"
    assert supervisor.is_held(lease)
    assert not supervisor.is_held(lease | {"beat": time.time() - 3600})  # alive, but stuck
    second.__exit__(RuntimeError)
    assert not supervisor.is_held(json.loads(folder.lease.read_text()))


def test_a_hung_attempt_whose_supervisor_dies_while_it_ends_it_was_not_cancelled(
    folder, monkeypatch
):
    class Gone(BaseException):
        pass

    def die(handle):
        FakeLauncher.cancel(launcher, handle)
        monkeypatch.undo()
        raise Gone

    launcher = FakeLauncher([running(5, save=True), *[running()] * 99], [completed()])
    monkeypatch.setattr(launcher, "cancel", die)
    options = {"heartbeat_timeout_s": 0.01, "poll_every_s": 0.02}
    with pytest.raises(Gone):
        supervise(launcher, folder, SPEC, CONFIG, **options)

    outcome = supervise(launcher, folder, SPEC, CONFIG, **options)

    assert [record.end.status for record in outcome.attempts] == ["continue", "completed"]
    assert outcome.attempts[0].end.reason.startswith("no heartbeat for 0.01 s")
