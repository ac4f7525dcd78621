"""From a JobSpec and a site to the text of one attempt's batch script: pure, pinned by golden files.

The batch shell runs on the first node. It claims the attempt, finds out where the processes are to
meet, and starts one torchrun on every node. It alone hears USR1, which SLURM sends some time before
the limit, and passes it on as the attempt's stop file.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path

from roma_core.claim import ATTEMPT_VARIABLE, FOLDER_VARIABLE
from roma_pipelines.launching.launcher import process_variables, program, remarks
from roma_pipelines.launching.slurm.profile import SlurmProfile
from roma_pipelines.launching.spec import JobSpec

_CLAIM = """\
# The first act: claim the attempt. Whoever comes second leaves; submitting twice does no harm.
mkdir -p "$attempt"
claim=$attempt/.owner.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
printf '{"schema_version": 1, "host": "%s", "external": {"SLURM_JOB_ID": "%s"}}\\n' \\
    "$HOSTNAME" "$SLURM_JOB_ID" >"$claim" || exit 1
ln "$claim" "$attempt/owner.json" 2>/dev/null
links=$(stat -c %h "$claim") # 2 even where NFS answers a repeated request with "exists"
if [ "$links" != 2 ] && ! { # a file system without hard links: whoever makes the empty file wins
    (set -C && : >"$attempt/owner.json") 2>/dev/null && mv -f "$claim" "$attempt/owner.json"
}; then
    rm -f "$claim"
    echo "attempt {attempt} in $folder is taken by $(cat "$attempt/owner.json"); leaving"
    exit 0
fi
rm -f "$claim"
"""

_STOP = """\
# SLURM's signal before the end becomes the stop file: the trainer saves, and ends with "continue".
signalled=
trap 'signalled=1; touch "$attempt/stop"' USR1 TERM
"""

_MEETING_POINT = """\
# Where the processes meet: the first node, under the address SLURM itself uses for it.
address=127.0.0.1
if [ "$SLURM_JOB_NUM_NODES" != 1 ]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    first=${first%%$'\\n'*}
    [[ $(scontrol -o show node "$first") =~ \\ NodeAddr=([^\\ ]+) ]] ||
        fail "scontrol does not give the address of the first node (${first:-no name})"
    address=${BASH_REMATCH[1]}
fi
port=$((20000 + SLURM_JOB_ID % 20000))
while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
"""

_WAIT = """\
# A signal interrupts `wait`; the step ends by itself, and its exit code is the job's.
while
    signalled=
    wait "$step"
    code=$?
    [ -n "$signalled" ]
