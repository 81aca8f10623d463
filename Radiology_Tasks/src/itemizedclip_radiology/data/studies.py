"""All series of one study, stacked: what training, validation and every zero-shot evaluation of MRI and head CT load.

Axes: S series, D H W voxels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from itemizedclip.data.batch import BadSampleError
from itemizedclip.runtime.remote import Place
from itemizedclip_radiology.data.volumes import (
    GreyRange,
    Size,
    VoxelMap,
    crop_series,
    detect_grey_range,
    is_volume_file,
    normalise_grey,
    read_volume,
    resample_brain,
)
from itemizedclip_radiology.models.series_names import encode_series_names

logger = logging.getLogger(__name__)

ScanReader = Callable[[Path, Size], list[tuple[str, Tensor]]]
"""NIfTI file, or file or folder of a DICOM series → (what tells it from its other series, grey values 0…255)."""

Preparation = Literal["crop", "resample"]
"""How a file becomes a volume of the model's size: `crop_series`, or `resample_brain` for files of any size."""


@dataclass(frozen=True)
class SeriesFile:
    """One series of a study.

    Attributes:
        name: the text that the series-name encoder reads.
        path: its volume.
    """

    name: str
    path: Place


@dataclass(frozen=True)
class Study:
    """One study on disk; `series` in the order in which the model sees them."""

    study_id: str
    series: tuple[SeriesFile, ...]


@dataclass
class LoadedStudy:
    """The series of a study that could be read.

    Attributes:
        image: float32 (S, 1, D, H, W), normalised.
        names: S names; a repeated series repeats its name.
        series_names: int64 (S, 110), `names` encoded; None where the model takes none.
        sources: S files.
        voxel_maps: where the voxels of each series lie in its file.
        grey_ranges: S ranges, as detected or given; empty for HU.
        skipped: the series that could not be used, each with its message.
    """

    image: Tensor
    names: list[str]
    series_names: Tensor | None
    sources: list[Place]
    voxel_maps: list[VoxelMap]
    grey_ranges: list[GreyRange]
    skipped: list[tuple[SeriesFile, str]]


def every_series_once(num_series: int) -> list[int]:
    """0 … num_series − 1: the arrangement of the zero-shot evaluations."""
    return list(range(num_series))


def load_study(
    study_id: str,
    series: Sequence[SeriesFile],
    *,
    size: Size,
    arrange: Callable[[int], Sequence[int]] = every_series_once,
    max_series: int | None = None,
    crop_at: tuple[float, float] | None = None,
    prepare: Preparation = "crop",
    grey_range: GreyRange | None = None,
    read_scan: ScanReader | None = None,
) -> LoadedStudy:
    """Read, check and stack the series of a study; those that cannot be used are skipped with a message.

    Args:
        study_id: for messages.
        series: files, in order.
        size: voxels (D, H, W) of every series.
        arrange: number of usable series → which of them fills each slot of the result; may repeat some.
        max_series: stop reading after so many usable ones.
        crop_at: position of the in-plane crop, see `crop_series`; the same for every series, so that they stay aligned.
        prepare: "crop", or "resample" for files of any size.
        grey_range: range of all files; None detects it per file.
        read_scan: reads what is no `.pt` file; one file may give several series (the windows of a head CT).

    Raises:
        BadSampleError: no series can be used.
    """
    usable: list[tuple[SeriesFile, Tensor, VoxelMap, GreyRange]] = []
    skipped: list[tuple[SeriesFile, str]] = []
    for entry in series:
        if max_series is not None and len(usable) == max_series:
            break
        try:
            if read_scan is not None and isinstance(entry.path, Path) and not is_volume_file(entry.path):
                for part, grey in read_scan(entry.path, size):
                    one = replace(entry, name=f"{entry.name}_{part}" if part else entry.name)
                    usable.append((one, grey, VoxelMap.of_box((0, 0, 0)), "0-255"))
                continue
            volume = read_volume(entry.path, allow_channels=prepare == "resample")
            found = grey_range or detect_grey_range(volume, source=entry.path)
            if prepare == "resample":
                volume, voxel_map = resample_brain(volume, size)
            else:
                volume, voxel_map = crop_series(volume, size, source=entry.path, at=crop_at)
        except BadSampleError as error:
            skipped.append((entry, f"study {study_id}, series {entry.name}: {error}"))
            continue
        usable.append((entry, volume, voxel_map, found))
    if not usable:
        reasons = skipped[0][1] if skipped else f"study {study_id}: lists no series"
        more = f" (and {len(skipped) - 1} more series)" if len(skipped) > 1 else ""
        raise BadSampleError(f"{reasons}{more}: no series of this study can be used")
    slots = list(arrange(len(usable)))
    image = torch.empty((len(slots), 1, *size), dtype=torch.float32)
    for slot, source in enumerate(slots):
        first = slots.index(source)
        if first < slot:
            image[slot].copy_(image[first])
        else:
            _, volume, _, found = usable[source]
            normalise_grey(volume, found, out=image[slot, 0])
    chosen = [usable[source] for source in slots]
    names = [entry.name for entry, *_ in chosen]
    return LoadedStudy(
        image=image,
        names=names,
        series_names=encode_series_names(names),
        sources=[entry.path for entry, *_ in chosen],
        voxel_maps=[voxel_map for _, _, voxel_map, _ in chosen],
        grey_ranges=[found for *_, found in chosen],
        skipped=skipped,
    )


class SkippedSeries:
    """Which series of a dataset were ever skipped: counted over all loader workers, each series once.

    One byte per series in shared memory, so that the main process sees what its workers skip.
    """

    def __init__(self, series_per_study: Sequence[int]) -> None:
        counts = torch.as_tensor(list(series_per_study), dtype=torch.int64)
        self._first = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        self._flags = torch.zeros(int(counts.sum()), dtype=torch.uint8).share_memory_()

    def add(self, study: int, series: int, message: str) -> None:
        """Note series number `series` of study number `study`; its message is logged the first time."""
        position = int(self._first[study]) + series
        if not self._flags[position]:
            self._flags[position] = 1
            logger.warning("series skipped: %s", message)

    def __len__(self) -> int:
        return int(self._flags.sum())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(study, series) numbers."""
        for position in self._flags.nonzero()[:, 0].tolist():
            study = int(torch.searchsorted(self._first, position, right=True)) - 1
            yield study, position - int(self._first[study])
