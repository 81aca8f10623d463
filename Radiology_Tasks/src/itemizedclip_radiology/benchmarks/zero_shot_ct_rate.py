"""Zero-shot detection of 16 findings on chest CT: CT-RATE's validation split.

    python3 zeroshot_ct_rate.py --resume epoch_80.pt --data-root DIR
    torchrun --nproc_per_node 8 -- zeroshot_ct_rate.py …          the same numbers

DIR holds valid/valid_1/valid_1_a/valid_1_a_1.pt. Labels are valid_predicted_labels.csv or valid_labels.csv, in DIR, in
the folder above, or in multi_abnormality_labels/ or dataset/multi_abnormality_labels/ there; --labels gives another
place. Every reconstruction is scored and counted on its own, as published; scan/… averages those of a scan.

Axes: N volumes, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import tyro

from itemizedclip_radiology.benchmarks.benchmark import Benchmark
from itemizedclip_radiology.benchmarks.chest_ct import CT_RATE_VALID_LABELS, open_ct_rate
from itemizedclip_radiology.benchmarks.chest_zero_shot import Averages, ChestZeroShotOptions, Findings, chest_measures
from itemizedclip_radiology.benchmarks.zero_shot import Measures, find_labels, parse_and_evaluate
from itemizedclip_radiology.data.ct_rate_tree import parse_volume_name

DESCRIPTION = "Zero-shot detection of 16 findings on CT-RATE: AUC, and accuracy, F1, recall, precision at thresholds."
PUBLISHED_GRID_SIZE = 1000


@dataclass(frozen=True, kw_only=True)
class CtRateOptions(ChestZeroShotOptions):
    """Zero-shot detection on CT-RATE."""

    labels: Annotated[Path | None, tyro.conf.arg(aliases=("--input-filename", "--zeroshot-ct-rate"))] = None
    """CSV of labels; default: valid_predicted_labels.csv or valid_labels.csv in --data-root or the folder above."""

    family: ClassVar[str] = "ct_rate"

    def open(self) -> Benchmark:
        """CT-RATE's labelled reconstructions."""
        labels = find_labels(self.labels, CT_RATE_VALID_LABELS, self.data_dir)
        return open_ct_rate(labels, self.data_dir, protocol=self.protocol, allow_missing=self.allow_missing)

    def measure(
        self, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str], studies: Sequence[str]
    ) -> Measures:
        """Measures of the 16 findings, with the reconstructions of a patient in one fold."""
        volumes = [parse_volume_name(study) for study in studies]
        findings = Findings(
            classes,
            scores_NC,
            labels_NC,
            groups_N=[f"{volume.split}_{volume.patient}" for volume in volumes],
            scans_N=[volume.scan for volume in volumes],
        )
        averages = Averages(f"mean over the {len(classes)} findings, one row per reconstruction", {"": classes})
        return chest_measures("CT-RATE", findings, averages, protocol=self.protocol, grid_size=PUBLISHED_GRID_SIZE)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Command line."""
    return parse_and_evaluate(CtRateOptions, argv, prog="zeroshot_ct_rate.py", description=DESCRIPTION)
