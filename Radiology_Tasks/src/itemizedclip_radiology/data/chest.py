"""Chest CT volumes in Hounsfield units: CT-RATE for training, single volumes for evaluation.

Files: ROOT/train/train_1/train_1_a/train_1_a_1.pt (any size at 3×1×1 mm, HU), and the reports per scan, itemized.json:

    {"train_1_a": {"recons": ["train_1_a_1.nii.gz"], "report": ["item", "item"]}}

Axes: K item slots, D H W voxels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.items import normalise_item
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.flags import check
from itemizedclip.runtime.remote import Address, Place, here, names_in, place, relative_path
from itemizedclip_radiology.data.ct_rate_tree import EXCLUDED_RECONSTRUCTIONS, is_scan_name, parse_volume_name
from itemizedclip_radiology.data.packed_volumes import PackedVolume
from itemizedclip_radiology.data.reports import StudyIndex, report_items
from itemizedclip_radiology.data.studies import LoadedStudy, Study
from itemizedclip_radiology.data.study_dataset import StudyDataset
from itemizedclip_radiology.data.unprepared import OWN_NAMES_IN_CT_RATE, hint_for_folder
from itemizedclip_radiology.data.volume_cache import CacheType, VolumeCache
from itemizedclip_radiology.data.volumes import (
    CHEST_SIZE,
    GREY_MEAN,
    GREY_STD,
    HounsfieldWindow,
    Size,
    VoxelMap,
    check_finite,
    chest_start,
    excess_rescale_hu,
    open_volume,
    read_part,
    read_volume,
    resize_chest,
    take_box,
    volume_file,
)

logger = logging.getLogger(__name__)

FitMode = Literal["crop", "resize"]
DoubleRescale = Literal["refuse", "undo"]


@dataclass(frozen=True)
class ChestInput:
    """How a chest CT volume becomes the model's input.

    Attributes:
        window: HU that become 0 and 1.
        fit: "crop" pads with air and crops (at random in training, centred in evaluation), "resize" interpolates.
        size: voxels (D, H, W) of the input.
        double_rescale: volumes whose HU were shifted down by a second rescale: "refuse", or "undo" by adding the
            shift back (see `itemizedclip_radiology.data.volumes.excess_rescale_hu`).
        read_as_is: take the values as they are, without a look at where tissue and air lie, as the published code does.
    """

    window: HounsfieldWindow = field(default_factory=HounsfieldWindow)
    fit: FitMode = "crop"
    size: Size = CHEST_SIZE
    double_rescale: DoubleRescale = "refuse"
    read_as_is: bool = False


def parse_input_info(words: Sequence[str]) -> tuple[HounsfieldWindow, FitMode]:
    """The published flag --input-info: lower HU, upper HU, crop or resize ("-1150 350 crop").

    Raises:
        ValueError: not two numbers in order and one of the words.
    """
    expected = "expected lower HU, upper HU and crop or resize, such as --input-info -1150 350 crop"
    if len(words) != 3:
        raise UserError(f"--input-info has {len(words)} values ({' '.join(words)}); {expected}")
    fit = words[2]
    try:
        window = HounsfieldWindow(float(words[0]), float(words[1]))
    except ValueError as error:
        raise UserError(f"--input-info {' '.join(words)}: {error}; {expected}") from None
    if fit not in ("crop", "resize"):
        raise UserError(f"--input-info {' '.join(words)}: {fit!r}; {expected}")
    return window, "crop" if fit == "crop" else "resize"


PUBLISHED_INPUT_INFO = ("-1150", "350", "crop")
"""--input-info of the published recipe and evaluations."""


@dataclass(frozen=True)
class ChestSettings:
    """Flags that say how chest CT volumes are read, in training, evaluation and cache building alike."""

    input_info: tuple[str, str, str] | None = None
    """Lower HU, upper HU, crop or resize; None: as the checkpoint was trained, else -1150 350 crop (published)."""

    double_rescale: DoubleRescale = "refuse"
    """Volumes whose HU were shifted down by a second rescale (CT-RATE v2): refuse them, or undo the shift."""

    read_as_is: bool = False
    """Take volumes that do not look like a chest CT in HU all the same, as they are, as the published code does."""

    cache_dir: Path | None = None
    """Folder of windowed volumes, a quarter of the bytes to read; each is built at its first use. None: no cache."""

    cache_type: CacheType = "uint8"
    """uint8 keeps 1/255 of the window (5.9 HU of the published one), float16 is twice as large and keeps 0.7 HU."""

    def __post_init__(self) -> None:
        if self.input_info is not None:
            parse_input_info(self.input_info)
        check(
            not self.read_as_is or (self.double_rescale == "refuse" and self.cache_dir is None),
            "--read-as-is leaves values as they are and unchecked: give it without --double-rescale and --cache-dir",
        )

    def chest_input(self, size: Size, transform: Mapping[str, Any] | None = None) -> ChestInput:
        """How volumes become an input of `size`; without --input-info as a checkpoint's `transform` says."""
        words = self.input_info or (transform or {}).get("input_info") or PUBLISHED_INPUT_INFO
        window, fit = parse_input_info(words)
        return ChestInput(window, fit, size, self.double_rescale, self.read_as_is)

    def cache(self, window: HounsfieldWindow) -> VolumeCache | None:
        """The cache, if there is one."""
        return None if self.cache_dir is None else VolumeCache(self.cache_dir, window=window, dtype=self.cache_type)


