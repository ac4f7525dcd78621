"""The interruption table on a real SLURM: what ends a job, and what becomes of it."""

import json
import subprocess
import sys
import threading
import time

import pytest

from roma_pipelines.launching.jobs import cancel, read_job
from roma_pipelines.launching.launcher import Unreachable
from roma_pipelines.launching.spec import JobFailed, JobHandle, Phase
from roma_pipelines.launching.supervisor import FAULT_POINTS, Supervisor, request_cancel, supervise
from tests.time_limits import within

CONFIG = {"base_lr": 0.001}
FAST = {"poll_every_s": 0.1}
TWICE = "save(n)\nif n < 2: beat(n); wait_for('never', 100)\nsucceed()"


class Killed(BaseException):
    """Stands for the end of the supervisor's process at some line."""


def records(folder):
    return [json.loads(folder.attempt_record(n).read_text()) for n in folder.attempt_numbers()]


def job_of(folder, n=1):
    return records(folder)[n - 1]["external"]["job_id"]


# -- something outside ends the job --------------------------------------------------------------


def test_scancel_by_another_user_ends_it(slurm, cluster, folder, make_spec, once, starts):
    cancel = once(lambda: cluster.run("scancel", job_of(folder)))

    with pytest.raises(JobFailed, match="SLURM says CANCELLED") as caught:
        supervise(slurm, folder, make_spec(TWICE), CONFIG, on_poll=cancel, **FAST)

    assert caught.value.outcome.status == "cancelled"
    assert starts() == [1]


def test_scancel_in_the_queue_ends_it(slurm, cluster, folder, make_spec):
    cluster.run("sbatch", "--exclusive", "-N2", "--wrap=sleep 100", "-o", "/dev/null")

    def cancel(state):
        if state.phase is Phase.WAITING:
            cluster.run("scancel", job_of(folder))

    with pytest.raises(JobFailed, match="SLURM says CANCELLED"):
        supervise(slurm, folder, make_spec(), CONFIG, on_poll=cancel, **FAST)


def test_a_preempted_job_continues(slurm, cluster, profile, folder, make_spec, once, starts):
    slurm.profile = profile.model_copy(update={"partition": "low"})
    more_important = ("-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap=sleep 1")
    preempt = once(lambda: cluster.run("sbatch", *more_important))

    outcome = supervise(slurm, folder, make_spec(TWICE), CONFIG, on_poll=preempt, **FAST)

    assert (outcome.status, starts()) == ("completed", [1, 2])
    assert "SLURM says PREEMPTED" in outcome.attempts[0].end.reason


def test_a_job_whose_node_fails_continues(slurm, cluster, folder, make_spec, once, starts):
    def fail():
        node = cluster.run("squeue", "-h", "-o", "%N").strip()
        cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    outcome = supervise(slurm, folder, make_spec(TWICE), CONFIG, on_poll=once(fail), **FAST)

    assert (outcome.status, starts()) == ("completed", [1, 2])
    assert "SLURM says NODE_FAIL" in outcome.attempts[0].end.reason


@pytest.mark.chaos
def test_a_node_that_is_lost_mid_step_is_found_out(slurm, cluster, folder, make_spec, once, starts):
    """Its slurmd is frozen, as by a cut cable; slurmctld notices after SlurmdTimeout."""
    body = (
        "rank = int(os.environ['RANK'])\nsave(10 * n + rank)\nif n < 2: time.sleep(100)\n"
        "if rank == 0: succeed(world_size=2)"
    )
    spec = make_spec(body, runner="torchrun", nodes=2)

    def lose():
        cluster.tell("freeze", "n2")
        threading.Timer(40, cluster.tell, ("thaw", "n2")).start()

    outcome = supervise(slurm, folder, spec, CONFIG, on_poll=once(lose), **FAST)

    assert outcome.status == "completed"
    assert "NODE_FAIL" in outcome.attempts[0].end.reason


RANKS = """
import os, time
import torch
import torch.distributed as dist
from roma_core.job import JobFolder
from roma_core.run_job import Work, run_in_folder

def work(folder, attempt):
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        (folder.checkpoints / f"step-{attempt.n}").mkdir(parents=True, exist_ok=True)
    while attempt.n == 1:  # until the other node is lost
        try:
            dist.all_reduce(torch.ones(10))
        except RuntimeError as error:
            raise ValueError("words that name no connection") from error
        time.sleep(0.05)
    return Work("completed", dist.get_world_size())

raise SystemExit(run_in_folder(JobFolder(os.environ["ROMA_JOB_FOLDER"]), work))
"""


