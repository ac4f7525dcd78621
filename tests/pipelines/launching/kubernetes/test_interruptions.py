"""The interruption table on Kubernetes: what ends a job, and what becomes of it."""

import os
import subprocess
import sys
import threading
import time

import pytest

from roma_pipelines.launching.spec import JobFailed, Phase
from roma_pipelines.launching.supervisor import FAULT_POINTS, Supervisor, request_cancel, supervise
from tests.pipelines.launching.kubernetes.fake_cluster import Node
from tests.time_limits import wait_until

CONFIG = {"base_lr": 0.001}
FAST = {"poll_every_s": 0.05}
TWICE = "save(n)\nif n < 2: beat(n); wait_for('never', 100)\nsucceed()"
JOB = "roma-0123456789ab-1"


def jobs(api):
    return [job["metadata"]["name"] for job in api.store.all("jobs", "roma")]


# -- the job is ended from outside ---------------------------------------------------------------


def test_cancelling_deletes_the_job_and_its_pods(
    launcher, cluster, api, folder, make_spec, once, processes
):
    ask = once(lambda: request_cancel(folder, "the sensor"))

    with pytest.raises(JobFailed, match="cancelled by the sensor"):
        supervise(launcher, folder, make_spec(TWICE), CONFIG, on_poll=ask, **FAST)

    assert (jobs(api), cluster.pods(), processes()) == ([], [], [])
    assert api.store.all("services", "roma") == []


def test_deletion_of_the_job_ends_it(launcher, cluster, api, folder, make_spec, once, starts):
    delete = once(lambda: api.delete("jobs", "roma", JOB, {"propagationPolicy": "Background"}, {}))

    with pytest.raises(JobFailed, match="was deleted in the cluster") as caught:
        supervise(launcher, folder, make_spec(TWICE), CONFIG, on_poll=delete, **FAST)

    assert (caught.value.outcome.status, starts()) == ("cancelled", [1])


def test_pods_that_a_plain_deletion_left_behind_are_still_watched_and_ended(
    launcher, cluster, api, folder, make_spec, once, processes
):
    """The API's default orphans them; they would keep holding their GPUs."""
    seen = []

    def on_poll(state):
        seen.append(state)
        delete(state)
        if "pods are left" in state.reason:
            request_cancel(folder, "me")

    delete = once(lambda: api.delete("jobs", "roma", JOB, {}, {}))
    with pytest.raises(JobFailed, match="cancelled by me"):
        supervise(launcher, folder, make_spec(TWICE), CONFIG, on_poll=on_poll, **FAST)

    assert (cluster.pods(), processes()) == ([], [])


def test_a_preempted_job_continues(launcher, cluster, folder, make_spec, once, starts):
    preempt = once(lambda: cluster.preempt(cluster.pod()))

    outcome = supervise(launcher, folder, make_spec(TWICE), CONFIG, on_poll=preempt, **FAST)

    assert (outcome.status, starts()) == ("completed", [1, 2])
    assert "condition DisruptionTarget" in outcome.attempts[0].end.reason


def test_term_lets_the_job_save(launcher, cluster, folder, make_spec, once, starts):
    """What precedes every end of a pod becomes the stop file; the pod exits with 75."""
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "if n < 2:\n    save(3); wait_for('attempts/1/stop', 60)\n"
        "    save(7); leave('continue', 'stop file'); sys.exit(1)\nsucceed()"
    )
    preempt = once(lambda: cluster.preempt(cluster.pod()))

    outcome = supervise(launcher, folder, make_spec(body), CONFIG, on_poll=preempt, **FAST)

    assert (outcome.status, starts()) == ("completed", [1, 2])
    assert outcome.attempts[0].end.checkpoint == 7


def test_a_job_whose_node_is_lost_mid_step_continues(
    launcher, cluster, folder, make_spec, once, starts, monkeypatch
):
    """The pod never ends; it counts as lost once its grace period is long over."""
    monkeypatch.setattr("roma_pipelines.launching.kubernetes.states._LOST_AFTER_S", 0.5)
    lose = once(lambda: cluster.lose("n1"))

    outcome = supervise(launcher, folder, make_spec(TWICE), CONFIG, on_poll=lose, **FAST)

    assert (outcome.status, starts()) == ("completed", [1, 2])
    assert "n1 lost" in outcome.attempts[0].end.reason
    assert outcome.attempts[1].end.nodes == "n2"


