#!/usr/bin/env bash
# Train ItemizedCLIP on RSICD (remote sensing), published recipe; further flags are passed on.
#   RSICD_DIR=/data/rsicd RSICD_ITEMS='/data/trainv1.json;/data/testv1.json' bash train_rsicd.sh --batch-size 64
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
MISSING_EXAMPLE="RSICD_DIR=/data/rsicd RSICD_ITEMS='/data/trainv1.json;/data/testv1.json'"
asks_for_help "$@" || {
    need RSICD_DIR "--rsicd-data-dir --rsicd-dir" "folder with train.csv, valid.csv and test.csv from Kaggle"
    need RSICD_ITEMS "--external-captions" "item files 'train.json;test.json' or 'train.json;valid.json;test.json'; 'captions' uses the CSV's sentences"
    check_needs
}
launch "$ROOT/2D_images_tasks/src/main.py" --recipe rsicd --logs "$LOGS" \
    ${RSICD_DIR:+--rsicd-data-dir "$RSICD_DIR"} ${RSICD_ITEMS:+--external-captions "$RSICD_ITEMS"} \
    ${RESUME:+--resume "$RESUME"} "$@"