@pytest.mark.chaos
def test_a_node_is_lost_and_a_survivor_reports_a_failure_before_slurm_does(
    slurm, cluster, folder, make_spec, once, tmp_path
):
    """slurmctld notices after SlurmdTimeout; rank 0 has written "failed" by then."""
    spec = make_spec(runner="torchrun", nodes=2)
    (tmp_path / "job.py").write_text(RANKS)
    lose = once(lambda: cluster.tell("lose", "n2"))
    survivor = []

    def on_poll(state):
        lose(state)
        if not survivor and folder.attempt(1).exit.exists():
            survivor.append((folder.attempt(1).read_exit().status, state.phase))
        if len(folder.attempt_numbers()) == 2 and len(survivor) == 1:
            survivor.append("replaced")
            cluster.tell("start", "n2")

    outcome = supervise(slurm, folder, spec, CONFIG, on_poll=on_poll, **FAST)

    assert survivor == [("failed", Phase.RUNNING), "replaced"]
    assert [record.end.status for record in outcome.attempts] == ["continue", "completed"]
    assert "NODE_FAIL" in outcome.attempts[0].end.reason


@pytest.mark.chaos
def test_the_time_limit_continues_the_job(slurm, profile, folder, make_spec, starts):
    slurm.profile = profile.model_copy(update={"time_limit_min": 1})

    outcome = supervise(slurm, folder, make_spec(TWICE), CONFIG, **FAST)

    assert (outcome.status, starts()) == ("completed", [1, 2])
    assert "SLURM says TIMEOUT" in outcome.attempts[0].end.reason


def test_the_signal_before_the_limit_lets_the_job_save(slurm, cluster, folder, make_spec, starts):
    """USR1 to the batch shell, as ``--signal=B:USR1@S`` sends it, becomes the stop file."""
    body = (
        "if n < 2:\n    beat(1); wait_for('attempts/1/stop', 60)\n"
        "    save(7); leave('continue', 'stop file'); sys.exit(75)\nsucceed()"
    )
    sent = []

    def send(state):
        if folder.attempt(1).heartbeat.exists() and not sent:
            sent.append(cluster.run("scancel", "--batch", "--signal=USR1", job_of(folder)))

    outcome = supervise(slurm, folder, make_spec(body), CONFIG, on_poll=send, **FAST)

    assert starts() == [1, 2]
    assert outcome.attempts[0].end.status == "continue"
    assert "exit code 75" in outcome.attempts[0].end.reason


def test_out_of_memory_fails_and_says_so(slurm, folder, make_spec, starts):
    body = "save(n)\nhoard = bytearray(900_000_000)\nhoard[::4096] = b'x' * len(hoard[::4096])\n"
    spec = make_spec(body + "time.sleep(60)", memory_gb=0.4)

    with pytest.raises(JobFailed, match="out of memory; ask for more memory_gb"):
        supervise(slurm, folder, spec, CONFIG, **FAST)

    assert starts() == [1]


def test_a_hung_rank_is_found_by_its_heartbeat(slurm, folder, make_spec, starts, processes):
    options = {"heartbeat_timeout_s": 1.5, **FAST}

    outcome = supervise(slurm, folder, make_spec(TWICE), CONFIG, **options)

    assert (outcome.status, starts()) == ("completed", [1, 2])
    assert "no heartbeat for 1.5 s" in outcome.attempts[0].end.reason
    assert processes() == []


def test_anyone_may_ask_for_the_end(slurm, cluster, folder, make_spec, once, processes):
    ask = once(lambda: request_cancel(folder, "the sensor"))

    with pytest.raises(JobFailed, match="cancelled by the sensor"):
        supervise(slurm, folder, make_spec(TWICE), CONFIG, on_poll=ask, **FAST)

    assert processes() == []
    states = {job: state for job, _, state in cluster.jobs()}
    assert states[job_of(folder)] == "CANCELLED"


# -- SLURM itself is not what it should be -------------------------------------------------------


@pytest.fixture
def controller_goes_away(slurm, cluster, folder, make_spec, once):
    """Runs a job during which slurmctld is away; the outcome, and all states that were seen."""

    def run(away_s, ends_while_away):
        seen = []

        def come_back():
            cluster.tell("start", "slurmctld")
            (folder.path / "go").touch()

        def go_away():
            time.sleep(2)  # it writes its state down within seconds
            cluster.tell("end", "slurmctld")
            if ends_while_away:
                (folder.path / "go").touch()
            threading.Timer(away_s, come_back).start()

        act = once(go_away)

        def on_poll(state):
            seen.append(state)
            act(state)

        spec = make_spec("save(n); beat(1)\nwait_for('go', 100)\nsucceed()")
        return supervise(slurm, folder, spec, CONFIG, on_poll=on_poll, **FAST), seen

    return run


