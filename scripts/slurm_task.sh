#!/usr/bin/env bash
# One node's share of a Slurm job, started by srun from slurm/train.sbatch:  bash scripts/slurm_task.sh train_mri.sh …
#
# Slurm's warning reaches this process alone. It is passed on to the run, which saves and leaves with exit status 75: a
# single process, or itemizedclip.runtime.torchrun, which tells every process of the node. Until they listen, the signal
# is ignored.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/attend.sh"
export NODE_RANK="${SLURM_NODEID:?set by srun}"

warn() {
    note_signal
    kill -USR1 "$run" 2>/dev/null || true
}

trap '' USR1
bash "$@" &
run=$!
trap warn USR1 TERM
attend "$run"
