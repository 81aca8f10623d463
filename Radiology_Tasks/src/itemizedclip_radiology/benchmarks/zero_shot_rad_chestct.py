"""Zero-shot detection of 14 findings (15 label columns) on chest CT: Rad-ChestCT.

    python3 zeroshot_rad_chestct.py --resume epoch_80.pt --data-root DIR
    torchrun --nproc_per_node 8 -- zeroshot_rad_chestct.py …          the same numbers

DIR holds <id>/<id>.pt or <id>.pt. Labels are rad_chestct_labels.csv in DIR or the folder above, made by
`python -m itemizedclip_radiology.prepare.labels rad-chestct`; --labels gives another place.

One calcification label stands under two columns. The mean over 14 findings counts it once, with the larger of its two
scores; the published code averages all 15 columns. Both are reported; unprefixed means are those of 14, with
--protocol published those of 15.

Axes: N scans, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import tyro

from itemizedclip_radiology.benchmarks.benchmark import Benchmark
from itemizedclip_radiology.benchmarks.chest_ct import (
    CALCIFICATION,
    RAD_CHESTCT_LABELS,
    merge_calcification,
    open_rad_chestct,
)
from itemizedclip_radiology.benchmarks.chest_zero_shot import Averages, ChestZeroShotOptions, Findings, chest_measures
from itemizedclip_radiology.benchmarks.zero_shot import Measures, find_labels, parse_and_evaluate

DESCRIPTION = "Zero-shot detection of 14 findings on Rad-ChestCT: AUC, and accuracy, F1, recall, precision."
PUBLISHED_GRID_SIZE = 4000


@dataclass(frozen=True, kw_only=True)
class RadChestCtOptions(ChestZeroShotOptions):
    """Zero-shot detection on Rad-ChestCT."""

    labels: Annotated[Path | None, tyro.conf.arg(aliases=("--input-filename",))] = None
    """CSV of labels; default: rad_chestct_labels.csv in --data-root or the folder above."""

    family: ClassVar[str] = "rad_chestct"

    def open(self) -> Benchmark:
        """Rad-ChestCT's scans, all three splits."""
        labels = find_labels(self.labels, RAD_CHESTCT_LABELS, self.data_dir)
        return open_rad_chestct(labels, self.data_dir, protocol=self.protocol, allow_missing=self.allow_missing)

    def measure(
        self, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str], studies: Sequence[str]
    ) -> Measures:
        """Measures of the 15 columns and of the merged calcification; the label file names no patients."""
        merged_scores, merged = merge_calcification(scores_NC, classes)
        merged_labels, _ = merge_calcification(labels_NC, classes)
        findings = Findings(
            (*classes, CALCIFICATION),
            np.concatenate([scores_NC, merged_scores[:, -1:]], axis=1),
            np.concatenate([labels_NC, merged_labels[:, -1:]], axis=1),
            groups_N=studies,
        )
        if self.protocol == "published":
            headline = f"mean over the {len(classes)} label columns, calcification counted twice, as published"
            averages = Averages(headline, {"": classes, f"classes_{len(merged)}": merged})
        else:
            headline = f"mean over {len(merged)} findings, the two calcification columns merged into one"
            averages = Averages(headline, {"": merged, f"columns_{len(classes)}": classes})
        return chest_measures("Rad-ChestCT", findings, averages, protocol=self.protocol, grid_size=PUBLISHED_GRID_SIZE)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Command line."""
    return parse_and_evaluate(RadChestCtOptions, argv, prog="zeroshot_rad_chestct.py", description=DESCRIPTION)
