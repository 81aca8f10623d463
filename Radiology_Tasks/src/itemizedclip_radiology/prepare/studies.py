"""The command `itemizedclip prepare studies`: DICOM trees, NIfTI files and packed studies → what training reads.

    itemizedclip prepare studies /data/pacs --to /data/mri --recipe mri
    itemizedclip prepare studies /data/ct.csv --to /data/chest --recipe chest-ct --workers 16
    itemizedclip prepare studies /data/pacs --to /data/mri --recipe mri --shard 3/64        one of 64 Slurm tasks

SOURCE is a folder, whose entries (folders, .zip, .tar, NIfTI files) are prepared one by one, however DICOM files are
nested in them, or a CSV with the columns path and, if wanted, patient and split. Every entry is prepared in a process
of its own with a time limit; what is done is kept under TO/.prepare and not done again.

    mri         TO/STUDY/SERIES/img.pt        uint8 48×224×224, grey values between the 0.5 and 99.5 percentiles
    ct          TO/STUDY/SERIES/img.pt        the same of each head window
    chest-ct    TO/train/train_1/train_1_a/train_1_a_1.pt        int16 HU at 3×1×1 mm

Beside each volume lies a JSON that tells where its voxels lie in the source. No name, number, date or path of the
source is written: studies and patients get pseudonyms from a secret key.

Axes: D H W voxels.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.images import decode_photograph
from itemizedclip.data.report_files import read_reports
from itemizedclip.runtime.errors import MissingFileError, UserError, reported_errors
from itemizedclip.runtime.files import check_writable, read_json, replacing, write_json, written_whole
from itemizedclip.runtime.flags import at_least, check, loader_processes, read_flags
from itemizedclip.runtime.jobs import run_jobs
from itemizedclip.runtime.logs import literal, logging_to_console, progress_bar, standard_error
from itemizedclip.runtime.ray_jobs import run_jobs_on_ray
from itemizedclip.viewer.geometry import Geometry
from itemizedclip.viewer.inputs import SeriesChoice
from itemizedclip_radiology.data.archives import unpacked_archive
from itemizedclip_radiology.data.dicom import DicomSeries, find_dicom_series, read_dicom
from itemizedclip_radiology.data.nifti import is_nifti, nifti_stem, read_nifti
from itemizedclip_radiology.data.reports import numbered_items
from itemizedclip_radiology.data.scans import (
    Body,
    Scan,
    check_field_of_view,
    looks_like_hu,
    straightened,
)
from itemizedclip_radiology.data.volumes import (
    BRAIN_SIZE,
    excess_rescale_hu,
)
from itemizedclip_radiology.prepare.pseudonyms import Pseudonyms, open_key, without_identities
from itemizedclip_radiology.prepare.public import PUBLIC_LAYOUTS
from itemizedclip_radiology.prepare.sources import Entry, Recipe, find_entries
from itemizedclip_radiology.viewing.inputs import (
    HEAD_WINDOWS_HU,
    at_chest_spacing,
    brain_series,
    grey_values,
    oriented_chest,
)

logger = logging.getLogger(__name__)

PROG = "itemizedclip prepare studies"
DESCRIPTION = (
    "DICOM trees, NIfTI files and packed studies → volumes that training reads, with a table of what was kept and left "
    "out, and a contact sheet (docs/prepare-studies.md)."
)

VERSION = 1
"""Of what is written for a source; entries prepared by another version are prepared again."""

STATE = ".prepare"
_THUMBNAIL_PX = 112
_SHEET_COLUMNS, _SHEET_MOST = 8, 160
_MOST_SHOWN = 12
_WINDOWED = re.compile(rf"(?P<series>.+)_(AX|COR|SAG)_(?P<window>{'|'.join(HEAD_WINDOWS_HU)})")
_PUBLIC_KEY = b"public data sets"
"""What names the entries of public data sets in the state folder; no name of theirs is made from it."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class PrepareStudiesOptions:
    """What to prepare, for which recipe, and where it goes."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """A folder of studies (folders, .zip, .tar, NIfTI files), one study's folder, or a CSV with a column path."""

    to: Path
    """Folder for the results."""

    recipe: Recipe | None = None
    """What they are for: mri, ct (head) or chest-ct; a public data set knows."""

    layout: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """A public data set as it is downloaded: mr-rate, ct-rate, rad-chestct, rsna, cq500 or brats."""

    items: Path | None = None
    """Items for the index files, by study, or by name of a folder or file of the source: what `prepare items` writes
    (items.json, reports.csv), or MR-RATE's sentences (.jsonl)."""

    valid_share: float = 0.05
    """Share of the patients whose studies become validation studies, drawn by the key."""

    key_file: Path = Path("~/.itemizedclip/pseudonyms.key")
    """Secret that pseudonyms are made from; made when there is none. The same key gives the same names."""

    names_table: Path | None = None
    """Where to write which source became which study, to join reports with; outside of --to, and not to be shared."""

    series: tuple[str, ...] = ()
    """Prepare only series whose description or number holds one of these words."""

    exclude_series: tuple[str, ...] = ()
    """Leave out series whose description or number holds one of these words."""

    fill_nan: bool = False
    """Put the lowest value of a series where a voxel has no finite value."""

    workers: int | None = None
    """Processes at once; None: one per core, at most 8."""

    engine: Literal["processes", "ray"] = "processes"
    """processes of this machine, or the cores of a Ray cluster, whose nodes see the same folders."""

    ray_address: str | None = None
    """Of the cluster, such as "auto"; None: RAY_ADDRESS, else this machine."""

    shard: str = "1/1"
    """i/n: prepare the i-th of n parts of the source, such as "$SLURM_ARRAY_TASK_ID/64"."""

    time_limit: float = 10.0
    """Minutes after which an entry is given up; 0: never."""

    def __post_init__(self) -> None:
        at_least(self, workers=1, time_limit=0)
        if self.layout is not None:
            known = PUBLIC_LAYOUTS.get(self.layout)
            check(known is not None, f"--from is {self.layout!r}; expected {', '.join(PUBLIC_LAYOUTS)}")
            assert known is not None
            fits = self.recipe in (None, known.recipe)
            check(fits, f"--recipe is {self.recipe}; --from {self.layout} is for {known.recipe}: leave --recipe out")
            object.__setattr__(self, "recipe", known.recipe)
        check(self.recipe is not None, "give --recipe mri, ct or chest-ct, or --from with a public data set")
        check(0 <= self.valid_share < 1, f"--valid-share is {self.valid_share}; expected a share in [0, 1)")
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shard)
        check(
            found is not None and 1 <= int(found[1]) <= int(found[2]),
            f"--shard is {self.shard!r}; expected i/n with 1 ≤ i ≤ n, such as 3/64",
        )
        if self.names_table is not None:
            inside = self.names_table.expanduser().resolve().is_relative_to(self.to.expanduser().resolve())
            check(not inside, f"--names-table {self.names_table} lies in --to, which is shared; give another place")