PEER = "RuntimeError: [pair.cc:553] Connection closed by peer [10.1.0.7]:35539"


@pytest.mark.parametrize("reason", [PEER, "OSError: [Errno 5] Input/output error"])
def test_a_lost_node_continues_though_the_survivor_failed_first(
    launcher, cluster, folder, make_spec, once, starts, monkeypatch, reason
):
    """The survivor writes "failed" at once; that the node is gone is known minutes later.

    So did a real cluster: the survivor's exit code fails the Job, the pod of the lost node is to end
    and never does, and only then the node controller says why.
    """
    monkeypatch.setattr("roma_pipelines.launching.kubernetes.states._LOST_AFTER_S", 0.5)
    cluster.nodes.append(Node("n3"))
    cluster.evicts_after_s = 5.0
    body = (
        "first = os.environ['RANK'] == '0'\n"
        "if n < 2:\n"
        "    if first: save(5); wait_for('lost', 60)\n"
        f"    if first: leave('failed', {reason!r}); sys.exit(1)\n"
        "    wait_for('never', 100)\n"
        "if first: succeed(world_size=2)"
    )

    def lose():
        cluster.lose(cluster.pod(1)["spec"]["nodeName"])
        (folder.path / "lost").touch()

    spec = make_spec(body, runner="torchrun", nodes=2)
    outcome = supervise(launcher, folder, spec, CONFIG, on_poll=once(lose), **FAST)

    assert outcome.status == "completed"
    first, second = outcome.attempts
    assert (first.end.status, first.end.checkpoint) == ("continue", 5)
    assert " lost" in first.end.reason
    assert "n2" not in second.end.nodes


@pytest.mark.parametrize("had_saved", [True, False])
def test_a_deleted_job_is_cancelled_whether_it_had_saved_or_not(
    launcher, cluster, api, folder, make_spec, once, starts, had_saved
):
    """A drain deletes pods, not Jobs."""
    save = "save(7); leave('continue', 'stop file'); sys.exit(75)" if had_saved else "time.sleep(9)"
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        f"save(3); wait_for('attempts/1/stop', 60)\n{save}"
    )
    delete = once(lambda: api.delete("jobs", "roma", JOB, {"propagationPolicy": "Background"}, {}))

    with pytest.raises(JobFailed, match="was deleted in the cluster") as caught:
        supervise(launcher, folder, make_spec(body), CONFIG, on_poll=delete, **FAST)

    assert (caught.value.outcome.status, starts()) == ("cancelled", [1])


def test_a_job_that_is_deleted_while_no_supervisor_lives_is_cancelled(
    launcher, cluster, api, folder, make_spec, once, starts
):
    def die():
        api.delete("jobs", "roma", JOB, {"propagationPolicy": "Background"}, {})
        raise Killed

    with pytest.raises(Killed):
        supervise(launcher, folder, make_spec(TWICE), CONFIG, on_poll=once(die), **FAST)
    with pytest.raises(JobFailed, match="was deleted in the cluster"):
        supervise(launcher, folder, make_spec(TWICE), CONFIG, **FAST)

    assert starts() == [1]


def test_a_job_that_its_time_to_live_removed_was_not_cancelled(
    launcher, cluster, api, folder, make_spec
):
    """Nobody watched it for a week; what it left in its folder says how it ended."""
    folder.path.mkdir(parents=True)
    folder.spec.write_text("{}")
    plan = launcher.plan(make_spec(), folder)
    handle = launcher.submit(plan, {})
    wait_until(lambda: launcher.watch(handle).phase is not Phase.UNKNOWN, 20)
    api.delete("jobs", "roma", JOB, {"propagationPolicy": "Background"}, {})
    wait_until(lambda: launcher.watch(handle).ended, 20)
    folder.result.unlink(missing_ok=True)

    assert launcher.watch(handle).phase is Phase.CANCELLED
    for file in (plan.files.script, plan.files.heartbeat, plan.files.log):
        if file.exists():
            os.utime(file, (0, time.time() - 8 * 86400))
    assert launcher.watch(handle).phase is Phase.GONE


