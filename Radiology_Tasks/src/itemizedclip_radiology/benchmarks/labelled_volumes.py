"""Labelled chest CT volumes for the zero-shot evaluation after each epoch of training."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.preflight import PreflightError
from itemizedclip_radiology.benchmarks.chest_ct import CT_RATE_VALID_LABELS, open_ct_rate
from itemizedclip_radiology.benchmarks.labelled_studies import LabelledStudies, find_labels
from itemizedclip_radiology.data.chest import ChestReader
from itemizedclip_radiology.data.study_dataset import usable_rows
from itemizedclip_radiology.data.volumes import read_volume

logger = logging.getLogger(__name__)

_VOLUMES_READ_WHOLE = 8


def unusable_volumes(volumes: LabelledStudies) -> dict[int, str]:
    """Row → why a volume cannot be used.

    Of each file only the beginning is read, of a few all values; when one of those is wrong, all values of all.
    """

    def message(row: int, *, whole: bool) -> str | None:
        try:
            if whole:
                volumes.load(row, size=volumes.size)
            else:
                read_volume(volumes.studies[row].series[0].path, memory_map=True)
        except BadSampleError as error:
            return str(error)
        return None

    few = range(0, len(volumes), -(-len(volumes) // _VOLUMES_READ_WHOLE))
    whole = any(message(row, whole=True) for row in few)
    if whole:
        logger.info("a validation volume cannot be used; reading all %d", len(volumes))
    messages = {row: message(row, whole=whole) for row in range(len(volumes))}
    return {row: found for row, found in messages.items() if found is not None}


def find_validation_labels(given: Path | None, root: Path) -> Path | None:
    """--labels, or labels of validation volumes that are there too.

    Raises:
        FileNotFoundError: --labels is not there.
    """
    if given is not None:
        return find_labels(given, CT_RATE_VALID_LABELS, root)
    if not (root / "valid").is_dir():
        return None
    try:
        return find_labels(None, CT_RATE_VALID_LABELS, root)
    except FileNotFoundError:
        return None


def open_labelled(labels: Path, root: Path, reader: ChestReader, on_bad_sample: str) -> LabelledStudies:
    """The labelled validation volumes that can be used.

    Raises:
        MissingFileError: missing volumes, with --on-bad-sample stop, or all of them.
        UserError: labels or volumes that cannot be used.
    """
    listed = open_ct_rate(labels, root, allow_missing=on_bad_sample == "skip")
    listed = replace(listed, reader=reader, size=reader.options.size, series_names=False)
    unusable = unusable_volumes(listed)
    rows = usable_rows(len(listed), unusable.get, source=labels, on_bad_sample=on_bad_sample, what="volume")
    volumes = listed.rows(rows)
    if not any({0, 1} <= set(column) for column in volumes.labels_NC.T.tolist()):
        raise PreflightError(f"{labels}: no finding has both volumes with and without it, so no AUC exists")
    logger.info("%s: %d labelled validation volumes", labels, len(volumes))
    return volumes
