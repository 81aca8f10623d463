"""What there is to prepare: the entries of a folder or CSV of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.files import open_table
from itemizedclip_radiology.data.archives import is_archive
from itemizedclip_radiology.data.nifti import is_nifti

Recipe = Literal["mri", "ct", "chest-ct"]

_SPLITS = {"": "", "train": "train", "valid": "valid", "val": "valid", "validation": "valid"}


@dataclass(frozen=True)
class VolumeFacts:
    """What a table says of a volume: name, rescale slope and intercept, spacing in mm along columns, rows, slices."""

    volume: str
    slope: float
    intercept: float
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Entry:
    """One thing of the source.

    Attributes:
        path: folder, archive or file.
        patient: whose it is, "" when only its files tell.
        split: train, valid or (public data sets) test, "" when it is drawn.
        loose: of a folder only the files that lie in it, not those of its folders.
        study: its name in a public data set, which it keeps.
        layout: of the public data set (see `itemizedclip_radiology.prepare.public`).
        files: only these of the folder's; none: all.
        facts: what the data set's tables say of them.
    """

    path: Path
    patient: str = ""
    split: str = ""
    loose: bool = False
    study: str = ""
    layout: str = ""
    files: tuple[Path, ...] = ()
    facts: tuple[VolumeFacts, ...] = ()


def find_entries(source: Path) -> list[Entry]:
    """The entries of a source, by name.

    Raises:
        MissingFileError: no such file or folder, or nothing in it.
        UserError: a CSV without a column path, or with another split than train and valid.
    """
    source = source.expanduser()
    if source.is_file() and source.suffix.lower() == ".csv":
        return _listed_entries(source)
    if source.is_file():
        return [Entry(source)]
    if not source.is_dir():
        raise MissingFileError(f"{source}: no such file or folder; expected studies, or a CSV with a column path")
    inside = sorted(path for path in source.iterdir() if not path.name.startswith("."))
    if not inside:
        raise MissingFileError(f"{source}: is empty; expected folders of studies, .zip, .tar or NIfTI files")
    whole = [path for path in inside if path.is_dir() or is_archive(path) or is_nifti(path)]
    if not whole:
        return [Entry(source)]
    # DICOM files that lie in the folder itself are one study, or several that are told apart by their headers.
    loose = [Entry(source, loose=True)] if len(whole) < len(inside) else []
    return [Entry(path) for path in whole] + loose


def _listed_entries(listed: Path) -> list[Entry]:
    with open_table(listed, holding="the columns path, patient, split") as table:
        path_at, patient_at, split_at = table.place("path"), table.find("patient"), table.find("split")
        entries = []
        for where, row in table.rows():
            given = "" if split_at is None else row[split_at].strip()
            if given.lower() not in _SPLITS:
                raise UserError(f"{where}: split is {given!r}; expected train or valid")
            path = Path(row[path_at].strip()).expanduser()
            patient = "" if patient_at is None else row[patient_at].strip()
            entries.append(Entry(path if path.is_absolute() else listed.parent / path, patient, _SPLITS[given.lower()]))
    if not entries:
        raise UserError(f"{listed}: has no row; expected a path in each")
    return entries
