import pytest

from roma_core.job import Exit, JobFolder
from roma_pipelines.launching.outcome import (
    POLICY,
    Event,
    ExitReport,
    append_event,
    attempts_table,
    decide,
    events_table,
    read_events,
    read_exit_report,
)
from roma_pipelines.launching.spec import AttemptRecord, End, JobSpec, JobState, Phase

ENDS = [phase for phase in Phase if JobState(phase).ended]


def attempt(n, how, checkpoint):
    end = End(status=how, reason="", checkpoint=checkpoint, ended_at=0.0)
    return AttemptRecord(attempt=n, backend="fake", intended_at=0.0, end=end)


def how(phase, said, checkpoint=None, before=(), max_attempts=20):
    return decide(phase, said, checkpoint, list(before), max_attempts)[0]


def test_the_table_has_a_word_for_every_end():
    assert set(POLICY) == set(ENDS)
    assert all(set(row) == set(ExitReport) for row in POLICY.values())


# One letter per way an attempt may have ended, for a first attempt: c completed, n continue (next
# attempt), f failed, x cancelled. Columns: no checkpoint yet, a checkpoint at step 5.
EXPECTED = {
    #                    proof     completed  continue   failed    nothing
    Phase.ENDED_OK: ("cc", "ff", "nn", "ff", "ff"),
    Phase.ENDED_BAD: ("ff", "ff", "nn", "ff", "fn"),
    Phase.INTERRUPTED: ("nn", "nn", "nn", "fn", "nn"),
    Phase.GONE: ("cc", "ff", "nn", "ff", "nn"),
    Phase.OUT_OF_MEMORY: ("ff", "ff", "nn", "ff", "ff"),
    Phase.HUNG: ("nn", "nn", "fn", "ff", "fn"),
    Phase.CANCELLED: ("xx", "xx", "xx", "xx", "xx"),
}
LETTERS = {"c": "completed", "n": "continue", "f": "failed", "x": "cancelled"}


@pytest.mark.parametrize("phase", ENDS)
@pytest.mark.parametrize("said", ExitReport)
def test_every_row_for_a_first_attempt(phase, said):
    letters = EXPECTED[phase][list(ExitReport).index(said)]

    assert how(phase, said, checkpoint=None) == LETTERS[letters[0]]
    assert how(phase, said, checkpoint=5) == LETTERS[letters[1]]


@pytest.mark.parametrize(
    ("phase", "report"),
    [(Phase.INTERRUPTED, ExitReport.NOTHING), (Phase.ENDED_OK, ExitReport.CONTINUE)],
)
@pytest.mark.parametrize("step", [None, 5])
def test_interruptions_without_a_new_checkpoint_are_counted_to_the_limit(phase, report, step):
    row = [] if step is None else [attempt(1, "continue", step)]  # it made that checkpoint
    ends = []
    while not ends or ends[-1] == "continue":
        ends.append(how(phase, report, step, row, max_attempts=4))
        row.append(attempt(len(row) + 1, ends[-1], step))

    assert ends == ["continue", "continue", "continue", "failed"]
    assert how(phase, report, 6, row[:-1], max_attempts=4) == "continue"
    assert how(Phase.ENDED_BAD, ExitReport.NOTHING, step, row[:2], max_attempts=4) == "failed"


def test_attempts_that_advance_are_not_counted_and_a_deliberate_retry_starts_anew():
    row = [attempt(n, "continue", n) for n in range(1, 100)]

    assert how(Phase.INTERRUPTED, ExitReport.NOTHING, 100, row, max_attempts=2) == "continue"
    assert how(Phase.INTERRUPTED, ExitReport.NOTHING, 99, row, max_attempts=2) == "continue"
    assert how(Phase.INTERRUPTED, ExitReport.NOTHING, 99, row, max_attempts=1) == "failed"
    stalled = [*row, attempt(100, "continue", 99)]
    assert how(Phase.INTERRUPTED, ExitReport.NOTHING, 99, stalled, max_attempts=2) == "failed"
    retried = [*stalled, attempt(101, "failed", 99)]
    assert how(Phase.INTERRUPTED, ExitReport.NOTHING, 99, retried, max_attempts=2) == "continue"
    assert how(Phase.ENDED_BAD, ExitReport.NOTHING, 99, retried, max_attempts=2) == "failed"


