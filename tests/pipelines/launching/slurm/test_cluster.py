import json
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from roma_core.job import Result
from roma_pipelines.launching.jobs import usage
from roma_pipelines.launching.launcher import Unreachable
from roma_pipelines.launching.slurm.cluster import SharedPoll
from roma_pipelines.launching.slurm.profile import SlurmProfile
from roma_pipelines.launching.spec import AttemptRecord, End, JobSpec, Outcome


@pytest.fixture
def ask():
    """A scheduler that counts its questions; ``.answers`` are given in turn, the last for ever."""

    def ask(before):
        ask.asked += 1
        answer = ask.answers[min(ask.asked, len(ask.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer, ask.positions

    ask.asked, ask.answers, ask.positions = 0, [{"1": {"state": "RUNNING"}}], None
    return ask


def test_one_question_serves_all_who_look_in_time(tmp_path, ask):
    polls = [SharedPoll(tmp_path, ask, 60, 60) for _ in range(20)]

    assert {json.dumps(poll.look().jobs) for poll in polls} == {'{"1": {"state": "RUNNING"}}'}
    assert ask.asked == 1


def test_questions_become_rarer_while_nothing_changes(tmp_path, ask):
    ask.answers = [{"1": {"state": "PENDING"}}] * 3 + [{"1": {"state": "RUNNING"}}]
    poll = SharedPoll(tmp_path, ask, 0.01, 0.02)
    intervals = []
    for _ in range(5):
        intervals.append(poll.look().interval_s)
        time.sleep(0.03)

    assert intervals == pytest.approx([0.01, 0.015, 0.02, 0.01, 0.015])


def test_places_in_the_queue_are_kept_and_are_no_news(tmp_path, ask):
    ask.positions = {"1": (3, 17)}
    poll = SharedPoll(tmp_path, ask, 0.01, 0.02)
    first = poll.look()
    ask.positions = None  # a question that does not ask for them
    time.sleep(0.03)
    second = SharedPoll(tmp_path, ask, 0.01, 0.02).look()
    ask.positions = {"1": (2, 17)}
    time.sleep(0.03)
    third = poll.look()

    assert (first.positions, second.positions, third.positions["1"]) == ({"1": (3, 17)},) * 2 + (
        (2, 17),
    )
    assert first.positions_at == second.positions_at < third.positions_at
    assert [p.interval_s for p in (first, second, third)] == pytest.approx([0.01, 0.015, 0.02])


def test_a_job_that_was_missed_is_asked_for_sooner_but_not_at_once(tmp_path, ask):
    poll = SharedPoll(tmp_path, ask, 0.05, 60)
    poll.look()
    time.sleep(0.06)
    poll.look()  # nothing changed: the next question would come later

    missed = time.time()
    assert poll.look(missed).asked_at < missed
    time.sleep(0.06)
    assert poll.look(missed).asked_at > missed
    assert ask.asked == 3


def test_while_one_asks_the_others_go_on_with_what_there_is(tmp_path, ask):
    poll = SharedPoll(tmp_path, ask, 0.0, 0.0)
    before = poll.look()

    with FileLock(tmp_path / "poll.lock"):
        assert poll.look() == before
    assert ask.asked == 1


def test_no_answer_keeps_the_last_one_and_says_why(tmp_path, ask):
    ask.answers = [{"1": {"state": "RUNNING"}}, Unreachable("the controller is away")]
    poll = SharedPoll(tmp_path, ask, 0.0, 0.0)
    poll.look()

    now = poll.look()

    assert (now.jobs, now.error) == ({"1": {"state": "RUNNING"}}, "the controller is away")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"schema_version": 2}', '{"schema_version": 1}']
)
def test_a_damaged_answer_is_asked_for_again(tmp_path, ask, content):
    (tmp_path / "poll.json").write_text(content)

    assert SharedPoll(tmp_path, ask, 60, 60).look().jobs == {"1": {"state": "RUNNING"}}


def test_a_clock_that_was_set_back_does_not_stop_the_questions(tmp_path, ask):
    poll = SharedPoll(tmp_path, ask, 60, 60)
    poll.look()
    document = json.loads(poll.path.read_text())
    poll.path.write_text(json.dumps(document | {"asked_at": time.time() + 3600}))

    poll.look()

    assert ask.asked == 2


LOOK = """
import sys, time
from pathlib import Path
from roma_pipelines.launching.slurm.cluster import SharedPoll
from roma_pipelines.launching.slurm.profile import SlurmProfile
folder = Path(sys.argv[1])
def ask(before):
    with (folder / "asked").open("a") as file:
        file.write("x")
    return {}, None
poll = SharedPoll(folder, ask, 0.5, 0.5)
end = time.monotonic() + 2
while time.monotonic() < end:
    poll.look()
    time.sleep(0.02)
"""


def test_processes_ask_no_more_often_than_one_would(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", LOOK, str(tmp_path)]) for _ in range(4)]

    assert [process.wait() for process in processes] == [0] * 4
    # they do not start together, so they look for two to four seconds in all
    assert 3 <= len((tmp_path / "asked").read_text()) <= 9


def record(n, how, ran_s, submitted_at=100.0, ended_at=200.0):
    end = End(status=how, reason="", checkpoint=n, ended_at=ended_at, ran_s=ran_s, nodes="n[1-2]")
    return AttemptRecord(
        attempt=n, backend="slurm", intended_at=submitted_at, submitted_at=submitted_at, end=end
    )


def test_what_a_job_used_is_summed_over_its_attempts():
    spec = JobSpec(key="a" * 20, command=("x",), config_digest="", nodes=2, gpus_per_node=4)
    result = Result(job_key=spec.key, attempt=2, world_size=8, wall_s=1, facts={"training_s": 75.0})
    records = (record(1, "continue", 60.0), record(2, "completed", 40.0))
    outcome = Outcome("completed", spec.key, "", records, result, "")

    profile = SlurmProfile(name="cluster", price_per_gpu_hour=9.0, currency="EUR")
    assert usage(outcome, spec, profile) == {
        "ran_s": 100.0,
        "queued_s": 100.0,
        "nodes": "n[1-2]",
        "gpu_hours": 0.2222,
        "cost": "2.00 EUR",
        "lost_s": 25.0,
        "efficiency": 0.75,
    }


def test_a_job_of_this_computer_waits_for_nothing_and_costs_nothing():
    spec = JobSpec(key="a" * 20, command=("x",), config_digest="")
    outcome = Outcome("completed", spec.key, "", (record(1, "completed", None),), None, "")

    assert usage(outcome, spec, None) == {"ran_s": 100.0, "queued_s": 0.0, "nodes": "n[1-2]"}
