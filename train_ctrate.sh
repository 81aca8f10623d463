#!/usr/bin/env bash
# Train ItemizedCLIP on chest CT (CT-RATE), published recipe; further flags are passed on.
#   DATA_ROOT=/data/ct_rate ITEMS_JSON=/data/ct_rate/itemized.json bash train_ctrate.sh --cache-dir /fast/ct_rate
# Optional: TEXT_MODEL (CXR-BERT folder), IMAGE_WEIGHTS (MAE ViT-B/16 file), CT_RATE_LABELS (labels of the validation
# volumes, looked for in DATA_ROOT otherwise).
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
MISSING_EXAMPLE="DATA_ROOT=/data/ct_rate ITEMS_JSON=/data/ct_rate/itemized.json"
asks_for_help "$@" || {
    need DATA_ROOT "--data-root" "CT-RATE's folder of .pt volumes, with train/ and valid/ in it"
    need ITEMS_JSON "--items-json" "reconstructions and report items of each training scan (itemized.json)"
    check_needs
}
launch "$ROOT/Radiology_Tasks/src/open_ct_rate/main.py" --recipe ctrate --logs "$LOGS" \
    ${DATA_ROOT:+--data-root "$DATA_ROOT"} ${ITEMS_JSON:+--items-json "$ITEMS_JSON"} \
    ${CT_RATE_LABELS:+--labels "$CT_RATE_LABELS"} \
    ${TEXT_MODEL:+--text-model "$TEXT_MODEL"} ${IMAGE_WEIGHTS:+--image-weights "$IMAGE_WEIGHTS"} \
    ${RESUME:+--resume "$RESUME"} "$@"
