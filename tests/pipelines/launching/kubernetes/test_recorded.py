"""Every recorded scenario, played by the API server, ends in the right outcome for the right reason.

The job itself does nothing here; where a recording ends well, its result is put there for it.
"""

import threading
import time

import pytest

from roma_core.files import digest_of
from roma_core.job import Exit, Result
from roma_pipelines.launching.spec import JobFailed, JobSpec
from roma_pipelines.launching.supervisor import supervise
from tests.pipelines.launching.conftest import KEY

CONFIG = {"base_lr": 0.001}
FAST = {"poll_every_s": 0.01}


def spec_of(scenario):
    """A job of as many pods as the recorded one."""
    nodes = {"ok": 2, "fail": 2, "retry": 2, "gpu": 3}.get(scenario, 1)
    return JobSpec(key=KEY, command=("x.py",), config_digest=digest_of(CONFIG), nodes=nodes)


@pytest.fixture
def impatient(launcher):
    launcher.profile = launcher.profile.model_copy(update={"start_timeout_s": 1.0})
    return launcher


def test_ok(launcher, replay, folder):
    replay("ok")

    def finish(state):
        if not folder.result.exists():
            folder.write_result(Result(job_key=KEY, attempt=1, world_size=2, wall_s=1.0))

    outcome = supervise(launcher, folder, spec_of("ok"), CONFIG, on_poll=finish, **FAST)

    assert outcome.status == "completed"
    assert outcome.attempts[0].end.nodes == "n1, n2"


def test_ok_without_a_result_is_no_success(launcher, replay, folder):
    replay("ok")

    with pytest.raises(JobFailed, match="ended ok, no exit"):
        supervise(launcher, folder, spec_of("ok"), CONFIG, **FAST)


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("fail", ["exit code 3", "on n1"]),
        ("retry", ["exit code 3"]),
        ("oom", ["out of memory: ask for more memory_gb", "OOMKilled"]),
        ("badcmd", ["StartError", "executable file not found"]),
    ],
)
def test_failures(launcher, replay, folder, scenario, words):
    replay(scenario)

    with pytest.raises(JobFailed) as caught:
        supervise(launcher, folder, spec_of(scenario), CONFIG, **FAST)

    assert caught.value.outcome.status == "failed"
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("img", ["did not start within 1 s", "ErrImagePull"]),
        ("gpu", ["did not start within 1 s", "Insufficient nvidia.com/gpu", "2 of 3 pods hold"]),
        ("nosa", ["did not start within 1 s", 'serviceaccount "nope" not found']),
    ],
)
def test_what_would_wait_for_ever(impatient, api, replay, folder, scenario, words):
    """Kubernetes never fails these; the launcher removes the Job and reports what it waited for."""
    playing = replay(scenario)
    reasons = []

    def end_pods(*_):  # the recording has no deletion
        for pod in api.store.all("pods", "roma"):
            api.store.remove("pods", "roma", pod["metadata"]["name"])

    api.on_deleted = end_pods
    # the watch goes on until the recording is over, then for the timeout
    with pytest.raises(JobFailed) as caught:
        supervise(
            impatient,
            folder,
            spec_of(scenario),
            CONFIG,
            on_poll=lambda state: (reasons.append(str(state)), playing.over.wait(5)),
            **FAST,
        )

    assert caught.value.outcome.status == "failed"
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert api.store.all("jobs", "roma") == []


def test_a_deadline_continues_the_job(launcher, replay, folder):
    """Its first attempt saves and runs out of time; a second one is made (and is out of memory)."""
    replay("dl", "oom")

    def play(state):
        if len(folder.attempt_numbers()) == 1 and not folder.checkpoints.exists():
            (folder.checkpoints / "step-000007").mkdir(parents=True)
            folder.attempt(1).path.mkdir(parents=True, exist_ok=True)
            folder.attempt(1).write_exit(Exit(status="continue", reason="stop file"))

    with pytest.raises(JobFailed) as caught:
        supervise(launcher, folder, spec_of("dl"), CONFIG, on_poll=play, **FAST)

    first, second = caught.value.outcome.attempts
    assert (first.end.status, second.end.status) == ("continue", "failed")
    assert "DeadlineExceeded" in first.end.reason


@pytest.mark.parametrize("trouble", ["cut", "compact", "away"])
def test_trouble_with_the_watch_loses_nothing(launcher, api, replay, folder, trouble):
    """Streams that are cut, a resourceVersion that is too old, a server that is away."""
    playing = replay("fail")

    def make_trouble():
        while not playing.over.is_set():
            time.sleep(0.1)
            if trouble == "compact":
                api.store.compact()
            if trouble == "away":
                api.away = not api.away
            api.cut_streams()
        api.away = False

    helper = threading.Thread(target=make_trouble)
    helper.start()
    with pytest.raises(JobFailed, match="exit code 3"):
        supervise(launcher, folder, spec_of("fail"), CONFIG, **FAST)
    helper.join()