@pytest.mark.parametrize("late", [False, True])
def test_a_finished_job_that_is_deleted_counts_as_finished(
    launcher, cluster, api, folder, make_spec, once, late
):
    """Its result is complete; whoever clears finished Jobs away cancels nothing."""
    late_result = folder.path / "late.json"

    def delete():
        if late:  # as a shared file system shows it
            folder.result.rename(late_result)
        api.delete("jobs", "roma", JOB, {"propagationPolicy": "Background"}, {})

    def on_poll(state):
        act(state)
        if "its result may follow" in state.reason and late_result.exists():
            late_result.rename(folder.result)

    act = once(delete, when=folder.result.exists)
    launcher.fs_lag_s = 20.0 if late else 0.0
    body = "succeed(); wait_for('never', 3)"

    outcome = supervise(launcher, folder, make_spec(body), CONFIG, on_poll=on_poll, **FAST)

    assert outcome.status == "completed"


def test_a_deleted_pod_continues_the_job_though_it_could_not_save(
    launcher, cluster, api, folder, make_spec, once, starts
):
    """``kubectl delete pod`` and a node's shutdown set no condition as an eviction does."""
    delete = once(
        lambda: api.delete("pods", "roma", cluster.pod()["metadata"]["name"], {}, {}),
        when=(folder.path / "starts").exists,
    )
    body = "if n < 2: wait_for('never', 100)\nsucceed()"

    outcome = supervise(launcher, folder, make_spec(body), CONFIG, on_poll=delete, **FAST)

    assert (outcome.status, starts()) == ("completed", [1, 2])
    assert "was deleted" in outcome.attempts[0].end.reason


def test_the_reason_is_known_though_the_watch_of_the_pods_is_behind(
    launcher, cluster, folder, make_spec, once
):
    """The Job's end is seen first; its pods are then listed anew."""

    def stand_still():
        launcher.client.pods._apply = lambda *change: None
        (folder.path / "go").touch()

    act = once(stand_still, when=(folder.path / "starts").exists)
    spec = make_spec("wait_for('go', 60); print('no luck'); sys.exit(3)")
    with pytest.raises(JobFailed, match="exit code 3: no luck"):
        supervise(launcher, folder, spec, CONFIG, on_poll=act, **FAST)


def test_one_dead_pod_ends_the_gang_and_its_log_is_kept(launcher, cluster, folder, make_spec):
    """Index 1 fails; index 0 is killed for it, and is not taken for the reason."""
    body = (
        "if os.environ['RANK'] == '1': print('no luck'); sys.exit(9)\n"
        "print('rank 0 waits', flush=True); wait_for('never', 60)"
    )
    spec = make_spec(body, runner="torchrun", nodes=2)

    with pytest.raises(JobFailed) as caught:
        supervise(launcher, folder, spec, CONFIG, **FAST)

    text = str(caught.value)
    assert "pod roma-0123456789ab-1-1-" in text
    assert "no luck" in text
    assert "rank 0 waits" in folder.attempt(1).log.read_text()


def test_the_time_limit_continues_the_job(launcher, cluster, api, folder, make_spec, once, starts):
    def run_out():
        api.store.change("jobs", "roma", JOB, lambda o: o["spec"].update(activeDeadlineSeconds=0))

    outcome = supervise(launcher, folder, make_spec(TWICE), CONFIG, on_poll=once(run_out), **FAST)

    assert (outcome.status, starts()) == ("completed", [1, 2])
    assert "DeadlineExceeded" in outcome.attempts[0].end.reason


def test_out_of_memory_fails_with_this_reason(launcher, cluster, folder, make_spec, once, starts):
    starve = once(lambda: cluster.starve(cluster.pod()))

    with pytest.raises(JobFailed, match="out of memory: ask for more memory_gb"):
        supervise(launcher, folder, make_spec(TWICE), CONFIG, on_poll=starve, **FAST)

    assert starts() == [1]


def test_a_hung_rank_is_found_by_its_heartbeat(launcher, cluster, folder, make_spec, starts):
    options = {"heartbeat_timeout_s": 1.0, **FAST}

    outcome = supervise(launcher, folder, make_spec(TWICE), CONFIG, **options)

    assert (outcome.status, starts()) == ("completed", [1, 2])
    assert "no heartbeat for 1 s" in outcome.attempts[0].end.reason


