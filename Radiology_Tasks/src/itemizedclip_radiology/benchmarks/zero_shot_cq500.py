"""Zero-shot detection of ten findings on head CT: CQ500.

    python3 zero_shot_cq500.py --resume epoch_24.pt --data-dir DIR --use-serienames
    torchrun --nproc_per_node 8 -- zero_shot_cq500.py …          the same numbers

Axes: N studies, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from itemizedclip_radiology.benchmarks.benchmark import Benchmark
from itemizedclip_radiology.benchmarks.head_ct import open_cq500
from itemizedclip_radiology.benchmarks.zero_shot import (
    Measures,
    ZeroShotOptions,
    find_labels,
    finding_measures,
    parse_and_evaluate,
)

DESCRIPTION = "Zero-shot detection of ten findings on CQ500: AUC of each and their mean."
LABEL_FILES = ("CQ500.csv", "cq500.csv")


@dataclass(frozen=True, kw_only=True)
class Cq500Options(ZeroShotOptions):
    """Zero-shot detection on CQ500."""

    family: ClassVar[str] = "cq500"

    def open(self) -> Benchmark:
        """CQ500's studies, every series in every window."""
        labels = find_labels(self.labels, LABEL_FILES, self.data_dir)
        return open_cq500(labels, self.data_dir, protocol=self.protocol, allow_missing=self.allow_missing)

    def measure(
        self, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str], studies: Sequence[str]
    ) -> Measures:
        """AUC of each finding and their mean."""
        return finding_measures("CQ500", scores_NC, labels_NC, classes)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Command line."""
    return parse_and_evaluate(Cq500Options, argv, prog="zero_shot_cq500.py", description=DESCRIPTION)
