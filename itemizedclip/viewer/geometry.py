"""The way from the tokens of attention maps back to the pixels or voxels of the input.

Axes: T items of one image; *grid how the tokens lie in the image, (h, w) for photographs, (S, d, h, w) for studies of
S series; *input the input's own size.

A transform resizes, crops or pads, so a token's place in the model's view is not its place in the input. `Geometry`
keeps the way, `map_to_input` goes back along it. Positions are measured between pixel edges: pixel n of an axis covers
n … n + 1, and resizing maps edges to edges, as Pillow and PyTorch (align_corners=False) do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from itemizedclip.runtime.errors import UserError

Upsampling = Literal["nearest", "smooth"]
"""Each pixel takes the value of the patch it lies in, or is interpolated linearly between patch centres."""


@dataclass(frozen=True)
class Geometry:
    """How a transform moved the input's pixels (or voxels) into the model's view; one entry per axis.

    Position x of the input, in pixels from its first edge, lies at x · scale − offset in the view. Parts of the view
    that no input pixel covers are padding, parts of the input outside the view were never seen.

    Build it step by step: `Geometry.of_input((480, 640)).resize((224, 298)).crop((0, 37), (224, 224))`.

    Attributes:
        input_size: pixels of the input, (H, W) or (D, H, W).
        view_size: pixels of the model's view.
        scale: view pixels per input pixel.
        offset: view pixels between the scaled input's first edge and the view's; negative where the view was padded.
    """

    input_size: tuple[int, ...]
    view_size: tuple[int, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]

    @classmethod
    def of_input(cls, size: Sequence[int]) -> Geometry:
        """The view is the input itself."""
        if len(size) not in (2, 3) or min(size) < 1:
            raise UserError(f"an input has 2 or 3 axes of at least 1 pixel, got the size {tuple(size)}")
        return cls(tuple(size), tuple(size), (1.0,) * len(size), (0.0,) * len(size))

    def resize(self, size: Sequence[int]) -> Geometry:
        """The view is resized to `size`, edges to edges."""
        factor = [new / old for new, old in zip(self._checked(size), self.view_size)]
        return replace(
            self,
            view_size=tuple(size),
            scale=tuple(s * f for s, f in zip(self.scale, factor)),
            offset=tuple(o * f for o, f in zip(self.offset, factor)),
        )

    def crop(self, start: Sequence[int], size: Sequence[int]) -> Geometry:
        """The view is cut to `size` pixels from `start` on; a start below 0, or a size beyond the end, pads it."""
        offset = tuple(o + s for o, s in zip(self.offset, self._checked(start)))
        return replace(self, view_size=tuple(self._checked(size)), offset=offset)

    def of_resized_input(self, size: Sequence[int]) -> Geometry:
        """The same view, seen from a copy of the input resized to `size` (to draw a large image smaller)."""
        scale = tuple(s * old / new for s, old, new in zip(self.scale, self.input_size, self._checked(size)))
        return replace(self, input_size=tuple(size), scale=scale)

    def of_input_box(self, start: Sequence[int], size: Sequence[int]) -> Geometry:
        """The same view, seen from a box of the input alone: one slice, or a slab of slices, of a large volume."""
        offset = tuple(o - first * s for o, first, s in zip(self.offset, self._checked(start), self.scale))
        return replace(self, input_size=tuple(self._checked(size)), offset=offset)

    def to_view(self, position: Sequence[float]) -> tuple[float, ...]:
        """Where a position of the input, between pixel edges, lies in the view."""
        return tuple(x * s - o for x, s, o in zip(position, self.scale, self.offset))

    def to_input(self, position: Sequence[float]) -> tuple[float, ...]:
        """Where a position of the view lies in the input."""
        return tuple((x + o) / s for x, s, o in zip(position, self.scale, self.offset))

    def _checked(self, values: Sequence[int]) -> Sequence[int]:
        if len(values) != len(self.input_size):
            raise UserError(f"expected {len(self.input_size)} numbers, one per axis, got {tuple(values)}")
        return values


def geometry_of_transform(transform: Callable[..., Any], input_size: tuple[int, int]) -> Geometry:
    """What an evaluation transform does to an image of `input_size` (H, W).

    Sizes and cut positions are read off the steps themselves, by running them on test images, not computed anew.

    Args:
        transform: one of open_clip's evaluation transforms (`create_transform(config, is_train=False)`), or a
            torchvision Compose of Resize, CenterCrop, ToTensor, Normalize.
        input_size: of the image before the transform.

    Raises:
        ValueError: a step that is not known here, such as a random one.
    """
    # Here, because importing them takes seconds that models of studies do not need.
    from open_clip.transform import CenterCropOrPad, MaybeConvertMode, ResizeKeepRatio
    from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

    geometry = Geometry.of_input(input_size)
    for step in transform.transforms if isinstance(transform, Compose) else [transform]:
        if isinstance(step, (Resize, ResizeKeepRatio)):
            height, width = geometry.view_size
            resized = step(Image.new("L", (width, height)))
            geometry = geometry.resize((resized.height, resized.width))
        elif isinstance(step, (CenterCrop, CenterCropOrPad)):
            geometry = _crop_like(geometry, step)
        elif not isinstance(step, (ToTensor, Normalize, MaybeConvertMode)):
            raise UserError(
                f"cannot tell where {step!r} moves the pixels; expected an evaluation transform made of Resize, "
                "CenterCrop, ToTensor and Normalize (random steps have no way back)"
            )
    return geometry


def _crop_like(geometry: Geometry, step: Callable[[Tensor], Tensor]) -> Geometry:
    """Read off what a crop does from an image of row and column numbers: −1, −2, …, while padding is 0 or more."""
    rows, columns = (-torch.arange(1.0, size + 1) for size in geometry.view_size)
    cut = step(torch.stack(torch.meshgrid(rows, columns, indexing="ij")))
    start = []
    for numbers in (cut[0].amin(1), cut[1].amin(0)):
        first = int((numbers < 0).nonzero()[0])
        start.append(-int(numbers[first]) - 1 - first)
    return geometry.crop(start, cut.shape[1:])


def mask_to_view(masks: Tensor | np.ndarray, geometry: Geometry) -> Tensor:
    """Carry masks the other way, from the input's own pixels into the model's view.

    A pixel of the view belongs to a mask that covers its centre, or that has a pixel whose centre falls into it: so
    neither enlarging tears holes into a mask nor shrinking loses a thin one.

    Args:
        masks: bool (..., *input).
        geometry: how the view was made from the input.

    Returns:
        bool (..., *view); False where the view is padding.
    """
    masks = torch.as_tensor(masks)
    num_axes = len(geometry.input_size)
    if masks.dtype != torch.bool or tuple(masks.shape[masks.dim() - num_axes :]) != geometry.input_size:
        raise UserError(f"masks are {masks.dtype} {tuple(masks.shape)}; expected bool (…, {geometry.input_size})")
    covered = torch.zeros((*masks.shape[: masks.dim() - num_axes], *geometry.view_size), dtype=torch.bool)
    gathered, inside_view = masks, []
    for axis, (size, view, scale, offset) in enumerate(
        zip(geometry.input_size, geometry.view_size, geometry.scale, geometry.offset)
    ):
        at = ((torch.arange(view, dtype=torch.float64) + 0.5 + offset) / scale).floor().long()
        inside_view.append((at >= 0) & (at < size))
        gathered = gathered.index_select(axis - num_axes, at.clamp(0, size - 1))
    for axis, inside in enumerate(inside_view):
        gathered = gathered & inside.view([-1 if other == axis else 1 for other in range(num_axes)])
    covered |= gathered
    points = masks.nonzero()
    positions = points[:, -num_axes:].double() + 0.5
    cells = (positions * torch.tensor(geometry.scale) - torch.tensor(geometry.offset)).floor().long()
    kept = ((cells >= 0) & (cells < torch.tensor(geometry.view_size))).all(1)
    where = torch.cat([points[kept, :-num_axes], cells[kept]], dim=1)
    covered[tuple(where.T)] = True
    return covered


def map_to_input(values: Tensor | np.ndarray, geometry: Geometry, mode: Upsampling = "nearest") -> np.ndarray:
    """Carry maps from the token grid to the input's own pixels.

    The grid divides the view evenly. When patches leave a rest at the far edges, which a convolution drops, crop the
    geometry to what they cover first: `geometry.crop((0, 0), (h * patch, w * patch))`.

    Args:
        values: (..., *grid), with one grid axis per axis of the geometry.
        geometry: how the view was made from the input.
        mode: "nearest" shows the patches, "smooth" interpolates linearly between their centres.

    Returns:
        float32 (..., *input), NaN where the input lies outside the view.

    Raises:
        ValueError: maps with fewer axes than the geometry, or an unknown mode.
    """
    if mode not in ("nearest", "smooth"):
        raise UserError(f'mode is {mode!r}; expected "nearest" or "smooth"')
    maps = torch.as_tensor(values).detach().cpu().float()
    num_axes = len(geometry.input_size)
    if maps.dim() < num_axes:
        raise UserError(f"maps of shape {tuple(maps.shape)} have fewer axes than the input {geometry.input_size}")
    positions, seen = [], torch.ones(geometry.input_size, dtype=torch.bool)
    for axis, (size, view, scale, offset) in enumerate(
        zip(geometry.input_size, geometry.view_size, geometry.scale, geometry.offset)
    ):
        at = (torch.arange(size, dtype=torch.float64) + 0.5) * scale - offset  # centre of each input pixel, in the view
        inside = (at >= 0) & (at < view)
        seen &= inside.view([-1 if other == axis else 1 for other in range(num_axes)])
        positions.append((at / view * 2 - 1).float())  # grid_sample counts from −1 to 1, edge to edge
    # grid_sample wants the last axis first.
    where = torch.stack(torch.meshgrid(*positions, indexing="ij")[::-1], dim=-1)
    leading = maps.shape[: maps.dim() - num_axes]
    flat = maps.reshape(1, -1, *maps.shape[maps.dim() - num_axes :])
    method = "nearest" if mode == "nearest" else "bilinear"
    sampled = F.grid_sample(flat, where[None], mode=method, padding_mode="border", align_corners=False)
    return sampled.masked_fill(~seen, float("nan")).reshape(*leading, *geometry.input_size).numpy()
