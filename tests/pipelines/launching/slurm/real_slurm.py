"""A real SLURM of a few nodes on this computer, all of it below one folder.

Debian's packages slurmctld, slurmd, slurm-client and munge; no system configuration is read. Works
as root and as anybody. Each node has a slurmd of its own and an address of its own (127.0.1.N); a
"GPU" is a link to /dev/null, which is enough for SLURM to count it and to hand it out.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.time_limits import within

NEEDED = ("slurmctld", "slurmd", "sbatch", "squeue", "munged")
CPUS, MEMORY_MB, GPUS = 8, 8000, 2  # of a node, claimed; a node may claim more than there is
_OUTER = ("SLURM", "SBATCH", "SALLOC", "SRUN", "SQUEUE", "SACCT", "SCANCEL", "SINFO", "PMI", "OMP_")

CONFIGURATION = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=5
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=1
KillWait={kill_wait_s}
MinJobAge={min_job_age_s}
CompleteWait=0
TmpFS={folder}/tmp
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 MaxTime=240 DefaultTime=10
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE MaxTime=240 DefaultTime=10
PartitionName=high Nodes=ALL PriorityTier=20 PreemptMode=OFF MaxTime=240 DefaultTime=10
"""


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(n)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Cluster:
    """A running cluster; ``environment`` is what a client of it needs."""

    def __init__(
        self, folder: Path, nodes: int = 2, *, kill_wait_s: int = 5, min_job_age_s: int = 300
    ) -> None:
        self.folder = folder
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        for name in ("munge", "state", "log", "spool", "tmp", "dev"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        for index in range(GPUS):
            (folder / "dev" / f"nvidia{index}").symlink_to("/dev/null")
        controller_port, *ports = _free_ports(1 + nodes)
        lines = [
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.1.{i} Port={port} CPUs={CPUS} "
            f"RealMemory={MEMORY_MB} Gres=gpu:{GPUS}"
            for i, (name, port) in enumerate(zip(self.nodes, ports, strict=True), start=1)
        ]
        text = CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            controller_port=controller_port,
            nodes="\n".join(lines),
            kill_wait_s=kill_wait_s,
            min_job_age_s=min_job_age_s,
        )
        (folder / "slurm.conf").write_text(text)
        devices = f"{folder}/dev/nvidia[0-{GPUS - 1}]"
        (folder / "gres.conf").write_text(f"NodeName=n[1-{nodes}] Name=gpu File={devices}\n")
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf")}
        clean = {k: v for k, v in os.environ.items() if not k.startswith(_OUTER)}
        sbin = os.pathsep.join((clean.get("PATH", ""), "/usr/sbin", "/sbin"))
        self.environment = {**clean, "PATH": sbin, **self.variables}
        self._keeper = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("slurm_keeper.py")), folder, *self.nodes],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if (line := self._keeper.stdout.readline()) != "ready\n":
            self._keeper.wait()
            logs = "\n".join(p.read_text()[-2000:] for p in (folder / "log").iterdir())
            raise RuntimeError(f"SLURM did not start ({line!r}); its logs:\n{logs}")

    def tell(self, verb: str, name: str) -> None:
        """``kill``, ``end``, ``freeze``, ``thaw`` or ``start`` the daemon of a node, or ``slurmctld``;
        ``lose`` a node with all its processes."""
        self._keeper.stdin.write(f"{verb} {name}\n")
        self._keeper.stdin.flush()
        assert self._keeper.stdout.readline() == "done\n"

    def run(self, *argv: str, timeout: float = within(30), **options: Any) -> str:
        """Output of a client command that has to succeed."""
        done = subprocess.run(
            argv, env=self.environment, capture_output=True, text=True, timeout=timeout, **options
        )
        assert done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
        return done.stdout

    def jobs(self) -> list[tuple[str, str, str]]:
        """(id, name, state) of all jobs the controller remembers."""
        lines = self.run("squeue", "-h", "-t", "all", "-o", "%i|%j|%T").splitlines()
        return [tuple(line.split("|")) for line in lines]  # type: ignore[misc]

    def settle(self) -> None:
        """End all jobs, and wait until every node is idle and up again."""
        user = getpass.getuser()
        deadline = time.monotonic() + within(30)
        self.run("scancel", f"--user={user}")
        while True:
            states = self.run("sinfo", "-hN", "-p", "main", "-o", "%N %T").split("\n")
            states = [line.split() for line in states if line]
            if all(state == "idle" for _, state in states):
                return
            for node, state in states:
                if state.startswith(("down", "drain")):
                    self.run("scontrol", "update", f"nodename={node}", "state=resume")
            assert time.monotonic() < deadline, f"the nodes do not become idle: {states}"
            time.sleep(0.1)

    def stop(self) -> None:
        self._keeper.stdin.close()
        self._keeper.wait(within(20))


def need_slurm() -> None:
    """Skip where SLURM is not installed; fail there if every real part is required."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if not missing:
        return
    packages = "apt-get install slurmctld slurmd slurm-client munge"
    text = f"no {', '.join(missing)}: `{packages}` gives a real SLURM to test on"
    if os.environ.get("ROMA_TEST_REQUIRE_ALL") == "1":
        pytest.fail(text)
    pytest.skip(text)


@contextlib.contextmanager
def real_slurm(folder: Path, **options: Any) -> Iterator[Cluster]:
    need_slurm()
    cluster = Cluster(folder, **options)
    try:
        yield cluster
    finally:
        cluster.stop()
