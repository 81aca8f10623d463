# Sourced by quickstart.sh and run_tests.sh: an environment in .venv, made once and reused until its recipe changes.

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"

# set_up EXTRAS…: installs the project with these extras, e.g. `set_up dev radiology`.
set_up() {
    local extras stamp recipe
    extras="$(IFS=,; echo "$*")"
    stamp="$VENV/.itemizedclip-${extras:-base}"
    recipe="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)"
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$recipe" ]]; then
        echo "environment: $VENV (reused)"
        return 0
    fi
    local python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "$python is $("$python" --version 2>&1); Python 3.10 or later is needed: set PYTHON" >&2
        exit 2
    }
    echo "environment: setting up $VENV (downloads PyTorch the first time, some minutes)"
    [[ -x "$VENV/bin/python" ]] || "$python" -m venv "$VENV"
    # The pinned versions are those of Python 3.11 and later; 3.10 takes the newest that still support it.
    local pins=()
    "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && pins=(--constraint "$ROOT/constraints.txt")
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        "${pins[@]}" --editable "$ROOT${extras:+[$extras]}" 2> >(grep -v '^WARNING: Location' >&2)
    echo "$recipe" >"$stamp"
}
