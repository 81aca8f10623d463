#!/usr/bin/env bash
# 30-class zero-shot classification of RSICD's test split; further flags are passed on.
#   RSICD_DIR=/data/rsicd RESUME=logs/run/checkpoints/epoch_100.pt bash inference_rsicd_classification.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
MISSING_EXAMPLE="RSICD_DIR=/data/rsicd RESUME=logs/run/checkpoints/epoch_100.pt"
asks_for_help "$@" || {
    need RSICD_DIR "--rsicd-data-dir --rsicd-dir" "folder with test.csv and large_label.json"
    need RESUME "--resume --checkpoint" "checkpoint (.pt) to evaluate"
    check_needs
}
launch "$ROOT/2D_images_tasks/src/classification.py" \
    ${RSICD_DIR:+--rsicd-data-dir "$RSICD_DIR"} ${RESUME:+--resume "$RESUME"} "$@"
