"""Half-prepared trees: what lies where volume files were expected, and the command that makes them.

Every sentence about it is made here; readers add it to their messages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from itemizedclip.runtime.remote import Address, Place

_NIFTI = (".nii", ".nii.gz")
_DICOM = (".dcm", ".dicom", ".ima")
_PACKED = (".zip", ".tar", ".tar.gz", ".tgz")
_MOST_LOOKED_AT = 2_000

COMMAND = "itemizedclip prepare studies"


def hint_for_missing(path: Place) -> str:
    """What lies beside a missing `.pt` file, as the end of a sentence; "" when nothing that could become it."""
    if isinstance(path, Address):
        return ""
    folder = path.parent
    kind = _kind_of(_names(folder, depth=1))
    if not kind:
        return ""
    return f". Beside it lie {kind}: run `{COMMAND} {_source_of(folder)} --to NEW --recipe mri` (or ct, chest-ct)"


def hint_for_folder(folder: Place, recipe: str) -> str:
    """What a folder holds instead of prepared studies, as the end of a sentence; "" when nothing that is known.

    Args:
        folder: that was given for training or evaluation.
        recipe: mri, ct or chest-ct.
    """
    if isinstance(folder, Address):
        return ""
    layout = _layout_of(folder)
    if layout:
        return f". It is {layout} as downloaded: run `{COMMAND} {folder} --from {layout} --to NEW`, and give NEW"
    kind = _kind_of(_names(folder, depth=5))
    return f". It holds {kind}: run `{COMMAND} {folder} --to NEW --recipe {recipe}`, and give NEW" if kind else ""


def hint_for_size(shape: tuple[int, ...]) -> str:
    """What to do about a volume of another size."""
    rows, columns = shape[1:]
    native = "as it came from the scanner, " if rows == columns and rows >= 320 else ""
    return f"{native}resample the scan: `{COMMAND}` does, from DICOM or NIfTI files"


def hint_for_grey_values(low: float, high: float) -> str:
    """What to do about values that are no grey values."""
    if low <= -500 and high <= 33_000:
        return (
            f"these look like HU: a head CT is read in three windows, which `{COMMAND} SOURCE --to NEW --recipe ct` "
            "makes; HU are for chest CT (--like chest-ct)"
        )
    return f"save uint8 grey values 0…255, which `{COMMAND} SOURCE --to NEW --recipe mri` makes"


OWN_NAMES_IN_CT_RATE = (
    "names of CT-RATE alone are read from such a tree: `itemizedclip prepare studies SOURCE --to NEW --recipe "
    "chest-ct` gives them, and `itemizedclip train own --like chest-ct` takes any names"
)


def _names(folder: Path, *, depth: int) -> Iterator[str]:
    """Names of files in a folder and, to some depth, below; of large folders the beginning."""
    seen = 0
    top = len(folder.parts)
    for place, inside, files in os.walk(folder):
        inside.sort()
        if len(Path(place).parts) - top >= depth - 1:
            inside.clear()
        for name in files:
            seen += 1
            if seen > _MOST_LOOKED_AT:
                return
            yield name


def _kind_of(names: Iterator[str]) -> str:
    for name in names:
        low = name.lower()
        for suffixes, what in ((_NIFTI, "NIfTI files"), (_DICOM, "DICOM files"), (_PACKED, "packed studies")):
            if low.endswith(suffixes) and not low.startswith("."):
                return f"{what} ({name}, …)"
    return ""


def _source_of(folder: Path) -> Path:
    """The folder of studies that a series' folder STUDY/SERIES belongs to."""
    return folder.parents[1] if len(folder.parents) > 1 else folder


def _layout_of(folder: Path) -> str:
    """The public data set whose download a folder is, by what only it has."""
    try:
        names = {entry.name for _, entry in zip(range(_MOST_LOOKED_AT), os.scandir(folder))}
    except OSError:
        return ""
    if "splits.csv" in names and (names & {"mri", "batch00"} or any(re.fullmatch(r"batch\d+", n) for n in names)):
        return "mr-rate"
    if "dataset" in names and any((folder / "dataset" / split).is_dir() for split in ("train", "valid", "train_fixed")):
        return "ct-rate"
    if any(re.fullmatch(r"CQ500-?CT-?\d+( .*)?(\.zip)?", name) for name in names):
        prepared = any(next((folder / name).glob("*/img_*.pt"), None) for name in names if name.startswith("CQ500"))
        return "" if prepared else "cq500"
    if any(re.fullmatch(r"(trn|val|tst)\d{5}\.npz", name) for name in names):
        return "rad-chestct"
    if any(re.fullmatch(r"ID_[0-9a-f]{9}\.dcm", name) for name in names) or "stage_2_train" in names:
        return "rsna"
    return ""
