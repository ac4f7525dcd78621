import re
import subprocess
import time
from pathlib import Path
from string import Template

import pytest

from roma_core.job import JobFolder
from roma_pipelines.launching.local import LocalLauncher
from roma_pipelines.launching.slurm.launcher import SlurmLauncher
from roma_pipelines.launching.slurm.profile import SlurmProfile, SlurmSettings, batch_script
from roma_pipelines.launching.spec import JobSpec

GOLDEN = Path(__file__).parents[2] / "golden" / "launching"

PRETRAINING = JobSpec(
    key="c0ffee00c0ffee00c0ff",
    command=("-m", "roma_core.cli", "pretrain", "--job", "$(a 'strange' folder)"),
    config_digest="0" * 64,
    processes_per_node=2,
    threads_per_process=1,
    env_names=("WANDB_API_KEY", "MLFLOW_TRACKING_URI"),
)


LEONARDO = SlurmProfile.load("leonardo", SlurmSettings(account="IscrC_RoMA"))


def slurm(profile, python="/venv/bin/python"):
    return SlurmLauncher(profile, Path("/nowhere"), python)


def test_the_local_plan_is_the_reviewed_one():
    assert LocalLauncher().plan(PRETRAINING).text == (GOLDEN / "local_pretraining.sh").read_text()


def test_the_slurm_plan_of_a_site_is_the_reviewed_one():
    spec = PRETRAINING.model_copy(update={"nodes": 2, "gpus_per_node": 2, "memory_gb": 120.5})

    plan = slurm(LEONARDO).plan(spec).text

    assert plan == (GOLDEN / "leonardo_pretraining.sbatch").read_text()
    checked = subprocess.run(["bash", "-n"], input=plan, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_slurm_plan_of_a_container_is_the_reviewed_one():
    profile = SlurmProfile(
        name="boxed",
        gpu_type="h100",
        container=("apptainer", "exec", "--nv", "/images/roma 1.sif"),
        python="python3",
        constraint="a|b",
        setup=("source /etc/site.sh",),
        sbatch_options=("--mail-type=END", "--nice=10"),
        srun_options=("--mpi=none",),
    )
    spec = PRETRAINING.model_copy(
        update={"runner": "plain", "processes_per_node": 1, "gpus_per_node": 1}
    )

    assert slurm(profile).plan(spec).text == (GOLDEN / "container_plain.sbatch").read_text()


def test_a_plan_renders_in_milliseconds():
    started = time.perf_counter()
    for _ in range(20):
        slurm(LEONARDO).plan(PRETRAINING)

    assert (time.perf_counter() - started) / 20 < 0.01


@pytest.mark.parametrize("folder", ['a"b', "a\nb", "a\\b", "a'b"])
def test_a_folder_that_no_script_can_name_is_refused(folder):
    with pytest.raises(ValueError, match="set ROMA_STORAGE_ROOT"):
        batch_script(PRETRAINING, LEONARDO, JobFolder(folder), 1, "python")


@pytest.mark.parametrize("name", ["generic", "leonardo", "marenostrum5", "orfeo"])
def test_every_profile_that_ships_gives_a_plan(name):
    profile = SlurmProfile.load(name, SlurmSettings())

    assert profile.description
    assert "torch.distributed.run" in slurm(profile).plan(PRETRAINING).text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partition: 'a; rm -rf /'", "partition: must match pattern"),
        ("modules: ['$(id)']", "modules.0: must match pattern"),
        ("account: a b", "account: must match"),
        ("ssh: -oProxyCommand=id", "ssh: must match"),
        ("environment: {'A B': x}", "environment.A B"),
        ("sbatch_options: ['--requeue']", "must not set requeue"),
        ("sbatch_options: ['--wrap=$(id)']", "sbatch_options.0"),
        ("gpus: 4", "gpus: not a setting; the closest one is"),
        ("a: [", "while parsing"),
        ("- a", "expected `setting: value` lines"),
    ],
)
def test_a_wrong_profile_names_file_and_field(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)

    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        SlurmProfile.load("mine", SlurmSettings(profiles=tmp_path))

    assert "mine.yaml" in str(caught.value)


def test_the_projects_profiles_come_before_the_shipped_and_an_unknown_one_names_all(
    tmp_path, monkeypatch
):
    (tmp_path / "profiles" / "slurm").mkdir(parents=True)
    for name in ("generic", "mine"):
        (tmp_path / "profiles" / "slurm" / f"{name}.yaml").write_text("partition: ours")
    monkeypatch.setenv("ROMA_PROJECT", str(tmp_path))
    assert {SlurmProfile.load(name).partition for name in ("generic", "mine")} == {"ours"}
    with pytest.raises(ValueError, match="are generic, leonardo, marenostrum5, mine, orfeo"):
        SlurmProfile.load("leonard", SlurmSettings())
    with pytest.raises(ValueError, match="there are none"):
        SlurmProfile.load("generic", SlurmSettings(profiles=tmp_path))


def test_what_is_the_users_lies_over_the_profile(monkeypatch):
    monkeypatch.setenv("ROMA_SLURM_ACCOUNT", "mine")
    monkeypatch.setenv("ROMA_SLURM_PARTITION", "debug")

    profile = SlurmProfile.load("leonardo")

    assert (profile.account, profile.partition, profile.cpus_per_process) == ("mine", "debug", 8)


def test_arguments_reach_the_program_as_they_are():
    argv = LocalLauncher("/usr/bin/python3").plan(PRETRAINING, JobFolder("/a folder"), 3).content

    assert argv[: argv.index("--")] == [
        *("/usr/bin/python3", "-m", "roma_core.claim", "/a folder", "3"),
    ]
    given = [Template(word).safe_substitute(local_rank="0") for word in argv]  # as torchrun does
    assert tuple(given[-len(PRETRAINING.command) :]) == PRETRAINING.command


def test_a_plain_job_has_no_rendezvous():
    spec = PRETRAINING.model_copy(update={"runner": "plain", "processes_per_node": 1})

    argv = LocalLauncher("python").plan(spec, JobFolder("folder")).content

    assert argv[argv.index("--") + 1 :] == ["python", *spec.command]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"nodes": 2}, "nodes=2"), ({"runner": "plain"}, 'use runner="torchrun"')],
)
def test_what_this_computer_cannot_run_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LocalLauncher().plan(PRETRAINING.model_copy(update=fields))
