#!/usr/bin/env bash
# Set up .venv, then train a small model on embedded data, evaluate it and draw what its items looked at:
#   bash quickstart.sh [flags of `itemizedclip demo`, see --help]
# A second run reuses the environment.
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"
set_up
exec "$VENV/bin/itemizedclip" demo --logs "${LOGS:-$ROOT/logs/}" "$@"
