#!/usr/bin/env bash
# Attention pictures of Itemized-cc0.3M images, one overlay per item; further flags are passed on.
#   VAL_SHARDS='/data/cc/{00058..00059}.tar' ITEMS_JSON=/data/first_300000_rewrites.json RESUME=epoch_100.pt \
#       bash visualize_itemized_cc3m.sh --viz-id 0-7
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
MISSING_EXAMPLE="VAL_SHARDS='/data/cc/{00058..00059}.tar' ITEMS_JSON=/data/first_300000_rewrites.json RESUME=epoch_100.pt"
asks_for_help "$@" || {
    need VAL_SHARDS "--val-data" "shards with the images: a quoted brace range, several sources joined by '::'"
    need ITEMS_JSON "--external-captions" "item file by sample index (first_300000_rewrites.json); 'captions' uses the samples' own captions"
    need RESUME "--resume --checkpoint" "checkpoint (.pt) to look into"
    check_needs
}
GPUS=1
launch "$ROOT/2D_images_tasks/src/visualize/shards.py" \
    ${VAL_SHARDS:+--val-data "$VAL_SHARDS"} ${ITEMS_JSON:+--external-captions "$ITEMS_JSON"} \
    ${RESUME:+--resume "$RESUME"} "$@"
