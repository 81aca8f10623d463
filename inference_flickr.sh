#!/usr/bin/env bash
# Retrieval on Flickr30k's val split, or with --split test on the usual 1k test split; further flags are passed on.
#   FLICKR_DIR=/data/flickr30k RESUME=logs/run/checkpoints/epoch_100.pt bash inference_flickr.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
MISSING_EXAMPLE="FLICKR_DIR=/data/flickr30k RESUME=logs/run/checkpoints/epoch_100.pt"
asks_for_help "$@" || {
    need FLICKR_DIR "--flickr-data-root-dir" "folder with flickr30k_val.json or flickr30k_test.json and the images"
    need RESUME "--resume --checkpoint" "checkpoint (.pt) to evaluate"
    check_needs
}
launch "$ROOT/2D_images_tasks/src/retrieval.py" flickr \
    ${FLICKR_DIR:+--flickr-data-root-dir "$FLICKR_DIR"} ${RESUME:+--resume "$RESUME"} "$@"