@dataclass
class ChestVolume:
    """One volume as the model takes it.

    Attributes:
        image: float32 (1, 1, D, H, W): one series, one channel, normalised.
        voxel_map: where its voxels lie in the file.
    """

    image: Tensor
    voxel_map: VoxelMap

    def as_study(self, name: str, path: Place) -> LoadedStudy:
        """The volume as a study of one series."""
        return LoadedStudy(
            image=self.image,
            names=[name],
            series_names=None,
            sources=[path],
            voxel_maps=[self.voxel_map],
            grey_ranges=[],
            skipped=[],
        )


def read_hu(path: Place, options: ChestInput) -> Tensor:
    """A whole volume (D, H, W) in HU, memory-mapped unless a double rescale had to be undone.

    Raises:
        BadSampleError: see `read_volume` and `excess_rescale_hu`.
    """
    volume = read_volume(path, memory_map=True)
    check_finite(volume, source=path)
    shift_hu = double_rescale_hu(volume, path, options)
    return volume + shift_hu if shift_hu else volume


def double_rescale_hu(volume: Tensor, path: Place, options: ChestInput) -> float:
    """HU to add to a whole volume; BadSampleError when it cannot be used."""
    if options.read_as_is:
        return 0.0
    excess_hu = excess_rescale_hu(volume, source=path)
    if excess_hu and options.double_rescale == "refuse":
        raise BadSampleError(
            f"{path}: values are HU minus {excess_hu:g}: slope and intercept were applied to a file that held HU "
            "already (CT-RATE v2); convert without them, or give --double-rescale undo to add the shift back"
        )
    return excess_hu


def load_chest_volume(
    path: str | Place,
    options: ChestInput,
    *,
    generator: np.random.Generator | None = None,
    cache: VolumeCache | None = None,
    cache_name: Path | None = None,
    hu: Tensor | None = None,
) -> ChestVolume:
    """Read, window, fit and normalise one volume.

    Args:
        path: `.pt` file of HU.
        options: window, size and fit.
        generator: draws the position of the padded crop (training); None centres it.
        cache: read the windowed volume from here, building it at first use.
        cache_name: its place in the cache, such as train/train_1/train_1_a/train_1_a_1.pt; default the file's name.
        hu: the whole volume, where the path is no `.pt` file.

    Raises:
        BadSampleError: the file cannot be used, see `read_volume` and `excess_rescale_hu`.
    """
    path = Path(path) if isinstance(path, str) else path
    if cache is not None:
        path = volume_file(path)
        if cache.window != options.window:
            raise UserError(f"the cache has {cache.window}, the input {options.window}; give both the same")
        if not path.is_file():
            raise BadSampleError(f"{path}: no such file; expected a chest CT volume in HU")
        cached = cache.open(cache_name or Path(path.name), path, lambda: read_hu(path, options))
        if options.fit == "resize":
            windowed, voxel_map = resize_chest(cached.read_box((0, 0, 0), cached.shape), options.size)
        else:
            start = chest_start(cached.shape, options.size, generator)
            windowed, voxel_map = cached.read_box(start, options.size), VoxelMap.of_box(start)
    elif options.fit == "resize":
        whole = read_hu(path, options) if hu is None else hu + double_rescale_hu(hu, path, options)
        windowed, voxel_map = resize_chest(options.window.apply(whole), options.size)
    else:
        windowed, voxel_map = _windowed_crop(path, options, generator, hu)
    image = windowed.sub_(GREY_MEAN).div_(GREY_STD)
    return ChestVolume(image[None, None], voxel_map)


