"""Results for people (a table) and for programs (results.json)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from itemizedclip.evaluation.encoding import Progress as OnProgress

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
        raise ValueError(f"{path}: metrics {', '.join(bad)} are not finite and are not written as a result")
    try:
        text = json.dumps(asdict(report), indent=2, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"{path}: facts must be numbers, strings, lists and dicts ({error})") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, which says which checkpoint or annotation file a result came from."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def metrics_table(title: str, metrics: Mapping[str, float], facts: Mapping[str, Any] | None = None) -> Table:
    """A rich table of measures, classes without an AUC among them; print it with a rich Console."""
    table = Table(title=title, title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, format_measure(name, value))
    for name in (facts or {}).get("undefined_classes", []):
        table.add_row(f"auc/{name}", "undefined (one label value)")
    return table


def format_measure(name: str, value: float) -> str:
    """Shares as percent, ranks with two decimals, everything else with four; decided by the name, never the value."""
    if "auc" in name:
        return f"{value:.4f}"
    leaf = name.rpartition("/")[2]
    if "rank" in leaf:
        return f"{value:.2f}"
    if "R@" in leaf or leaf.startswith(("top", "complete@")) or leaf in ("pointing_game", "nowhere_share"):
        return f"{100 * value:.1f} %"
    return f"{value:.4f}"


@contextmanager
def progress_bar(label: str, *, enabled: bool) -> Iterator[OnProgress]:
    """A bar on standard error, fed with (done, to do); nothing when that is no terminal."""
    console = Console(stderr=True)
    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, to_do: bar.update(task, completed=done, total=to_do)
