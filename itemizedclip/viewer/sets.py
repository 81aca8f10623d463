"""A folder of images or studies with their items, and masks where there are some, as an evaluator's data set.

    FOLDER/NAME                     what `open_input` reads: an image file, a study folder, a scan
    own data (.jsonl, .csv)         see `itemizedclip.data.jsonl`: paths of images are the names
    items JSON                      {"NAME": ["item", …]}, or per item {"item": …, "series": […], "finding": …}
    MASKS/NAME.npz or NAME.pt       {"1": mask of the first item, …} by the item's number or its "finding"; or, in a
                                    .npz, one array "masks" (K, …)
    MASKS/NAME/1.png, 2.png, …      photographs: white where the item is

A mask has the size of the image, or (D, H, W) of the study's series; an item's mask counts in the series that its
"series" names (default: in all). NAME may be given without its suffix, and its "/" are "__" in names of mask files.

Axes: K items, S series, D H W voxels or H W pixels of the files, after `masks` of the model's view.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itemizedclip.data.batch import BadSampleError, ItemSample
from itemizedclip.data.images import SUFFIXES, decode_mask
from itemizedclip.data.items import check_id
from itemizedclip.data.jsonl import read_own
from itemizedclip.models.archive import unusable_tensor
from itemizedclip.models.factory import LoadedModel
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.files import check_readable, read_json
from itemizedclip.viewer.geometry import Geometry, mask_to_view
from itemizedclip.viewer.inputs import InputView, ModelInput, open_input

MAX_MASK_BYTES = 2**31
"""Of all masks of one image or study together."""

_SUFFIXES = (*SUFFIXES, ".pt", ".nii.gz", ".nii")


@dataclass(frozen=True)
class SetItem:
    """One text of an image or study.

    Attributes:
        text: the item.
        key: under which a mask file holds its mask.
        series: names of the series that show it; None: all.
    """

    text: str
    key: str
    series: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SetEntry:
    """One image or study: its name in the item file, where it is, and its items."""

    name: str
    path: Path
    items: list[SetItem]


@dataclass
class ExplainSet:
    """Images or studies of a folder that have items.

    Attributes:
        entries: N of them, in the order of the item file.
        loaded: the model they are read for.
        masks_folder: where masks are; None: there are none.
        missing: names of the item file that are not in the folder.
        without_items: names left out because their list is empty.
    """

    entries: list[SetEntry]
    loaded: LoadedModel
    masks_folder: Path | None = None
    missing: list[str] = field(default_factory=list)
    without_items: list[str] = field(default_factory=list)
    _views: dict[int, list[tuple[str, Geometry]]] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.entries)

    def sample_id(self, index: int) -> str:
        """Its name in the item file."""
        return self.entries[index].name

    def __getitem__(self, index: int) -> ItemSample:
        """Image or study `index`; raises BadSampleError when it cannot be read."""
        opened = self._open(index)
        return ItemSample(opened.name, opened.image, self.items(index), series_names=opened.series_names)

    def items(self, index: int) -> list[str]:
        """Its K texts."""
        return [item.text for item in self.entries[index].items]

    def masks(self, index: int) -> Tensor | None:
        """bool (K, Y, X) or (K, S, D, Y, X) in the frame of the model's view; None when it has none.

        An item without a mask has an empty one. What the crop leaves out is not part of a mask.

        Raises:
            BadSampleError: a mask file that cannot be read, a mask of another size, or of a series that is not there.
        """
        if self.masks_folder is None:
            return None
        entry = self.entries[index]
        source = _find_masks(self.masks_folder, entry.name)
        if source is None:
            return None
        if index not in self._views:
            self._open(index)
        views = self._views.pop(index)
        read = read_masks(source)
        if len(views[0][1].input_size) == 2:
            return torch.stack([_view_mask(read.get(item.key), views[0][1], source, item) for item in entry.items])
        return torch.stack([_study_mask(read.get(item.key), views, source, item) for item in entry.items])

    def _open(self, index: int) -> ModelInput:
        opened = open_input(self.entries[index].path, self.loaded)
        self._views[index] = [(view.name, _seen(view, opened.image)) for view in opened.views]
        return opened


def _seen(view: InputView, image: Tensor) -> Geometry:
    """The geometry with the model's whole view as its frame: a photograph's may stop where the patches do."""
    size = tuple(image.shape[-len(view.geometry.view_size) :])
    return view.geometry.crop((0,) * len(size), size)


def open_explain_set(
    folder: Path,
    items_json: Path,
    loaded: LoadedModel,
    masks_folder: Path | None = None,
    *,
    allow_missing: bool = False,
) -> ExplainSet:
    """The images or studies of an item file that lie in a folder.

    Raises:
        FileNotFoundError: no such folder or file, or names that are not in the folder, without `allow_missing`.
        ValueError: an item file that is none, or no name with items.
    """
    for place in (folder, masks_folder):
        if place is not None and not place.is_dir():
            raise MissingFileError(f"{place}: no such folder")
    lists = read_item_file(items_json)
    entries, missing = [], []
    for name, items in lists.items():
        path = _find_input(folder, name)
        if path is None:
            missing.append(name)
        elif items:
            entries.append(SetEntry(name, path, items))
    if missing and (not allow_missing or not entries):
        raise MissingFileError(
            f"{items_json}: {len(missing)} of {len(lists)} names are not in {folder}, such as {missing[0]}; give the "
            "folder that holds them, or leave them out with --allow-missing"
        )
    if not entries:
        raise UserError(f"{items_json}: no name in it has an item; expected at least one")
    empty = [name for name, items in lists.items() if not items]
    if masks_folder is not None and not any(_find_masks(masks_folder, entry.name) for entry in entries):
        raise MissingFileError(
            f"{masks_folder}: holds masks of none of {len(entries)} names; expected such as {entries[0].name}.npz"
        )
    return ExplainSet(entries, loaded, masks_folder, missing, empty)


def read_item_file(path: Path) -> dict[str, list[SetItem]]:
    """Items by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not the format above; names file and key.
    """
    if path.suffix.lower() in (".jsonl", ".csv"):
        entries = read_own(path).entries
        if any(entry.series for entry in entries):
            raise UserError(
                f"{path}: lists studies by their series; expected images, or a .json of study folders' names"
            )
        return {
            entry.image: [SetItem(text, str(number)) for number, text in enumerate(entry.items, start=1)]
            for entry in entries
        }
    content = read_json(path, holding="items")
    if not isinstance(content, dict):
        raise UserError(f'{path}: expected an object {{"NAME": ["item", …]}}')
    if not content:
        raise UserError(f'{path}: expected an object {{"NAME": ["item", …]}}, found one without an entry')
    lists = {}
    for name, entries in content.items():
        if not isinstance(entries, list):
            raise UserError(f"{path}: key {name!r}: expected a list of items, found {type(entries).__name__}")
        check_id(name, path)
        lists[name] = [_read_item(path, name, entry, number) for number, entry in enumerate(entries, start=1)]
    return lists


def _read_item(path: Path, name: str, entry: Any, number: int) -> SetItem:
    if isinstance(entry, str) and entry.strip():
        return SetItem(entry.strip(), str(number))
    if isinstance(entry, dict) and isinstance(entry.get("item"), str) and entry["item"].strip():
        series = entry.get("series")
        if series is None or (isinstance(series, list) and all(isinstance(one, str) for one in series)):
            key = str(entry.get("finding", number))
            return SetItem(entry["item"].strip(), key, None if series is None else tuple(series))
    raise UserError(
        f'{path}: key {name!r}, item {number}: expected a text or {{"item": text, "series": [names]}}, found '
        f"{repr(entry)[:60]}"
    )


def _find_input(folder: Path, name: str) -> Path | None:
    for candidate in (name, *(name + suffix for suffix in _SUFFIXES)):
        if (folder / candidate).exists():
            return folder / candidate
    return None


def _find_masks(folder: Path, name: str) -> Path | None:
    flat = name.replace("/", "__")
    for stem in dict.fromkeys((flat, Path(flat).stem)):
        for candidate in (folder / f"{stem}.npz", folder / f"{stem}.pt", folder / stem):
            if candidate.is_file() or (candidate.is_dir() and any(candidate.glob("*.png"))):
                return candidate
    return None


def read_masks(source: Path) -> Mapping[str, np.ndarray]:
    """Masks by key, bool; nothing in the file is executed.

    Raises:
        BadSampleError: a file that cannot be read, or holds anything but masks.
    """
    expected = "expected bool masks by item number or finding"
    try:
        if not source.is_dir():
            check_readable(source, holding="masks")
        if source.is_dir():
            found = {path.stem: decode_mask(path, source=str(path)) for path in source.glob("*.png")}
        elif source.suffix == ".npz":
            _check_unpacked(source, expected)
            with np.load(source, allow_pickle=False) as archive:
                found = {key: archive[key] for key in archive.files}
            if list(found) == ["masks"]:
                found = {str(number): mask for number, mask in enumerate(found["masks"], start=1)}
        else:
            tensors = torch.load(source, map_location="cpu", weights_only=True)
            problem = unusable_tensor(tensors)
            if problem:
                raise BadSampleError(f"{source}: masks cannot be read, {problem}; {expected}")
            found = {str(key): tensor.numpy() for key, tensor in tensors.items()}
    except BadSampleError:
        raise
    except Exception as error:  # bytes that are no mask file make the readers fail in any way
        reason = (str(error) or type(error).__name__).split("\n")[0][:120]
        raise BadSampleError(f"{source}: masks cannot be read ({reason}); {expected}") from None
    for key, mask in found.items():
        if mask.dtype.kind not in "bu" or not np.isin(np.unique(mask), (0, 1)).all():
            raise BadSampleError(f"{source}: mask {key!r} holds {mask.dtype} values; {expected}, 0 and 1")
    return {key: mask.astype(bool) for key, mask in found.items()}


def _check_unpacked(source: Path, expected: str) -> None:
    """Refuse an archive of masks that would unpack to more than memory should hold: zeros shrink a thousandfold."""
    with zipfile.ZipFile(source) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_MASK_BYTES:
        raise BadSampleError(
            f"{source}: unpacks to {unpacked:,} bytes, more than the {MAX_MASK_BYTES:,} that are read; {expected}; "
            "save the masks as bool or uint8, those of fewer items"
        )


def _view_mask(mask: np.ndarray | None, geometry: Geometry, source: Path, item: SetItem) -> Tensor:
    """One mask in the frame of the model's view; nothing when there is none."""
    if mask is None:
        return torch.zeros(geometry.view_size, dtype=torch.bool)
    if mask.shape != geometry.input_size:
        raise BadSampleError(
            f"{source}: mask {item.key!r} is {'×'.join(map(str, mask.shape))}; expected "
            f"{'×'.join(map(str, geometry.input_size))}, the size of its image or series"
        )
    return mask_to_view(mask, geometry)


def _study_mask(mask: np.ndarray | None, views: list[tuple[str, Geometry]], source: Path, item: SetItem) -> Tensor:
    """(S, D, Y, X): the mask in each series that shows the item."""
    names = [name for name, _ in views]
    shown = names if item.series is None else [name for name in item.series if name in names]
    if not shown:
        raise BadSampleError(
            f"{source}: item {item.text!r} is shown in {', '.join(item.series or ())}; the study has {', '.join(names)}"
        )
    return torch.stack([_view_mask(mask if name in shown else None, frame, source, item) for name, frame in views])