def _windowed_crop(
    path: Place, options: ChestInput, generator: np.random.Generator | None, hu: Tensor | None
) -> tuple[Tensor, VoxelMap]:
    """Pad and crop, reading and windowing only what the crop needs."""
    volume = open_volume(path) if hu is None else hu
    start = chest_start(volume.shape, options.size, generator)
    # The lower end of the window is what padding means: 0 after windowing.
    fill = options.window.hu_min
    inside = read_part(volume, [slice(max(s, 0), max(s, 0) + m) for s, m in zip(start, options.size)])
    check_finite(inside, source=path)
    inside_hu = inside.float()
    if not _shows_hu(inside_hu, path):
        whole = volume.whole() if isinstance(volume, PackedVolume) else volume
        inside_hu = inside_hu + double_rescale_hu(whole, path, options)
    box = take_box(inside_hu, [min(s, 0) for s in start], options.size, fill=fill)
    return options.window.apply(box), VoxelMap.of_box(start)


def _shows_hu(part_hu: Tensor, path: Place) -> bool:
    """Whether a part of a volume alone shows that its values are HU; a crop beside the body does not."""
    try:
        return excess_rescale_hu(part_hu, source=path) == 0
    except BadSampleError:
        return False


@dataclass(frozen=True)
class ChestReader:
    """Chest CT volumes of a benchmark (see `itemizedclip_radiology.benchmarks.labelled_studies.StudyReader`).

    Attributes:
        root: folder of the volumes; places in the cache are relative to it.
        options: window, fit, double rescale; the size is the model's.
        cache: read windowed volumes from here, building them at first use.
    """

    root: Place
    options: ChestInput = field(default_factory=ChestInput)
    cache: VolumeCache | None = None

    def read(self, study: Study, size: Size) -> LoadedStudy:
        """The one volume of a study."""
        (file,) = study.series
        volume = load_chest_volume(
            file.path,
            replace(self.options, size=size),
            cache=self.cache,
            cache_name=relative_path(file.path, self.root),
        )
        return volume.as_study(file.name, file.path)

    def facts(self) -> dict[str, Any]:
        """What scores depend on, besides the size, which is part of the model's config."""
        facts: dict[str, Any] = {
            "hu_window": [self.options.window.hu_min, self.options.window.hu_max],
            "fit": self.options.fit,
            "double_rescale": self.options.double_rescale,
            "cache": None if self.cache is None else self.cache.dtype,
        }
        if self.options.read_as_is:
            facts["read_as_is"] = "values taken as they are, without a look at whether they are HU (--read-as-is)"
        return facts


def find_ct_rate_root(data_root: str | Path | None = None) -> Place:
    """CT-RATE's folder of `.pt` volumes, by default DATA_ROOT in the environment.

    Raises:
        ValueError: none given.
        FileNotFoundError: no such folder, or no train/ or valid/ in it.
    """
    given = data_root or os.environ.get("DATA_ROOT")
    if not given:
        raise UserError("no CT-RATE folder given: set --data-root or DATA_ROOT to the folder of train/ and valid/")
    root = place(given)
    if isinstance(root, Address):
        return root  # a web server need not list folders
    if not root.is_dir():
        raise MissingFileError(f"{root}: no such folder (--data-root, DATA_ROOT)")
    if not any((root / split).is_dir() for split in ("train", "valid")):
        raise MissingFileError(
            f"{root}: holds neither train/ nor valid/; give CT-RATE's folder of .pt volumes"
            f"{hint_for_folder(root, 'chest-ct')}"
        )
    return root


def find_items_json(items_json: str | Path | None = None) -> Path:
    """The item file of the training scans, by default ITEMS_JSON in the environment.

    Raises:
        ValueError: none given.
        FileNotFoundError: no such file.
    """
    given = items_json or os.environ.get("ITEMS_JSON")
    if not given:
        raise UserError("no item file given: set --items-json or ITEMS_JSON to CT-RATE's itemized.json")
    path = here(place(given))
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; expected the items of each scan (--items-json, ITEMS_JSON)")
    return path


