import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from roma_core.files import digest_of
from roma_core.job import JobFolder
from roma_pipelines.launching.local import LocalLauncher
from roma_pipelines.launching.outcome import log_tail
from roma_pipelines.launching.spec import JobFailed, JobSpec, JobState, Phase
from roma_pipelines.launching.supervisor import FAULT_POINTS, Supervisor, request_cancel, supervise

CONFIG = {"base_lr": 0.001}
FAST = {"poll_every_s": 0.02}


class Killed(BaseException):
    """Stands for the end of the supervisor's process at some line."""


def die_at(*names):
    """A fault point that kills once at each of the names."""
    left = list(names)

    def fault_point(name):
        if name in left:
            left.remove(name)
            raise Killed(name)

    return fault_point


def done_words(folder):
    return [json.loads(line)["action"] for line in folder.events.read_text().splitlines()]


def test_a_job_that_proves_its_success_is_completed(launcher, folder, make_spec):
    outcome = supervise(launcher, folder, make_spec(), CONFIG, **FAST)

    assert (outcome.status, len(outcome.attempts)) == ("completed", 1)
    assert outcome.result.wall_s == 1.5
    assert outcome.attempts[0].end.status == "completed"
    assert outcome.metadata()["processes"] == "1"
    assert json.loads(folder.config.read_text()) == CONFIG


def test_a_completed_job_is_not_run_again(launcher, folder, make_spec, starts):
    first = supervise(launcher, folder, make_spec(), CONFIG, **FAST)
    second = supervise(launcher, folder, make_spec(), CONFIG, **FAST)

    assert starts() == [1]
    assert (second.result, second.attempts) == (first.result, first.attempts)


def test_a_crash_is_reported_with_the_end_of_the_log(launcher, folder, make_spec):
    body = "for i in range(80): print('line', i)\nraise MemoryError('too many whales')"

    with pytest.raises(JobFailed, match="exit code 1") as caught:
        supervise(launcher, folder, make_spec(body), CONFIG, **FAST)

    lines = caught.value.outcome.log_tail.splitlines()
    assert lines[-1] == "MemoryError: too many whales"
    assert len(lines) == 50
    assert str(caught.value).endswith(caught.value.outcome.log_tail)
    assert caught.value.outcome.result is None


def test_the_jobs_own_reason_is_reported(launcher, folder, make_spec):
    body = "leave('failed', 'the loss is not finite in batch 7'); sys.exit(1)"

    with pytest.raises(JobFailed, match="the loss is not finite in batch 7"):
        supervise(launcher, folder, make_spec(body), CONFIG, **FAST)


def test_an_attempt_that_wants_to_continue_gets_another(launcher, folder, make_spec, starts):
    body = "save(n)\nif n < 3: leave('continue'); sys.exit(1)\nsucceed()"

    outcome = supervise(launcher, folder, make_spec(body), CONFIG, **FAST)

    assert starts() == [1, 2, 3]
    assert [a.end.status for a in outcome.attempts] == ["continue", "continue", "completed"]
    assert [a.end.checkpoint for a in outcome.attempts] == [1, 2, 3]


def test_an_attempt_killed_from_outside_continues_until_checkpoints_stop(
    launcher, folder, make_spec, starts
):
    body = "save(min(n, 2)) if n < 3 else None\nos.kill(os.getpid(), signal.SIGKILL)"

    with pytest.raises(JobFailed, match="2 attempts in a row without a new checkpoint"):
        supervise(launcher, folder, make_spec(body), CONFIG, max_attempts=2, **FAST)

    assert starts() == [1, 2, 3, 4]


def test_attempts_that_advance_have_no_bound(launcher, folder, make_spec, starts):
    spec = make_spec("save(n)\nif n < 7: leave('continue')\nelse: succeed()")

    outcome = supervise(launcher, folder, spec, CONFIG, max_attempts=2, **FAST)

    assert (outcome.status, starts()) == ("completed", [1, 2, 3, 4, 5, 6, 7])


def test_a_retry_of_a_failed_job_makes_the_next_attempt(launcher, folder, make_spec, starts):
    with pytest.raises(JobFailed):
        supervise(launcher, folder, make_spec("sys.exit(1)"), CONFIG, **FAST)

    outcome = supervise(launcher, folder, make_spec("succeed()"), CONFIG, **FAST)

    assert starts() == [1, 2]
    assert [a.end.status for a in outcome.attempts] == ["failed", "completed"]