@pytest.mark.parametrize("kind", ["hung", "not started"])
def test_a_supervisor_that_dies_while_it_deletes_a_job_cancels_nothing(
    launcher, cluster, folder, make_spec, monkeypatch, kind
):
    real = launcher.cancel

    def cancel(handle):
        real(handle)
        monkeypatch.undo()
        raise Killed

    monkeypatch.setattr(launcher, "cancel", cancel)
    spec = make_spec(TWICE)
    if kind == "not started":
        spec = make_spec(gpus_per_node=99)
        launcher.profile = launcher.profile.model_copy(update={"queue_timeout_s": 0.3})
    options = {"heartbeat_timeout_s": 1.0, **FAST}
    with pytest.raises(Killed):
        supervise(launcher, folder, spec, CONFIG, **options)

    outcome = Supervisor(launcher, folder, spec, CONFIG, **options).run()

    reason, status = "did not start within 0.3 s", "failed"
    if kind == "hung":
        reason, status = "no heartbeat for 1 s", "completed"
    assert reason in outcome.attempts[0].end.reason
    assert outcome.status == status


def test_a_job_that_its_queue_suspends_goes_on_later(
    launcher, cluster, api, folder, make_spec, once, starts
):
    """Kueue takes a Job's pods away and lets it begin again: the same attempt, no failure."""
    body = (
        "beat(n)\nif not (folder / 'again').exists():\n"
        "    (folder / 'again').touch(); save(n); wait_for('never', 60)\nsucceed()"
    )
    seen = []

    def on_poll(state):
        seen.append(state)
        suspend(state)
        waits = [s for s in seen if "suspended" in s.reason]
        if len(waits) > 50 and not cluster.pods():  # longer than a heartbeat may stand still
            cluster.suspend(JOB, False)

    suspend = once(lambda: cluster.suspend(JOB, True))
    options = {"heartbeat_timeout_s": 2.0, **FAST}
    outcome = supervise(launcher, folder, make_spec(body), CONFIG, on_poll=on_poll, **options)

    assert (outcome.status, starts()) == ("completed", [1, 1])
    assert any(state.phase is Phase.WAITING and "no room" in state.reason for state in seen)


# -- the API server is not what it should be -----------------------------------------------------


def test_the_api_server_may_be_away(launcher, cluster, api, folder, make_spec, once, starts):
    def go_away():
        api.away = True
        api.cut_streams()
        (folder.path / "go").touch()
        threading.Timer(2.0, setattr, (api, "away", False)).start()

    seen = []
    act = once(go_away)

    def on_poll(state):
        seen.append(state)
        act(state)

    spec = make_spec("save(n)\nwait_for('go', 60)\nsucceed()")
    outcome = supervise(launcher, folder, spec, CONFIG, on_poll=on_poll, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])
    assert any(state.phase is Phase.UNKNOWN for state in seen)


@pytest.mark.parametrize("trouble", ["swallow", "lose"])
def test_a_creation_without_an_answer_makes_one_job(
    launcher, cluster, api, folder, make_spec, starts, trouble
):
    """It was done and the answer is lost; or it never arrived."""
    getattr(api, trouble).add(("create", "jobs"))

    outcome = supervise(launcher, folder, make_spec(), CONFIG, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])
    assert jobs(api) == [JOB]


def test_a_service_whose_answer_is_lost_is_made_once(launcher, cluster, api, folder, make_spec):
    api.swallow.add(("create", "services"))
    body = "if os.environ['RANK'] == '0': succeed(world_size=2)"
    spec = make_spec(body, runner="torchrun", nodes=2)

    outcome = supervise(launcher, folder, spec, CONFIG, **FAST)

    assert outcome.status == "completed"
    (service,) = api.store.all("services", "roma")
    assert service["metadata"]["ownerReferences"][0]["name"] == JOB


def test_a_job_of_this_name_that_is_there_is_adopted(launcher, cluster, folder, make_spec, starts):
    """A supervisor created it and died before it could write that down: 409."""
    spec = make_spec("wait_for('go', 60)\nsucceed()")
    folder.path.mkdir(parents=True)
    folder.spec.write_text(spec.model_dump_json())
    folder.config.write_text('{"base_lr": 0.001}')
    (folder.path / "attempts").mkdir()
    plan = launcher.plan(spec, folder)
    first = launcher.submit(plan, {})
    second = launcher.submit(plan, {})
    (folder.path / "go").touch()

    assert first == second
    outcome = supervise(launcher, folder, spec, CONFIG, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])


