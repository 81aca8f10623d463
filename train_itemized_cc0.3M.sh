#!/usr/bin/env bash
# Train ItemizedCLIP on Itemized-cc0.3M (natural images), published recipe; further flags are passed on.
#   TRAIN_SHARDS='/data/cc/{00000..00057}.tar' VAL_SHARDS='/data/cc/{00058..00059}.tar' \
#       ITEMS_JSON=/data/first_300000_rewrites.json bash train_itemized_cc0.3M.sh --batch-size 64
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
MISSING_EXAMPLE="TRAIN_SHARDS='/data/cc/{00000..00057}.tar' VAL_SHARDS='/data/cc/{00058..00059}.tar' ITEMS_JSON=/data/first_300000_rewrites.json"
asks_for_help "$@" || {
    need TRAIN_SHARDS "--train-data" "training shards: a quoted brace range, several sources joined by '::'"
    need VAL_SHARDS "--val-data" "validation shards, in the same form; 'none' trains without validation"
    need ITEMS_JSON "--external-captions" "item file by sample index (first_300000_rewrites.json); 'captions' uses the samples' own captions"
    check_needs
}
[[ "${VAL_SHARDS:-}" == "none" ]] && VAL_SHARDS=""
launch "$ROOT/2D_images_tasks/src/main.py" --recipe itemized_cc0.3M --logs "$LOGS" \
    ${TRAIN_SHARDS:+--train-data "$TRAIN_SHARDS"} ${VAL_SHARDS:+--val-data "$VAL_SHARDS"} \
    ${ITEMS_JSON:+--external-captions "$ITEMS_JSON"} ${RESUME:+--resume "$RESUME"} "$@"
