"""A training or a build that failed for a passing reason is tried again by the sensors."""

import dagster as dg
import pytest

from roma_pipelines.automation.alerts import read_alerts
from roma_pipelines.automation.sensors import check_dataset, check_source, scheduled_run
from roma_pipelines.automation.settings import NewData
from tests.pipelines.automation.conftest import month  # noqa: F401
from tests.pipelines.automation.played_month import Month
from tests.pipelines.conftest import storage  # noqa: F401

NEW_DATA = NewData(settle_s=60)


@pytest.fixture
def built(month: Month):  # noqa: F811
    month.deliver()
    assert month.launch(check_source(month.experiment, NEW_DATA, month.instance, month.now), "new")
    return month


def train(built, hour):
    """A tick of the sensor at an hour after noon of the first day: its decision, and if a run began."""
    decision = check_dataset(built.experiment, built.instance, built.now + 3600 * hour)
    return decision, built.launch(decision, "train")


def test_a_failed_training_is_requested_again_after_a_while(built):
    built.mood = "fail"
    assert train(built, 0)[1]

    decision, began = train(built, 1)
    assert not began
    assert "failed; it is tried again 4 h after its request" in decision.skip_message

    assert train(built, 5)[1]
    assert built.trained == [0, 0]
    assert "was trained on already" in train(built, 6)[0].skip_message


def test_it_waits_for_a_person_after_some_attempts(built):
    hours = []
    for hour in range(72):
        built.mood = "fail"
        decision, began = train(built, hour)
        hours += [hour] if began else []
    assert hours == [0, 4, 16, 40]
    run = built.instance.get_runs(limit=1)[0].run_id
    assert f"run {run} failed, attempt 4; waiting: materialise it manually" in decision.skip_message


@pytest.mark.parametrize(
    ("status", "tags", "expected"),
    [
        (dg.DagsterRunStatus.CANCELED, {}, "was cancelled; materialise it manually"),
        (dg.DagsterRunStatus.FAILURE, {"dagster/will_retry": "true"}, "failed and will be retried"),
    ],
)
def test_a_run_that_was_cancelled_or_is_retried_is_not_requested_again(
    built, status, tags, expected
):
    request = check_dataset(built.experiment, built.instance, built.now)
    key = {"dagster/run_key": request.run_key}
    run = dg.DagsterRun("job", status=status, tags={**request.tags, **key, **tags})
    built.instance.add_run(run)

    decision, began = train(built, 30)

    assert not began
    assert f"run {run.run_id} {expected}" in decision.skip_message


@pytest.mark.parametrize(
    ("error", "follows"),
    [
        (
            "OutOfMemoryError: CUDA out of memory",
            "tried again 4 h after its request, as attempt 2 of 4",
        ),
        ("", "tried again 4 h after its request"),  # its node was lost, say
        ("NonFiniteLoss: loss nan", "attempt 1; waiting: a NonFiniteLoss would come again"),
    ],
)
def test_the_error_of_the_job_decides_and_tick_alert_run_and_schedule_say_it(built, error, follows):
    built.mood, built.error = "fail", error
    assert train(built, 0)[1]
    built.send_failure_alerts()

    (run,) = built.instance.get_runs(limit=1)
    (alert,) = read_alerts(built.storage)
    scheduled = scheduled_run(built.experiment, built.instance, built.now + 3600)
    said = [alert["text"], run.tags["roma/next"], scheduled.skip_message]
    said.append(train(built, 1)[0].skip_message)
    assert [text for text in said if f"run {run.run_id} failed" in text and follows in text] == said

    later = scheduled_run(built.experiment, built.instance, built.now + 24 * 3600 - 10)
    assert isinstance(later, dg.RunRequest) == follows.startswith("tried")


def test_a_build_is_tried_again_unless_the_data_are_wrong(month, monkeypatch):  # noqa: F811
    def ask(hour):
        decision = check_source(month.experiment, NEW_DATA, month.instance, month.now + 3600 * hour)
        return decision, month.launch(decision, "new")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    month.deliver()
    with monkeypatch.context() as patch:
        patch.setattr("roma_core.data.writer.write_column", full)
        assert ask(0)[1]
    decision, began = ask(1)
    assert not began and "it is tried again 4 h after" in decision.skip_message
    assert ask(4)[1]

    month.day = 1
    bad = month.deliver(bad=True)
    assert ask(24)[1]
    decision, began = ask(72)
    assert not began
    assert "failed, attempt 1; waiting: " in decision.skip_message
    bad.unlink()
    assert "none of" in ask(73)[0].skip_message
