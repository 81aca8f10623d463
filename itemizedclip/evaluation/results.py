"""Results for people (a table) and for programs (results.json)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
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


_COMPACT: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}


def intervals_table(
    metrics: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], *, patients: int, most: int = 24
) -> Table:
    """95 % intervals of measures, those of single classes last and, beyond `most`, only in the result file."""
    table = Table(
        title=f"95 % intervals, {patients:,} patients or images",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("measure", no_wrap=True)
    for name in ("value", "from", "to"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in sorted(intervals, key=lambda name: name.startswith("auc/"))[:most]:
        shown = (format_measure(name, value) for value in (metrics[name], *intervals[name]))
        table.add_row(literal(name), *shown)
    return table


def differences_table(other: str, compared: Mapping[str, Any]) -> Table:
    """What `paired.compare_cases` found."""
    table = Table(
        title=literal(f"Difference to {other}, {compared['num_cases']:,} cases"),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("measure", no_wrap=True)
    for name in ("this", "other", "difference", "95 % interval", "p", "test"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, found in compared["differences"].items():
        ends = f"{found['low']:+.4f} … {found['high']:+.4f}"
        values = [f"{found['value']:.4f}", f"{found['other']:.4f}", f"{found['difference']:+.4f}", ends]
        table.add_row(literal(name), *values, f"{found['p']:.4f}", found["test"])
    return table


def calibrated_table(measured: Mapping[str, Mapping[str, Any]], coverage: float) -> Table:
    """What `calibration.measured_calibration` found of other patients."""
    table = Table(
        title=f"Calibrated, stated coverage {coverage:.0%}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("finding", no_wrap=True)
    for name in ("Brier", "error", "cov. with", "without", "undecided", "threshold", "sens.", "spec."):
        table.add_column(name, justify="right", no_wrap=True)

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f} %"

    for finding, own in measured.items():
        first = own["operating_points"][0]
        shares = [percent(own[key]) for key in ("coverage_present", "coverage_absent", "undecided")]
        point = [f"{first['threshold']:.4f}", percent(first["sensitivity"]), percent(first["specificity"])]
        table.add_row(literal(finding), f"{own['brier']:.4f}", f"{own['calibration_error']:.4f}", *shares, *point)
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
