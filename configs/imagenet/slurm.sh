#!/bin/bash
# One recipe as a Slurm job, on one host of 8 GPUs or several; submit it from the repository's root:
#
#   sbatch [--nodes N] configs/imagenet/slurm.sh configs/imagenet/RECIPE.yaml [FLAGS OF train.py]
#
# With N hosts give the flags at the head of the recipe, which keep its global batch. Partition and
# account are the site's: sbatch --partition P --account A, or SBATCH_PARTITION and SBATCH_ACCOUNT.
# Python's environment is that of the shell that submits; it has to have torchrun.
#
# Five minutes before the time limit, and wherever the job is preempted, it is put back in the queue
# and continues where it stood, by --resume auto.
#
#SBATCH --job-name=emax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: sbatch [--nodes N] $0 RECIPE [FLAGS OF train.py]" >&2
    exit 2
fi

# The first host of the job is where the ranks meet.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
host=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 10000))

stopping=
# The training ends at its next step, with a checkpoint, when it is asked to.
trap 'stopping=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1

# srun starts one torchrun per host, and torchrun a process per GPU.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$host:$port" \
    train.py -c "$1" --resume auto "${@:2}" &
job=$!

status=0
wait "$job" || status=$?
if [[ -n $stopping ]]; then
    status=0
    wait "$job" || status=$? # the signal ended the first wait, not the training
    if ((status != 0)); then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
fi
exit "$status"