def test_a_token_may_be_replaced(launcher, cluster, api, profile, folder, make_spec, once):
    """The kubeconfig is read anew when the server no longer knows the old one's token."""
    api.token = "first"
    api.write_kubeconfig(profile.kubeconfig)

    def rotate():
        api.token = "second"
        api.write_kubeconfig(profile.kubeconfig)
        api.cut_streams()
        (folder.path / "go").touch()

    spec = make_spec(
        "print('one', flush=True); save(n)\nwait_for('go', 60)\nprint('two')\nsucceed()"
    )
    outcome = supervise(launcher, folder, spec, CONFIG, on_poll=once(rotate), **FAST)

    assert outcome.status == "completed"
    assert folder.attempt(1).log.read_text() == "one\ntwo\n"


def test_the_log_survives_streams_that_are_cut(launcher, cluster, api, folder, make_spec):
    body = "for i in range(60): print(i, flush=True); time.sleep(0.03)\nsucceed()"
    stop = threading.Event()

    def cut():
        while not stop.wait(0.15):
            api.cut_streams()

    helper = threading.Thread(target=cut)
    helper.start()
    try:
        supervise(launcher, folder, make_spec(body), CONFIG, **FAST)
    finally:
        stop.set()
        helper.join()

    assert folder.attempt(1).log.read_text().split() == [str(i) for i in range(60)]


# -- the orchestrator ends -----------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the supervisor's process at some line."""


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_supervisor_may_die_at_any_point(
    launcher, cluster, api, folder, make_spec, starts, point
):
    left = [point]

    def fault_point(here):
        if here in left:
            left.remove(here)
            raise Killed

    with pytest.raises(Killed):
        supervise(launcher, folder, make_spec(), CONFIG, fault_point=fault_point, **FAST)
    outcome = supervise(launcher, folder, make_spec(), CONFIG, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])
    assert jobs(api) == [JOB]


SUPERVISE = """
import sys
from roma_core.job import JobFolder
from roma_pipelines.launching.kubernetes.launcher import KubernetesLauncher
from roma_pipelines.launching.kubernetes.profile import KubernetesProfile
from roma_pipelines.launching.spec import JobSpec
from roma_pipelines.launching.supervisor import supervise
spec, profile, folder = sys.argv[1:]
launcher = KubernetesLauncher(KubernetesProfile.model_validate_json(profile), fs_lag_s=0)
supervise(launcher, JobFolder(folder), JobSpec.model_validate_json(spec), {"base_lr": 0.001},
    poll_every_s=0.1)
"""


@pytest.fixture
def worker(profile, folder):
    """Starts a supervisor that is a process of its own."""

    def start(spec):
        documents = (spec.model_dump_json(), profile.model_dump_json(), str(folder.path))
        return subprocess.Popen([sys.executable, "-c", SUPERVISE, *documents])

    return start


def test_a_worker_killed_with_9_is_followed_by_one_that_adopts(
    launcher, cluster, folder, make_spec, starts, eventually, worker
):
    body = "for i in range(3): print(i, flush=True)\nsave(n)\nwait_for('go', 60)\nprint('end')\nsucceed()"
    spec = make_spec(body)
    first = worker(spec)
    eventually(lambda: folder.checkpoints.exists(), 30)
    eventually(
        lambda: folder.attempt(1).log.exists() and "2" in folder.attempt(1).log.read_text(), 30
    )
    time.sleep(1.1)  # so that it wrote down how far it read
    first.kill()
    first.wait()
    (folder.path / "go").touch()

    outcome = supervise(launcher, folder, spec, CONFIG, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])
    assert "adopted it" in folder.events.read_text()
    assert folder.attempt(1).log.read_text().splitlines()[-1] == "end"


def test_two_supervisors_at_once_make_one_job(api, cluster, folder, make_spec, starts, worker):
    spec = make_spec("time.sleep(1)\nsucceed()")

    workers = [worker(spec) for _ in range(2)]

    assert [one.wait() for one in workers] == [0, 0]
    assert (starts(), jobs(api)) == ([1], [JOB])
