"""The slurm backend on a real SLURM of two nodes: from the submission to a proven end."""

import json
import os
import re

import pytest

from roma_core.job import JobFolder
from roma_pipelines.launching.launcher import Rejected, Unreachable
from roma_pipelines.launching.slurm.cluster import MARK, own_jobs, parse_squeue, queue_positions
from roma_pipelines.launching.spec import JobFailed, Phase
from roma_pipelines.launching.supervisor import request_cancel, supervise

CONFIG = {"base_lr": 0.001}
FAST = {"poll_every_s": 0.1}


def printed_by(attempt):
    """What a job printed, without the lines that SLURM's own step daemon writes into the same file."""
    lines = attempt.log.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("slurmstepd"))


def test_a_job_that_proves_its_success_is_completed(slurm, cluster, folder, make_spec):
    outcome = supervise(slurm, folder, make_spec("print('hello')\nsucceed()"), CONFIG, **FAST)

    assert outcome.status == "completed"
    (record,) = outcome.attempts
    assert record.backend == "slurm"
    assert set(record.external) == {"job_id", "profile"}
    assert record.end.nodes in cluster.nodes
    assert printed_by(folder.attempt(1)) == "hello\n"
    owner = json.loads(folder.attempt(1).owner.read_text())
    assert owner["external"] == {"SLURM_JOB_ID": record.external["job_id"]}
    assert (record.external["job_id"], "roma-0123456789ab-1", "COMPLETED") in cluster.jobs()


WORLD = """
import os, torch, torch.distributed as dist
from roma_core.job import JobFolder, Result
dist.init_process_group("gloo")
mine = {name: os.environ.get(name) for name in
        ("SLURMD_NODENAME", "LOCAL_RANK", "RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "KEY")}
everybody = [None] * dist.get_world_size()
dist.all_gather_object(everybody, mine)
if dist.get_rank() == 0:
    folder = JobFolder(os.environ["ROMA_JOB_FOLDER"])
    folder.write_result(Result(job_key=folder.path.name, attempt=1, facts={"ranks": everybody},
        world_size=len(everybody), wall_s=0.1))
dist.destroy_process_group()
"""


def test_two_nodes_with_two_processes_each_are_one_world(
    slurm, folder, tmp_path, make_spec, monkeypatch
):
    monkeypatch.setenv("KEY", 'it\'s a "secret" $(id)')
    monkeypatch.setenv("NOISE", "not for the job")
    spec = make_spec(
        "",
        runner="torchrun",
        nodes=2,
        processes_per_node=2,
        gpus_per_node=2,
        env_names=("KEY",),
    )
    (tmp_path / "job.py").write_text(WORLD)

    outcome = supervise(slurm, folder, spec, CONFIG, **FAST)

    ranks = outcome.result.facts["ranks"]
    assert [rank["RANK"] for rank in ranks] == ["0", "1", "2", "3"]
    assert [rank["SLURMD_NODENAME"] for rank in ranks] == ["n1", "n1", "n2", "n2"]
    assert {rank["CUDA_VISIBLE_DEVICES"] for rank in ranks} == {"0,1"}
    assert {rank["KEY"] for rank in ranks} == {'it\'s a "secret" $(id)'}
    assert outcome.attempts[0].end.nodes == "n[1-2]"
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    assert not any(b"secret" in path.read_bytes() for path in files if path != folder.result)


def test_a_crash_is_reported_with_code_and_log(slurm, folder, make_spec):
    body = "print('a useful line', flush=True)\nraise MemoryError('too many whales')"

    with pytest.raises(JobFailed, match=r"SLURM says FAILED .*exit code 1") as caught:
        supervise(slurm, folder, make_spec(body), CONFIG, **FAST)

    assert "a useful line" in str(caught.value)
    assert "MemoryError: too many whales" in str(caught.value)


def test_exit_code_0_proves_nothing(slurm, folder, make_spec):
    with pytest.raises(JobFailed, match=r"ended ok.*no exit.json"):
        supervise(slurm, folder, make_spec("pass"), CONFIG, **FAST)


def test_worlds_that_did_not_meet_are_no_success(slurm, folder, make_spec):
    with pytest.raises(JobFailed, match="2 processes made it, expected 1"):
        supervise(slurm, folder, make_spec("succeed(world_size=2)"), CONFIG, **FAST)


