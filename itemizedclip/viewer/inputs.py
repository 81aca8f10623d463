"""What a viewer opens: one image or study, as the model takes it and as people look at it.

A photograph is one view, a study is one view per series. Every view knows how the model's input was made of it, so that
attention can be carried back to its own pixels or voxels (`itemizedclip.viewer.geometry.map_to_input`).

Model families outside the core register how their inputs are read under the entry-point group `itemizedclip.inputs`:
value of `vision_cfg.tower` → function (source, loaded, choice of series) → ModelInput.

Axes: T items, S series, D H W slices, rows and columns of a view, in its own voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from itemizedclip.data.images import decode_photograph
from itemizedclip.models.factory import LoadedModel, create_transform, family_name
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.registry import Registry
from itemizedclip.viewer.geometry import Geometry, geometry_of_transform

READERS: Registry[Callable[[Path, LoadedModel, SeriesChoice], ModelInput]] = Registry(
    "itemizedclip.inputs", "reader of inputs"
)
"""Value of `vision_cfg.tower` → function (path, loaded, choice of series) → ModelInput."""

BodyPart = Literal["", "head", "chest"]
"""What a volume shows, as far as its reader knows; decides which windows a viewer offers."""

Unit = Literal["rgb", "grey", "hu"]
"""What the values of a view are: colours, grey values 0 … 255, or Hounsfield units."""


@dataclass(frozen=True)
class VoxelGrid:
    """Voxels in the world.

    Attributes:
        shape: voxels (i, j, k).
        affine: float64 (4, 4), voxel (i, j, k) → world, mm, RAS+.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray


