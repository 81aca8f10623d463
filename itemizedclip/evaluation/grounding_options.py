"""What all grounding benchmarks are asked for, and the table they print."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from itemizedclip.evaluation.benchmark import Benchmark, BenchmarkOptions
from itemizedclip.evaluation.explanation import THRESHOLDS
from itemizedclip.evaluation.grounding import GroundingEvaluator
from itemizedclip.evaluation.results import format_measure
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import read_json
from itemizedclip.runtime.logs import literal
from itemizedclip.runtime.processes import on_main


@dataclass(frozen=True, kw_only=True)
class GroundingOptions(BenchmarkOptions):
    """What grounding benchmarks are asked for."""

    threshold: float = 0.5
    """Fraction of a map's maximum above which a pixel is the item: 0.05, 0.10, … 0.95."""

    threshold_from: Path | None = None
    """Result file of the same benchmark on training data, whose best threshold is taken instead."""

    normalise_tokens: bool = False
    """L2-normalise image tokens before the head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(math.isclose(self.threshold, known) for known in THRESHOLDS):
            raise UserError(f"--threshold is {self.threshold}; expected one of 0.05, 0.10, … 0.95")

    def chosen_threshold(self) -> float:
        """The threshold to measure at.

        Raises:
            UserError: --threshold-from is no result of a grounding benchmark.
        """
        if self.threshold_from is None:
            return self.threshold
        path = self.threshold_from
        values = on_main(lambda: read_json(path, holding="results of a grounding benchmark"))
        metrics = values.get("metrics") if isinstance(values, dict) else None
        best = metrics.get("threshold_best") if isinstance(metrics, dict) else None
        if not isinstance(best, float) or not any(math.isclose(best, known) for known in THRESHOLDS):
            raise UserError(
                f"{path}: has no threshold_best; expected results of a grounding benchmark on training data"
            )
        return best

    def benchmark(
        self, evaluator: GroundingEvaluator, title: str, results: Path, facts: Mapping[str, Any]
    ) -> Benchmark:
        """A grounding benchmark, opened."""
        return Benchmark(
            name=evaluator.name,
            evaluator=evaluator,
            results=results,
            table=lambda metrics: grounding_table(title, metrics),
            facts=lambda: {
                **facts,
                "threshold_from": None if self.threshold_from is None else str(self.threshold_from),
            },
        )


def grounding_table(title: str, metrics: Mapping[str, float]) -> Table:
    """Measures, those that need context beside chance and the patch grid's ceiling."""
    table = Table(title=literal(title), title_justify="left")
    table.add_column("measure")
    for column in ("value", "chance", "patch grid allows"):
        table.add_column(column, justify="right")
    for name, value in metrics.items():
        if not name.startswith(_BESIDE):
            beside = (of.get(name, "") for of in (_CHANCE, _CEILING))
            cells = (format_measure(name, metrics[other]) if other in metrics else "" for other in beside)
            table.add_row(literal(name), format_measure(name, value), *cells)
    return table


_BESIDE = ("chance_", "ceiling_")
_CHANCE = {"dice": "chance_dice", "pointing_game": "chance_pointing"}
_CEILING = {"dice": "ceiling_dice", "hit_rate": "ceiling_hit_rate"}
