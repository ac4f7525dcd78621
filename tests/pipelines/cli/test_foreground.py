"""Who holds a run that no daemon looks after."""

import os

import dagster as dg
import pytest

from roma_pipelines.cli import demo as foreground
from roma_pipelines.launching.spec import root_of


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@dg.job
def nothing():
    pass


def add(instance, tags, status=dg.DagsterRunStatus.STARTED):
    return instance.create_run_for_job(nothing, tags=tags, status=status)


def killed(tags):
    """The same, of a process whose id another one has by now."""
    return {**tags, "roma/foreground_process": f"{os.getpid()} another time"}


def test_a_run_is_held_while_its_process_lives(instance):
    tags = foreground.tags_of("waves", "a")
    mine = add(instance, tags)
    gone = add(instance, killed(tags))
    add(instance, killed(tags), dg.DagsterRunStatus.SUCCESS)
    add(instance, foreground.tags_of("vowels", "a"))
    add(instance, {**tags, "roma/foreground_host": "another"})  # nobody can say from here

    held, left = foreground.unfinished(instance, "waves")

    assert [run.run_id for run in held] == [mine.run_id]
    assert [run.run_id for run in left] == [gone.run_id]
    assert held[0].tags[foreground.PROCESS_TAG].split()[0] == str(os.getpid())
    assert left[0].tags[foreground.SETTINGS_TAG] == "a"


def test_a_retry_of_a_retry_leads_to_the_first_run(instance):
    first = add(instance, killed(foreground.tags_of("waves", "a")))
    second = add(instance, killed(foreground.tags_of("waves", "a", first)))
    third = add(instance, foreground.tags_of("waves", "a", second))

    def tags_of(run_id):
        return instance.get_run_by_id(run_id).tags

    assert root_of(third.run_id, third.tags, tags_of) == first.run_id
    _, left = foreground.unfinished(instance, "waves")
    assert [run.run_id for run in left] == [second.run_id, first.run_id]