def test_the_queue_is_told_in_words(slurm, cluster, folder, make_spec, eventually):
    for name in ("runs", "first", "second"):  # one runs on both nodes, two are in front of ours
        words = ("--exclusive", "-N2", f"--job-name={name}", "-o", "/dev/null")
        cluster.run("sbatch", *words, "--wrap=sleep 100")
    eventually(lambda: "RUNNING" in [state for _, _, state in cluster.jobs()])
    cluster.run("sbatch", "--hold", "--job-name=held", "-o", "/dev/null", "--wrap=true")
    seen = []

    def on_poll(state):
        if state.phase is Phase.WAITING and state.reason not in [s.reason for s in seen]:
            seen.append(state)
            if state.queue.get("queue_position") == 3:
                cluster.run("scancel", "--name=first")
            elif state.queue.get("queue_position") == 2:
                for name in ("second", "held", "runs"):
                    cluster.run("scancel", f"--name={name}")

    supervise(slurm, folder, make_spec("succeed()"), CONFIG, on_poll=on_poll, **FAST)

    placed = [state for state in seen if "queue_position" in state.queue]
    assert ", 3 of 3 in the queue" in placed[0].reason
    assert placed[0].queue["queue_length"] == 3
    assert "2 of 2 in the queue" in placed[-1].reason


def test_a_place_is_among_those_that_want_the_same_nodes():
    lines = """\
Welcome | to | the | cluster
1|PENDING|N/A||Resources|main|me|50|/jobs/a|roma-a-1
2|PENDING|N/A||Priority|main|you|90|/home/you|a name | with bars
3|PENDING|N/A||Priority|low,main|you|70|/home/you|x
4|PENDING|N/A||Priority|low|you|99|/home/you|x
5|PENDING|N/A||JobHeldUser|main|you|99|/home/you|x
6|RUNNING|N/A|n1|None|main|me|99|/jobs/b|roma-b-1
7|PENDING|N/A||Dependency|main|me|50|/jobs/c|roma-c-1
8|PENDING|N/A||Priority|main|you|10|/home/you|x
"""
    rows = parse_squeue(re.sub(r"(?m)^(\d)", rf"{MARK}\1", lines))

    assert (rows["2"]["name"], rows["1"]["folder"]) == (" with bars", "/jobs/a")
    assert set(own_jobs(rows)) == {"1", "6", "7"}
    assert queue_positions(rows, own_jobs(rows)) == {"1": (3, 4)}


@pytest.mark.parametrize("name", ["with a space", "a;b$c", "100%j", "täglich"])
def test_any_folder_name_a_file_system_takes(slurm, tmp_path, make_spec, name):
    folder = JobFolder(tmp_path / name / "0123456789abcdef0123")

    supervise(slurm, folder, make_spec("print('here')\nsucceed()"), CONFIG, **FAST)

    assert printed_by(folder.attempt(1)) == "here\n"


def test_what_is_submitted_is_what_was_planned(slurm, folder, make_spec):
    supervise(slurm, folder, make_spec("succeed()"), CONFIG, **FAST)

    printed = slurm.plan(make_spec("succeed()")).text
    submitted = slurm.plan(make_spec("succeed()"), folder).text
    assert folder.attempt(1).script.read_text() == submitted
    assert submitted == printed.replace("JOB_FOLDER", str(folder.path)).replace(
        f"ROMA_{folder.path}", "ROMA_JOB_FOLDER"
    )


@pytest.mark.parametrize("lost", range(1, 12))
def test_an_answer_that_was_cut_short_is_no_answer(lost):
    row = f"{MARK}6|RUNNING|N/A|n1|None|main|me|99|/jobs/b|roma-b-1"

    with pytest.raises(Unreachable, match="expected 10 fields"):
        parse_squeue(f"{row}\n{row.rsplit('|', min(lost, 9))[0]}")