def test_slurmctld_may_be_away(controller_goes_away, starts):
    outcome, seen = controller_goes_away(9, ends_while_away=False)

    assert (outcome.status, starts()) == ("completed", [1])
    assert any(state.phase is Phase.UNKNOWN and "contact" in state.reason for state in seen)


@pytest.mark.chaos
def test_slurmctld_may_be_away_for_a_minute_while_the_job_ends(controller_goes_away, starts):
    """The nodes tell it of the end only a minute after that, so this takes two."""
    outcome, _ = controller_goes_away(60, ends_while_away=True)

    assert (outcome.status, starts()) == ("completed", [1])


def test_cancelling_while_slurmctld_is_away_is_bounded_and_kept_for_later(
    slurm, cluster, folder, make_spec, once, processes
):
    def die():
        raise Killed

    with pytest.raises(Killed):
        supervise(slurm, folder, make_spec(TWICE), CONFIG, on_poll=once(die), **FAST)
    lease = json.loads(folder.lease.read_text())
    folder.lease.write_text(json.dumps(lease | {"start": "another process"}))
    time.sleep(2)  # slurmctld writes its state down within seconds
    cluster.tell("end", "slurmctld")
    began = time.monotonic()
    try:
        with pytest.raises(Unreachable):
            cancel(read_job(folder.path), "me", lambda record: slurm, wait_s=1)
        assert time.monotonic() - began < within(30)
    finally:
        cluster.tell("start", "slurmctld")

    assert cancel(read_job(folder.path), "me", lambda record: slurm) == "cancelled"
    assert processes() == []


TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


def test_sbatch_that_times_out_after_accepting_is_not_repeated(
    slurm, cluster, folder, make_spec, stand_in, starts
):
    before = len(cluster.jobs())
    stand_in("sbatch", (
        f'for a in "$@"; do [ "$a" = --test-only ] && exec $REAL "$@"; done\n'
        f'$REAL "$@" >/dev/null; echo "{TIMED_OUT}" >&2; exit 1'
    ))  # fmt: skip

    outcome = supervise(slurm, folder, make_spec("succeed()"), CONFIG, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])
    assert len(cluster.jobs()) == before + 1


def test_sbatch_that_times_out_without_accepting_is_repeated(
    slurm, cluster, folder, make_spec, stand_in, starts, tmp_path
):
    before = len(cluster.jobs())
    stand_in("sbatch", (
        f'for a in "$@"; do [ "$a" = --test-only ] && exec $REAL "$@"; done\n'
        f'mkdir {tmp_path}/refused 2>/dev/null && {{ echo "{TIMED_OUT}" >&2; exit 1; }}\n'
        'exec $REAL "$@"'
    ))  # fmt: skip

    outcome = supervise(slurm, folder, make_spec("succeed()"), CONFIG, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])
    assert len(cluster.jobs()) == before + 1


def test_a_job_accepted_twice_runs_once(slurm, cluster, folder, make_spec, stand_in, starts):
    """The first request arrives after everybody believed it lost, and was made again."""
    stand_in("sbatch", (
        f'for a in "$@"; do [ "$a" = --test-only ] && exec $REAL "$@"; done\n'
        f'mkdir {folder.path}/late 2>/dev/null || exec $REAL "$@"\n'
        f'(sleep 3; exec $REAL "$@") >/dev/null 2>&1 &\necho "{TIMED_OUT}" >&2; exit 1'
    ))  # fmt: skip
    body = "save(n)\nwait_for('go', 60)\nsucceed()"

    def go_on(state):
        jobs = [job for job in cluster.jobs() if job[1] == "roma-0123456789ab-1"]
        if len(jobs) == before + 2 and "is taken by" in folder.attempt(1).log.read_text():
            (folder.path / "go").touch()

    before = len([job for job in cluster.jobs() if job[1] == "roma-0123456789ab-1"])
    outcome = supervise(slurm, folder, make_spec(body), CONFIG, on_poll=go_on, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])


