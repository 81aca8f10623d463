"""A picture of a comparison: for each measure, what every objective reached, run by run and on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

Values = Mapping[str, Sequence[float]]
"""Objective → its values, one per seed."""


def comparison_figure(measures: Mapping[str, Values], *, title: str = "", columns: int = 4) -> Figure:
    """Small multiples, one per measure: a row per objective, a dot per seed, a bar at the mean.

    Args:
        measures: label of a measure → objectives and their values; the objectives of the first one name the rows, and
            those without a value leave their row empty.
        title: above all.
        columns: panels side by side, at most.

    Raises:
        ValueError: no measure.
    """
    if not measures:
        raise ValueError("no measure to draw; expected at least one")
    names = list(dict.fromkeys(name for values in measures.values() for name in values))
    columns = min(columns, len(measures))
    rows = -(-len(measures) // columns)
    figure = Figure(figsize=(1.2 + 2.5 * columns, 0.9 + rows * (0.8 + 0.26 * len(names))), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    height = {name: len(names) - 1 - row for row, name in enumerate(names)}
    for axes, (label, values) in zip(grid.flat, measures.items()):
        for name, runs in values.items():
            if not runs:
                continue
            y = height[name]
            axes.plot(runs, np.full(len(runs), y), "o", markersize=4, alpha=0.55, color="tab:blue")
            axes.plot([float(np.mean(runs))] * 2, [y - 0.3, y + 0.3], "-", linewidth=2, color="black")
        axes.set_title(label, fontsize=8)
        axes.set_yticks(list(height.values()), list(height))
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="both", linewidth=0.4, alpha=0.5)
        axes.set_axisbelow(True)
    for axes in grid.flat[len(measures) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=9)
    return figure
