#!/usr/bin/env bash
# Attention pictures of RSICD images, one overlay per item; further flags are passed on.
#   RSICD_DIR=/data/rsicd RSICD_ITEMS='train.json;test.json' RESUME=epoch_100.pt bash visualize_rsicd.sh --viz-id 0-7
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
MISSING_EXAMPLE="RSICD_DIR=/data/rsicd RSICD_ITEMS='/data/trainv1.json;/data/testv1.json' RESUME=epoch_100.pt"
asks_for_help "$@" || {
    need RSICD_DIR "--rsicd-data-dir --rsicd-dir" "folder with test.csv"
    need RSICD_ITEMS "--external-captions" "item files 'train.json;test.json' or 'train.json;valid.json;test.json'; 'captions' uses the CSV's sentences"
    need RESUME "--resume --checkpoint" "checkpoint (.pt) to look into"
    check_needs
}
GPUS=1
launch "$ROOT/2D_images_tasks/src/visualize/main.py" \
    ${RSICD_DIR:+--rsicd-data-dir "$RSICD_DIR"} ${RSICD_ITEMS:+--external-captions "$RSICD_ITEMS"} \
    ${RESUME:+--resume "$RESUME"} "$@"
