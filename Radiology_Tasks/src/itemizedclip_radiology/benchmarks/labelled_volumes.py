"""Labelled chest CT volumes for the zero-shot evaluation after each epoch of training."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from itemizedclip.data.batch import BadSampleError, ItemSample
from itemizedclip.data.preflight import PreflightError
from itemizedclip_radiology.benchmarks.chest_ct import CT_RATE_VALID_LABELS, open_ct_rate
from itemizedclip_radiology.benchmarks.labelled_studies import LabelledStudies, find_labels
from itemizedclip_radiology.data.chest import ChestReader
from itemizedclip_radiology.data.study_dataset import usable_rows
from itemizedclip_radiology.data.volumes import Size, read_volume

logger = logging.getLogger(__name__)

_VOLUMES_READ_WHOLE = 8


@dataclass
class LabelledVolumes:
    """The volumes of a benchmark that can be opened, as evaluators read them.

    Attributes:
        benchmark: volumes and labels.
        rows: which of them.
        size: voxels of the model's input.
    """

    benchmark: LabelledStudies
    rows: list[int]
    size: Size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ItemSample:
        study = self.benchmark.load(self.rows[index], size=self.size)
        return ItemSample(self.benchmark.studies[self.rows[index]].study_id, study.image, [])

    @property
    def labels_NC(self) -> np.ndarray:
        """float64 (N, C): 1, 0, or NaN where not rated."""
        labels_NC = self.benchmark.labels_NC[self.rows].astype(np.float64)
        return np.where(labels_NC < 0, np.nan, labels_NC)


def unusable_volumes(benchmark: LabelledStudies, size: Size) -> dict[int, str]:
    """Row → why a volume cannot be used.

    Of each file only the beginning is read, of a few all values; when one of those is wrong, all values of all.
    """

    def message(row: int, *, whole: bool) -> str | None:
        try:
            if whole:
                benchmark.load(row, size=size)
            else:
                read_volume(benchmark.studies[row].series[0].path, memory_map=True)
        except BadSampleError as error:
            return str(error)
        return None

    few = range(0, len(benchmark), -(-len(benchmark) // _VOLUMES_READ_WHOLE))
    whole = any(message(row, whole=True) for row in few)
    if whole:
        logger.info("a validation volume cannot be used; reading all %d", len(benchmark))
    messages = {row: message(row, whole=whole) for row in range(len(benchmark))}
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


def open_labelled(labels: Path, root: Path, reader: ChestReader, on_bad_sample: str) -> LabelledVolumes:
    """The labelled validation volumes.

    Raises:
        MissingFileError: missing volumes, with --on-bad-sample stop, or all of them.
        UserError: labels or volumes that cannot be used.
    """
    benchmark = open_ct_rate(labels, root, allow_missing=on_bad_sample == "skip")
    benchmark.reader = reader
    size = reader.options.size
    unusable = unusable_volumes(benchmark, size)
    rows = usable_rows(len(benchmark), unusable.get, source=labels, on_bad_sample=on_bad_sample, what="volume")
    labelled = LabelledVolumes(benchmark, rows, size)
    if not any(len(np.unique(column[~np.isnan(column)])) == 2 for column in labelled.labels_NC.T):
        raise PreflightError(f"{labels}: no finding has both volumes with and without it, so no AUC exists")
    logger.info("%s: %d labelled validation volumes", labels, len(labelled))
    return labelled
