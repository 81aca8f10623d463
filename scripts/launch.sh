# Sourced by every train_*.sh, inference_*.sh and visualize_*.sh: finds Python, checks variables, starts the processes.
#
#   GPUS      processes on this node; default: every visible GPU, or 1 on a machine without
#   PYTHON    default: .venv/bin/python when it exists, else python3
#   LOGS      run folders; default: logs/
#   RESUME    a checkpoint, or "latest"
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several nodes (slurm/train.sbatch sets them)
#   MAX_RESTARTS   with several nodes: start again, from the last checkpoint, so often after a process or node has died
#   MIN_NODES      with MAX_RESTARTS: go on with as few nodes as this, and with more again when they come back

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="python3"
    [[ -x "$ROOT/.venv/bin/python" ]] && PYTHON="$ROOT/.venv/bin/python"
fi
LOGS="${LOGS:-$ROOT/logs/}"

# True when the user only wants to read: then no variable is required.
asks_for_help() {
    local argument
    for argument in "$@"; do
        [[ "$argument" == "--help" || "$argument" == "-h" ]] && return 0
    done
    return 1
}

# need NAME "--flag --alias" "what it is": the variable, or one of the flags that stand for it (which win when both are
# given). Ends the script with everything missing named, once all are checked by `check_needs`.
MISSING=()
ARGUMENTS=("$@")
need() {
    local flag argument
    [[ -n "${!1:-}" ]] && return 0
    for flag in $2; do
        for argument in ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}; do
            [[ "$argument" == "$flag" || "$argument" == "$flag="* ]] && return 0
        done
    done
    MISSING+=("  $1  $3 (or ${2%% *})")
}

check_needs() {
    (( ${#MISSING[@]} == 0 )) && return 0
    {
        echo "$(basename "$0"): set these environment variables first, or give the flags:"
        printf '%s\n' "${MISSING[@]}"
        echo "for example:  ${MISSING_EXAMPLE:-NAME=/path} bash $(basename "$0")"
    } >&2
    exit 2
}

count_gpus() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then  # set but empty, or -1: none is visible
        awk -F, '{ print ($1 == "-1" ? 0 : NF) }' <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null 2>&1; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# launch SCRIPT ARGUMENTS…: one process, or torchrun when there are several.
# The "--" keeps torchrun from reading our flags: without it, it takes --logs for an abbreviation of its own.
launch() {
    local processes="${GPUS:-$(count_gpus)}"
    [[ "$processes" =~ ^[0-9]+$ ]] || { echo "GPUS is '$processes'; expected a number of processes" >&2; exit 2; }
    (( processes > 0 )) || processes=1
    if asks_for_help "$@"; then
        exec "$PYTHON" "$@"
    elif (( ${NNODES:-1} > 1 && ${MAX_RESTARTS:-0} > 0 )); then
        # Nodes meet at a store of the first one, and number themselves: one that comes back is as good as before.
        exec "$PYTHON" -m itemizedclip.runtime.torchrun --nnodes "${MIN_NODES:-$NNODES}:$NNODES" \
            --nproc_per_node "$processes" --max_restarts "$MAX_RESTARTS" --rdzv_backend c10d \
            --rdzv_id "${SLURM_JOB_ID:-itemizedclip}" ${RDZV_CONF:+--rdzv_conf "$RDZV_CONF"} \
            --rdzv_endpoint "${MASTER_ADDR:?set by slurm/train.sbatch}:${MASTER_PORT:-29500}" -- "$@"
    elif (( ${NNODES:-1} > 1 )); then
        exec "$PYTHON" -m itemizedclip.runtime.torchrun --nnodes "$NNODES" \
            --node_rank "${NODE_RANK:?set by slurm/train.sbatch}" --nproc_per_node "$processes" \
            --master_addr "${MASTER_ADDR:?set by slurm/train.sbatch}" --master_port "${MASTER_PORT:-29500}" -- "$@"
    elif (( processes > 1 )); then
        exec "$PYTHON" -m itemizedclip.runtime.torchrun --standalone --nproc_per_node "$processes" -- "$@"
    else
        exec "$PYTHON" "$@"
    fi
}
