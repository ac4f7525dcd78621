from pathlib import Path

import pytest

from roma_pipelines.launching.job import JobSpec
from roma_pipelines.launching.local import LocalLauncher
from roma_pipelines.launching.plan import plan_local

GOLDEN = Path(__file__).parents[2] / "golden" / "launching"

PRETRAINING = JobSpec(
    key="c0ffee00c0ffee00c0ff",
    command=("-m", "roma_core.cli", "pretrain", "--job", "$(a 'strange' folder)"),
    config_digest="0" * 64,
    processes_per_node=2,
    threads_per_process=1,
    env_names=("WANDB_API_KEY", "MLFLOW_TRACKING_URI"),
)


def test_the_local_plan_is_the_reviewed_one():
    assert LocalLauncher().plan(PRETRAINING) == (GOLDEN / "local_pretraining.sh").read_text()


def test_arguments_reach_the_program_as_they_are():
    argv = plan_local(PRETRAINING, "/a folder", 3, "/usr/bin/python3", 29500)

    assert argv[: argv.index("--")] == [
        *("/usr/bin/python3", "-m", "roma_core.attempt", "/a folder", "3"),
    ]
    assert tuple(argv[-len(PRETRAINING.command) :]) == PRETRAINING.command


def test_a_plain_job_has_no_rendezvous():
    spec = PRETRAINING.model_copy(update={"starter": "plain", "processes_per_node": 1})

    argv = plan_local(spec, "folder", 1, "python", 29500)

    assert argv[argv.index("--") + 1 :] == ["python", *spec.command]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"nodes": 2}, "nodes=2"), ({"starter": "plain"}, 'use starter="torchrun"')],
)
def test_what_this_computer_cannot_run_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LocalLauncher().plan(PRETRAINING.model_copy(update=fields))
