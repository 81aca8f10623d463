"""What is measured of chest CT findings (CT-RATE, Rad-ChestCT): at which thresholds, over which findings; the table.

Axes: N volumes, C classes, M findings that are measured (C, or more where columns are merged).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from itemizedclip.evaluation.classification import class_aucs
from itemizedclip.evaluation.results import Protocol
from itemizedclip.runtime.errors import UserError
from itemizedclip_radiology.benchmarks.operating_points import (
    MEANING,
    MEASURES,
    Decided,
    corner_threshold,
    decide,
    decide_across_folds,
    measure_decisions,
    published_grid,
)
from itemizedclip_radiology.benchmarks.roc_figure import RocCurve, roc_figure
from itemizedclip_radiology.benchmarks.zero_shot import Measures

_HEADINGS = {"accuracy": "acc", "balanced_accuracy": "b.acc", "f1": "F1", "recall": "rec", "precision": "prec"}
"""Short: a table of 80 columns has room for five besides the longest finding."""


@dataclass(frozen=True)
class Findings:
    """Scores and labels of the findings that are measured.

    Attributes:
        names: M findings.
        scores_NM: float64.
        labels_NM: int8, −1 where not rated.
        groups_N: rows of one group (patient) stay in one fold.
        scans_N: rows of one scan are also averaged and measured together; None: every row is a scan.
    """

    names: Sequence[str]
    scores_NM: np.ndarray
    labels_NM: np.ndarray
    groups_N: Sequence[str]
    scans_N: Sequence[str] | None = None


@dataclass(frozen=True)
class Averages:
    """Which findings are averaged.

    Attributes:
        headline: sentence that says what the unprefixed means are.
        sets: prefix of the means ("" for the headline) → findings.
    """

    headline: str
    sets: Mapping[str, Sequence[str]]


def chest_measures(
    title: str, findings: Findings, averages: Averages, *, protocol: Protocol, grid_size: int
) -> Measures:
    """AUC of every finding, and accuracy, F1, recall and precision at each kind of threshold; see `operating_points`.

    Metrics are named auc/<finding> and <choice of threshold>/<measure>/<finding>, means mean_auc and
    <choice>/<measure>, after the prefix of their set of findings.

    Args:
        title: of table and picture.
        findings: what to measure.
        averages: what to average.
        protocol: "published" adds thresholds from the published grid.
        grid_size: values of that grid.

    Raises:
        ValueError: no finding has both rows with and without it.
    """
    by_finding: dict[str, dict[str, float]] = {}
    thresholds: dict[str, dict[str, list[float]]] = {}
    curves = []
    grid = published_grid(grid_size) if protocol == "published" else None
    for m, name in enumerate(findings.names):
        rated = findings.labels_NM[:, m] >= 0
        labels, scores = findings.labels_NM[rated, m], findings.scores_NM[rated, m]
        (auc,) = class_aucs(torch.from_numpy(scores[:, None]), labels[:, None].astype(np.float64))
        if auc is None:
            continue
        groups = [group for group, keep in zip(findings.groups_N, rated) if keep]
        measured = {"auc": auc}
        for choice, decided in _decisions(scores, labels, groups, grid).items():
            measured |= {f"{choice}/{key}": v for key, v in measure_decisions(labels, decided.positive_N).items()}
            thresholds.setdefault(choice, {})[name] = decided.thresholds
        by_finding[name] = measured
        curves.append(RocCurve(name, scores, labels, auc, corner_threshold(scores, labels)))
    if not by_finding:
        raise UserError(f"{title}: no finding has both volumes with and without it, so nothing can be measured")
    scan_aucs = _scan_aucs(findings)
    metrics = _means(by_finding, scan_aucs, averages.sets)
    for name, measured in by_finding.items():
        metrics |= {f"{key}/{name}": value for key, value in measured.items()}
    metrics |= {f"scan/auc/{name}": auc for name, auc in scan_aucs.items()}
    undefined = [name for name in findings.names if name not in by_finding]
    facts: dict[str, Any] = {
        "headline": f"mean_auc: {averages.headline}",
        "means": {prefix or "headline": list(members) for prefix, members in averages.sets.items()},
        "threshold_choices": {choice: MEANING[choice] for choice in thresholds},
        "thresholds": thresholds,
        "f1": "weighted by class (with and without the finding); recall and precision are those of the finding",
        "undefined_classes": undefined,
        "not_cross_validated": [name for name in by_finding if name not in thresholds.get("cross_validated", {})],
        "num_groups": len(set(findings.groups_N)),
    }
    if findings.scans_N is not None:
        facts["num_scans"] = len(set(findings.scans_N))
        facts["scan"] = "scan/…: scores of a scan's reconstructions averaged, one row per scan"
    shown = "published" if protocol == "published" else "cross_validated"
    table = _table(title, findings, by_finding, metrics, averages.sets, shown)
    heading = f"{title}: mean AUC {metrics['mean_auc']:.3f}, {len(findings.scores_NM):,} volumes"
    return Measures(metrics, facts, table, {"roc": roc_figure(heading, curves)})


def _decisions(
    scores_N: np.ndarray, labels_N: np.ndarray, groups_N: Sequence[str], grid_T: np.ndarray | None
) -> dict[str, Decided]:
    """Choice of threshold → yes or no of one finding."""
    decisions = {"corner": decide(scores_N, labels_N)}
    across = decide_across_folds(scores_N, labels_N, groups_N)
    if across is not None:
        decisions["cross_validated"] = across
    if grid_T is not None:
        decisions["published"] = decide(scores_N, labels_N, grid_T)
    return decisions


def _scan_aucs(findings: Findings) -> dict[str, float]:
    """AUC of each finding with the scores of a scan averaged; a scan has a finding when one of its rows has it."""
    if findings.scans_N is None:
        return {}
    names, scan_N = np.unique(findings.scans_N, return_inverse=True)
    sums = np.zeros((len(names), len(findings.names)))
    np.add.at(sums, scan_N, findings.scores_NM)
    labels = np.full(sums.shape, -1, dtype=np.int8)
    np.maximum.at(labels, scan_N, findings.labels_NM)
    means = sums / np.bincount(scan_N)[:, None]
    aucs = class_aucs(torch.from_numpy(means), np.where(labels < 0, np.nan, labels.astype(np.float64)))
    return {name: auc for name, auc in zip(findings.names, aucs) if auc is not None}


def _means(
    by_finding: Mapping[str, Mapping[str, float]], scan_aucs: Mapping[str, float], sets: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Means over each set of findings, of those that have the measure."""
    metrics: dict[str, float] = {}
    keys = list(dict.fromkeys(key for measured in by_finding.values() for key in measured))
    for prefix, members in sets.items():
        stem = f"{prefix}/" if prefix else ""
        for key in keys:
            values = [by_finding[name][key] for name in members if key in by_finding.get(name, {})]
            if values:
                metrics[stem + ("mean_auc" if key == "auc" else key)] = float(np.mean(values))
        scan_values = [scan_aucs[name] for name in members if name in scan_aucs]
        if scan_values:
            metrics[f"{stem}scan/mean_auc"] = float(np.mean(scan_values))
    return metrics


