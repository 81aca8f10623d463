"""The part of an image that a text looked at, as a box in the image's own pixels.

Axes: h, w rows and columns of the token grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from itemizedclip.viewer.geometry import Geometry

PEAK_FRACTION = 0.5
"""Patches with at least this fraction of the peak's attention, and connected with it, are the attended region."""

_NEIGHBOURS = np.ones((3, 3), dtype=bool)  # corners touch


@dataclass(frozen=True)
class AttendedRegion:
    """Where a text looked most, in pixels of the upright image.

    Attributes:
        left: first column.
        top: first row.
        right: column after the last.
        bottom: row after the last.
        share: of the text's attention, how much rests on the region's patches; `nowhere` and the rest of the image
            hold the remainder.
        nowhere: of the text's attention, how much rests on no patch.
    """

    left: int
    top: int
    right: int
    bottom: int
    share: float
    nowhere: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom)."""
        return self.left, self.top, self.right, self.bottom


def attended_region(weights_hw: np.ndarray, nowhere: float, geometry: Geometry) -> AttendedRegion:
    """The patches around the peak of an attention map.

    Args:
        weights_hw: attention of one text, averaged over heads.
        nowhere: the zero token's share.
        geometry: the way from the image to the patches.
    """
    peak = np.unravel_index(int(weights_hw.argmax()), weights_hw.shape)
    parts, _ = ndimage.label(weights_hw >= PEAK_FRACTION * weights_hw[peak], structure=_NEIGHBOURS)
    mask = parts == parts[peak]
    bounds = []
    for axis, cells in enumerate(ndimage.find_objects(mask.astype(np.uint8))[0]):
        patch = geometry.view_size[axis] / weights_hw.shape[axis]
        scale, offset, size = geometry.scale[axis], geometry.offset[axis], geometry.input_size[axis]
        first, last = ((cell * patch + offset) / scale for cell in (cells.start, cells.stop))
        # Rounded before the edges are taken, so that a patch that ends on a pixel's edge does not claim the next one.
        bounds.append((max(0, math.floor(round(first, 6))), min(size, math.ceil(round(last, 6)))))
    (top, bottom), (left, right) = bounds
    return AttendedRegion(left, top, right, bottom, float(weights_hw[mask].sum()), nowhere)
