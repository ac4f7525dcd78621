import pytest

from roma_core.files import digest_of
from roma_core.job import Exit
from roma_pipelines.launching.fake import FakeLauncher, away, completed, ended, running, waiting
from roma_pipelines.launching.job import JobFailed, JobSpec, Phase
from roma_pipelines.launching.launcher import Refused
from roma_pipelines.launching.supervisor import request_cancel, supervise

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
    stopped = [running(9, save=True), ended(Phase.ENDED_BAD, said=Exit(status="continue"))]
    launcher = FakeLauncher(preempted, stopped, [running(12), completed()])

    outcome = supervise(launcher, folder, SPEC, CONFIG, **FAST)

    assert [a.end.how for a in outcome.attempts] == ["continue", "continue", "completed"]
    assert [a.end.checkpoint for a in outcome.attempts] == [5, 9, 9]


def test_a_target_that_is_away_ends_nothing(folder):
    launcher = FakeLauncher([running(), *[away()] * 50, completed()])

    assert supervise(launcher, folder, SPEC, CONFIG, **FAST).status == "completed"


def test_a_world_of_another_size_is_no_success(folder):
    with pytest.raises(JobFailed, match="1 processes made it, expected 256"):
        supervise(FakeLauncher([completed(world_size=1)]), folder, SPEC, CONFIG, **FAST)


def test_memory_is_not_tried_again(folder):
    launcher = FakeLauncher([running(5, save=True), ended(Phase.OUT_OF_MEMORY)])

    with pytest.raises(JobFailed, match="out of memory"):
        supervise(launcher, folder, SPEC, CONFIG, **FAST)

    assert len(launcher.submitted) == 1


def test_it_can_be_refused_and_cancelled(folder):
    with pytest.raises(Refused, match=r"- too large\n- too long"):
        supervise(FakeLauncher(refuses=["too large", "too long"]), folder, SPEC, CONFIG)

    def ask(state):
        request_cancel(folder, "me")

    with pytest.raises(JobFailed, match="asked for by me"):
        supervise(FakeLauncher([running(1)]), folder, SPEC, CONFIG, on_poll=ask, **FAST)
