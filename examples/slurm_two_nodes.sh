#!/bin/bash
# Both stages of two_nodes.json under Slurm:  sbatch examples/slurm_two_nodes.sh
# Submit it again to continue a stopped run.
#SBATCH --job-name=flare
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --output=%x-%j.log
# --ntasks-per-node=1: Flare starts a process for each GPU itself.
# --signal=USR1@300: five minutes before the end every host's launcher gets SIGUSR1; the run writes a checkpoint and
# exits 0.
set -euo pipefail

NAME=${NAME:-two_nodes}
OUTPUT=${FLARE_OUTPUT_DIR:?set FLARE_OUTPUT_DIR to a directory that both hosts share}

export NNODES=$SLURM_NNODES
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one host need different ports
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR

train() { # stage
  # In single quotes, because SLURM_NODEID is set only inside the task.
  srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec "$@"' task \
    ./run_training.sh "$1" auto "$NAME" --config examples/two_nodes.json --base_output_dir "$OUTPUT"
}

cd "${SLURM_SUBMIT_DIR:?}" # the clone of Flare, on a file system that both hosts share
[ -d "$OUTPUT/$NAME/stage1" ] || train 1 # stage1/ exists once stage 2 has started
if [ -d "$OUTPUT/$NAME/stage1" ] || [ -d "$OUTPUT/$NAME/final_model" ]; then
  train 2
fi # otherwise stage 1 was stopped before its end: submit this job again