def test_an_answer_that_was_cut_short_ends_no_watch(slurm, cluster, folder, make_spec, stand_in):
    stand_in("squeue", f'echo "{MARK}12|RUNN"; mkdir {folder.path}/asked || exec $REAL "$@"')
    seen = []

    def on_poll(state):
        seen.append(state)
        if len(seen) > 5:
            stand_in("squeue", 'exec $REAL "$@"')

    outcome = supervise(slurm, folder, make_spec(), CONFIG, on_poll=on_poll, **FAST)

    assert outcome.status == "completed"
    assert seen[0].phase is Phase.UNKNOWN and "expected 10 fields" in seen[0].reason


@pytest.mark.parametrize("name", ["sbatch", "squeue", "scontrol", "scancel", "sinfo", "sacct"])
def test_lines_of_a_sites_wrapper_are_ignored(slurm, cluster, folder, make_spec, stand_in, name):
    """Before and behind the answer, on both streams, with the separators that answers have."""
    noise = "echo '12|NOTICE|a=b: maintenance at 8|12:00|x|y'; echo 'connection refused' >&2"
    stand_in(name, f'{noise}; $REAL "$@"; code=$?; {noise}; exit $code')
    other = JobFolder(folder.path.with_name("other"))

    def ask(state):
        if other.checkpoints.exists():
            request_cancel(other, "me")

    supervise(slurm, folder, make_spec("succeed()"), CONFIG, **FAST)
    with pytest.raises(JobFailed, match="cancelled by me"):
        supervise(slurm, other, make_spec("save(1)\ntime.sleep(60)"), CONFIG, on_poll=ask, **FAST)


def test_a_number_that_is_no_job_id_is_told_apart_by_the_name(
    slurm, cluster, folder, make_spec, stand_in, starts
):
    before = len(cluster.jobs())
    stand_in("sbatch", 'echo 420; $REAL "$@"; code=$?; echo 421; exit $code')

    outcome = supervise(slurm, folder, make_spec(), CONFIG, **FAST)

    assert (starts(), len(cluster.jobs())) == ([1], before + 1)
    assert outcome.attempts[0].external["job_id"] in [job for job, _, _ in cluster.jobs()]
    assert "watch that one" not in folder.events.read_text()  # no other one was ever watched


def test_an_answer_that_names_this_cluster_is_taken(slurm, folder, make_spec, stand_in):
    stand_in("sbatch", '$REAL "$@" | sed "s/$/;mini/"')

    assert supervise(slurm, folder, make_spec(), CONFIG, **FAST).status == "completed"


@pytest.mark.parametrize(("code", "left"), [(0, ""), (1, "call `scancel --clusters=other 101`")])
def test_a_job_sent_to_another_cluster_is_refused_and_cancelled(
    slurm, folder, make_spec, stand_in, tmp_path, code, left
):
    stand_in("sbatch", 'echo "101;other"')
    stand_in("scancel", f'echo "$@" >>{tmp_path}/cancelled; exit {code}')

    with pytest.raises(Rejected, match=f"another cluster, other, .*unset SBATCH_CLUSTERS.*{left}$"):
        supervise(slurm, folder, make_spec(), CONFIG, **FAST)

    assert (tmp_path / "cancelled").read_text() == "--clusters=other 101\n"


def test_through_ssh_only_commands_travel(slurm, cluster, folder, make_spec, tmp_path, monkeypatch):
    """``ssh`` stands for one that runs its standard input on this computer, in a bare environment,
    after a banner and what a .bashrc prints."""
    stand_in = tmp_path / "bin" / "ssh"
    stand_in.parent.mkdir()
    stand_in.write_text(
        "#!/bin/bash\n"
        f'echo "$@" >>{tmp_path}/ssh.log\n'
        "echo '#1 Timed out? Call us'; echo 'roma|7|all communication is logged' >&2\n"
        f"exec env -i PATH=$PATH HOME=$HOME SLURM_CONF={cluster.variables['SLURM_CONF']} bash -s\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("KEY", "a secret")
    slurm.shell.ssh = "login.example.org"
    spec = make_spec("print(os.environ['KEY'])\nsucceed()", env_names=("KEY",))

    supervise(slurm, folder, spec, CONFIG, **FAST)

    assert printed_by(folder.attempt(1)) == "a secret\n"
    asked = (tmp_path / "ssh.log").read_text()
    assert "ControlMaster=auto" in asked and "login.example.org bash -s" in asked
    assert "secret" not in asked
