"""What a real cluster's word refuses before a job queues, and every reason at once."""

import os

import pytest

from roma_core.job import JobFolder
from roma_pipelines.launching.launcher import Rejected, Unreachable
from roma_pipelines.launching.slurm.cluster import Answer, minutes
from roma_pipelines.launching.slurm.launcher import SlurmLauncher, gpus_of
from roma_pipelines.launching.supervisor import supervise

CONFIG = {"base_lr": 0.001}


@pytest.fixture
def refusals(slurm, folder, make_spec, profile):
    """Why a job with these needs is refused with these settings of the profile."""

    def refusals(settings=None, **needs):
        slurm.profile = profile.model_copy(update=settings or {})
        return slurm.preflight(slurm.plan(make_spec("", **needs), folder))

    return refusals


def test_a_job_that_fits_is_not_refused(refusals):
    assert refusals({"partition": "main"}, gpus_per_node=2, nodes=2, runner="torchrun") == []


def test_every_reason_is_given_at_once(refusals):
    found = refusals(
        {"python": "/no/such/python"},
        runner="torchrun",
        nodes=3,
        gpus_per_node=8,
        processes_per_node=4,
        threads_per_process=4,
        memory_gb=64,
        time_limit_min=1000,
    )

    assert [reason.split(",")[0] for reason in found] == [
        "there is no interpreter /no/such/python; set `python` in the profile mini",
        "3 nodes are asked for",
        "8 GPUs a node are asked for",
        "16 CPUs a node are asked for",
        "64 GB a node are asked for",
        "a time limit of 1000 min is asked for",
    ]
    assert "has at most 2" in found[2]
    assert "is 240 min" in found[5]


def test_a_partition_that_does_not_exist_names_those_there_are(refusals):
    (reason,) = refusals({"partition": "gpu"})

    assert reason == "there is no partition gpu at mini; there are high, low, main"


def test_a_gpu_type_the_partition_has_not(refusals):
    (reason,) = refusals({"gpu_type": "h100"}, gpus_per_node=1)

    assert reason.startswith("1 GPUs of type h100 a node are asked for")


def test_a_partition_that_is_down(refusals, cluster):
    cluster.run("scontrol", "update", "partitionname=low", "state=down")
    try:
        assert refusals({"partition": "low"}) == ["partition low is not up"]
    finally:
        cluster.run("scontrol", "update", "partitionname=low", "state=up")


def test_what_only_sbatch_knows_is_its_own_word(refusals):
    (reason,) = refusals({"constraint": "unobtainium"})

    assert reason.startswith("sbatch would refuse it:")
    assert "Invalid feature specification" in reason


def test_a_folder_that_cannot_be_written(slurm, make_spec, tmp_path):
    (tmp_path / "file").touch()

    (reason,) = slurm.preflight(
        slurm.plan(make_spec(""), JobFolder(tmp_path / "file" / "jobs" / "x"))
    )

    assert "set ROMA_STORAGE_ROOT" in reason


def test_a_folder_the_login_node_does_not_see(refusals, slurm, tmp_path, monkeypatch):
    stand_in = tmp_path / "bin" / "ssh"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\nsed "s/cat/echo of another disk:/" | exec bash -s\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    slurm.shell.ssh = "login.example.org"

    (reason,) = refusals()

    assert reason.startswith("login.example.org does not see what is written to")


def test_a_computer_without_slurm(refusals, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    (reason,) = refusals()

    assert "no sbatch, squeue, scontrol, scancel, sinfo on this computer" in reason


@pytest.mark.parametrize(("ssh", "advice"), [(None, "SLURM_CONF"), ("login", "name a login node")])
def test_slurm_commands_that_know_of_no_cluster(
    profile, make_spec, folder, tmp_path, monkeypatch, ssh, advice
):
    launcher = SlurmLauncher(profile, tmp_path / "clusters")
    monkeypatch.setattr("shutil.which", lambda name: name)

    def run(*argv):
        if argv[0] == "sinfo":
            return Answer(1, "", "sinfo: fatal: Could not establish a configuration source\n")
        return Answer(0, "", "")

    monkeypatch.setattr(launcher.shell, "run", run)
    launcher.profile = profile.model_copy(update={"ssh": ssh})

    (reason,) = launcher.preflight(launcher.plan(make_spec(""), folder))

    assert "know of no cluster" in reason and advice in reason


def test_nothing_is_written_or_queued_for_a_refused_job(slurm, cluster, folder, make_spec):
    before = cluster.jobs()
    spec = make_spec("succeed()", gpus_per_node=8)

    with pytest.raises(Rejected, match="8 GPUs a node are asked for"):
        supervise(slurm, folder, spec, CONFIG)

    assert not folder.path.exists()
    assert cluster.jobs() == before


def test_a_missing_interpreter_on_the_node_fails_with_its_message(
    slurm, folder, make_spec, profile
):
    slurm.profile = profile.model_copy(update={"setup": ("true",), "python": "/no/such/python"})

    with pytest.raises(RuntimeError, match="/no/such/python: No such file or directory"):
        supervise(slurm, folder, make_spec("succeed()"), CONFIG, poll_every_s=0.1)


def test_a_cluster_that_is_away_is_no_refusal(refusals, monkeypatch, tmp_path):
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=none\nSlurmctldHost=none(127.0.0.1)\nSlurmctldPort=1\nMessageTimeout=2\n"
    )
    monkeypatch.setenv("SLURM_CONF", str(conf))

    with pytest.raises(Unreachable, match="sinfo"):
        refusals()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("30:00", 30),
        ("4:00:00", 240),
        ("1-02:30:00", 1590),
        ("infinite", float("inf")),
        ("n/a", float("inf")),
    ],
)
def test_time_limits_as_sinfo_writes_them(text, value):
    assert minutes(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(null)", {}),
        ("gpu:2", {"": 2}),
        ("gpu:a100:4(S:0-1),lustre:1", {"a100": 4}),
        ("gpu:a100:2,gpu:h100:2", {"a100": 2, "h100": 2}),
        ("gpu:a100_1g.5gb:7(S:0)", {"a100_1g.5gb": 7}),
    ],
)
def test_gpus_as_sinfo_writes_them(text, value):
    assert gpus_of(text) == value
