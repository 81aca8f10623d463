#!/usr/bin/env bash
# Train ItemizedCLIP on whole head CT studies, published recipe; further flags are passed on.
#   DATA_ROOT=/data/ct JSON_ROOT=/data/ct bash train_ct.sh --batch-size 4
# Optional: TEXT_MODEL (BERT folder), IMAGE_WEIGHTS (MAE ViT-B/16 file), SERIES_NAME_WEIGHTS (series-name encoder file).
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
MISSING_EXAMPLE="DATA_ROOT=/data/ct JSON_ROOT=/data/ct"
asks_for_help "$@" || {
    need DATA_ROOT "--data-root" "folder of STUDY/SERIES/img.pt, or of train/ and val/ (or valid/) with these"
    need JSON_ROOT "--json-root" "folder with train.json and val.json (or valid.json)"
    check_needs
}
launch "$ROOT/Radiology_Tasks/src/open_mri_train/main.py" --recipe ct --logs "$LOGS" \
    ${DATA_ROOT:+--data-root "$DATA_ROOT"} ${JSON_ROOT:+--json-root "$JSON_ROOT"} \
    ${TEXT_MODEL:+--text-model "$TEXT_MODEL"} ${IMAGE_WEIGHTS:+--image-weights "$IMAGE_WEIGHTS"} \
    ${SERIES_NAME_WEIGHTS:+--series-name-weights "$SERIES_NAME_WEIGHTS"} \
    ${RESUME:+--resume "$RESUME"} "$@"
