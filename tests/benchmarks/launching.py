"""What launching costs: python -m tests.benchmarks.launching

On a real SLURM of two nodes that it starts itself (Debian's slurmctld, slurmd, slurm-client, munge).
Every figure is printed beside its bound.

    plan        rendering a batch script
    watching    1,000 jobs by 20 processes, half of them waiting: questions to the scheduler, and CPU of
                all together
    accepted    from the start of an asset, in a fresh worker process, to the job's id on record;
                preflight included; median of five. And the supervisor's part of it
    first line  of the trainer, later than with bare torchrun in the same job: both in turn, inside one
                allocation; median of the paired differences. And what a batch script does before it
                starts torchrun as bare a job would: that is all there is of it, without the noise
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from roma_core.files import digest_of
from roma_core.job import JobFolder
from roma_pipelines.launching.slurm.launcher import SlurmLauncher
from roma_pipelines.launching.slurm.profile import SlurmProfile, SlurmSettings, batch_script
from roma_pipelines.launching.spec import JobSpec
from roma_pipelines.launching.supervisor import supervise
from tests.pipelines.launching.slurm.real_slurm import Cluster, real_slurm

REPEATS, PAIRS = 5, 15
JOBS, WATCHERS, WATCHED_S, INTERVAL_S = 1000, 20, 20.0, 5.0

FIRST_LINE = """
import time
now = time.time()
import sys
from pathlib import Path
Path(sys.argv[1]).write_text(str(now))
"""

IN_TURN = """#!/bin/bash
#SBATCH --mem=2000 --cpus-per-task=1 --time=60 --output={folder}/in-turn.log
bare() {{
    date +%s.%N >{folder}/began-bare-$1
    srun {python} -m torch.distributed.run --nnodes=1 --nproc-per-node=1 --master-addr=127.0.0.1 \\
        --master-port=29123 {folder}/first.py {folder}/line-bare-$1
}}
ours() {{
    date +%s.%N >{folder}/began-ours-$1
    bash {folder}/script-$1
}}
script() {{ # srun is a stand-in here, which says when it was called
    date +%s.%N >{folder}/began-script-$1
    LINE={folder}/line-script-$1 PATH={folder}/stand-in:$PATH bash {folder}/script-again-$1
}}
for i in $(seq 1 {pairs}); do
    script $i
    if [ $((i % 2)) = 0 ]; then bare $i; ours $i; else ours $i; bare $i; fi
done
"""

WATCH = """
import json, sys, time
from pathlib import Path
from roma_core.job import JobFolder
from roma_pipelines.launching.slurm.launcher import SlurmLauncher
from roma_pipelines.launching.slurm.profile import SlurmProfile
from roma_pipelines.launching.spec import JobHandle, JobSpec
clusters, first, count, seconds, interval = sys.argv[1:]
profile = SlurmProfile(name="many", poll_s=float(interval), slowest_poll_s=float(interval))
launcher = SlurmLauncher(profile, Path(clusters))
spec = JobSpec(key="0" * 20, command=("x",), config_digest="")
handles = [JobHandle(launcher.plan(spec, JobFolder(f"/nowhere/{i}")), {"job_id": str(i)})
           for i in range(int(first), int(first) + int(count))]
begun, end = time.process_time(), time.monotonic() + float(seconds)
while time.monotonic() < end:
    seen = sorted({str(launcher.watch(handle).phase) for handle in handles})
    time.sleep(0.5)
print(json.dumps([time.process_time() - begun, seen]))
"""


def accepted_s(folder: Path, environment: dict[str, str]) -> float:
    """From the start of an asset to its job's id on record."""

    def materialise(noun: str) -> str:
        argv = [sys.executable, "-m", "tests.benchmarks.launching_asset", str(folder), noun]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    materialise("dataset")
    return statistics.median(float(materialise("pretrained_encoder")) for _ in range(REPEATS))


