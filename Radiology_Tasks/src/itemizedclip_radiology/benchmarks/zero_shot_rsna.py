"""Zero-shot detection of intracranial hemorrhage on head CT: RSNA 2019.

    python3 zero_shot_rsna.py --resume epoch_24.pt --data-dir DIR --use-serienames
    python3 zero_shot_rsna.py --resume epoch_24.pt --data-dir DIR --labels RSNA.csv --study-lists test.txt val.txt
    torchrun --nproc_per_node 8 -- zero_shot_rsna.py …          the same numbers

Axes: N studies, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from itemizedclip_radiology.benchmarks.benchmark import Benchmark
from itemizedclip_radiology.benchmarks.head_ct import open_rsna, read_study_list
from itemizedclip_radiology.benchmarks.zero_shot import (
    Measures,
    ZeroShotOptions,
    find_labels,
    finding_measures,
    parse_and_evaluate,
)

DESCRIPTION = "Zero-shot detection of intracranial hemorrhage and four of its kinds on RSNA: AUC of each, mean."
LABEL_FILES = ("RSNA.csv", "rsna.csv")


@dataclass(frozen=True, kw_only=True)
class RsnaOptions(ZeroShotOptions):
    """Zero-shot detection on RSNA."""

    study_lists: tuple[Path, ...] = ()
    """Text files of study ids, one per line: score only these; default: all of the label file."""

    family: ClassVar[str] = "rsna"

    def open(self) -> Benchmark:
        """RSNA's studies, every one once."""
        labels = find_labels(self.labels, LABEL_FILES, self.data_dir)
        return open_rsna(
            labels,
            self.data_dir,
            studies=read_study_list(self.study_lists) if self.study_lists else None,
            protocol=self.protocol,
            allow_missing=self.allow_missing,
        )

    def measure(
        self, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str], studies: Sequence[str]
    ) -> Measures:
        """AUC of each finding and their mean."""
        return finding_measures("RSNA", scores_NC, labels_NC, classes)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Command line."""
    return parse_and_evaluate(RsnaOptions, argv, prog="zero_shot_rsna.py", description=DESCRIPTION)
