"""One series as a tensor: read it from disk, check it, bring it to the model's size and grey scale.

Axes: D depth (slices), H rows, W columns, all in voxels; S series. Sizes and starts are (D, H, W) triples.

Brain MRI and head CT files hold grey values 0…255 (uint8 or float) or 0…1 (float) at 48×224×224, or 48×256×256 with a
margin to crop away. Chest CT files hold Hounsfield units (HU) at 3×1×1 mm and any size.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from itemizedclip.data.batch import BadSampleError
from itemizedclip.models.archive import is_archive
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.remote import Address, Place
from itemizedclip_radiology.data.packed_volumes import PACKED_SUFFIX, PackedVolume
from itemizedclip_radiology.data.unprepared import hint_for_grey_values, hint_for_missing, hint_for_size

Size = tuple[int, int, int]
"""Voxels (D, H, W)."""

GREY_MEAN = 0.449
"""Mean of the ImageNet channel means: every volume, scaled to 0…1, is normalised with it."""
GREY_STD = 0.226
"""Mean of the ImageNet channel standard deviations."""

BRAIN_SIZE: Size = (48, 224, 224)
CHEST_SIZE: Size = (112, 336, 336)

GreyRange = Literal["0-255", "0-1"]
"""Range of the grey values in a file."""

_VALUE_TYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip


@dataclass(frozen=True)
class VoxelMap:
    """Where output voxels lie in the input, per axis: input index = scale · output index + offset (voxel centres).

    Attributes:
        scale: input voxels per output voxel, (D, H, W).
        offset: input index of output voxel 0; negative where padding was added.
    """

    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def to_input(self, index: Sequence[float]) -> tuple[float, float, float]:
        """Input coordinates of output coordinates (d, h, w)."""
        d, h, w = (s * i + o for s, i, o in zip(self.scale, index, self.offset))
        return d, h, w

    def then(self, later: VoxelMap) -> VoxelMap:
        """This change followed by `later`: output of `later` → input of this."""
        d, h, w = (a * b for a, b in zip(self.scale, later.scale))
        return VoxelMap((d, h, w), self.to_input(later.offset))

    @staticmethod
    def of_box(start: Sequence[int]) -> VoxelMap:
        """The map of `take_box`."""
        d, h, w = map(float, start)
        return VoxelMap(offset=(d, h, w))

    @staticmethod
    def of_resize(before: Sequence[int], after: Sequence[int]) -> VoxelMap:
        """The map of an interpolation that keeps the outer edges in place (PyTorch's align_corners=False)."""
        d, h, w = (n / m for n, m in zip(before, after))
        return VoxelMap((d, h, w), ((d - 1) / 2, (h - 1) / 2, (w - 1) / 2))


# --- reading ---------------------------------------------------------------------------------------------------------


def read_volume(path: str | Place, *, memory_map: bool = False, allow_channels: bool = False) -> Tensor:
    """The tensor of a `.pt` file: (D, H, W), real numbers, finite.

    Nothing in the file is executed (`weights_only=True`).

    Args:
        path: file written by `torch.save(tensor, path)`, or a packed one (`packed_volumes`), which is also taken when
            it lies beside a `.pt` that is not there; one at an address is kept in the cache of this machine, and
            fetched again when the checksums in it do not hold.
        memory_map: read pages only when they are used: for a crop of a large volume. Values are then not checked
            here; call `check_finite` on the part that is used.
        allow_channels: of a 4-D tensor take entry 0 of the last axis, as the Pub-Brain-5 evaluation does.

    Raises:
        BadSampleError: no such file, truncated or no tensor file, Python objects in it, not three axes, an empty axis,
            complex or boolean values, NaN or infinite values.
        RemoteError: a store that does not answer.
    """
    path = Path(path) if isinstance(path, str) else path
    volume = _load_tensor(path, memory_map)
    shape = "×".join(map(str, volume.shape))
    if volume.dim() == 4 and allow_channels:
        volume = volume[..., 0]
    if volume.dim() != 3:
        raise BadSampleError(
            f"{path}: tensor of {volume.dim()} axes ({shape or 'a scalar'}); expected D × H × W: save each channel or "
            "time point as a series of its own"
        )
    if 0 in volume.shape:
        raise BadSampleError(f"{path}: tensor of {shape} voxels is empty; expected D × H × W: convert the scan again")
    if volume.dtype not in _VALUE_TYPES:
        raise BadSampleError(f"{path}: values are {volume.dtype}; expected integers or floats: convert the scan again")
    if not memory_map:
        check_finite(volume, source=path)
    return volume


_EXPECTED = "expected one tensor, written by torch.save(tensor, path)"


def _archive_problem(path: Path) -> str:
    """What a copied archive's own checksums say against it; torch.load does not look at them."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, zlib.error) as error:
        return str(error) or type(error).__name__
    return "" if bad is None else f"{bad} does not have its checksum"


def open_volume(path: str | Place) -> Tensor | PackedVolume:
    """A volume of which parts are read: a memory-mapped tensor, or a packed file; see `read_volume` and `read_part`.

    Raises:
        BadSampleError, RemoteError: as `read_volume`; values are not checked.
    """
    path = Path(path) if isinstance(path, str) else path
    return _packed(path) or read_volume(path, memory_map=True)


def read_part(volume: Tensor | PackedVolume, box: Sequence[slice]) -> Tensor:
    """The voxels of a box; of a packed file only the chunks it touches are read."""
    return volume.read(box) if isinstance(volume, PackedVolume) else volume[tuple(box)]


def _local_file(path: Place, check: Callable[[Path], str] = lambda path: "") -> Path | None:
    """The file on this machine; None when there is none."""
    if not isinstance(path, Address):
        return path if path.is_file() else None
    try:
        return path.local(check)
    except MissingFileError:
        return None


def is_volume_file(path: Place) -> bool:
    """Whether a name is that of a volume as this project stores it, and no scan as it came from the scanner."""
    return path.suffix in (".pt", PACKED_SUFFIX)


def volume_file(path: Place) -> Place:
    """The file of a volume: the path itself, or the packed one beside a `.pt` that is not there."""
    if path.suffix != ".pt" or path.is_file():
        return path
    packed = path.parent / f"{path.stem}{PACKED_SUFFIX}"
    return packed if packed.is_file() else path


def _packed(path: Place) -> PackedVolume | None:
    path = volume_file(path)
    file_here = _local_file(path) if path.suffix == PACKED_SUFFIX else None
    return None if file_here is None else PackedVolume(file_here, source=path)


def _load_tensor(path: Place, memory_map: bool) -> Tensor:
    expected = _EXPECTED
    packed = _packed(path)
    if packed is not None:
        return packed.whole()
    file_here = _local_file(path, _archive_problem)
    if file_here is None:
        raise BadSampleError(f"{path}: no such file; {expected}{hint_for_missing(path)}")
    is_torch = False
    try:
        is_torch = is_archive(file_here)
        if is_torch:
            _check_stored(file_here, source=path)
        content = torch.load(file_here, map_location="cpu", weights_only=True, mmap=memory_map and is_torch)
    except BadSampleError:
        raise
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error):
            raise BadSampleError(
                f"{path}: holds Python objects besides tensors and is not opened, since such files can run code; "
                f"{expected}"
            ) from None
        raise BadSampleError(f"{path}: is no tensor file, or damaged; {expected}") from None
    except Exception as error:  # bytes that are no tensor file make the reader fail in any way
        reason = (str(error) or type(error).__name__).split("\n")[0][:160]
        what = f"truncated or damaged ({reason})" if is_torch else "is no tensor file, or damaged"
        raise BadSampleError(f"{path}: {what}; {expected}: copy or convert it again") from None
    if not isinstance(content, Tensor):
        raise BadSampleError(f"{path}: holds a {type(content).__name__}; {expected}")
    if content.layout != torch.strided:
        raise BadSampleError(f"{path}: holds a {content.layout} tensor; expected a dense one: save tensor.to_dense()")
    # Judged from what the file says, before a value is touched: 1 kB can tell of gigabytes.
    if content.device.type != "cpu" or content.is_quantized:
        raise BadSampleError(f"{path}: holds a tensor without plain values ({content.device.type}); {expected}")
    told, held = content.numel() * content.element_size(), content.untyped_storage().nbytes()
    if told > held:
        raise BadSampleError(
            f"{path}: tells of {'×'.join(map(str, content.shape))} voxels ({told:,} bytes) and holds {held:,} bytes; "
            f"{expected}: save tensor.contiguous()"
        )
    return content.detach()


def _check_stored(path: Path, *, source: Place) -> None:
    """Refuse an archive whose entries are larger than the file: torch.save never compresses.

    Raises:
        BadSampleError: with both sizes.
    """
    with zipfile.ZipFile(path) as archive:
        told = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if told > size:
        raise BadSampleError(
            f"{source}: is compressed, {size:,} bytes that become {told:,}; expected a file as torch.save writes it"
        )


def check_finite(volume: Tensor, *, source: str | Place) -> None:
    """Refuse NaN and infinite values.

    Raises:
        BadSampleError: with their number.
    """
    if not volume.is_floating_point():
        return
    # The extremes are NaN or infinite exactly when some value is, and need no copy of the volume.
    if not torch.stack(volume.aminmax()).isfinite().all():
        bad = int((~volume.isfinite()).sum())
        raise BadSampleError(
            f"{source}: {bad:,} of {volume.numel():,} values are NaN or infinite; expected finite grey values: "
            "convert the scan again"
        )


# --- grey values -----------------------------------------------------------------------------------------------------


def detect_grey_range(volume: Tensor, *, source: str | Place) -> GreyRange:
    """Whether grey values are meant as 0…255 or 0…1.

    uint8 is 0…255. Anything else is taken by its largest value: up to 1 means 0…1, from 2 to 255 means 0…255. Values
    between (a dark 0…255 volume, or 0…1 with interpolation overshoot), a volume of zeros and ones only (a mask, or one
    of the two), negative values and values above 255 are refused.

    Raises:
        BadSampleError: values that fit neither or both.
    """
    if volume.dtype == torch.uint8:
        return "0-255"
    low, high = (float(value) for value in volume.aminmax())
    remedy = hint_for_grey_values(low, high)
    if low < -1e-3 or high > 255.5:
        raise BadSampleError(
            f"{source}: {volume.dtype} values from {low:g} to {high:g}; expected 0…255 or 0…1: {remedy}"
        )
    if 1.001 < high < 2:
        raise BadSampleError(
            f"{source}: {volume.dtype} values up to {high:g} may be meant as 0…1 or as 0…255: {remedy}"
        )
    if high >= 2:
        return "0-255"
    if high > 0 and bool(((volume == 0) | (volume == 1)).all()):
        raise BadSampleError(
            f"{source}: {volume.dtype} values are only 0 and 1: a mask, or grey values 0…1 or 0…255? {remedy}"
        )
    return "0-1"


def normalise_grey(volume: Tensor, grey_range: GreyRange, *, out: Tensor | None = None) -> Tensor:
    """float32 (x / 255 − 0.449) / 0.226, or (x − 0.449) / 0.226 for values 0…1.

    Args:
        volume: grey values.
        grey_range: see `detect_grey_range`.
        out: float32 tensor of the same shape to fill.
    """
    white = 255.0 if grey_range == "0-255" else 1.0
    out = torch.empty(volume.shape, dtype=torch.float32) if out is None else out
    return out.copy_(volume).sub_(GREY_MEAN * white).div_(GREY_STD * white)


# --- boxes -----------------------------------------------------------------------------------------------------------


def centre_start(num_voxels: int, size: int) -> int:
    """Start of a centred box of `size` along one axis; negative when it is padded. Halves are rounded towards 0."""
    excess = num_voxels - size
    return excess // 2 if excess >= 0 else -(-excess // 2)


def random_start(num_voxels: int, size: int, generator: np.random.Generator) -> int:
    """Start of a box of `size`, all positions equally likely: inside a longer axis, around a shorter one."""
    excess = num_voxels - size
    return int(generator.integers(excess + 1)) if excess >= 0 else -int(generator.integers(-excess + 1))


def overlap(num_voxels: int, start: int, size: int) -> tuple[slice, slice]:
    """The part of an axis that a box covers: (slice of the axis, slice of the box)."""
    first, last = max(start, 0), min(start + size, num_voxels)
    last = max(first, last)
    return slice(first, last), slice(first - start, last - start)


def take_box(volume: Tensor, start: Sequence[int], size: Sequence[int], *, fill: float = 0.0) -> Tensor:
    """The box of `size` voxels that begins at `start`; what lies outside the volume is `fill`."""
    pairs = [overlap(n, s, m) for n, s, m in zip(volume.shape, start, size)]
    inside = volume[tuple(pair[0] for pair in pairs)]
    if inside.shape == tuple(size):
        return inside
    box = volume.new_full(tuple(size), fill)
    box[tuple(pair[1] for pair in pairs)] = inside
    return box


# --- brain MRI and head CT -------------------------------------------------------------------------------------------


def padded_in_plane(size: int) -> int:
    """Rows or columns with the margin that files may carry: 256 for 224 (a seventh more)."""
    return size + size // 7


def crop_series(
    volume: Tensor, size: Size, *, source: str | Place, at: tuple[float, float] | None = None
) -> tuple[Tensor, VoxelMap]:
    """A series at the model's size: as it is, or rid of the in-plane margin (48×256×256 → 48×224×224).

    Args:
        volume: (D, H, W).
        size: wanted voxels.
        source: for messages.
        at: position of the crop in [0, 1) along (H, W), for training; None crops the centre (rows and columns 16…239).

    Returns:
        A view of `volume` and where it lies.

    Raises:
        BadSampleError: another depth, smaller in-plane, or more than the known margin.
    """
    (D, H, W), (d, h, w) = volume.shape, size
    if d != D or not (h <= H <= padded_in_plane(h) and w <= W <= padded_in_plane(w)):
        raise BadSampleError(
            f"{source}: volume of {D}×{H}×{W} voxels; expected {d}×{h}×{w} or {d}×{padded_in_plane(h)}×"
            f"{padded_in_plane(w)} (slices × rows × columns): {hint_for_size((D, H, W))}"
        )
    if at is None:
        start = (0, centre_start(H, h), centre_start(W, w))
    else:
        start = (0, int(at[0] * (H - h + 1)), int(at[1] * (W - w + 1)))
    return take_box(volume, start, size), VoxelMap.of_box(start)


def nearest_slices(num_slices: int, wanted: int) -> Tensor:
    """int64 (wanted,): the slice that "nearest-exact" interpolation copies to each output slice."""
    index = torch.arange(num_slices, dtype=torch.float32)[None, None]
    return F.interpolate(index, size=wanted, mode="nearest-exact")[0, 0].long()


def resample_brain(volume: Tensor, size: Size) -> tuple[Tensor, VoxelMap]:
    """A series of any size as the Pub-Brain-5 evaluation sees it (float32, grey values unchanged otherwise).

    Zero-padded in-plane to a square (an odd row or column goes below or right), bilinear to 256×256, the nearest of
    its slices at 48 depths, centre crop to 224×224; other `size`s have a margin in proportion.

    Args:
        volume: (D, H, W), D ≥ 1.
        size: wanted voxels.
    """
    (D, H, W), (d, h, w) = volume.shape, size
    side = max(H, W)
    start = (0, centre_start(H, side), centre_start(W, side))
    # Slices are only copied along depth, so those not chosen need no interpolation.
    chosen = volume[nearest_slices(D, d)].float()
    square = take_box(chosen, start, (d, side, side))
    padded = (padded_in_plane(h), padded_in_plane(w))
    resized = F.interpolate(square[:, None], size=padded, mode="bilinear", align_corners=False)[:, 0]
    crop = (0, centre_start(padded[0], h), centre_start(padded[1], w))
    where = VoxelMap.of_box(start).then(VoxelMap.of_resize((D, side, side), (d, *padded))).then(VoxelMap.of_box(crop))
    return take_box(resized, crop, size), where


# --- chest CT --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HounsfieldWindow:
    """HU that become 0 and 1; everything outside is clipped. The default is the published chest window."""

    hu_min: float = -1150.0
    hu_max: float = 350.0

    def __post_init__(self) -> None:
        if not self.hu_min < self.hu_max:
            raise UserError(f"window from {self.hu_min:g} to {self.hu_max:g} HU; expected the lower limit first")

    def apply(self, volume_hu: Tensor) -> Tensor:
        """float32 in 0…1."""
        windowed = volume_hu.to(torch.float32, copy=True)
        return windowed.sub_(self.hu_min).div_(self.hu_max - self.hu_min).clamp_(0, 1)


def chest_start(shape: Sequence[int], size: Size, generator: np.random.Generator | None) -> tuple[int, int, int]:
    """Start of the padded crop: centred, or with a generator at random along each axis (training)."""
    if generator is None:
        d, h, w = (centre_start(n, m) for n, m in zip(shape, size))
    else:
        d, h, w = (random_start(n, m, generator) for n, m in zip(shape, size))
    return d, h, w


def resize_chest(windowed: Tensor, size: Size) -> tuple[Tensor, VoxelMap]:
    """Trilinear to `size` (float32), instead of the padded crop."""
    resized = F.interpolate(windowed[None, None].float(), size=size, mode="trilinear", align_corners=False)[0, 0]
    return resized, VoxelMap.of_resize(windowed.shape, size)


SOFT_TISSUE_HU = (-150.0, 250.0)
_AIR_BELOW_HU = -300.0
_LEAST_SOFT_SHARE = 0.02
_LEAST_AIR_SHARE = 0.005
"""Shares of a chest volume that soft tissue, and lung with outside air, must take; both have 20 % and more."""
_RESCALE_INTERCEPTS_HU = (1024.0, 8192.0)
"""Intercepts in CT-RATE's metadata, as positive numbers."""


def excess_rescale_hu(volume: Tensor, *, source: str | Place) -> float:
    """HU that a second rescale took from a chest CT: 0 when it holds HU, else 1024 or 8192 (to be added back).

    CT-RATE v2 volumes hold HU already; converting them with the slope and intercept of the metadata table shifts them
    down again. Judged on every fourth voxel along each axis by where soft tissue and air lie.

    Raises:
        BadSampleError: values that never were rescaled, or that fit no reading.
    """
    values = volume[::4, ::4, ::4].float()

    def fits(shift_hu: float) -> bool:
        """Whether soft tissue and air lie `shift_hu` above their place."""
        low, high = (limit + shift_hu for limit in SOFT_TISSUE_HU)
        soft = ((values > low) & (values < high)).float().mean()
        air = (values < _AIR_BELOW_HU + shift_hu).float().mean()
        return bool(soft >= _LEAST_SOFT_SHARE and air >= _LEAST_AIR_SHARE)

    for excess_hu in (0.0, *_RESCALE_INTERCEPTS_HU):
        if fits(-excess_hu):
            return excess_hu
    found = f"values from {float(values.min()):g} to {float(values.max()):g}"
    if fits(1024.0):
        raise BadSampleError(
            f"{source}: {found}, tissue near 1060: not yet rescaled; expected HU: apply slope and intercept once"
        )
    raise BadSampleError(
        f"{source}: {found} do not look like a chest CT in HU; check its conversion, or "
        "take it as it is with --read-as-is"
    )