do :; done
exit "$code"
"""


def job_name(spec: JobSpec, attempt: int) -> str:
    """Name of an attempt at the scheduler: the same whoever submits it."""
    return f"{spec.name}-{attempt}"


def batch_script(
    spec: JobSpec, site: SlurmProfile, folder: Path | str, attempt: int, python: str
) -> str:
    """The script that ``sbatch`` is given.

    Args:
        folder: path of the job folder, the same on every node.
        python: interpreter on the nodes, unless the site names one.

    Raises:
        ValueError: no SLURM could ever run the spec, or the folder cannot be named in a script.
    """
    if set("\n\r\\\"'") & set(str(folder)):
        raise ValueError(
            f"the job folder {str(folder)!r} has a quote, a backslash or a line break in its name, "
            f"which SLURM cannot be told; set ROMA_STORAGE_ROOT to another folder"
        )
    parts = [
        # a login shell knows `module`, which is a function that no environment hands on
        "#!/bin/bash -l" if site.modules or site.setup else "#!/bin/bash",
        *remarks(spec),
        *(f"#SBATCH {option}" for option in _options(spec, site, str(folder), attempt)),
        "",
        f"folder={shlex.quote(str(folder))}",
        f"attempt=$folder/attempts/{attempt}",
        'fail() { echo "roma: $*" >&2; exit 1; }',
        "",
        _CLAIM.replace("{attempt}", str(attempt)),
        _STOP,
        *_environment(spec, site, attempt),
        "",
        *([_MEETING_POINT] if spec.starter == "torchrun" else []),
        *_step(spec, site, python),
        _WAIT,
    ]
    return "\n".join(parts)


def _options(spec: JobSpec, site: SlurmProfile, folder: str, attempt: int) -> list[str]:
    limit_min = spec.time_limit_min or site.time_limit_min
    # limits are looked at every 30 s, and a signal may come a minute early: short jobs get a third
    stop_s = min(site.stop_before_end_s, limit_min * 60 // 3)
    cpus = max(spec.threads_per_process, site.cpus_per_process or 1) * spec.processes_per_node
    memory_gb = spec.memory_gb or site.memory_gb
    gpus = f"{site.gpu_type}:{spec.gpus_per_node}" if site.gpu_type else str(spec.gpus_per_node)
    escaped = folder.replace("%", "%%")  # %j and the like are SLURM's
    values: Mapping[str, str | None] = {
        "job-name": job_name(spec, attempt),
        "comment": f"{spec.key}/{attempt}",
        "chdir": folder,
        "output": f"{escaped}/attempts/{attempt}/log",
        "open-mode": "append",
        "export": "ALL",
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "nodes": str(spec.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(cpus),
        "gpus-per-node": gpus if spec.gpus_per_node else None,
        "mem": f"{math.ceil(memory_gb * 1000)}M" if memory_gb else None,
        "time": str(limit_min),
        "signal": f"B:USR1@{stop_s}",
    }
    given = [f"--{k}={shlex.quote(v)}" for k, v in values.items() if v is not None]
    flags = ["--no-requeue", *(["--exclusive"] if site.exclusive else [])]
    further = [
        f"{name}={shlex.quote(value)}" if equals else name
        for name, equals, value in (option.partition("=") for option in site.sbatch_options)
    ]
    return [*given, *flags, *further]


def _environment(spec: JobSpec, site: SlurmProfile, attempt: int) -> list[str]:
    variables = {**process_variables(spec), **site.environment}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    modules = [f'module load {name} || fail "no module {name}"' for name in site.modules]
    return [
        f'export {FOLDER_VARIABLE}="$folder" {ATTEMPT_VARIABLE}={attempt}',
        *lines,
        *modules,
        *site.setup,
    ]


def _step(spec: JobSpec, site: SlurmProfile, python: str) -> list[str]:
    """One starter per node, which is the task itself: else no signal would reach the processes."""
    srun = ["--kill-on-bad-exit=1", "--wait=600", '--cpus-per-task="$SLURM_CPUS_PER_TASK"']
    argv = program(spec, site.python or python, "RANK", "ADDRESS", "PORT", "SCRATCH")
    if spec.starter == "torchrun":
        start = 'exec "$0" -m torch.distributed.run --node-rank="$SLURM_PROCID" "$@"'
        options = argv[3 : -len(spec.command)]  # after: python -m torch.distributed.run
        filled = [_IN_THE_JOB.get(word, shlex.quote(word)) for word in options]
        lines = [
            shlex.join(["bash", "-c", start, argv[0]]),
            " ".join(word for word in filled if word),
            shlex.join(argv[-len(spec.command) :]),
        ]
    else:
        lines = [shlex.join(argv)]
    further = [shlex.join(words) for words in (site.srun_options, site.container) if words]
    return [" \\\n    ".join([f"srun {' '.join(srun)}", *further, *lines]) + " &", "step=$!", ""]


# what a plan cannot know, in double quotes for the shell of the job; the rank is each task's own
_IN_THE_JOB = {
    "--node-rank=RANK": "",
    "--master-addr=ADDRESS": '--master-addr="$address"',
    "--master-port=PORT": '--master-port="$port"',
    "--log-dir=SCRATCH": '--log-dir="$attempt/torchrun"',
}