@pytest.mark.parametrize(("run", "attempts"), [("run-a", [1]), ("run-b", [1, 2])])
def test_a_failure_that_an_earlier_run_could_not_record_is_not_a_retrys(
    launcher, folder, make_spec, starts, run, attempts
):
    spec = make_spec("leave('failed', 'full disk') if n < 2 else succeed()")
    options = {"holder": {"dagster_run_id": "run-a"}, "fault_point": die_at("before end"), **FAST}
    with pytest.raises(Killed):
        supervise(launcher, folder, spec, CONFIG, **options)

    holder = {"dagster_run_id": run}
    outcome = Supervisor(launcher, folder, spec, CONFIG, holder=holder, **FAST).run()

    assert starts() == attempts
    assert outcome.attempts[0].end.status == "failed"
    assert outcome.status == ("failed" if attempts == [1] else "completed")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("succeed(job_key='f' * 20)", "it names job ffffffffffffffffffff"),
        ("succeed(world_size=2)", "2 processes made it, expected 1"),
        ("(folder / 'result.json').write_text('{')", "result.json cannot be read"),
        ("write(folder / 'result.json', job_key=key)", "result.json cannot be read"),
        ("leave('completed')", "exit.json: completed"),
        ("pass", "no exit.json"),
        ("succeed(); sys.exit(9)", "exit code 9"),
    ],
)
def test_nothing_less_than_proof_is_success(launcher, folder, make_spec, body, reason):
    with pytest.raises(JobFailed, match=reason):
        supervise(launcher, folder, make_spec(body), CONFIG, **FAST)


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_supervisor_that_dies_anywhere_is_followed_by_one_that_goes_on(
    launcher, folder, make_spec, starts, point
):
    spec = make_spec("succeed()")

    with pytest.raises(Killed):
        supervise(launcher, folder, spec, CONFIG, fault_point=die_at(point), **FAST)
    outcome = supervise(LocalLauncher(), folder, spec, CONFIG, **FAST)

    assert outcome.status == "completed"
    assert starts() == [1]
    assert folder.attempt_numbers() == [1]


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_the_same_between_two_attempts(launcher, folder, make_spec, starts, point):
    spec = make_spec("save(n)\nif n < 2: leave('continue')\nelse: succeed()")
    passed = []

    def second_time(name):
        passed.append(name)
        if passed.count(point) == 2:
            passed.append(point)
            raise Killed(point)

    with pytest.raises(Killed):
        supervise(launcher, folder, spec, CONFIG, fault_point=second_time, **FAST)
    outcome = supervise(launcher, folder, spec, CONFIG, **FAST)

    assert outcome.status == "completed"
    assert starts() == [1, 2]


SUPERVISING = """
import json, sys
from roma_core.job import JobFolder
from roma_pipelines.launching.local import LocalLauncher
from roma_pipelines.launching.spec import JobSpec
from roma_pipelines.launching.supervisor import supervise

folder, spec, config = JobFolder(sys.argv[1]), JobSpec.model_validate_json(sys.argv[2]), sys.argv[3]
supervise(LocalLauncher(), folder, spec, json.loads(config), poll_every_s=0.02)
"""


def test_a_killed_supervisor_leaves_the_job_to_the_next_one(
    launcher, folder, make_spec, starts, eventually
):
    spec = make_spec("wait_for('go'); succeed()")
    argv = [sys.executable, "-c", SUPERVISING, str(folder.path), spec.model_dump_json()]
    first = subprocess.Popen([*argv, json.dumps(CONFIG)])
    eventually(lambda: (folder.path / "starts").exists())
    os.kill(first.pid, signal.SIGKILL)
    first.wait()

    def then_go(state):
        assert state.phase in (Phase.RUNNING, Phase.GONE)
        (folder.path / "go").touch()

    outcome = supervise(launcher, folder, spec, CONFIG, on_poll=then_go, **FAST)

    assert starts() == [1]
    assert outcome.status == "completed"
    assert "its exit code is not known" in outcome.attempts[0].end.reason
    assert "adopted it" in done_words(folder)


