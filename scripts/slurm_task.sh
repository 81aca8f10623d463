#!/usr/bin/env bash
# One node's share of a Slurm job, started by srun from slurm/train.sbatch:  bash scripts/slurm_task.sh train_mri.sh …
#
# Slurm's warning reaches this process alone. It is passed on to the training processes, which save and stop: to
# torchrun's children, or to the run itself when it is a single process. torchrun does not outlive such a signal, so it
# starts with the signal ignored; the training processes set their own handler.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/attend.sh"
export NODE_RANK="${SLURM_NODEID:?set by srun}"

warn() {
    note_signal
    kill -USR1 "$run" 2>/dev/null || true
    pkill -USR1 -P "$run" || true
}

trap '' USR1
bash "$@" &
run=$!
trap warn USR1 TERM
attend "$run"