# --- one entry -------------------------------------------------------------------------------------------------------


@dataclass
class SeriesRecord:
    """What became of one series.

    Attributes:
        study, series: pseudonym and name, as in the folders.
        split: train or valid.
        file: of its volume, below --to; "" when it was left out.
        reason: why it was left out.
        notes: what must be known of it.
        thumbnail: of its middle slice, below the state folder.
        patient: pseudonym, or name in a public data set.
    """

    study: str
    series: str
    split: str
    file: str = ""
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    thumbnail: str = ""
    patient: str = ""


@dataclass(frozen=True)
class Task:
    """All that the process of one entry is told."""

    entry: Entry
    to: Path
    recipe: Recipe
    key: bytes
    valid_share: float
    choice: SeriesChoice


def prepare_entry(task: Task) -> None:
    """Prepare one entry and write what became of it; runs in a process of its own."""
    torch.set_num_threads(1)
    names = Pseudonyms(task.key)
    records: list[SeriesRecord] = []
    try:
        with unpacked_archive(task.entry.path) as opened:
            for study in _studies(task, opened):
                records += _Preparation(task, names, study).run()
        if not records:
            if task.entry.loose:  # tables and notes beside the studies
                write_record(task, [])
                return
            records = [_nothing(task, names, "holds no DICOM or NIfTI scan")]
    except BadSampleError as error:
        records = [_nothing(task, names, str(error))]
    except (OSError, MemoryError) as error:
        records = [_nothing(task, names, f"{type(error).__name__}: {error}")]
    write_record(task, records)