def _table(
    title: str,
    findings: Findings,
    by_finding: Mapping[str, Mapping[str, float]],
    metrics: Mapping[str, float],
    sets: Mapping[str, Sequence[str]],
    choice: str,
) -> Table:
    heading = f"{title}: {len(findings.scores_NM):,} volumes; percent at {choice.replace('_', '-')} thresholds"
    table = Table(title=heading, title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("finding", no_wrap=True)
    for name in ("with", "AUC", *_HEADINGS.values()):
        table.add_column(name, justify="right", no_wrap=True)

    def cells(values: Mapping[str, float]) -> list[str]:
        keys = [f"{choice}/{measure}" for measure in MEASURES]
        return [f"{100 * values[key]:.1f}" if key in values else "–" for key in keys]

    for m, name in enumerate(findings.names):
        positive = f"{int((findings.labels_NM[:, m] == 1).sum()):,}"
        measured = by_finding.get(name)
        if measured is None:
            table.add_row(name, positive, *["–"] * (1 + len(_HEADINGS)))
        else:
            table.add_row(name, positive, f"{measured['auc']:.4f}", *cells(measured))
    table.add_section()
    for prefix, members in sets.items():
        stem = f"{prefix}/" if prefix else ""
        if f"{stem}mean_auc" not in metrics:
            continue
        means = {key: metrics[stem + key] for key in metrics if stem + key in metrics}
        table.add_row(f"mean of {len(members)}", "", f"{means['mean_auc']:.4f}", *cells(means))
        if "scan/mean_auc" in means:
            table.add_row(f"mean of {len(members)}, by scan", "", f"{means['scan/mean_auc']:.4f}")
    return table