def test_the_job_on_record_may_be_the_one_that_left(
    slurm, cluster, folder, make_spec, stand_in, starts
):
    """Two were accepted, and the id that came back is the second one's: the first claimed."""
    stand_in("sbatch", (
        'for a in "$@"; do [ "$a" = --test-only ] && exec $REAL "$@"; done\n'
        '$REAL "$@" >/dev/null\nsleep 1.5\nexec $REAL "$@"'
    ))  # fmt: skip

    outcome = supervise(slurm, folder, make_spec("time.sleep(4)\nsucceed()"), CONFIG, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])
    assert "watch that one" in folder.events.read_text()


def test_the_end_is_the_end_of_both(slurm, cluster, folder, make_spec, stand_in, once, processes):
    stand_in("sbatch", (
        'for a in "$@"; do [ "$a" = --test-only ] && exec $REAL "$@"; done\n'
        '$REAL "$@" >/dev/null\nexec $REAL --begin=now+1hour "$@"'
    ))  # fmt: skip

    def ask(state):
        if (folder.path / "starts").exists():
            request_cancel(folder, "me")

    with pytest.raises(JobFailed, match="cancelled by me"):
        supervise(slurm, folder, make_spec(TWICE), CONFIG, on_poll=ask, **FAST)

    assert processes() == []
    assert cluster.run("squeue", "-h", "-o", "%i %T") == ""


NO_HARD_LINKS = """
import errno, os
def link(*arguments, **options):
    raise OSError(errno.EPERM, "Operation not permitted")
os.link = link
"""


@pytest.mark.parametrize("links", [True, False])  # hard links, which some file systems lack
def test_a_script_submitted_by_hand_does_no_harm(
    slurm, cluster, folder, make_spec, once, starts, tmp_path, monkeypatch, links
):
    def submit_again():
        script = str(folder.attempt(1).script)
        cluster.run("sbatch", "--wait", script)
        (folder.path / "go").touch()

    if not links:
        (tmp_path / "python").mkdir()
        (tmp_path / "python" / "sitecustomize.py").write_text(NO_HARD_LINKS)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "python"))
    body = "save(n)\nwait_for('go', 60)\nsucceed()"
    again = once(submit_again)

    outcome = supervise(slurm, folder, make_spec(body), CONFIG, on_poll=again, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])
    assert "is taken by" in folder.attempt(1).log.read_text()


FORGETFUL = {
    "squeue": "exit 0",
    "scontrol": '[ "$3" = job ] || exec $REAL "$@"\n'
    "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
}
"""What a controller says of a job that ended long ago, or that it lost."""


@pytest.mark.parametrize(
    ("sacct", "status"),
    [
        ("echo 'Slurm accounting storage is disabled' >&2; exit 1", "completed"),  # none there
        ("echo 'Unable to connect to database' >&2; exit 1", "completed"),
        ("exit 0", "completed"),  # it has no row yet
        ("echo RUNNING", "completed"),  # it lags
        ("echo COMPLETED", "completed"),
        ("echo 'CANCELLED by 0'", "cancelled"),
        ("echo GARBAGE", "completed"),
    ],
)
def test_a_job_that_slurm_forgot_ends_as_its_files_report(
    slurm, folder, make_spec, stand_in, once, sacct, status
):
    stand_in("sacct", sacct)

    def forget():
        for name, body in FORGETFUL.items():
            stand_in(name, body)
        (folder.path / "go").touch()

    body = "save(n)\nwait_for('go', 60)\nsucceed()"
    run = Supervisor(slurm, folder, make_spec(body), CONFIG, on_poll=once(forget), **FAST).run

    assert run().status == status


def test_accounting_that_is_away_is_not_an_answer(slurm, folder, make_spec, stand_in):
    """Neither that the job never was, nor that it is gone."""
    for name, body in {**FORGETFUL, "sacct": "echo 'sacct: error: refused' >&2; exit 1"}.items():
        stand_in(name, body)
    slurm.gone_after_s = 0.0
    plan = slurm.plan(make_spec(), folder)

    with pytest.raises(Unreachable, match=r"sacct: .*refused"):
        slurm.find(plan)
    handle = JobHandle(plan, {"job_id": "101", "profile": "mini"})
    reasons = []
    while len(reasons) < 50 and not any("refused" in reason for reason in reasons):
        state = slurm.watch(handle)
        assert state.phase is Phase.UNKNOWN
        reasons.append(state.reason)
        time.sleep(0.1)
    assert "refused" in reasons[-1]


