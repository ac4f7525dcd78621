"""The batch script of one attempt, from a JobSpec and a profile: pure, pinned by golden files.

The batch shell runs on the first node: it loads modules, finds the rendezvous address, and starts
one task on every node, which claims the attempt and becomes torchrun. The batch shell alone
receives USR1, which SLURM sends some time before the limit, and turns it into the stop file.
"""

from __future__ import annotations

import math
import shlex

from roma_core.claim import ATTEMPT_VARIABLE, FOLDER_VARIABLE
from roma_core.job import JobFolder
from roma_pipelines.launching.launcher import claimed, header, process_variables, program
from roma_pipelines.launching.slurm.profile import SlurmProfile
from roma_pipelines.launching.spec import JobSpec

_STOP = """\
# SLURM's signal before the limit becomes the stop file: the trainer saves, and ends with "continue".
# A duplicate of the job, which did not claim the attempt, must not stop it.
signalled=
trap 'signalled=1; grep -qs "\\"$SLURM_JOB_ID\\"" "$attempt/owner.json" && touch "$attempt/stop"' USR1 TERM
"""

_RENDEZVOUS = """\
# Rendezvous address: the first node, as SLURM itself addresses it.
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


def batch_script(
    spec: JobSpec, profile: SlurmProfile, folder: JobFolder, attempt: int, python: str
) -> str:
    """The script that ``sbatch`` is given.

    Args:
        folder: the job folder, under the same path on every node.
        python: interpreter on the nodes, unless the profile names one.

    Raises:
        ValueError: no SLURM could ever run the spec, or the folder cannot be named in a script.
    """
    path = str(folder.path)
    if set("\n\r\\\"'") & set(path):
        raise ValueError(
            f"the job folder {path!r} has a quote, a backslash or a line break in its name, which "
            f"SLURM does not accept; set ROMA_STORAGE_ROOT to another folder"
        )
    variables = {**process_variables(spec), **profile.environment}
    parts = [
        # a login shell defines `module`, a function that the environment does not pass on
        "#!/bin/bash -l" if profile.modules or profile.setup else "#!/bin/bash",
        *header(spec),
        *(f"#SBATCH {option}" for option in _options(spec, profile, path, attempt)),
        "",
        f"folder={shlex.quote(path)}",
        f"attempt=$folder/attempts/{attempt}",
        'fail() { echo "roma: $*" >&2; exit 1; }',
        "",
        _STOP,
        f'export {FOLDER_VARIABLE}="$folder" {ATTEMPT_VARIABLE}={attempt}',
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        *(f'module load {name} || fail "no module {name}"' for name in profile.modules),
        *profile.setup,
        "",
        *([_RENDEZVOUS] if spec.runner == "torchrun" else []),
        *_step(spec, profile, folder, attempt, profile.python or python),
        _WAIT,
    ]
    return "\n".join(parts)


def _options(spec: JobSpec, profile: SlurmProfile, folder: str, attempt: int) -> list[str]:
    limit_min = spec.time_limit_min or profile.time_limit_min
    # limits are checked every 30 s, and a signal may come a minute early: short jobs get a third
    stop_s = min(profile.stop_before_end_s, limit_min * 60 // 3)
    memory_gb = spec.memory_gb or profile.memory_gb
    gpu_type = f"{profile.gpu_type}:" if profile.gpu_type else ""
    escaped = folder.replace("%", "%%")  # %j and the like are SLURM's
    values = {
        "job-name": spec.attempt_name(attempt),
        "comment": f"{spec.key}/{attempt}",
        "chdir": folder,
        "output": f"{escaped}/attempts/{attempt}/log",
        "open-mode": "append",
        "export": "ALL",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "nodes": str(spec.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(cpus_per_node(spec, profile)),
        "gpus-per-node": f"{gpu_type}{spec.gpus_per_node}" if spec.gpus_per_node else None,
        "mem": f"{math.ceil(memory_gb * 1000)}M" if memory_gb else None,
        "time": str(limit_min),
        "signal": f"B:USR1@{stop_s}",
    }
    given = [f"--{k}={shlex.quote(v)}" for k, v in values.items() if v is not None]
    flags = ["--no-requeue", *(["--exclusive"] if profile.exclusive else [])]
    further = [
        f"{name}={shlex.quote(value)}" if equals else name
        for name, equals, value in (option.partition("=") for option in profile.sbatch_options)
    ]
    return [*given, *flags, *further]


def cpus_per_node(spec: JobSpec, profile: SlurmProfile) -> int:
    return max(spec.threads_per_process, profile.cpus_per_process or 1) * spec.processes_per_node


# values that only the job knows, in double quotes for its shell; the rank is each task's own
_FILLED_IN = {
    "--node-rank=RANK": "",
    "--master-addr=ADDRESS": '--master-addr="$address"',
    "--master-port=PORT": '--master-port="$port"',
    "--log-dir=SCRATCH": '--log-dir="$attempt/torchrun"',
}
_TASK = (
    f'exec "$0" -m roma_core.claim "${FOLDER_VARIABLE}" "${ATTEMPT_VARIABLE}" -- '
    '"$0" -m torch.distributed.run --node-rank="$SLURM_PROCID" "$@"'
)


def _step(
    spec: JobSpec, profile: SlurmProfile, folder: JobFolder, attempt: int, python: str
) -> list[str]:
    # one task per node that becomes the runner itself: else no signal would reach the processes
    argv = program(spec, python, "RANK", "ADDRESS", "PORT", "SCRATCH")
    if spec.runner == "torchrun":
        n = len(spec.command)
        options = [_FILLED_IN.get(word, shlex.quote(word)) for word in argv[3:-n]]
        lines = [
            shlex.join(["bash", "-c", _TASK, python]),
            " ".join(word for word in options if word),
            shlex.join(argv[-n:]),
        ]
    else:
        lines = [shlex.join(claimed(folder, attempt, python, [])), shlex.join(argv)]
    further = [shlex.join(words) for words in (profile.srun_options, profile.container) if words]
    srun = 'srun --kill-on-bad-exit=1 --wait=600 --cpus-per-task="$SLURM_CPUS_PER_TASK"'
    return [" \\\n    ".join([srun, *further, *lines]) + " &", "step=$!", ""]
