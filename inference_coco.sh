#!/usr/bin/env bash
# Retrieval on COCO val2017, or with --split karpathy on the usual 5k test split; further flags are passed on.
#   COCO_DIR=/data/coco RESUME=logs/run/checkpoints/epoch_100.pt bash inference_coco.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
MISSING_EXAMPLE="COCO_DIR=/data/coco RESUME=logs/run/checkpoints/epoch_100.pt"
asks_for_help "$@" || {
    need COCO_DIR "--coco-data-root-dir" "folder with annotations/captions_val2017.json and images/val2017/"
    need RESUME "--resume --checkpoint" "checkpoint (.pt) to evaluate"
    check_needs
}
launch "$ROOT/2D_images_tasks/src/retrieval.py" coco \
    ${COCO_DIR:+--coco-data-root-dir "$COCO_DIR"} ${RESUME:+--resume "$RESUME"} "$@"
