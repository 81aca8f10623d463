"""A benchmark as somebody else's package would bring it: random pictures for the smallest model, some broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from itemizedclip.data.batch import BadSampleError, ItemSample
from itemizedclip.evaluation.benchmark import Benchmark, BenchmarkOptions, Subject
from itemizedclip.evaluation.classification import ClassPrompts, SingleLabelEvaluator
from itemizedclip.evaluation.results import metrics_table
from itemizedclip.runtime.errors import MissingFileError
from itemizedclip.runtime.processes import main_first


class Pictures:
    """Eight random pictures of 64 × 64; those of `bad` cannot be read."""

    def __init__(self, bad: Sequence[int]) -> None:
        self.bad = bad
        self.images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> ItemSample:
        if row in self.bad:
            raise BadSampleError(f"{row}.png: no picture; copy it again")
        return ItemSample(f"{row}.png", self.images[row], [])


@dataclass(frozen=True, kw_only=True)
class TinyOptions(BenchmarkOptions):
    """Two classes of random pictures: chance, by which nobody learns anything.

    Further lines are not in the list.
    """

    data_dir: Path
    """A folder that must be there."""

    bad: tuple[int, ...] = ()
    """Pictures that cannot be read."""

    def open(self, subject: Subject) -> Benchmark:
        """Random pictures, the first half of one class."""
        dataset = main_first(self._read)
        evaluator = SingleLabelEvaluator(
            dataset,
            subject.loaded.tokenizer,
            ClassPrompts.from_templates(["seven", "two"], ["a {class}"]),
            labels=[0, 0, 0, 0, 1, 1, 1, 1],
            encoding=subject.encoding,
        )
        return Benchmark(
            name="tiny",
            evaluator=evaluator,
            results=(self.output or self.checkpoint.with_suffix(".tiny")) / "tiny.results.json",
            table=lambda metrics: metrics_table("Tiny", metrics),
            facts=lambda: {"data_dir": str(self.data_dir)},
            notes=["these pictures mean nothing"],
            figures=lambda: {"empty": Figure()},
        )

    def _read(self) -> Pictures:
        if not self.data_dir.is_dir():
            raise MissingFileError(f"{self.data_dir}: no such folder (--data-dir)")
        return Pictures(self.bad)
