#!/usr/bin/env bash
# Build the documentation site into docs/_build/html; a warning, such as a dead link, is an error:
#   bash docs/build.sh        (run_tests.sh installs what it needs: the extras docs and radiology)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x ../.venv/bin/python ]] && PYTHON=../.venv/bin/python
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$PYTHON" generate.py
"$PYTHON" -m sphinx -W --keep-going -q -E -b html . _build/html
echo "docs: docs/_build/html/index.html"