def test_two_supervisors_at_once_run_the_job_once(folder, make_spec, starts):
    spec = make_spec("time.sleep(0.3); save(n)\nif n < 2: leave('continue')\nelse: succeed()")
    outcomes = []

    def watch():
        outcomes.append(supervise(LocalLauncher(), folder, spec, CONFIG, **FAST))

    threads = [threading.Thread(target=watch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [outcome.status for outcome in outcomes] == ["completed"] * 3
    assert starts() == [1, 2]


def interrupt_when(path):
    def on_poll(state):
        if path.exists():
            raise KeyboardInterrupt

    return on_poll


def test_an_interrupt_may_leave_the_job_running(launcher, folder, make_spec, starts):
    spec = make_spec("save(1); wait_for('go'); succeed()")
    options = {"on_poll": interrupt_when(folder.checkpoints), **FAST}

    with pytest.raises(KeyboardInterrupt):
        supervise(launcher, folder, spec, CONFIG, on_interrupt=lambda error: "detach", **options)
    (folder.path / "go").touch()

    assert supervise(launcher, folder, spec, CONFIG, **FAST).status == "completed"
    assert starts() == [1]


def test_an_interrupt_may_end_the_job(launcher, folder, make_spec, starts, processes):
    spec = make_spec("save(1)\nif n < 2: wait_for('go')\nsucceed()")
    asked = []

    def on_interrupt(error):
        asked.append(error)
        return "cancel"

    options = {"on_poll": interrupt_when(folder.checkpoints), **FAST}
    with pytest.raises(KeyboardInterrupt) as caught:
        supervise(launcher, folder, spec, CONFIG, on_interrupt=on_interrupt, **options)

    assert asked == [caught.value]
    assert processes() == []
    assert Supervisor(launcher, folder, spec, CONFIG).records()[0].end.status == "cancelled"


def test_a_full_disk_does_not_keep_an_interrupt_from_ending_the_job(
    launcher, folder, make_spec, processes
):
    def on_poll(state):
        if (folder.path / "starts").exists():
            raise Killed

    def on_note(note):
        if "cancel the job" in note:
            raise OSError(errno.ENOSPC, "No space left on device")

    options = {"on_interrupt": lambda error: "cancel", "on_poll": on_poll, "on_note": on_note}
    with pytest.raises(OSError, match="No space left"):
        supervise(launcher, folder, make_spec("wait_for('go', 60)"), CONFIG, **options, **FAST)

    assert processes() == []


@pytest.mark.parametrize("point", ["after intent", "after submit"])
def test_an_interrupt_while_submitting_ends_what_was_started(
    launcher, folder, make_spec, processes, point
):
    options = {"fault_point": die_at(point), "on_interrupt": lambda error: "cancel", **FAST}

    with pytest.raises(Killed):
        supervise(launcher, folder, make_spec("wait_for('go')"), CONFIG, **options)

    assert processes() == []


def test_anyone_may_ask_for_the_end_and_a_retry_starts_again(
    launcher, folder, make_spec, starts, processes
):
    spec = make_spec("if n < 2: wait_for('go')\nsucceed()")

    def ask(state):
        if (folder.path / "starts").exists():
            request_cancel(folder, "the sensor")

    with pytest.raises(JobFailed, match="cancelled by the sensor") as caught:
        supervise(launcher, folder, spec, CONFIG, on_poll=ask, **FAST)

    assert caught.value.outcome.status == "cancelled"
    assert processes() == []
    assert supervise(launcher, folder, spec, CONFIG, **FAST).status == "completed"
    assert starts() == [1, 2]


def test_a_hung_job_is_ended_and_continues_if_it_had_advanced(launcher, folder, make_spec, starts):
    body = "beat(1)\nsave(n)\nif n < 2: wait_for('never')\nsucceed()"
    options = {"heartbeat_timeout_s": 0.3, **FAST}

    outcome = supervise(launcher, folder, make_spec(body), CONFIG, **options)

    assert starts() == [1, 2]
    assert "no heartbeat for 0.3 s" in outcome.attempts[0].end.reason


def test_a_hung_job_without_a_checkpoint_has_failed(launcher, folder, make_spec, starts):
    spec = make_spec("beat(1); wait_for('never')")

    with pytest.raises(JobFailed, match=r"no heartbeat for 0\.2 s"):
        supervise(launcher, folder, spec, CONFIG, heartbeat_timeout_s=0.2, **FAST)

    assert starts() == [1]


def test_a_slow_start_and_a_beating_heart_are_no_hang(launcher, folder, make_spec, starts):
    body = "time.sleep(0.5)\nfor i in range(20): beat(i); time.sleep(0.03)\nsucceed()"

    supervise(launcher, folder, make_spec(body), CONFIG, heartbeat_timeout_s=0.3, **FAST)

    assert starts() == [1]


def test_a_changed_configuration_is_reported_and_the_job_kept(launcher, folder, make_spec, starts):
    notes = []
    spec = make_spec("wait_for('go'); succeed()")
    with pytest.raises(Killed):
        supervise(launcher, folder, spec, CONFIG, fault_point=die_at("after record"), **FAST)
    (folder.path / "go").touch()

    changed = {"base_lr": 0.5}
    other = spec.model_copy(update={"config_digest": digest_of(changed), "memory_gb": 3.0})
    supervise(launcher, folder, other, changed, on_note=notes.append, **FAST)

    assert starts() == [1]
    assert json.loads(folder.config.read_text()) == CONFIG
    assert any("memory_gb: None -> 3.0" in note and "config_digest" in note for note in notes)


def test_mistakes_are_refused_before_anything_is_written(launcher, folder, make_spec):
    with pytest.raises(ValueError, match="one computer"):
        supervise(launcher, folder, make_spec(nodes=2, runner="torchrun"), CONFIG)
    with pytest.raises(ValueError, match="is not that of the configuration"):
        supervise(launcher, folder, make_spec(), {"base_lr": 1})
    assert not folder.path.exists()
    with pytest.raises(ValidationError, match="pattern"):
        JobSpec(key="../../etc", command=("x",), config_digest="")


def test_a_folder_of_another_job_is_refused(launcher, folder, make_spec):
    supervise(launcher, folder, make_spec(), CONFIG, **FAST)

    with pytest.raises(ValueError, match="belongs to job"):
        other = make_spec().model_copy(update={"key": "f" * 20})
        supervise(launcher, folder, other, CONFIG, **FAST)


def test_a_result_that_changed_after_the_end_is_no_proof(launcher, folder, make_spec):
    supervise(launcher, folder, make_spec(), CONFIG, **FAST)
    folder.result.unlink()

    with pytest.raises(ValueError, match="was completed, but"):
        supervise(launcher, folder, make_spec(), CONFIG, **FAST)


class Unsure:
    """A launcher whose target now and then has no answer."""

    backend = "unsure"

    def __init__(self, launcher):
        self.launcher, self.calls = launcher, 0

    def __getattr__(self, name):
        return getattr(self.launcher, name)

    def watch(self, handle):
        self.calls += 1
        if self.calls < 4:
            return JobState(Phase.UNKNOWN, "the controller is away")
        return self.launcher.watch(handle)


def test_no_answer_is_not_an_end(launcher, folder, make_spec, starts):
    outcome = supervise(Unsure(launcher), folder, make_spec("succeed()"), CONFIG, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])


def test_the_lease_names_the_supervising_process(launcher, folder, make_spec):
    supervise(launcher, folder, make_spec(), CONFIG, holder={"dagster_run_id": "run-a"}, **FAST)

    lease = json.loads(folder.lease.read_text())
    assert (lease["dagster_run_id"], lease["pid"]) == ("run-a", os.getpid())


def test_every_file_says_its_version(launcher, folder, make_spec):
    supervise(launcher, folder, make_spec(), CONFIG, **FAST)

    paths = {path for path in folder.path.rglob("*.json") if path != folder.config}
    documents = [json.loads(path.read_text()) for path in paths]
    documents += [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert len(paths) == 6
    assert all(document["schema_version"] == 1 for document in documents)


def test_the_tail_of_a_huge_log_is_cheap_and_short(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"x" * 1_000_000 + b"\n\xff\n" + b"end\n")

    assert log_tail(log).endswith("\ufffd\nend")
    assert len(log_tail(log)) <= 64 * 1024
    assert log_tail(tmp_path / "none") == ""


def test_two_processes_of_a_real_torchrun_find_one_another(launcher, tmp_path, processes):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, torch, torch.distributed as dist\n"
        "from roma_core.job import JobFolder, Result\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.ones(1)\n"
        "dist.all_reduce(total)\n"
        "if dist.get_rank() == 0:\n"
        "    folder = JobFolder(os.environ['ROMA_JOB_FOLDER'])\n"
        "    folder.write_result(Result(job_key=folder.path.name, attempt=1,\n"
        "        world_size=int(total), wall_s=0.1))\n"
        "dist.destroy_process_group()\n"
    )
    key = "feedfacefeedfacefeed"
    spec = JobSpec(
        key=key, command=(str(script),), config_digest=digest_of({}), processes_per_node=2
    )

    outcome = supervise(launcher, JobFolder(Path(tmp_path) / key), spec, {}, **FAST)

    assert outcome.result.world_size == 2
    assert processes() == []


def test_what_torchrun_says_of_itself_is_no_part_of_a_jobs_last_words(tmp_path):
    log = tmp_path / "log"
    report = "E1124 12:07:05.1 14 torch/distributed/elastic/multiprocessing/api.py:1] failed (exitcode: 1)"
    rule = "=" * 60
    log.write_text(f"ImportError: no\n{report}\n  its stack\n{rule}\nRoot Cause\n{rule}\nthe end\n")

    assert log_tail(log) == "ImportError: no\nthe end"
    log.write_text(f"ImportError: no\n{report}\n  its stack was cut short\n")
    assert log_tail(log).endswith("cut short")  # better too much than too little
