"""What a profile puts around a job, on a real SLURM: a container command, modules, set-up lines.

``apptainer`` and ``module`` are stand-ins that do what matters here: the one runs the rest of its
words in another environment, the other is a function that only a login shell knows. The quoting
between batch script, srun, bash and the program is the real one.
"""

import json
import os
import stat

import pytest

from roma_pipelines.launching.spec import JobFailed
from roma_pipelines.launching.supervisor import supervise

CONFIG = {"base_lr": 0.001}
FAST = {"poll_every_s": 0.1}
WORDS = (
    "a b",
    "it's",
    '"quoted"',
    "$(touch evil)",
    "$$ ${local_rank}",
    "`id`",
    "*",
    "--",
    "",
    "täglich",
    "-m",
    "a\\b",
)
IMAGE = "/images/roma 1 'new'.sif"

# names what it was given before the program, then is the program
APPTAINER = """#!/bin/bash
[ "$1" = exec ] || { echo "apptainer: $1 is not known" >&2; exit 255; }
shift
options=()
while [[ $1 == --* ]]; do options+=("$1"); shift; done
export CONTAINER_OPTIONS="${options[*]}" CONTAINER_IMAGE=$1
shift
exec "$@"
"""

MODULES = """
module() {
    [ "$1" = load ] && [ -n "${2##*missing*}" ] || { echo "no module is named $2" >&2; return 1; }
    LOADED="$LOADED $2"
    export LOADED
}
"""

SEES = """
names = ("RANK", "WORLD_SIZE", "SLURMD_NODENAME", "CONTAINER_OPTIONS", "CONTAINER_IMAGE", "LOADED", "GREETING")
seen = {name: os.environ.get(name) for name in names}
rank = os.environ.get("RANK", "0")
(folder / f"seen-{rank}.json").write_text(json.dumps({**seen, "argv": sys.argv[1:]}))
if rank == "0":
    wait_for(f"seen-{int(os.environ.get('WORLD_SIZE', '1')) - 1}.json")
    succeed(world_size=int(os.environ.get("WORLD_SIZE", "1")))
"""


@pytest.fixture
def seen(folder):
    """What each process saw, by rank."""
    return lambda: [json.loads(p.read_text()) for p in sorted(folder.path.glob("seen-*.json"))]


@pytest.fixture
def login_shell(tmp_path, monkeypatch):
    """A home whose login shells know ``module``."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bash_profile").write_text(MODULES)
    monkeypatch.setenv("HOME", str(home))


def with_settings(slurm, **changes):
    slurm.profile = slurm.profile.model_copy(update=changes)
    return slurm


@pytest.mark.parametrize("runner", ["torchrun", "plain"])
def test_a_container_gets_every_word_as_it_is(
    slurm, folder, make_spec, seen, tmp_path, monkeypatch, runner
):
    path = tmp_path / "bin" / "apptainer"
    path.parent.mkdir()
    path.write_text(APPTAINER)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    spec = make_spec(SEES, runner=runner, nodes=2 if runner == "torchrun" else 1)
    spec = spec.model_copy(update={"command": (*spec.command, *WORDS)})
    profile = with_settings(slurm, container=("apptainer", "exec", "--nv", "--bind=/a b", IMAGE))

    outcome = supervise(profile, folder, spec, CONFIG, **FAST)

    assert outcome.status == "completed"
    nodes = ["n1", "n2"] if runner == "torchrun" else ["n1"]
    assert [found["SLURMD_NODENAME"] for found in seen()] == nodes
    for found in seen():
        assert found["argv"] == list(WORDS)
        assert (found["CONTAINER_OPTIONS"], found["CONTAINER_IMAGE"]) == ("--nv --bind=/a b", IMAGE)
    assert not list(tmp_path.rglob("evil"))


def test_a_container_command_that_fails_is_in_the_error(slurm, folder, make_spec, monkeypatch):
    profile = with_settings(slurm, container=("no-such-apptainer", "exec", IMAGE))

    with pytest.raises(JobFailed, match="no-such-apptainer"):
        supervise(profile, folder, make_spec(), CONFIG, **FAST)


def test_modules_and_set_up_lines_reach_every_node(slurm, folder, make_spec, seen, login_shell):
    profile = with_settings(
        slurm,
        modules=("cuda/12.1", "python/3.11+x"),
        setup=("export GREETING=\"it's a 'good' day\"",),
    )

    supervise(profile, folder, make_spec(SEES, runner="torchrun", nodes=2), CONFIG, **FAST)

    assert [found["LOADED"] for found in seen()] == [" cuda/12.1 python/3.11+x"] * 2
    assert [found["GREETING"] for found in seen()] == ["it's a 'good' day"] * 2


def test_a_module_that_is_missing_fails_with_its_name(
    slurm, folder, make_spec, login_shell, starts
):
    profile = with_settings(slurm, modules=("missing/1.0",))

    with pytest.raises(JobFailed, match=r"no module missing/1\.0"):
        supervise(profile, folder, make_spec(), CONFIG, **FAST)
    assert not (folder.path / "starts").exists()