@dataclass(frozen=True)
class FileGrid:
    """The voxel grid of the file that a series was read from, whose axes lie in another order there.

    A view holds the file's voxels, none added or lost, with its axes permuted and flipped. So a map that lies over the
    view can be written to lie over the file, with the file's own shape and affine. A file whose axes are not at right
    angles was resampled on a grid where they are, which stands here in its place; its own is `sheared`.

    Attributes:
        shape: voxels (i, j, k) of the file.
        affine: float64 (4, 4), voxel (i, j, k) → world, mm, RAS+.
        view_axis: for each axis of the file, the axis of the view (0 = D, 1 = H, 2 = W) that it became.
        flipped: for each axis of the file, whether the view runs along it backwards.
        sheared: the file's own voxels, where these are not they.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    view_axis: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    sheared: VoxelGrid | None = None

    def from_view(self, values: np.ndarray) -> np.ndarray:
        """(D, H, W) of the view → (i, j, k) of the file, a view of the same memory."""
        turned = values.transpose(self.view_axis)
        return np.flip(turned, tuple(axis for axis in range(3) if self.flipped[axis]))

    def to_view(self, voxels: np.ndarray) -> np.ndarray:
        """(i, j, k) of the file → (D, H, W) of the view, a view of the same memory."""
        straight = np.flip(voxels, tuple(axis for axis in range(3) if self.flipped[axis]))
        return straight.transpose(np.argsort(self.view_axis))


@dataclass(frozen=True)
class SliceLabels:
    """What other viewers call the slices of a series.

    Attributes:
        axis: of the view (0 = D, 1 = H, 2 = W) that counts them.
        texts: one per slice, such as "series 4 · image 12 · S 45.5 mm"; empty where the file has none there.
    """

    axis: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class SourceSlice:
    """One image of the DICOM series that a view was read from.

    Attributes:
        grid: its pixels (column, row, 0) in the world.
        frame: its number in its file, from 0.
        header: of its file, without pixels (`pydicom.Dataset`); None unless `SeriesChoice.keep_headers`.
    """

    grid: VoxelGrid
    frame: int = 0
    header: Any = None


@dataclass(frozen=True)
class InputView:
    """One picture, or one series of a study, at its own size.

    Attributes:
        name: file name, or series name.
        values: uint8 (H, W, 3) colours, uint8 (D, H, W) grey values, or int16 (D, H, W) HU.
        unit: which of the three.
        geometry: how the model's view was made from these pixels or voxels; its view size is what the tokens cover.
        spacing_mm: between voxel centres along (D, H, W), mm; None when the file does not say.
        affine: float64 (4, 4), voxel (d, h, w) of `values` → world, mm, RAS+ as in NIfTI; None when the file does not
            say.
        window_hu: HU that the model saw as black and as white; None where values are no HU.
        original: (D, H, W) as the file has them, where `values` are scaled for the screen; None where they are the
            same.
        file_grid: how the voxels lie in the file. None for a picture. Of a file that says nothing about the world (its
            `affine` is None) the order and orientation that its format is made with, about the world's origin.
        body: what it shows.
        slice_labels: what other viewers call its slices; None when the file does not say.
        frame: name of the coordinate system that `affine` leads to (FrameOfReferenceUID): series of one frame show the
            same place at the same mm. "" when the file does not say.
        sources: the DICOM images it was read from, each where its own header says, in order; empty for other files.
        window_of: a name of the series that it is one window of, where each window has values of its own; else "".

    Views of one series in several windows share one `values` array, or `window_of`: viewers show them as one series.
    """

    name: str
    values: np.ndarray
    unit: Unit
    geometry: Geometry
    spacing_mm: tuple[float, float, float] | None = None
    affine: np.ndarray | None = None
    window_hu: tuple[float, float] | None = None
    file_grid: FileGrid | None = None
    original: np.ndarray | None = None
    body: BodyPart = ""
    slice_labels: SliceLabels | None = None
    frame: str = ""
    sources: tuple[SourceSlice, ...] = ()
    window_of: str = ""


@dataclass(frozen=True)
class SeriesChoice:
    """Which series of a study are read, and how.

    Attributes:
        wanted: a series is read when its name, number or file holds one of these words; empty: every one.
        unwanted: it is not read when these occur.
        list_only: end with a list of what there is.
        fill_nan: put the lowest value of a series where a voxel has no finite one.
        keep_headers: keep those of DICOM images, for results that refer to them.
    """

    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    list_only: bool = False
    fill_nan: bool = False
    keep_headers: bool = False

    def takes(self, *names: str) -> bool:
        """Whether a series of these names is read."""

        def named(words: Sequence[str]) -> bool:
            return any(word.lower() in name.lower() for word in words for name in names)

        return (not self.wanted or named(self.wanted)) and not named(self.unwanted)


class SeriesListed(Exception):
    """A list of the series was asked for instead of reading them; its text is the list."""

    def __init__(self, source: Path, series: Sequence[str]) -> None:
        super().__init__("\n".join([f"{source}: {len(series)} series", *(f"  {one}" for one in series)]))


@dataclass(frozen=True)
class ModelInput:
    """One image or study.

    Attributes:
        name: file name, or study id.
        image: what `encode_image` takes, without the batch axis: (3, H, W), or (S, 1, D, H, W).
        views: one for a photograph; of a study one per series, in the order of the image's S axis.
        series_names: int64 (S, 110), or None.
        items: texts known to belong to it, such as a report's; may be empty.
        notes: what was decided while reading, for people.
        warnings: what must be known to use the result: gaps, guesses, series that were left out.
    """

    name: str
    image: Tensor
    views: list[InputView]
    series_names: Tensor | None = None
    items: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def open_input(source: str | Path, loaded: LoadedModel, choice: SeriesChoice | None = None) -> ModelInput:
    """Read one image or study for a model.

    Args:
        source: an image file, or what the model's family reads (a study folder, a scan).
        loaded: the model with its config.
        choice: of the series of a study; default: all.

    Raises:
        BadSampleError: a file that is missing or cannot be read; names it, what was expected and what to do.
        SeriesListed: `choice.list_only`.
        ValueError: a model family that does not say how its inputs are read.
    """
    if loaded.input_kind == "photographs":
        return open_photograph(Path(source).expanduser(), loaded)
    family = family_name(loaded.config)
    if family not in READERS.names():
        raise UserError(
            f"no reader for inputs of models with vision_cfg.tower {family!r}; run `pip install -e .` in the project "
            "so that the wings register theirs"
        )
    return READERS.load(family)(Path(source).expanduser(), loaded, choice or SeriesChoice())


def open_photograph(path: Path, loaded: LoadedModel) -> ModelInput:
    """One image file.

    Raises:
        BadSampleError: no such file, or no image.
    """
    return photograph_input(path.name, decode_photograph(path, source=str(path)), loaded)


def photograph_input(name: str, picture: Image.Image, loaded: LoadedModel, items: Sequence[str] = ()) -> ModelInput:
    """An RGB picture as input of a 2D model."""
    transform = create_transform(loaded.config, is_train=False)
    geometry = photograph_geometry(loaded.config, transform, (picture.height, picture.width))
    view = InputView(name, np.asarray(picture), "rgb", geometry)
    return ModelInput(name, transform(picture), [view], items=list(items))


def photograph_geometry(config: Mapping[str, Any], transform: Callable[..., Tensor], size: tuple[int, int]) -> Geometry:
    """The way from a picture of `size` (H, W) through the evaluation transform of a 2D model to its patches."""
    geometry = geometry_of_transform(transform, size)
    # What is left over at the right and the bottom when patches do not divide the view is not seen.
    patch = config["vision_cfg"]["patch_size"]
    return geometry.crop((0, 0), [length // patch * patch for length in geometry.view_size])
