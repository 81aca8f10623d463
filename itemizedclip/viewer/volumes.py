"""Attention over 3-D studies: a montage of the slices that matter, and NIfTI volumes that lie over the study's files.

Axes: T items, H heads, S series (views), d h w tokens of one series, D H W voxels of a view; i j k voxels of its file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from itemizedclip.runtime.errors import UserError
from itemizedclip.viewer.explanation import Explanation
from itemizedclip.viewer.figures import (
    LEAST_PEAK,
    MIN_DPI,
    MIN_SCALE_TOP,
    Block,
    Panel,
    Sheet,
    legend_of,
    nowhere_note,
    peak_note,
    signed,
)
from itemizedclip.viewer.geometry import Upsampling, map_to_input
from itemizedclip.viewer.inputs import FileGrid, InputView, VoxelGrid

_SLAB_SLICES = 16
"""Slices of a view that are enlarged at once: a whole chest at its own size would need gigabytes of positions."""

_IMAGE_SIZE = 2.3, 2.3  # inches, width and height of a slice on paper
_MOST_SERIES_NAMED = 4
_LEAST_SHARE_NAMED = 0.01
_WORDS_IN_FILE_NAME = 40


@dataclass(frozen=True)
class Place:
    """The middle of one token, in the places people count in.

    Attributes:
        view: number of the series.
        voxel: (d, h, w) of the view.
        file_voxel: (i, j, k) of the file, counted from 0; None for a view without a file grid.
        world_mm: RAS+; None when the file does not say.
    """

    view: int
    voxel: tuple[int, int, int]
    file_voxel: tuple[int, int, int] | None
    world_mm: tuple[float, float, float] | None


@dataclass(frozen=True)
class Slab:
    """One token's depth of one series: slices that share their attention.

    Attributes:
        view: number of the series.
        middle: slice of the view in its middle.
        share: of the item's attention, 0 … 1.
    """

    view: int
    middle: int
    share: float


def place_of_token(explanation: Explanation, token: int) -> Place:
    """Where a token of the whole grid (S, d, h, w), counted through, lies."""
    s, *cell = np.unravel_index(token, explanation.maps.grid)
    view = explanation.source.views[int(s)]
    sizes = [size / n for size, n in zip(view.geometry.view_size, explanation.maps.grid[1:])]
    centre = view.geometry.to_input([(float(at) + 0.5) * size for at, size in zip(cell, sizes)])
    d, h, w = (min(max(int(x), 0), n - 1) for x, n in zip(centre, view.geometry.input_size))
    world = None
    if view.affine is not None:
        x, y, z = (view.affine @ np.array([d, h, w, 1.0]))[:3].tolist()
        world = x, y, z
    file_voxel = None if view.file_grid is None else _in_file(view.file_grid, (d, h, w))
    if world is not None and view.file_grid is not None and view.file_grid.sheared is not None:
        file_voxel = _nearest_voxel(view.file_grid.sheared, world)
    return Place(int(s), (d, h, w), file_voxel, world)


def _in_file(grid: FileGrid, voxel: tuple[int, int, int]) -> tuple[int, int, int]:
    """(i, j, k) of the file from (d, h, w) of the view."""
    i, j, k = (
        n - 1 - voxel[axis] if flip else voxel[axis] for n, axis, flip in zip(grid.shape, grid.view_axis, grid.flipped)
    )
    return i, j, k


def _nearest_voxel(grid: VoxelGrid, world_mm: tuple[float, float, float]) -> tuple[int, int, int]:
    i, j, k = np.rint(np.linalg.solve(grid.affine, [*world_mm, 1.0])[:3]).astype(int).tolist()
    last_i, last_j, last_k = (n - 1 for n in grid.shape)
    return min(max(i, 0), last_i), min(max(j, 0), last_j), min(max(k, 0), last_k)


def slabs_by_attention(explanation: Explanation, item: int) -> list[Slab]:
    """All slabs of all series that hold a slice of the study, most attended first."""
    views = explanation.source.views
    shares_Sd = explanation.maps.weights[item].sum((2, 3))
    slabs = []
    for s, d in np.ndindex(*shares_Sd.shape):
        depth = views[s].geometry.view_size[0] / shares_Sd.shape[1]
        first, last = (views[s].geometry.to_input((edge, 0, 0))[0] for edge in (d * depth, (d + 1) * depth))
        num_slices = views[s].geometry.input_size[0]
        first, last = max(first, 0.0), min(last, float(num_slices))
        if last > first:
            middle = min(int((first + last) / 2), num_slices - 1)
            slabs.append(Slab(int(s), middle, float(shares_Sd[s, d])))
    return sorted(slabs, key=lambda slab: -slab.share)


# --- montage ---------------------------------------------------------------------------------------------------------


def montage_figure(
    explanation: Explanation,
    items: Sequence[int] | None = None,
    *,
    num_slices: int = 4,
    mode: Upsampling = "smooth",
    scale_top: float | None = None,
) -> Figure:
    """For every item the slices that carry most of its attention: the first plain, then each with the overlay.

    The slice of the peak is always among them. A map that is nearly even (`LEAST_PEAK`) is not coloured.

    Args:
        explanation: of a study.
        items: which of its items, by number; default all.
        num_slices: overlays per item.
        mode: see `map_to_input`.
        scale_top: value of the brightest colour, in multiples of an even spread; default the largest of all items, at
            least `MIN_SCALE_TOP`, so that several montages of one explanation compare.

    Raises:
        ValueError: no item, a photograph, or fewer than one slice.
    """
    if len(explanation.maps.grid) != 4:
        raise UserError("a montage shows 3-D studies; a photograph has itemizedclip.viewer.figures.attention_figure")
    chosen = list(range(len(explanation.items))) if items is None else list(items)
    if not chosen or num_slices < 1:
        raise UserError("a montage needs at least one item and one slice")
    blocks = [_item_block(explanation, k, num_slices, mode) for k in chosen]
    panels = [panel for block in blocks for panel in block.panels]
    legend = [legend_of(panels, [block.note for block in blocks])]
    legend += ["Percent: share of the item's attention on the slab of slices around the one shown."]
    if any(any(panel.marks) for panel in panels):
        legend.append("Letters: side of the patient.")
    legend.append("TCSim: similarity of text and image, −1 to 1; a score is no probability.")
    sheet = Sheet(
        blocks,
        max(len(block.panels) for block in blocks),
        _IMAGE_SIZE,
        min_cell_width=_IMAGE_SIZE[0],
        legend=" ".join(legend),
    )
    top = max(MIN_SCALE_TOP, float(explanation.maps.times_uniform().max())) if scale_top is None else scale_top
    return sheet.render(None, top, MIN_DPI)


def _item_block(explanation: Explanation, item: int, num_slices: int, mode: Upsampling) -> Block:
    by_attention = slabs_by_attention(explanation, item)
    slabs = by_attention[:num_slices]
    peak = _peak_slab(explanation, item, by_attention)
    if peak is not None and peak not in slabs:
        slabs[-1] = peak
    shown: Upsampling | None = mode
    if float(explanation.maps.peaks[item]) < LEAST_PEAK:
        shown, peak = None, None
    panels = [_slice_panel(explanation, item, slabs[0], None)]
    panels += [_slice_panel(explanation, item, slab, shown, is_peak=slab == peak) for slab in slabs[shown is None :]]
    heading = f"{item + 1}. {explanation.items[item]}  (TCSim {signed(float(explanation.maps.scores[item]))})"
    return Block(heading, panels, _shares_note(explanation, item))


def _peak_slab(explanation: Explanation, item: int, slabs: Sequence[Slab]) -> Slab | None:
    """The slab that holds the item's most attended patch; None where it lies in the padding."""
    place = place_of_token(explanation, int(explanation.maps.weights[item].argmax()))
    own = [slab for slab in slabs if slab.view == place.view]
    nearest = min(own, key=lambda slab: abs(slab.middle - place.voxel[0]), default=None)
    view = explanation.source.views[place.view]
    depth = view.geometry.view_size[0] / explanation.maps.grid[1] / view.geometry.scale[0]
    return nearest if nearest is not None and abs(nearest.middle - place.voxel[0]) <= depth else None


