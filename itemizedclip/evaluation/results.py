"""Results for people (a table) and for programs (results.json)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import write_json
from itemizedclip.runtime.logs import literal

Protocol = Literal["corrected", "published"]
"""Whether known defects of the published evaluation are corrected (the default everywhere) or reproduced."""


@dataclass(frozen=True)
class EvaluationReport:
    """One evaluation of one checkpoint.

    Attributes:
        evaluation: what was evaluated, such as "RSICD 30 classes".
        protocol: see `Protocol`.
        checkpoint: file the weights came from.
        metrics: what an evaluator's `run` returned.
        facts: what an evaluator says about the run: counts, prompts and their fingerprint, scoring.
    """

    evaluation: str
    protocol: Protocol
    checkpoint: str
    metrics: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)


def write_results(path: str | Path, report: EvaluationReport) -> None:
    """Write `report` as JSON; the file appears whole or not at all.

    Raises:
        ValueError: a metric that is not finite, or a fact that is no plain data.
    """
    path = Path(path)
    bad = [name for name, value in report.metrics.items() if not math.isfinite(value)]
    if bad:
        raise UserError(f"{path}: metrics {', '.join(bad)} are not finite and are not written as a result")
    write_json(path, asdict(report))


def metrics_table(title: str, metrics: Mapping[str, float], facts: Mapping[str, Any] | None = None) -> Table:
    """A rich table of measures, classes without an AUC among them; print it with a rich Console."""
    table = Table(title=literal(title), title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(literal(name), format_measure(name, value))
    for name in (facts or {}).get("undefined_classes", []):
        table.add_row(literal(f"auc/{name}"), "undefined (one label value)")
    return table


def format_measure(name: str, value: float) -> str:
    """Shares as percent, ranks with two decimals, everything else with four; decided by the name, never the value."""
    if "auc" in name:
        return f"{value:.4f}"
    leaf = name.rpartition("/")[2]
    if "rank" in leaf:
        return f"{value:.2f}"
    if (
        "R@" in leaf
        or leaf.startswith(("top", "complete@"))
        or leaf == "pointing_game"
        or leaf.startswith("nowhere_share")
    ):
        return f"{100 * value:.1f} %"
    return f"{value:.4f}"