def _nothing(task: Task, names: Pseudonyms, reason: str) -> SeriesRecord:
    study = task.entry.study or names.name("study", str(task.entry.path))
    return SeriesRecord(study, "", "", reason=_anonymous(reason, task.entry.path, study, ()))


def _anonymous(text: str, path: Path, study: str, personal: Iterable[str]) -> str:
    """A message without the paths of the source, which are named after patients as often as not."""
    text = re.sub(rf"{re.escape(str(path))}[^\s:;,]*", study, text)
    text = re.sub(r"/\S*itemizedclip-study-[^\s:;,]*", study, text)
    return without_identities(text, personal)


@dataclass(frozen=True)
class _FoundStudy:
    """The series of one study of an entry: DICOM series or NIfTI files."""

    identity: str
    patient: str
    dicom: list[DicomSeries] = field(default_factory=list)
    nifti: list[tuple[str, Path]] = field(default_factory=list)

    @property
    def personal(self) -> set[str]:
        """What tells whose it is."""
        found = {word for one in self.dicom for part in one.slices for word in part.personal}
        return found | {stem for _, path in self.nifti for stem in (nifti_stem(path), path.parent.name)}


def _studies(task: Task, opened: Path) -> list[_FoundStudy]:
    """The studies of an entry, DICOM by StudyInstanceUID; NIfTI files of one folder are one study."""
    entry = task.entry
    if entry.layout:
        named = PUBLIC_LAYOUTS[entry.layout].series(entry, opened)
        if named is not None:
            return [_FoundStudy(entry.study, entry.patient, nifti=named)]
        return [_FoundStudy(entry.study, entry.patient, dicom=find_dicom_series(opened, files=entry.files))]
    if opened.is_file() and is_nifti(opened):
        return [_FoundStudy(str(entry.path), entry.patient or str(entry.path), nifti=[("", opened)])]
    found: list[_FoundStudy] = []
    by_uid: dict[str, list[DicomSeries]] = {}
    for one in find_dicom_series(opened, nested=not entry.loose):
        by_uid.setdefault(one.slices[0].study, []).append(one)
    for uid, series in by_uid.items():
        patient = entry.patient or series[0].slices[0].patient or uid
        found.append(_FoundStudy(uid or str(entry.path), patient, dicom=series))
    if opened.is_dir() and not entry.loose:
        by_folder: dict[Path, list[tuple[str, Path]]] = {}
        for path in sorted(opened.rglob("*")):
            if is_nifti(path) and not path.name.startswith("."):
                by_folder.setdefault(path.parent, []).append(("", path))
        for folder, files in by_folder.items():
            identity = f"{entry.path}/{folder.relative_to(opened)}"
            found.append(_FoundStudy(identity, entry.patient or str(entry.path), nifti=files))
    return found