def _shares_note(explanation: Explanation, item: int) -> str:
    """Such as "AX_DWI 54 % · AX_FLAIR 21 % · 3 more 12 % · nowhere 13 % · peak 9.1×"."""
    views = explanation.source.views
    shares = explanation.share_of_views()[item].tolist()
    order = sorted(range(len(views)), key=lambda s: -shares[s])
    named = [s for s in order[:_MOST_SERIES_NAMED] if shares[s] >= _LEAST_SHARE_NAMED] or order[:1]
    rest = order[len(named) :]
    parts = [f"{views[s].name} {100 * shares[s]:.0f} %" for s in named] if len(views) > 1 else [views[0].name]
    if rest:
        parts.append(f"{len(rest)} more {100 * sum(shares[s] for s in rest):.0f} %")
    parts.append(nowhere_note(float(explanation.maps.nowhere[item])))
    parts.append(peak_note(float(explanation.maps.peaks[item])))
    return " · ".join(parts)


def _slice_panel(
    explanation: Explanation, item: int, slab: Slab, mode: Upsampling | None, *, is_peak: bool = False
) -> Panel:
    """One slice, with the overlay or (mode None) plain."""
    views = explanation.source.views
    view, values = views[slab.view], None
    lines = [view.name] if len(views) > 1 else []  # of one series the name stands above
    lines.append(f"{'peak slice' if is_peak else 'slice'} {_slice_number(view, slab.middle)} of {view.values.shape[0]}")
    lines += _image_number(view, slab.middle)
    if mode is not None:
        grid_map = explanation.times_uniform(slab.view)[item]
        values = slice_of_map(grid_map, view, slab.middle, mode)
        lines.append(f"{100 * slab.share:.0f} % of attention")
    _, h, w = view.spacing_mm or (1.0, 1.0, 1.0)
    rows, columns = view.values.shape[1:]
    pixels = np.repeat(grey_of(view, view.values[slab.middle])[..., None], 3, axis=-1)
    marks, turned = _as_read(_marks(view))
    pixels = pixels[turned]
    values = None if values is None else values[turned]
    return Panel(lines[0], " · ".join(lines[1:]), values, None, pixels, (rows * h, columns * w), marks)


_OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "S": "I", "I": "S"}


def _as_read(marks: tuple[str, str]) -> tuple[tuple[str, str, str, str], tuple[slice, slice]]:
    """The way slices hang on a wall: right or front of the patient at the left edge, front or head at the top.

    Models see some the other way round. Returns the marks of all edges then (left, right, top, bottom), and the rows
    and columns to take.
    """
    left, top = marks
    backwards, forwards = slice(None, None, -1), slice(None)
    turned = backwards if top in ("P", "I") else forwards, backwards if left in ("L", "P") else forwards
    left = _OPPOSITE[left] if left in ("L", "P") else left
    top = _OPPOSITE[top] if top in ("P", "I") else top
    return (left, _OPPOSITE.get(left, ""), top, _OPPOSITE.get(top, "")), turned


def _slice_number(view: InputView, d: int) -> int:
    """Counted from 1 along the file's own axis, as ITK-SNAP counts."""
    if view.file_grid is None:
        return d + 1
    return _in_file(view.file_grid, (d, 0, 0))[view.file_grid.view_axis.index(0)] + 1


def _image_number(view: InputView, d: int) -> list[str]:
    """Such as "image 12", where the slices are images of a DICOM series; else nothing."""
    labels = view.slice_labels
    if labels is None or labels.axis != 0:
        return []
    return [part for part in labels.texts[d].split(" · ") if part.startswith("image ")]


