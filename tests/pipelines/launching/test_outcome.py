import pytest

from roma_pipelines.launching.outcome import TABLE, ExitReport, judge
from roma_pipelines.launching.spec import AttemptRecord, End, JobState, Phase

ENDS = [phase for phase in Phase if JobState(phase).ended]


def attempt(n, how, checkpoint):
    end = End(how=how, reason="", checkpoint=checkpoint, ended_at=0.0)
    return AttemptRecord(attempt=n, backend="fake", intended_at=0.0, end=end)


def how(phase, said, checkpoint=None, before=(), max_attempts=20, began=True):
    return judge(phase, said, checkpoint, list(before), max_attempts, began)[0]


def test_the_table_has_a_word_for_every_end():
    assert set(TABLE) == set(ENDS)
    assert all(set(row) == set(ExitReport) for row in TABLE.values())


# One letter per way an attempt may have ended, for a first attempt: c completed, n continue (next
# attempt), f failed, x cancelled. Columns: no checkpoint yet, a checkpoint at step 5.
EXPECTED = {
    #                    proof     completed  continue   failed    nothing
    Phase.ENDED_OK: ("cc", "ff", "nn", "ff", "ff"),
    Phase.ENDED_BAD: ("ff", "ff", "nn", "ff", "fn"),
    Phase.INTERRUPTED: ("nn", "nn", "nn", "ff", "nn"),
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


def test_attempts_continue_only_while_checkpoints_advance():
    before = [attempt(1, "continue", 5)]

    assert how(Phase.INTERRUPTED, ExitReport.NOTHING, 6, before) == "continue"
    assert how(Phase.INTERRUPTED, ExitReport.NOTHING, 5, before) == "failed"
    assert how(Phase.ENDED_OK, ExitReport.CONTINUE, 5, before) == "failed"
    assert (
        how(Phase.INTERRUPTED, ExitReport.NOTHING, None, [attempt(1, "continue", None)]) == "failed"
    )


def test_attempts_in_a_row_have_a_bound_and_a_deliberate_retry_starts_anew():
    row = [attempt(n, "continue", n) for n in (1, 2, 3)]

    assert how(Phase.INTERRUPTED, ExitReport.NOTHING, 4, row, max_attempts=5) == "continue"
    assert how(Phase.INTERRUPTED, ExitReport.NOTHING, 4, row, max_attempts=4) == "failed"
    retried = [*row, attempt(4, "failed", 4)]
    assert how(Phase.INTERRUPTED, ExitReport.NOTHING, 4, retried, max_attempts=4) == "continue"
    assert how(Phase.ENDED_BAD, ExitReport.NOTHING, 4, retried, max_attempts=4) == "failed"


def test_attempts_that_only_waited_owe_no_checkpoint_but_are_counted():
    """Where the time limit counts waiting, a busy cluster ends them before they begin."""
    before = [attempt(1, "continue", None), attempt(2, "continue", None)]

    assert how(Phase.INTERRUPTED, ExitReport.NOTHING, None, before, began=False) == "continue"
    assert how(Phase.INTERRUPTED, ExitReport.NOTHING, None, before, began=True) == "failed"
    assert how(Phase.INTERRUPTED, ExitReport.NOTHING, None, before, 3, began=False) == "failed"
    assert how(Phase.ENDED_BAD, ExitReport.NOTHING, None, before, began=False) == "failed"