class _Preparation:
    """One study of one entry."""

    def __init__(self, task: Task, names: Pseudonyms, study: _FoundStudy) -> None:
        self.task = task
        self.found = study
        self.layout = PUBLIC_LAYOUTS.get(task.entry.layout)
        self.patient = study.patient if self.layout else names.name("patient", study.patient)
        self.study = study.identity if self.layout else names.name("study", study.identity)
        drawn = "valid" if names.share("split", study.patient) < task.valid_share else "train"
        self.split = task.entry.split or drawn
        # Names of public data sets are known to all, and their headers were emptied by who published them.
        self.personal = set() if self.layout else study.personal
        self.patient_number = names.number("patient", study.patient)
        letters = names.number("study", study.identity)
        self.scan_letters = "".join(_LETTERS[letters // 26**n % 26] for n in range(6))
        self.used: Counter[str] = Counter()
        self.records: list[SeriesRecord] = []

    def run(self) -> list[SeriesRecord]:
        """Prepare every series."""
        for one in self.found.dicom:
            label = one.description or f"series {one.number}"
            if self.layout and one.files[0].parent != self.task.entry.path:
                label = one.files[0].parent.name  # the name that the data set's tables know it by
            if one.reason:
                self._leave_out(label, one.reason)
            elif any(part.burned_in for part in one.slices):
                self._leave_out(label, "its header says that text about the patient is burned into the images")
            elif not self.task.choice.takes(one.description, str(one.number)):
                self._leave_out(label, "not asked for (--series, --exclude-series)")
            else:
                name = label if self.layout else None
                self._prepare(label, lambda one=one: [read_dicom(one, fill=self.task.choice.fill_nan)], name)
        for number, (named, path) in enumerate(self.found.nifti, start=1):
            # File names of archives are patients' names as often as not; what kind of series it is may stand there.
            label = named or self._clean(self._nifti_label(path)) or f"series{number}"
            if re.search(r"(?i)(seg|mask)", path.name):
                self._leave_out(label, "its name says segmentation")
            elif not self.task.choice.takes(path.name):
                self._leave_out(label, "not asked for (--series, --exclude-series)")
            else:
                self._prepare(label, lambda path=path: self._read(path), label)
        return self.records

    def _read(self, path: Path) -> list[Scan]:
        fill = self.task.choice.fill_nan
        return self.layout.read(self.task.entry, path, fill=fill) if self.layout else read_nifti(path, fill=fill)

    def _nifti_label(self, path: Path) -> str:
        """The words of a file's name that are kinds of series, such as t1_post; identities are not among them."""
        words = re.split(r"[^A-Za-z0-9]+", nifti_stem(path))
        known = re.compile(
            r"(?i)(ax|axial|sag|sagittal|cor|coronal|tra|t1w?|t2w?|t1c|t1ce|t1gd|flair|dwi|adc|swi|swan|gre|mra|pd|stir|"
            r"post|pre|contrast|gd|ct|ncct|cect|b\d{1,4}|tof|perf|dti|mprage|space|tse|fse)"
        )
        return "_".join(word for word in words if known.fullmatch(word))

    def _clean(self, text: str) -> str:
        text = without_identities(text, self.personal).replace("…", "")
        return re.sub(r"[^A-Za-z0-9.+*()-]+", "_", text).strip("_")

    def _anonymous(self, text: str) -> str:
        if self.layout:
            return text.replace(f"{self.task.entry.path}/", "")
        return _anonymous(text, self.task.entry.path, self.study, self.personal)

    def _leave_out(self, label: str, reason: str) -> None:
        reason = self._anonymous(reason)
        self.records.append(
            SeriesRecord(self.study, self._clean(label), self.split, reason=reason, patient=self.patient)
        )

    def _prepare(self, label: str, read: Any, name: str | None = None) -> None:
        try:
            for scan in read():
                own = name if name is not None else scan.name
                stem = nifti_stem(scan.source)
                suffix = scan.name.removeprefix(stem) if name is not None and scan.name.startswith(stem) else ""
                self._prepare_scan(replace(scan, name=self._clean(own + suffix) or "series"))
        except BadSampleError as error:
            self._leave_out(label, str(error))

    def _prepare_scan(self, scan: Scan) -> None:
        body: Body = "chest" if self.task.recipe == "chest-ct" else "brain"
        is_ct = scan.modality == "CT" or (not scan.modality and looks_like_hu(scan.voxels))
        wanted = "MR" if self.task.recipe == "mri" else "CT"
        if is_ct != (wanted == "CT"):
            self._leave_out(
                scan.name, f"a {'CT' if is_ct else 'MR'} series; the recipe {self.task.recipe} takes {wanted}"
            )
            return
        check_field_of_view(scan, body)
        if body == "chest":
            self._write_chest(scan)
            return
        scan = straightened(scan)
        own_size = self.layout is not None and self.layout.own_size
        folder = ""
        for one in brain_series(scan, BRAIN_SIZE):
            if own_size:
                grey, geometry = torch.from_numpy(one.view.values), Geometry.of_input(one.view.values.shape)
            else:
                grey = grey_values(one)
                geometry = one.view.geometry
            where = {"geometry": _described(geometry), "window_hu": one.view.window_hu, "values": "grey 0-255"}
            windowed = _WINDOWED.fullmatch(one.view.name) if self.layout else None
            if self.layout and windowed:
                # The windows of a series share its folder.
                name = folder = folder or self._unused(windowed["series"])
                file = self.layout.file(self.task.entry, folder, windowed["window"])
            elif self.layout:
                name = self._unused(scan.name if own_size else one.view.name)
                file = self.layout.file(self.task.entry, name, "")
            else:
                name = self._unused(one.view.name)
                file = Path(self.study, name, "img.pt")
            self._write(file, grey, name, scan, where, one.view.affine, one.view.spacing_mm)

    def _write_chest(self, scan: Scan) -> None:
        stored_order = self.layout is not None
        if not stored_order:
            scan = straightened(scan)
        turned = oriented_chest(scan, stored_order=stored_order)
        hu = torch.from_numpy(np.ascontiguousarray(turned.voxels)).float()
        excess = excess_rescale_hu(hu, source=scan.source)
        if excess:
            raise BadSampleError(f"{scan.source}: values are HU minus {excess:g}, rescaled twice; export it again")
        volume, geometry = at_chest_spacing(hu, turned.spacing_mm, Geometry.of_input(tuple(hu.shape)))
        limits = torch.iinfo(torch.int16)
        values = volume.round().clamp(limits.min, limits.max).to(torch.int16)
        number = self.used["volume"] = self.used["volume"] + 1
        if self.layout:
            name, file = scan.name, self.layout.file(self.task.entry, scan.name, "")
        else:
            folder = f"{self.split}_{self.patient_number}"
            name = f"{folder}_{self.scan_letters}_{number}"
            file = Path(self.split) / folder / f"{folder}_{self.scan_letters}" / f"{name}.pt"
        where = {"geometry": _described(geometry), "window_hu": None, "values": "HU"}
        self._write(file, values, name, scan, where, turned.affine, turned.spacing_mm)

    def _unused(self, name: str) -> str:
        """A folder name that no other series of the study has."""
        name = re.sub(r"[^A-Za-z0-9_.+*()-]+", "_", name)[:100].strip("._") or "series"
        self.used[name] += 1
        return name if self.used[name] == 1 else f"{name}_{self.used[name]}"

    def _write(
        self,
        file: Path,
        values: Tensor,
        name: str,
        scan: Scan,
        where: dict[str, Any],
        affine: np.ndarray | None,
        spacing_mm: tuple[float, float, float] | None,
    ) -> None:
        path = self.task.to / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            torch.save(values.contiguous(), part)
        notes = [self._anonymous(text) for text in (*scan.warnings, *scan.notes)]
        sidecar = {
            "version": VERSION,
            "recipe": self.task.recipe,
            "source": {
                "patient": self.patient,
                "study": self.study,
                "series": name,
                **({"file": self._anonymous(str(scan.source))} if self.layout else {}),
                "modality": scan.modality,
                "shape": list(scan.voxels.shape),
                "affine": np.asarray(scan.affine).tolist(),
            },
            "straight_and_turned": {
                "spacing_mm": None if spacing_mm is None else list(spacing_mm),
                "affine": None if affine is None else np.asarray(affine).tolist(),
            },
            "volume": {"shape": list(values.shape), "type": str(values.dtype).removeprefix("torch.")},
            **where,
            "notes": notes,
        }
        write_json(path.with_suffix(".json"), sidecar)
        thumbnail = self.task.to / STATE / "thumbnails" / f"{self.study.replace('/', '-')}-{len(self.records):03d}.png"
        _write_thumbnail(values, thumbnail)
        self.records.append(
            SeriesRecord(
                self.study,
                name,
                self.split,
                str(file),
                "",
                notes,
                str(thumbnail.relative_to(self.task.to)),
                self.patient,
            )
        )


def _described(geometry: Geometry) -> dict[str, Any]:
    """The way from the straight, turned source to the volume: position · scale − offset, between voxel edges."""
    return {name: list(value) for name, value in asdict(geometry).items()}


def _write_thumbnail(values: Tensor, path: Path) -> None:
    middle = values[len(values) // 2].float()
    low, high = (0.0, 255.0) if values.dtype == torch.uint8 else (-1150.0, 350.0)
    grey = ((middle - low) / (high - low)).clamp(0, 1).mul(255).to(torch.uint8).numpy()
    image = Image.fromarray(grey)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        image.save(part, format="PNG")


# --- what is kept of an entry ----------------------------------------------------------------------------------------


def record_path(task: Task) -> Path:
    """Where it is written what became of an entry: named by everything that the result depends on."""
    choice = json.dumps(asdict(task.choice), sort_keys=True)
    identity = f"{VERSION}\0{task.recipe}\0{choice}\0{task.valid_share}\0{task.entry}"
    return task.to / STATE / "done" / f"{Pseudonyms(task.key).name('entry', identity)}.json"


def write_record(task: Task, records: Sequence[SeriesRecord]) -> None:
    """Last of all, so that an entry whose process was killed is prepared again."""
    path = record_path(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"version": VERSION, "series": [asdict(record) for record in records]})


def read_records(to: Path) -> list[SeriesRecord]:
    """What became of all entries so far, in the order of studies."""
    records = []
    for path in sorted((to / STATE / "done").glob("e*.json")):
        content = read_json(path, holding="what became of an entry")
        records += [SeriesRecord(**one) for one in content["series"]]
    return sorted(records, key=lambda record: (record.study, record.series, record.reason))


# --- results over all entries ----------------------------------------------------------------------------------------


def write_results(
    to: Path,
    recipe: Recipe,
    records: Sequence[SeriesRecord],
    *,
    items: Mapping[str, list[str]] | None = None,
    layout: str | None = None,
) -> list[Path]:
    """Index files, table and contact sheet; the items of a report that stands in an index already are kept.

    Args:
        to: folder of the results.
        recipe: what they are for.
        records: of all entries.
        items: study → items.
        layout: of a public data set; some have no index.
    """
    written = []
    if layout is None or PUBLIC_LAYOUTS[layout].has_index:
        written = _write_indices(to, recipe, [record for record in records if record.file], items or {})
    table = to / "series.csv"
    with written_whole(table, text=True) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["study", "series", "split", "file", "left_out", "notes"])
        for one in records:
            rows.writerow([one.study, one.series, one.split, one.file, one.reason, " | ".join(one.notes)])
    written.append(table)
    sheet = _contact_sheet(to, [record for record in records if record.thumbnail])
    return [*written, *([sheet] if sheet is not None else [])]


CHEST_INDICES = {"train": "itemized.json", "valid": "valid_items.json"}
"""Split → index of chest CT scans."""


def _write_indices(
    to: Path, recipe: Recipe, kept: Sequence[SeriesRecord], items: Mapping[str, list[str]]
) -> list[Path]:
    written = []
    for split in ("train", "valid", "test"):
        records = [one for one in kept if one.split == split]
        if split == "test" and not records:
            continue
        path = to / (CHEST_INDICES[split] if recipe == "chest-ct" else f"{split}.json")
        known = _reports(path)
        studies: dict[str, Any] = {}
        for one in records:
            file = Path(one.file)
            study = file.parent.name if recipe == "chest-ct" else one.study
            report = known.get(study) or items.get(one.study, [])
            if recipe == "chest-ct":
                entry = studies.setdefault(study, {"recons": [], "report": report})
                entry["recons"].append(f"{file.stem}.nii.gz")
            else:
                entry = studies.setdefault(study, {"series": {}, "report": report, "patient": one.patient})
                entry["series"][file.parent.name] = {}
        write_json(path, studies)
        written.append(path)
    return written


def _reports(path: Path) -> dict[str, Any]:
    """Reports that somebody has put into an index already."""
    if not path.is_file():
        return {}
    entries = read_json(path, holding="studies")
    return {name: entry["report"] for name, entry in entries.items() if isinstance(entry, dict) and entry.get("report")}


def _contact_sheet(to: Path, records: Sequence[SeriesRecord]) -> Path | None:
    """The middle slices of the series beside each other, as one picture."""
    shown = records[:_SHEET_MOST]
    if not shown:
        return None
    cell_w, cell_h = _THUMBNAIL_PX + 12, _THUMBNAIL_PX + 34
    rows = -(-len(shown) // _SHEET_COLUMNS)
    sheet = Image.new("RGB", (cell_w * min(_SHEET_COLUMNS, len(shown)), cell_h * rows), "white")
    pen = ImageDraw.Draw(sheet)
    for number, one in enumerate(shown):
        left, top = number % _SHEET_COLUMNS * cell_w + 6, number // _SHEET_COLUMNS * cell_h + 4
        sheet.paste(decode_photograph(to / one.thumbnail, source=one.thumbnail), (left, top))
        pen.text((left, top + _THUMBNAIL_PX + 1), one.study, fill="black")
        pen.text((left, top + _THUMBNAIL_PX + 13), one.series[:20], fill=(90, 90, 90))
    path = to / "contact_sheet.png"
    with replacing(path) as part:
        sheet.save(part, format="PNG")
    return path


def summary_table(records: Sequence[SeriesRecord]) -> Table:
    """How many series were kept, and why the others were left out."""
    kept = [record for record in records if record.file]
    table = Table(title="Series", title_justify="left")
    table.add_column("what became of them")
    table.add_column("series", justify="right")
    splits = Counter(record.split for record in kept)
    for split in [split for split in ("train", "valid", "test") if split != "test" or splits[split]]:
        studies = len({record.study for record in kept if record.split == split})
        table.add_row(literal(f"kept, {split}, of {studies:,} studies"), f"{splits[split]:,}")
    reasons = Counter(_kind_of(record.reason) for record in records if record.reason)
    for reason, count in reasons.most_common(_MOST_SHOWN):
        table.add_row(literal(f"left out: {reason}"), f"{count:,}")
    return table


def _kind_of(reason: str) -> str:
    """A reason without the study and the numbers it is about."""
    return re.sub(r"\d[\d.,]*", "N", re.sub(r"^s[0-9a-f]{12}\S*: ", "", reason))[:90]


# --- entry -----------------------------------------------------------------------------------------------------------


def open_tasks(options: PrepareStudiesOptions) -> list[Task]:
    """All that there is to do, in all shards.

    Raises:
        MissingFileError, UserError: a source, key or folder that cannot be used.
    """
    to = check_writable(options.to.expanduser(), "--to")
    assert options.recipe is not None  # checked when they were made
    if options.layout is None:
        key, entries = open_key(options.key_file).key, find_entries(options.source)
    else:
        source = options.source.expanduser()
        if not source.is_dir():
            raise MissingFileError(f"{source}: no such folder; expected {options.layout} as it is downloaded")
        key, entries = _PUBLIC_KEY, PUBLIC_LAYOUTS[options.layout].entries(source, to / STATE)
    choice = SeriesChoice(options.series, options.exclude_series, fill_nan=options.fill_nan)
    return [Task(entry, to, options.recipe, key, options.valid_share, choice) for entry in entries]


def prepare(options: PrepareStudiesOptions, all_tasks: Sequence[Task] | None = None) -> list[SeriesRecord]:
    """Prepare this shard of the source; what became of all entries that are done.

    Args:
        options: see there.
        all_tasks: of all shards, where they are at hand.

    Raises:
        MissingFileError, UserError: a source, key or folder that cannot be used.
    """
    all_tasks = open_tasks(options) if all_tasks is None else all_tasks
    to = options.to.expanduser()
    first, parts = map(int, options.shard.split("/"))
    tasks = all_tasks[first - 1 :: parts]
    waiting = [task for task in tasks if not record_path(task).is_file()]
    workers = loader_processes(options.workers)
    logger.info(
        "%s entries of the source, %s in this shard, %s done before; %d at once",
        f"{len(all_tasks):,}", f"{len(tasks):,}", f"{len(tasks) - len(waiting):,}", workers,
    )  # fmt: skip
    seconds = 0.0
    with progress_bar("Preparing", enabled=True) as advance:
        jobs = [(task,) for task in waiting]
        limit_s = 60 * options.time_limit
        if options.engine == "ray":
            address = options.ray_address
            ends = run_jobs_on_ray(prepare_entry, jobs, time_limit_s=limit_s, preload=(__name__,), address=address)
        else:
            ends = run_jobs(prepare_entry, jobs, workers=workers, time_limit_s=limit_s, preload=(__name__,))
        for done, end in enumerate(ends, start=1):
            seconds += end.seconds
            task = waiting[end.job]
            if end.failure or not record_path(task).is_file():
                write_record(task, [_nothing(task, Pseudonyms(task.key), end.failure or "its process wrote nothing")])
            advance(done, len(waiting))
    if waiting:
        logger.info("%.1f s of processes an entry", seconds / len(waiting))
    if options.names_table is not None:
        _write_names(options.names_table.expanduser(), tasks)
    return read_records(to)


def _write_names(path: Path, tasks: Sequence[Task]) -> None:
    """Which entry became which studies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, text=True) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "study"])
        for task in tasks:
            content = read_json(record_path(task), holding="what became of an entry")
            for study in sorted({one["study"] for one in content["series"]}):
                rows.writerow([str(task.entry.path), study])
    path.chmod(0o600)


def join_items(options: PrepareStudiesOptions, tasks: Sequence[Task]) -> dict[str, list[str]]:
    """Study → items of --items, which names studies as the source or the data set does.

    Raises:
        MissingFileError, UserError: a file that is none.
    """
    if options.items is None:
        return {}
    layout = PUBLIC_LAYOUTS.get(options.layout or "")
    given: dict[str, list[str]] = {}
    for report in read_reports(options.items).reports:
        try:
            key = layout.study_of(report.key) if layout else report.key
        except ValueError:
            continue
        given.setdefault(key, [item for text in report.texts for item in numbered_items(text) or [text]])
    joined: dict[str, list[str]] = {}
    several = 0
    for task in tasks:
        path = task.entry.path
        names = [task.entry.study] if layout else [path.name, path.name.split(".")[0]]
        items = next((given[name] for name in names if name in given), None)
        if items is None or not record_path(task).is_file():
            continue
        studies = {one["study"] for one in read_json(record_path(task), holding="what became of it")["series"]}
        several += len(studies) > 1
        if len(studies) == 1:
            joined[studies.pop()] = items
    logger.info("%s: items of %s studies, %s of them here", options.items, f"{len(given):,}", f"{len(joined):,}")
    if several:
        logger.warning("%d entries hold several studies, so that their items cannot be told apart", several)
    return joined


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `itemizedclip prepare studies`."""
    options = read_flags(PrepareStudiesOptions, argv, prog=PROG, description=DESCRIPTION)
    with reported_errors(PROG), logging_to_console(0):
        tasks = open_tasks(options)
        records = prepare(options, tasks)
        to = options.to.expanduser()
        assert options.recipe is not None  # checked when they were made
        items = join_items(options, tasks)
        written = write_results(to, options.recipe, records, items=items, layout=options.layout)
        console: Console = standard_error()
        console.print(summary_table(records))
        console.print(literal(f"written to {', '.join(map(str, written))}"), soft_wrap=True)
        if not any(record.file for record in records):
            raise UserError(f"{options.source}: no series could be prepared; series.csv says why")
        if options.layout is not None:
            console.print(literal(f"next: {PUBLIC_LAYOUTS[options.layout].then.format(to=to)}"), soft_wrap=True)
        elif not any(record.file and record.split == "valid" for record in records):
            logger.warning("no patient was drawn for validation; give a larger --valid-share, or splits in a CSV")


if __name__ == "__main__":
    main()
