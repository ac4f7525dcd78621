"""What launching costs: python -m tests.benchmarks.launching

On a real SLURM of two nodes that it starts itself (Debian's slurmctld, slurmd, slurm-client, munge).
Each figure is the median of five, printed beside its bound.

    accepted   from the start of a supervisor to the job's id on record, preflight included
    first line of the trainer, later than with bare torchrun on the same cluster
    watching   1,000 jobs by 20 processes: questions to the scheduler, and CPU of all together
    plan       rendering a batch script
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
from roma_pipelines.launching.job import JobSpec
from roma_pipelines.launching.sbatch import batch_script
from roma_pipelines.launching.site import Site, SlurmSettings, load_site
from roma_pipelines.launching.slurm import SlurmLauncher
from roma_pipelines.launching.supervisor import supervise
from tests.pipelines.launching.real_slurm import Cluster, real_slurm

REPEATS = 5
JOBS, WATCHERS, WATCHED_S, INTERVAL_S = 1000, 20, 20.0, 5.0

FIRST_LINE = """
import time
now = time.time()
import json, os, sys
from pathlib import Path
Path(sys.argv[1]).write_text(str(now))
if len(sys.argv) > 2:
    folder = Path(os.environ["ROMA_JOB_FOLDER"])
    (folder / "result.json").write_text(json.dumps({"schema_version": 1, "job_key": folder.name,
        "attempt": 1, "world_size": 1, "wall_s": 0.0}))
"""

BARE = """#!/bin/bash
#SBATCH --mem=2000 --output=/dev/null
date +%s.%N >{folder}/began
srun {python} -m torch.distributed.run --nnodes=1 --nproc-per-node=1 --master-addr=127.0.0.1 \\
    --master-port=29123 {folder}/first.py {folder}/line
"""

WATCH = """
import json, sys, time
from pathlib import Path
from roma_pipelines.launching.job import JobHandle
from roma_pipelines.launching.site import Site
from roma_pipelines.launching.slurm import SlurmLauncher
clusters, first, count, seconds, interval = sys.argv[1:]
site = Site(name="many", poll_s=float(interval), slowest_poll_s=float(interval))
launcher = SlurmLauncher(site, Path(clusters))
handles = [JobHandle(f"/nowhere/{i}", 1, "slurm", {"job_id": str(i), "site": "many"})
           for i in range(int(first), int(first) + int(count))]
begun, end = time.process_time(), time.monotonic() + float(seconds)
while time.monotonic() < end:
    for handle in handles:
        state = launcher.watch(handle)
    time.sleep(0.5)
print(json.dumps([time.process_time() - begun, str(state)]))
"""


def accepted_s(folder: Path, site: Site) -> float:
    """From nothing to a job id on record."""

    class Accepted(BaseException):
        pass

    def fault_point(name: str) -> None:
        if name == "after record":
            raise Accepted

    script = folder / "sleep.py"
    script.write_text("")
    times = []
    for i in range(REPEATS):
        spec = JobSpec(key=f"{i:020x}", command=(str(script),), config_digest=digest_of({}))
        job = JobFolder(folder / "jobs" / spec.key)
        started = time.perf_counter()
        try:
            launcher = SlurmLauncher(site, folder / "clusters")
            supervise(launcher, job, spec, {}, fault_point=fault_point)
        except Accepted:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def first_line_s(folder: Path, site: Site, cluster: Cluster) -> tuple[float, float]:
    """From the start of the batch script to the first Python line: ours, and bare torchrun's."""
    (folder / "first.py").write_text(FIRST_LINE)
    bare_script = folder / "bare.sh"
    bare_script.write_text(BARE.format(folder=folder, python=sys.executable))
    timed = site.model_copy(update={"setup": ()})
    ours, bare = [], []
    for i in range(REPEATS):
        for name in ("line", "began"):
            (folder / name).unlink(missing_ok=True)
        cluster.run("sbatch", "--wait", str(bare_script))
        bare.append(float((folder / "line").read_text()) - float((folder / "began").read_text()))

        key = f"{i + 100:020x}"
        command = (str(folder / "first.py"), str(folder / "line"), "result")
        spec = JobSpec(key=key, command=command, config_digest=digest_of({}))
        job = JobFolder(folder / "jobs" / key)
        launcher = SlurmLauncher(timed, folder / "clusters", files_within_s=0)
        written = launcher._write_script

        def with_time(spec: JobSpec, job: JobFolder, attempt: int, write: object = written) -> Path:
            path: Path = write(spec, job, attempt)  # type: ignore[operator]
            head, _, rest = path.read_text().partition("\nfolder=")
            path.write_text(f"{head}\ndate +%s.%N >{folder}/began\nfolder={rest}")
            return path

        launcher._write_script = with_time  # type: ignore[method-assign]
        supervise(launcher, job, spec, {}, poll_every_s=0.1)
        ours.append(float((folder / "line").read_text()) - float((folder / "began").read_text()))
    return statistics.median(ours), statistics.median(bare)


def watching(folder: Path) -> tuple[int, float, int, float]:
    """Questions asked, seconds, largest number allowed, and CPU share of a core."""
    stand_in = folder / "bin" / "squeue"
    stand_in.parent.mkdir()
    rows = "".join(f"{i}|roma-{i:012x}-1|RUNNING|N/A|n1|None|/nowhere/{i}\n" for i in range(JOBS))
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
    assert all("RUNNING" in state for _, state in answers), answers
    wall_s = time.monotonic() - started
    asked = len((folder / "asked").read_text().split())
    return asked, wall_s, int(wall_s / INTERVAL_S) + 1, sum(cpu for cpu, _ in answers) / WATCHED_S


def plan_s() -> float:
    site = load_site("leonardo", SlurmSettings())
    spec = JobSpec(key="a" * 20, command=("-m", "x"), config_digest="", nodes=2, gpus_per_node=4)
    times = []
    for _ in range(REPEATS * 20):
        started = time.perf_counter()
        batch_script(spec, site, "/a/folder", 1, "python")
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
            site = Site(
                name="mini", poll_s=0.2, memory_gb=2, environment={"GLOO_SOCKET_IFNAME": "lo"}
            )
            print(f"accepted  {accepted_s(folder, site):.3f} s (at most 1 s)", flush=True)
            cluster.settle()
            ours, bare = first_line_s(folder, site, cluster)
            print(
                f"first line {ours - bare:+.3f} s against bare torchrun's {bare:.2f} s "
                f"(at most +0.3 s)"
            )


if __name__ == "__main__":
    main()
