"""Attention maps and masks between a token grid and the input's own pixels, axis by axis.

The same way as `itemizedclip.viewer.geometry.map_to_input` with "smooth", without that function's list of places, which
takes three numbers per voxel: a chest CT has a hundred million.

Axes: *grid how tokens lie, *input pixels or voxels of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Lattice:
    """How a token grid lies over an input; one entry per axis.

    Attributes:
        input_size: pixels of the input.
        view_size: pixels of the model's view, which the grid divides evenly.
        scale, offset: position x of the input lies at x · scale − offset in the view.
        grid: tokens.
    """

    input_size: tuple[int, ...]
    view_size: tuple[int, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    grid: tuple[int, ...]

    def _places(self, axis: int) -> NDArray[np.float64]:
        """Where the centre of each input pixel lies along the grid, in cells; outside 0 … cells where not seen."""
        centre = np.arange(self.input_size[axis]) + 0.5
        in_view = centre * self.scale[axis] - self.offset[axis]
        return in_view / self.view_size[axis] * self.grid[axis]

    def _seen(self, axis: int) -> NDArray[np.bool_]:
        places = self._places(axis)
        return (places >= 0) & (places < self.grid[axis])

    def enlarge(self, values: Array) -> Array:
        """Values of the grid → float32 (*input), linear between cell centres; 0 where the model did not look."""
        out = np.asarray(values, dtype=np.float32)
        for axis, cells in enumerate(self.grid):
            at = np.clip(self._places(axis) - 0.5, 0, cells - 1)
            low = np.minimum(at.astype(int), max(cells - 2, 0))
            high = np.minimum(low + 1, cells - 1)
            share = (at - low).astype(np.float32)
            seen = self._seen(axis).astype(np.float32)
            weights = np.zeros((len(at), cells), dtype=np.float32)
            rows = np.arange(len(at))
            weights[rows, low] += (1 - share) * seen
            weights[rows, high] += share * seen
            out = np.moveaxis(np.tensordot(weights, out, axes=(1, axis)), 0, axis)
        return np.ascontiguousarray(out)

    def reduce(self, mask: NDArray[np.bool_]) -> Array:
        """Share of each cell's pixels that a mask (*input) covers, (*grid); 0 for cells of padding alone."""
        cells = [np.clip(self._places(axis).astype(int), 0, n - 1) for axis, n in enumerate(self.grid)]
        for axis in range(len(self.grid)):
            mask = np.compress(self._seen(axis), mask, axis=axis)
            cells[axis] = cells[axis][self._seen(axis)]
        covered = np.zeros(self.grid, dtype=np.float32)
        places = np.nonzero(mask)
        np.add.at(covered, tuple(own[at] for own, at in zip(cells, places)), 1)
        whole = np.ones(self.grid, dtype=np.float32)
        for axis, (own, n) in enumerate(zip(cells, self.grid)):
            count = np.bincount(own, minlength=n).astype(np.float32)
            whole = whole * count.reshape([-1 if other == axis else 1 for other in range(len(self.grid))])
        return (covered / np.maximum(whole, 1)).astype(np.float32)


def bounding_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) of a mask (H, W), the last two beyond it; None when it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1) if len(rows) else None


def box_iou(first: Sequence[int], second: Sequence[int]) -> float:
    """Intersection over union of two boxes (top, left, bottom, right)."""
    sides = [min(first[at + 2], second[at + 2]) - max(first[at], second[at]) for at in (0, 1)]
    inside = max(0, sides[0]) * max(0, sides[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return inside / max(sum(areas) - inside, 1)