def slice_of_map(grid_map: Tensor, view: InputView, d: int, mode: Upsampling) -> np.ndarray:
    """One slice (H, W) of a map (d, h, w) carried to the view's voxels, NaN outside the model's crop."""
    _, H, W = view.geometry.input_size
    return map_to_input(grid_map, view.geometry.of_input_box((d, 0, 0), (1, H, W)), mode)[0]


def grey_of(view: InputView, values: np.ndarray) -> np.ndarray:
    """uint8 grey values as the model saw them: HU in its window."""
    if view.unit != "hu":
        return values
    low, high = view.window_hu or (float(view.values.min()), float(view.values.max()))
    return (np.clip((values - low) / max(high - low, 1.0), 0, 1) * 255).astype(np.uint8)


def _marks(view: InputView) -> tuple[str, str]:
    """Which side of the patient lies at the left and at the top edge; nothing when the file does not say."""
    if view.affine is None:
        return "", ""
    letters = ("LR", "PA", "IS")
    marks = []
    for axis in (2, 1):  # columns, then rows: their first edge lies against their direction
        towards = view.affine[:3, axis]
        world = int(np.abs(towards).argmax())
        marks.append(letters[world][0 if towards[world] > 0 else 1])
    return marks[0], marks[1]


# --- NIfTI -----------------------------------------------------------------------------------------------------------


def volume_of_map(grid_map: Tensor, view: InputView, mode: Upsampling) -> np.ndarray:
    """A map (d, h, w) carried to all voxels of a view: float32 (D, H, W), 0 outside the model's crop."""
    D, H, W = view.geometry.input_size
    volume = np.empty((D, H, W), dtype=np.float32)
    for start in range(0, D, _SLAB_SLICES):
        size = (min(_SLAB_SLICES, D - start), H, W)
        slab = map_to_input(grid_map, view.geometry.of_input_box((start, 0, 0), size), mode)
        volume[start : start + size[0]] = np.nan_to_num(slab, nan=0.0)
    return volume


def map_in_grid(grid_map: Tensor, view: InputView, grid: VoxelGrid, mode: Upsampling) -> np.ndarray:
    """A map carried to any grid of the world, such as that of a tilted slice.

    Args:
        grid_map: (d, h, w).
        view: whose map it is; one with an affine.
        grid: where values are wanted.
        mode: see `map_to_input`.

    Returns:
        float32 (i, j, k) of the grid, 0 outside the model's crop.
    """
    assert view.affine is not None
    geometry, (I, J, K) = view.geometry, grid.shape
    scale, offset, view_size = (
        torch.tensor(values, dtype=torch.float64) for values in (geometry.scale, geometry.offset, geometry.view_size)
    )
    way = torch.from_numpy(np.linalg.inv(view.affine) @ grid.affine)
    in_plane = torch.stack(torch.meshgrid(torch.arange(I), torch.arange(J), indexing="ij"), -1).double() @ way[:3, :2].T
    method = "nearest" if mode == "nearest" else "bilinear"
    volume = np.zeros(grid.shape, dtype=np.float32)
    for k in range(K):
        edges = in_plane + way[:3, 2] * k + way[:3, 3] + 0.5  # geometries measure between edges
        at = edges * scale - offset
        inside = ((at >= 0) & (at < view_size)).all(-1)
        where = (at / view_size * 2 - 1).flip(-1).float()[None, None]
        flat = grid_map.float()[None, None]
        sampled = F.grid_sample(flat, where, mode=method, padding_mode="border", align_corners=False)[0, 0, 0]
        volume[..., k] = sampled.masked_fill(~inside, 0.0).numpy()
    return volume


def grid_of(view: InputView) -> FileGrid:
    """The grid to write a view's volumes in: its file's, else columns, rows, slices at its spacing."""
    if view.file_grid is not None:
        return view.file_grid
    D, H, W = view.geometry.input_size
    d, h, w = view.spacing_mm or (1.0, 1.0, 1.0)
    return FileGrid((W, H, D), np.diag([w, h, d, 1.0]), (2, 1, 0), (False, False, False))