def supervised_s(folder: Path, profile: SlurmProfile) -> float:
    """From the start of a supervisor to its job's id on record."""

    class Accepted(BaseException):
        pass

    def fault_point(name: str) -> None:
        if name == "after record":
            raise Accepted

    script = folder / "nothing.py"
    script.write_text("")
    times = []
    for i in range(REPEATS):
        spec = JobSpec(key=f"{i:020x}", command=(str(script),), config_digest=digest_of({}))
        job = JobFolder(folder / "supervised" / spec.key)
        started = time.perf_counter()
        try:
            launcher = SlurmLauncher(profile, folder / "clusters")
            supervise(launcher, job, spec, {}, fault_point=fault_point)
        except Accepted:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def first_line_s(
    folder: Path, profile: SlurmProfile, cluster: Cluster
) -> tuple[list[float], float, float]:
    """Seconds to the first Python line, bare torchrun's taken off ours, of every pair; the median of
    bare's; and of our batch script before it calls srun.
    """
    (folder / "first.py").write_text(FIRST_LINE)
    stand_in = folder / "stand-in" / "srun"
    stand_in.parent.mkdir()
    stand_in.write_text("#!/bin/bash\ndate +%s.%N >$LINE\n")
    stand_in.chmod(0o755)
    launcher = SlurmLauncher(profile, folder / "clusters")
    for i in range(1, PAIRS + 1):
        for name, key in ((f"script-{i}", f"{i:020x}"), (f"script-again-{i}", f"{i + PAIRS:020x}")):
            command = (str(folder / "first.py"), str(folder / f"line-ours-{i}"))
            spec = JobSpec(key=key, command=command, config_digest=digest_of({}))
            job = folder / "first" / spec.key
            job.mkdir(parents=True)
            (folder / name).write_text(launcher.plan(spec, JobFolder(job)).text)
    script = folder / "in-turn.sh"
    script.write_text(IN_TURN.format(folder=folder, python=sys.executable, pairs=PAIRS))
    cluster.run("sbatch", "--wait", str(script), timeout=1200)

    def seconds(which: str, i: int) -> float:
        line, began = folder / f"line-{which}-{i}", folder / f"began-{which}-{i}"
        return float(line.read_text()) - float(began.read_text())

    each = range(1, PAIRS + 1)
    later = [seconds("ours", i) - seconds("bare", i) for i in each]
    bare, before = (
        statistics.median(seconds(what, i) for i in each) for what in ("bare", "script")
    )
    return later, bare, before


def watching(folder: Path) -> tuple[int, float, int, float]:
    """Questions asked, seconds, largest number allowed, and CPU share of a core."""
    stand_in = folder / "bin" / "squeue"
    stand_in.parent.mkdir()
    states = ("RUNNING|N/A|n1|None", "PENDING|N/A||Priority")
    rows = "".join(
        f"{i}|{states[i % 2]}|main|me|{i}|/nowhere/{i}|roma-{i:012x}-1\n" for i in range(JOBS)
    )
    (folder / "answer").write_text(rows)
    stand_in.write_text(f"#!/bin/bash\necho x >>{folder}/asked\ncat {folder}/answer\n")
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    each = JOBS // WATCHERS
    workers = []
    for i in range(WATCHERS):
        words = (folder / "clusters", i * each, each, WATCHED_S, INTERVAL_S)
        argv = [sys.executable, "-c", WATCH, *map(str, words)]
        workers.append(subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True))
    started = time.monotonic()
    answers = [json.loads(worker.communicate()[0]) for worker in workers]
    assert all(seen == ["running", "waiting"] for _, seen in answers), answers
    wall_s = time.monotonic() - started
    asked = len((folder / "asked").read_text().split())
    return asked, wall_s, int(wall_s / INTERVAL_S) + 1, sum(cpu for cpu, _ in answers) / WATCHED_S


def plan_s() -> float:
    profile = SlurmProfile.load("leonardo", SlurmSettings())
    spec = JobSpec(key="a" * 20, command=("-m", "x"), config_digest="", nodes=2, gpus_per_node=4)
    times = []
    for _ in range(REPEATS * 20):
        started = time.perf_counter()
        batch_script(spec, profile, JobFolder(Path("/a/folder")), 1, "python")
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"plan      {1000 * plan_s():.2f} ms (at most 10 ms)", flush=True)
        asked, wall_s, allowed, share = watching(folder)
        print(
            f"watching  {JOBS} jobs by {WATCHERS} processes: {asked} questions in {wall_s:.0f} s (at most "
            f"{allowed}), {100 * share:.1f} % of a core in all (at most 5 %)",
            flush=True,
        )
        with real_slurm(folder / "slurm") as cluster:
            os.environ.update(cluster.variables)
            profile = SlurmProfile(
                name="mini", poll_s=0.2, memory_gb=2, environment={"GLOO_SOCKET_IFNAME": "lo"}
            )
            (folder / "mini.yaml").write_text(
                "poll_s: 0.3\nenvironment: { GLOO_SOCKET_IFNAME: lo }\n"
            )
            environment = {
                **os.environ,
                "ROMA_ENV_FILE": os.devnull,
                "ROMA_STORAGE_ROOT": str(folder / "roma"),
                "ROMA_SLURM_PROFILES": str(folder),
                "ROMA_SLURM_PROFILE": "mini",
            }
            print(
                f"accepted  {accepted_s(folder, environment):.2f} s after the asset's start (at most "
                f"1 s), {supervised_s(folder, profile):.3f} s after the supervisor's",
                flush=True,
            )
            cluster.settle()
            later, bare, before = first_line_s(folder, profile, cluster)
            low, middle, high = statistics.quantiles(later, n=4)
            print(
                f"first line {middle:+.3f} s (quartiles {low:+.3f}, {high:+.3f}; {PAIRS} pairs) against "
                f"bare torchrun's {bare:.2f} s (at most +0.3 s); the script before srun {before:.3f} s"
            )


if __name__ == "__main__":
    main()
