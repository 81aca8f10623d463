# Sourced by slurm/train.sbatch and scripts/slurm_task.sh: waits for a process while signals come in.
#
# attend PID: returns the exit status of PID. A trap that calls `note_signal` keeps it waiting; without that call bash
# would end `wait` at the first signal and take the run down before it has saved.

INTERRUPTED=""
note_signal() { INTERRUPTED=1; }

attend() {
    local status
    while :; do
        INTERRUPTED=""
        status=0
        wait "$1" || status=$?
        [[ -n "$INTERRUPTED" ]] || return "$status"
    done
}