class ChestScans(StudyDataset):
    """Scans of CT-RATE with the items of their reports, lower-cased; images are float32 (1, 1, D, H, W).

    Training: one reconstruction of the scan at random per epoch, a random padded crop. Evaluation: the first
    reconstruction, a centred crop. One that cannot be used is skipped for another one of the scan.
    """

    what_files = "reconstructions"
    chest_ct = True

    def __init__(
        self,
        *,
        data_root: str | Place,
        items_json: str | Path,
        is_train: bool,
        num_items: int,
        seed: int,
        options: ChestInput | None = None,
        cache: VolumeCache | None = None,
        on_bad_sample: Literal["skip", "stop"] = "stop",
    ) -> None:
        """Open the scans of an item file; reads no volume.

        Args:
            data_root: folder that holds train/ and valid/.
            items_json: reports and reconstructions per scan.
            is_train: see above.
            num_items: K, items drawn per training scan; not used in evaluation.
            seed: seed of all random choices.
            options: window, size, fit.
            cache: read windowed volumes from here, building them at first use.
            on_bad_sample: what to do about JSON entries that cannot be used: "stop" raises, "skip" leaves them out.

        Raises:
            MissingFileError: no JSON file.
            UserError: num_items below 1, no usable scan, or a cache with another window.
            BadSampleError: a JSON entry that cannot be used, with on_bad_sample="stop"; names scan and field.
        """
        self.options = options or ChestInput()
        if cache is not None and cache.window != self.options.window:
            raise UserError(f"the cache has {cache.window}, the input {self.options.window}; give both the same")
        self.data_root = place(data_root)
        self.cache = cache
        index = StudyIndex(items_json, _check_scan, on_bad_sample=on_bad_sample)
        counts = [len(index[row]["recons"]) for row in range(len(index))]
        super().__init__(index, files_per_study=counts, is_train=is_train, num_items=num_items, seed=seed)

    @property
    def folder(self) -> Place:
        """The folder of train/ and valid/."""
        return self.data_root

    def load(self, row: int, generator: np.random.Generator | None) -> LoadedStudy:
        """See `StudyDataset`."""
        scan, recons = self.index[row]["study"], self.index[row]["recons"]
        order = range(len(recons)) if generator is None else generator.permutation(len(recons)).tolist()
        messages = []
        for recon in order:
            name = parse_volume_name(recons[recon]).path
            path = self.data_root / name
            try:
                volume = load_chest_volume(path, self.options, generator=generator, cache=self.cache, cache_name=name)
            except BadSampleError as error:
                messages.append(f"scan {scan}: {error}")
                self.skipped.add(row, recon, messages[-1])
                continue
            return volume.as_study(recons[recon], path)
        more = f" (and {len(messages) - 1} more reconstructions)" if len(messages) > 1 else ""
        raise BadSampleError(f"{messages[0]}{more}: no reconstruction of this scan can be used")

    def why_unusable(self, row: int) -> str | None:
        """See `StudyDataset`."""
        messages = []
        for recon in self.index[row]["recons"]:
            try:
                read_volume(self.data_root / parse_volume_name(recon).path, memory_map=True)
            except BadSampleError as error:
                messages.append(f"scan {self.index[row]['study']}: {error}")
                continue
            return None
        return messages[0]

    def without_folder(self) -> list[str]:
        """Scans whose patient has no folder; see `StudyDataset`."""
        on_disk: dict[str, set[str]] = {}
        absent = []
        for row in range(len(self)):
            volume = parse_volume_name(self.index[row]["recons"][0])
            if volume.split not in on_disk:
                on_disk[volume.split] = names_in(self.data_root / volume.split)
            if not on_disk[volume.split] and isinstance(self.data_root, Address):
                continue  # a web server that lists no folders: what is missing shows when it is read
            if f"{volume.split}_{volume.patient}" not in on_disk[volume.split]:
                absent.append(volume.scan)
        return absent


def _check_scan(scan: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Reconstructions (without the excluded ones) and lower-cased items of one scan."""
    if not is_scan_name(scan):
        raise UserError(f"key {scan!r}; expected a scan name such as train_12_b: {OWN_NAMES_IN_CT_RATE}")
    recons = entry.get("recons")
    if not isinstance(recons, list) or not all(isinstance(name, str) for name in recons):
        found = "nothing" if recons is None else repr(recons)[:60]
        raise UserError(f"field 'recons': expected a list of volume names, found {found}")
    stems = []
    for name in recons:
        try:
            volume = parse_volume_name(name)
        except ValueError as error:
            raise UserError(f"field 'recons': {error}") from None
        if volume.scan != scan:
            raise UserError(f"field 'recons': {name!r} is no reconstruction of this scan")
        if volume.stem not in EXCLUDED_RECONSTRUCTIONS:
            stems.append(volume.stem)
    if not stems:
        raise UserError(f"field 'recons': no reconstruction left of {recons}")
    if "report" not in entry:
        raise UserError("field 'report' is missing; expected a list of texts")
    try:
        items = report_items(entry["report"])
    except ValueError as error:
        raise UserError(f"field 'report': {error}") from None
    return {"recons": stems, "report": [normalise_item(item) for item in items]}
