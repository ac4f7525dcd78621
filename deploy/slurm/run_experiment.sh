#!/bin/bash
# Train any Python module that uses the Trainer on a SLURM cluster, without the orchestrator:
#
#     sbatch [OPTION OF SBATCH…] run_experiment.sh MODULE [ARGUMENT…]
#
# for example, from the folder that your module and your .env lie in:
#
#     sbatch --nodes=2 --gpus-per-node=4 --cpus-per-task=32 --time=4:00:00 --account=MINE \
#         PATH/deploy/slurm/run_experiment.sh roma_core.cli pretrain --data data/x/1 --run-dir runs/x
#
# One process per GPU of the allocation (PROCESSES_PER_NODE without GPUs), on any number of nodes. The
# arguments reach the module as they are, and its exit code becomes the job's. Before the time limit
# the training is asked to save, and the job requeues itself, at most MAX_RESTARTS times; the Trainer
# resumes from its newest checkpoint. What stands in .env, or in the file ENV_FILE names, is exported
# without being evaluated, where the environment does not say otherwise. The script itself reads:
#
#     VIRTUALENV_LOC       virtual environment to use; without it, `python` as it is found
#     MODULES              environment modules to load, separated by spaces
#     PROCESSES_PER_NODE   without GPUs; 1
#     MAX_RESTARTS         20
#
#SBATCH --job-name=roma
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=roma-%j.log

fail() { echo "run_experiment.sh: $*" >&2; exit 2; }

[ -n "$SLURM_JOB_ID" ] || fail "this runs inside a SLURM job: sbatch [OPTION…] $0 MODULE [ARGUMENT…]"
[ "$1" = -m ] && shift
[ -n "$1" ] || fail "expected: sbatch [OPTION…] run_experiment.sh MODULE [ARGUMENT…]"

near_the_end= signalled=
trap 'near_the_end=1 signalled=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1
trap 'signalled=1' TERM # the step hears it too, saves, and ends by itself

# NAME=VALUE lines; nothing in them is evaluated, quotes around a value are taken off
env_file=${ENV_FILE:-.env}
[ -z "$ENV_FILE" ] || [ -r "$ENV_FILE" ] || fail "ENV_FILE=$ENV_FILE cannot be read"
if [ -r "$env_file" ]; then
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line#export }
        name=${line%%=*} value=${line#*=}
        [[ $line == *=* && $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || continue
        if [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]]; then value=${BASH_REMATCH[1]}; fi
        [ -n "${!name+set}" ] || export "$name=$value"
    done <"$env_file"
fi

for module in $MODULES; do
    module load "$module" || fail "there is no environment module $module"
done
python=python
[ -z "$VIRTUALENV_LOC" ] || python=$VIRTUALENV_LOC/bin/python
command -v "$python" >/dev/null || fail "there is no interpreter $python; set VIRTUALENV_LOC"

# of the allocation, not of a constant
processes=${SLURM_GPUS_ON_NODE:-${PROCESSES_PER_NODE:-1}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-$processes} / processes))}
[ "$OMP_NUM_THREADS" -gt 0 ] || export OMP_NUM_THREADS=1
export PYTHONUNBUFFERED=1

# where the processes meet: the first node, under the address SLURM itself uses for it
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol -o show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p')
[ -n "$address" ] || fail "scontrol does not give the address of the first node (${first:-no name})"
port=$((20000 + SLURM_JOB_ID % 20000))
while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done

echo "roma: $SLURM_JOB_NUM_NODES node(s) x $processes process(es), start $((${SLURM_RESTART_COUNT:-0} + 1))"
# torchrun is the task itself: else no signal would reach the processes; it halves every $$ of its words
srun --kill-on-bad-exit=1 --wait=600 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'exec "$0" -m torch.distributed.run --node-rank="$SLURM_PROCID" "$@"' "$python" \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$processes" --max-restarts=0 \
    --master-addr="$address" --master-port="$port" -m "${@//\$/\$\$}" &
step=$!
while
    signalled=
    wait "$step"
    code=$?
    [ -n "$signalled" ]
do :; done

if [ -n "$near_the_end" ] && [ "$code" != 0 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-20}" ]; then
        echo "roma: not finished before the time limit; requeueing"
        scontrol requeue "$SLURM_JOB_ID" && sleep 60 # it ends this script
    else
        echo "roma: not finished after ${MAX_RESTARTS:-20} restarts, which are the limit" >&2
    fi
fi
exit "$code"
