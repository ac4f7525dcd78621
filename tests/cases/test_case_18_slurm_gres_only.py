"""A site that knows only --gres has a field of the profile for it."""

import shlex

import pytest

from roma_core.job import JobFolder
from roma_pipelines.launching.slurm.profile import SlurmProfile, batch_script
from roma_pipelines.launching.spec import JobSpec


def options_of(gpus, **profile):
    spec = JobSpec(
        key="0123456789abcdef0123", command=("-m", "x"), config_digest="0", gpus_per_node=gpus
    )
    script = batch_script(
        spec, SlurmProfile(name="s", **profile), JobFolder("/jobs/x"), 1, "python"
    )
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line]
    return [o for o in shlex.split(" ".join(lines)) if "gpu" in o or "gres" in o], script


@pytest.mark.parametrize(
    ("gpus", "profile", "expected"),
    [
        (4, {"gpu_option": "gres"}, ["--gres=gpu:4"]),
        (4, {"gpu_option": "gres", "gpu_type": "h100"}, ["--gres=gpu:h100:4"]),
        (4, {}, ["--gpus-per-node=4"]),
        (0, {"gpu_option": "gres"}, []),
        (
            4,
            {"gpu_option": "gres", "sbatch_options": ("--gres=lustre:1",)},
            ["--gres=gpu:4,lustre:1"],
        ),
        (0, {"gpu_option": "gres", "sbatch_options": ("--gres=lustre:1",)}, ["--gres=lustre:1"]),
        (2, {"sbatch_options": ("--gres=nvme",)}, ["--gpus-per-node=2", "--gres=nvme"]),
    ],
)
def test_the_gpus_are_asked_for_once_by_the_option_of_the_site(gpus, profile, expected):
    options, script = options_of(gpus, **profile)

    assert options == expected
    assert ("CUDA_VISIBLE_DEVICES=" in script) == (gpus == 0)


@pytest.mark.parametrize(
    "option", ["--gres=gpu:4", "--gres=lustre:1,gpu:a100:4", "--gpus=4", "--gpus-per-task=1"]
)
def test_gpus_that_the_job_does_not_know_of_are_refused(option):
    """They would be paid for, and hidden from a job with gpus_per_node 0."""
    with pytest.raises(ValueError, match=r"gpus_per_node, with gpu_option of the profile"):
        SlurmProfile(name="s", sbatch_options=(option,))


def test_marenostrum_asks_by_gres():
    assert SlurmProfile.load("marenostrum5").gpu_option == "gres"
