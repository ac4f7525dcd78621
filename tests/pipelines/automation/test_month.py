"""Thirty days by themselves: exactly the expected trainings, promotions and alerts."""

import dagster as dg

from roma_pipelines.automation.alerts import read_alerts
from roma_pipelines.automation.drift import check_inputs
from roma_pipelines.automation.sensors import (
    check_dataset,
    check_source,
    scheduled_run,
)

ARRIVALS = (2, 6, 10, 14, 18, 24)
BAD_DELIVERY, JOB_CRASH, WORKER_CRASH, DAEMON_CRASH = 10, 6, 18, 24
WORSE_MODEL, DRIFT = 14, 21


def test_thirty_days_give_exactly_the_expected_trainings_promotions_and_alerts(month):
    new_data = month.experiment.automation.new_data
    drift = month.experiment.automation.drift
    month.deliver()
    cursor, bad = None, None
    said = {}

    def sensors():
        nonlocal cursor
        month.launch(check_source(month.experiment, new_data, month.instance, month.now), "new")
        month.launch(check_dataset(month.experiment, month.instance, month.now), "train")
        decision, after = check_inputs(month.experiment, drift, month.instance, cursor, month.now)
        month.launch(decision, "drift")
        cursor = after

    for day in range(30):
        month.day, month.accuracy = day, 0.5 if day == WORSE_MODEL else 0.9
        # 03:00, the schedule
        decision = scheduled_run(month.experiment, month.instance, month.now)
        said[day] = decision.skip_message if isinstance(decision, dg.SkipReason) else "run"
        month.launch(decision, "schedule")
        month.launch(check_dataset(month.experiment, month.instance, month.now), "train")
        # 11:00, what comes in
        if day == WORSE_MODEL:
            bad.unlink()
        if day in ARRIVALS:
            delivered = month.deliver(bad=day == BAD_DELIVERY)
            bad = delivered if day == BAD_DELIVERY else bad
        month.receive_inputs(shift=3.0 if day == DRIFT else 0.0)
        # 12:00, the sensors, twice
        month.mood = {JOB_CRASH: "fail", WORKER_CRASH: "kill"}.get(day, "work")
        if day == DAEMON_CRASH:  # it asked, and died before it wrote down that it had
            before = cursor
            sensors()
            cursor = before
        sensors()
        sensors()
        month.send_failure_alerts()

    # the first day by the schedule; day 6 failed, so the schedule of day 7 trained in its place;
    # day 10 was no data; day 18 was killed and went on; day 21 for drift
    assert month.trained == [0, 2, 6, 7, 14, 18, 21, 24]
    assert month.promoted == [0, 2, 7, 18, 21, 24]
    assert month.champion() == "6"
    kinds = [(alert["kind"], alert["subject"]) for alert in read_alerts(month.storage)]
    failed = [subject for kind, subject in kinds if kind == "failed"]
    # the job of day 6; the delivery of day 10, which neither sensor nor schedule builds again
    assert len(failed) == 1 + 1
    assert [day for day, subject in month.alerts if subject.endswith("failed")] == [6, 10]
    assert all("waiting: a DataError would come again" in said[day] for day in range(11, 15))
    assert [one for one in kinds if one[0] == "check"] == [
        ("check", "waves: check failed: gate of evaluation_report")
    ]
    assert [one for one in kinds if one[0] == "drift"] == [("drift", "waves: inputs have drifted")]
    assert len(kinds) == len(failed) + 2
    # nothing was lost or doubled: the jobs, and one data set for every good delivery
    jobs = list(month.storage.jobs.iterdir())
    assert len(jobs) == 2 * len(month.trained) - 1  # the one that failed had no second
    assert len(list((month.storage.datasets / "waves").glob("*/manifest.json"))) == 1 + 5
    assert said[1].startswith("nothing changed: run ")
    assert sum(text.startswith("nothing changed") for text in said.values()) == 30 - 1 - 1 - 4


def test_an_alert_of_a_failed_job_has_the_last_fifty_lines_of_its_log(month):
    month.deliver()
    month.mood = "fail"
    month.launch(scheduled_run(month.experiment, month.instance), "schedule")
    month.launch(check_dataset(month.experiment, month.instance, month.now), "train")
    month.send_failure_alerts()
    month.send_failure_alerts()
    (alert,) = read_alerts(month.storage)
    lines = alert["text"].splitlines()
    assert lines[-51:] == ["last 50 lines:", *(f"line {k}" for k in range(30, 80))]
    assert "exit code 1" in alert["text"]
