#!/usr/bin/env bash
# Set up an environment and run lint, types and tests, and build the documentation:  bash run_tests.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"
cd "$ROOT"
set_up dev docs radiology
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [[ $# -eq 0 ]]; then
    echo "ruff";  "$VENV/bin/ruff" check .; "$VENV/bin/ruff" format --check .
    echo "mypy";  "$VENV/bin/mypy" itemizedclip 2D_images_tasks/src Radiology_Tasks/src
    echo "docs";  PYTHON="$VENV/bin/python" bash docs/build.sh
    # Two workers: every test is one thread, and the machine that runs them in CI has two cores.
    set -- -n 2
fi
echo "pytest"
exec "$VENV/bin/python" -m pytest "$@"