def write_map(grid_map: Tensor, view: InputView, path: Path, mode: Upsampling) -> Path:
    """Write a map (d, h, w) as NIfTI over the voxels of the view's file, in 255 steps of its range.

    The JSON beside such files has peaks and shares exactly.
    """
    if view.file_grid is not None and view.file_grid.sheared is not None:
        sheared = view.file_grid.sheared
        return _write_nifti(map_in_grid(grid_map, view, sheared, mode), sheared.affine, path, in_steps=True)
    values = volume_of_map(grid_map, view, mode)
    return _write_nifti(grid_of(view).from_view(values), grid_of(view).affine, path, in_steps=True)


def write_volume(values: np.ndarray, view: InputView, path: Path) -> Path:
    """Write a view's own values (D, H, W) as NIfTI, exactly, in the grid of its file: the two lie over each other.

    Raises:
        ValueError: nibabel, which is an optional package, is not installed.
    """
    return _write_nifti(grid_of(view).from_view(values), grid_of(view).affine, path, in_steps=False)


def _write_nifti(voxels: np.ndarray, affine: np.ndarray, path: Path, *, in_steps: bool) -> Path:
    try:
        import nibabel
    except ModuleNotFoundError as error:
        raise UserError("writing NIfTI needs the package nibabel: pip install -e '.[radiology]'") from error
    image = nibabel.Nifti1Image(np.ascontiguousarray(voxels), affine)
    image.set_sform(affine, code=1)
    # A qform has right angles only: of a sheared grid ITK would take it and show the volume elsewhere.
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    is_straight = np.allclose(directions.T @ directions, np.eye(3), atol=1e-3)
    image.set_qform(affine, code=1 if is_straight else 0, strip_shears=True)
    image.header.set_xyzt_units("mm")
    if in_steps:
        # 16 bits would be ten times the size on disk, all of it the last digits of interpolated values.
        image.set_data_dtype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def write_attention_volumes(
    explanation: Explanation,
    folder: Path,
    *,
    mode: Upsampling = "smooth",
    per_head: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """One NIfTI per item and series, in multiples of an even spread over the whole study: ITEM__SERIES.nii.gz.

    Args:
        explanation: of a study.
        folder: where they go.
        mode: see `map_to_input`.
        per_head: also one per attention head, …_headN.nii.gz.
        on_progress: called after each item and series with (done, to do): a whole chest takes seconds.

    Raises:
        ValueError: a photograph.
    """
    if len(explanation.maps.grid) != 4:
        raise UserError("NIfTI volumes are written of 3-D studies, not of photographs")
    views = explanation.source.views
    heads_THSdhw = explanation.maps.times_uniform(per_head=True)
    names = file_names([view.name for view in views])
    written = []
    for k, text in enumerate(explanation.items):
        for s, view in enumerate(views):
            stem = f"item{k + 1:02d}_{slug(text)}" + (f"__{names[s]}" if len(views) > 1 else "")
            volumes = [(stem, heads_THSdhw[k].mean(0)[s])]
            if per_head:
                volumes += [(f"{stem}_head{h + 1}", heads_THSdhw[k, h, s]) for h in range(heads_THSdhw.shape[1])]
            written += [write_map(grid_map, view, folder / f"{name}.nii.gz", mode) for name, grid_map in volumes]
            if on_progress is not None:
                on_progress(k * len(views) + s + 1, len(explanation.items) * len(views))
    return written


def slug(text: str) -> str:
    """Letters, digits and _ of a text, for a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text)[:_WORDS_IN_FILE_NAME].strip("_").lower() or "text"


def file_names(names: Sequence[str]) -> list[str]:
    """File names of series, each different: a name that stands twice gets its number."""
    plain = [re.sub(r"[^\w.+-]+", "_", name) or "series" for name in names]
    counts = Counter(name.lower() for name in plain)
    return [f"{name}_{n + 1}" if counts[name.lower()] > 1 else name for n, name in enumerate(plain)]
