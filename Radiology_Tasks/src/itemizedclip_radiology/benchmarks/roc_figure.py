"""ROC curves of several findings as small multiples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

_COLUMNS = 4
_PANEL_INCHES = 2.3
_CURVE, _CORNER, _CHANCE = "#0072b2", "#d55e00", "0.6"
"""Blue and vermilion are told apart under every common colour blindness."""


@dataclass(frozen=True)
class RocCurve:
    """One finding.

    Attributes:
        name: title of its panel.
        scores_N: scores.
        labels_N: 0 or 1.
        auc: area under the curve.
        threshold: whose operating point is marked.
    """

    name: str
    scores_N: np.ndarray
    labels_N: np.ndarray
    auc: float
    threshold: float


def roc_figure(title: str, curves: Sequence[RocCurve]) -> Figure:
    """One panel per finding, in order: its curve, its AUC, and the operating point nearest to the corner."""
    from sklearn.metrics import roc_curve

    columns = min(_COLUMNS, len(curves))
    rows = math.ceil(len(curves) / columns)
    with matplotlib.style.context("default"):
        size = (columns * _PANEL_INCHES + 0.5, rows * (_PANEL_INCHES + 0.25) + 0.8)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for panel, curve in zip(panels, curves):
            false_alarms, hits, _ = roc_curve(curve.labels_N, curve.scores_N)
            panel.plot([0, 1], [0, 1], color=_CHANCE, linewidth=0.8, linestyle=":")
            panel.plot(false_alarms, hits, color=_CURVE, linewidth=1.4)
            called = curve.scores_N > curve.threshold
            point = (float(called[curve.labels_N == 0].mean()), float(called[curve.labels_N == 1].mean()))
            panel.plot(*point, "o", color=_CORNER, markersize=4)
            panel.set_title(curve.name, fontsize=8)
            counted = f"AUC {curve.auc:.3f}\n{int((curve.labels_N == 1).sum()):,} of {len(curve.labels_N):,}"
            panel.text(0.97, 0.04, counted, ha="right", va="bottom", fontsize=8, transform=panel.transAxes)
            panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            panel.tick_params(labelsize=7)
        for panel in panels[len(curves) :]:
            panel.set_visible(False)
        for place, panel in enumerate(panels[: len(curves)]):
            # The lowest panel of a column carries its numbers, also where the last row is not full.
            panel.tick_params(labelbottom=place + columns >= len(curves))
        figure.suptitle(title, fontsize=10)
        figure.supxlabel("false-positive rate", fontsize=9)
        figure.supylabel("true-positive rate (point: nearest to the upper left corner)", fontsize=9)
    return figure