GLOO = (
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by "
    "peer [127.0.0.1]:35539. This is typically caused by a remote worker crashing."
)
NCCL = (
    "DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:77\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely."
)


@pytest.mark.parametrize(
    ("reason", "report"),
    [
        (GLOO, ExitReport.NOTHING),
        (GLOO.replace("closed", "reset"), ExitReport.NOTHING),
        ("RuntimeError: Timed out waiting 1800000ms for recv operation", ExitReport.NOTHING),
        ("DistNetworkError: failed to recv, got 0 bytes", ExitReport.NOTHING),
        ("DistStoreError: wait timeout after 300000ms, keys: /x", ExitReport.NOTHING),
        (NCCL, ExitReport.NOTHING),
        ("DistBackendError: NCCL error: ncclInvalidUsage: Duplicate GPU", ExitReport.FAILED),
        ("ValueError: step 3: the loss is not finite", ExitReport.FAILED),
        ("ConnectionError: Connection reset by peer", ExitReport.FAILED),  # a server's, say
        ("RuntimeError: mat1 and mat2 shapes cannot be multiplied", ExitReport.FAILED),
    ],
)
def test_the_failure_of_a_process_that_lost_another_one_is_no_cause(tmp_path, reason, report):
    folder = JobFolder(tmp_path)
    folder.attempt(1).path.mkdir(parents=True)
    folder.attempt(1).write_exit(Exit(status="failed", reason=reason))
    spec = JobSpec(key="a" * 20, command=("x",), config_digest="", processes_per_node=2)

    found, why = read_exit_report(folder, spec, 1)

    assert found is report
    assert reason in why


def test_what_is_appended_is_read_and_a_line_cut_short_is_not(tmp_path):
    folder = JobFolder(tmp_path)
    assert read_events(folder) == []
    trail = [Event(1.0, None, "a", "b"), Event(2.0, 3, "täglich", "d")]
    for event in trail:
        append_event(folder, event)
    with folder.events.open("a") as file:
        file.write('{"time": 3.0, "att')

    assert read_events(folder) == trail
    assert [str(event) for event in trail] == ["a: b", "attempt 3: täglich: d"]


def test_text_of_a_log_is_no_markdown_and_no_html(tmp_path):
    folder = JobFolder(tmp_path)
    append_event(folder, Event(1.0, 1, "<img src=x> | [a](b) `c`\nnext", "x" * 1000))

    table = events_table(folder).splitlines()

    assert len(table) == 3
    assert r"&lt;img src=x&gt; \| \[a\](b) \`c\` next" in table[2]
    assert len(table[2]) < 600


def test_a_long_trail_shows_its_end_and_says_where_the_rest_is(tmp_path):
    folder = JobFolder(tmp_path)
    for n in range(100):
        append_event(folder, Event(float(n), n, f"seen{n}", "done"))

    table = events_table(folder)

    assert "seen99" in table and "seen60" in table and "seen59" not in table
    assert "60 earlier ones are in" in table


def test_an_attempt_without_an_end_has_a_row_too():
    end = End(
        status="continue", reason="preempted", checkpoint=5, ended_at=9.0, ran_s=4.4, nodes="n1"
    )
    ended = AttemptRecord(
        attempt=1, backend="slurm", intended_at=1.0, external={"job_id": "7"}, end=end
    )
    running = AttemptRecord(attempt=2, backend="local", intended_at=2.0)

    first, second = attempts_table([ended, running]).splitlines()[2:]

    assert first.startswith(r"| 1 | slurm (job\_id 7) | ")
    assert first.endswith("| 4 s | n1 | continue | preempted |")
    assert second.startswith("| 2 | local | ") and "not ended" in second
