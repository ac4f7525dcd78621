from roma_core.job import JobFolder
from roma_pipelines.launching.outcome import (
    Event,
    append_decision,
    attempts_table,
    decisions_table,
    read_decisions,
)
from roma_pipelines.launching.spec import AttemptRecord, End


def test_what_is_appended_is_read_and_a_line_cut_short_is_not(tmp_path):
    folder = JobFolder(tmp_path)
    assert read_decisions(folder) == []
    trail = [Event(1.0, None, "a", "b"), Event(2.0, 3, "täglich", "d")]
    for decision in trail:
        append_decision(folder, decision)
    with folder.decisions.open("a") as file:
        file.write('{"time": 3.0, "att')

    assert read_decisions(folder) == trail
    assert [str(decision) for decision in trail] == ["a: b", "attempt 3: täglich: d"]


def test_text_of_a_log_is_no_markdown_and_no_html(tmp_path):
    folder = JobFolder(tmp_path)
    append_decision(folder, Event(1.0, 1, "<img src=x> | [a](b) `c`\nnext", "x" * 1000))

    table = decisions_table(folder).splitlines()

    assert len(table) == 3
    assert r"&lt;img src=x&gt; \| \[a\](b) \`c\` next" in table[2]
    assert len(table[2]) < 600


def test_a_long_trail_shows_its_end_and_says_where_the_rest_is(tmp_path):
    folder = JobFolder(tmp_path)
    for n in range(100):
        append_decision(folder, Event(float(n), n, f"seen{n}", "done"))

    table = decisions_table(folder)

    assert "seen99" in table and "seen60" in table and "seen59" not in table
    assert "60 earlier ones stand in" in table


def test_an_attempt_without_an_end_has_a_row_too():
    end = End(how="continue", reason="preempted", checkpoint=5, ended_at=9.0, ran_s=4.4, nodes="n1")
    ended = AttemptRecord(
        attempt=1, backend="slurm", intended_at=1.0, external={"job_id": "7"}, end=end
    )
    running = AttemptRecord(attempt=2, backend="local", intended_at=2.0)

    first, second = attempts_table([ended, running]).splitlines()[2:]

    assert first.startswith(r"| 1 | slurm (job\_id 7) | ")
    assert first.endswith("| 4 s | n1 | continue | preempted |")
    assert second.startswith("| 2 | local | ") and "not over" in second