def test_a_running_job_that_slurmctld_lost_is_not_doubled(
    slurm, cluster, folder, make_spec, stand_in, once, starts
):
    """As long as something of it moves, it is not gone, whatever SLURM says."""
    body = "save(n)\nfor i in range(30): beat(i); time.sleep(0.15)\nsucceed()"

    def forget():
        for name, text in FORGETFUL.items():
            stand_in(name, text)

    outcome = supervise(slurm, folder, make_spec(body), CONFIG, on_poll=once(forget), **FAST)

    assert (outcome.status, starts()) == ("completed", [1])


def test_an_unknown_state_is_no_end(slurm, folder, make_spec, stand_in, once, starts):
    stand_in("squeue", '$REAL "$@" | sed s/COMPLETED/DREAMING/')
    seen = []

    def wake_up(state):
        seen.append(state)
        if "DREAMING" in state.reason:
            stand_in("squeue", 'exec $REAL "$@"')

    outcome = supervise(slurm, folder, make_spec(), CONFIG, on_poll=wake_up, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])
    assert any(state.phase is Phase.UNKNOWN and "DREAMING" in state.reason for state in seen)


def test_files_may_be_seen_late(slurm, folder, make_spec):
    """As on a network file system: the result appears here a second after the job has ended."""
    slurm.fs_lag_s = 20.0
    body = "write(folder / '.result', job_key=key, attempt=n, world_size=1, wall_s=1.0)"
    seen = []

    def deliver(state):
        if state.ended and not seen:
            seen.append(state)
            threading.Timer(1.0, (folder.path / ".result").replace, (folder.result,)).start()

    outcome = supervise(slurm, folder, make_spec(body), CONFIG, on_poll=deliver, **FAST)

    assert outcome.status == "completed"


# -- the orchestrator ends -----------------------------------------------------------------------


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_supervisor_may_die_at_any_point(slurm, cluster, folder, make_spec, starts, point):
    name = "roma-0123456789ab-1"
    before = len([job for job in cluster.jobs() if job[1] == name])
    left = [point]

    def fault_point(here):
        if here in left:
            left.remove(here)
            raise Killed

    with pytest.raises(Killed):
        supervise(slurm, folder, make_spec(), CONFIG, fault_point=fault_point, **FAST)
    outcome = supervise(slurm, folder, make_spec(), CONFIG, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])
    assert len([job for job in cluster.jobs() if job[1] == name]) == before + 1


SUPERVISE = """
import sys
from pathlib import Path
from roma_core.job import JobFolder
from roma_pipelines.launching.slurm.launcher import SlurmLauncher
from roma_pipelines.launching.slurm.profile import SlurmProfile
from roma_pipelines.launching.spec import JobSpec
from roma_pipelines.launching.supervisor import supervise
spec, profile, folder, clusters = sys.argv[1:]
profile = SlurmProfile.model_validate_json(profile)
launcher = SlurmLauncher(profile, Path(clusters), fs_lag_s=0)
supervise(launcher, JobFolder(folder), JobSpec.model_validate_json(spec), {"base_lr": 0.001},
    poll_every_s=0.1)
"""


def test_a_worker_killed_with_9_is_followed_by_one_that_adopts(
    slurm, profile, folder, make_spec, starts, eventually, tmp_path
):
    spec = make_spec("save(n)\nwait_for('go', 60)\nsucceed()")
    documents = (
        spec.model_dump_json(),
        profile.model_dump_json(),
        folder.path,
        tmp_path / "clusters",
    )
    worker = subprocess.Popen([sys.executable, "-c", SUPERVISE, *map(str, documents)])
    eventually(lambda: folder.checkpoints.exists(), 30)
    worker.kill()
    worker.wait()
    (folder.path / "go").touch()

    outcome = supervise(slurm, folder, spec, CONFIG, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])
    assert "adopted it" in folder.events.read_text()


def test_two_supervisors_at_once_make_one_job(
    slurm, profile, cluster, folder, make_spec, starts, tmp_path
):
    spec = make_spec("time.sleep(1)\nsucceed()")
    name = "roma-0123456789ab-1"
    before = len([job for job in cluster.jobs() if job[1] == name])
    documents = (
        spec.model_dump_json(),
        profile.model_dump_json(),
        folder.path,
        tmp_path / "clusters",
    )
    argv = [sys.executable, "-c", SUPERVISE, *map(str, documents)]

    workers = [subprocess.Popen(argv) for _ in range(2)]

    assert [worker.wait() for worker in workers] == [0, 0]
    assert starts() == [1]
    assert len([job for job in cluster.jobs() if job[1] == name]) - before in (1, 2)
