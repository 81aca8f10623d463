"""Brain MRI and head CT studies for training and validation.

Files: ROOT/STUDY/SERIES/img.pt or ROOT/<split>/STUDY/SERIES/img.pt, where <split> is the stem of the JSON file, and
train.json, valid.json (or val.json):

    {"STUDY": {"series": {"AX_FLAIR": {}, "AX_T2": {}}, "report": ["item", "item"]}}

A report may also be one numbered text ("1. …", a line each). img.pt holds 48×224×224 or 48×256×256 grey values.

Axes: S series, K item slots, D H W voxels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from itemizedclip.data.batch import BadSampleError
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.remote import Address, Place, here, names_in, place
from itemizedclip_radiology.data.reports import StudyIndex, check_names, report_items
from itemizedclip_radiology.data.studies import LoadedStudy, Preparation, ScanReader, SeriesFile, load_study
from itemizedclip_radiology.data.study_dataset import StudyDataset
from itemizedclip_radiology.data.unprepared import hint_for_folder
from itemizedclip_radiology.data.volumes import BRAIN_SIZE, Size, crop_series, is_volume_file, read_volume

NUM_SERIES = 10
"""Series slots of a study in every published recipe."""

VOLUME_FILE = "img.pt"

_SPLIT_ALIASES = {"valid": "val", "val": "valid"}
_STUDIES_LOOKED_FOR = 50


@dataclass(frozen=True)
class StudyFiles:
    """Where training and validation studies are.

    Attributes:
        data_root: folder of studies, or of split folders; also at an address.
        train_json: index of the training studies.
        valid_json: index of the validation studies.
    """

    data_root: Place
    train_json: Path
    valid_json: Path


def find_study_files(
    data_root: str | Path | None = None, json_root: str | Path | None = None, *, is_ct: bool = False
) -> StudyFiles:
    """The files of a training run from two folders, by default those of DATA_ROOT and JSON_ROOT in the environment.

    Either may be at an address; the index files are then copied. Without JSON_ROOT the index files are looked for in
    the data folder. The validation index is valid.json or val.json, whichever exists; of both, val.json with `is_ct`,
    as the published code takes it.

    Raises:
        ValueError: no data folder given, or both valid.json and val.json without `is_ct`.
        FileNotFoundError: a folder or an index file is missing.
    """
    data = data_root or os.environ.get("DATA_ROOT")
    if not data:
        raise UserError("no study folder given: set --data-root or DATA_ROOT to the folder of STUDY/SERIES/img.pt")
    data_folder = place(data)
    json_folder = place(json_root or os.environ.get("JSON_ROOT") or data_folder)
    for folder, flag in ((data_folder, "--data-root, DATA_ROOT"), (json_folder, "--json-root, JSON_ROOT")):
        # A web server need not list folders.
        if not isinstance(folder, Address) and not folder.is_dir():
            raise MissingFileError(f"{folder}: no such folder ({flag})")
    train_json = json_folder / "train.json"
    valid_jsons = [path for path in (json_folder / "valid.json", json_folder / "val.json") if path.is_file()]
    if not train_json.is_file():
        hint = hint_for_folder(data_folder, "ct" if is_ct else "mri")
        raise MissingFileError(
            f"{train_json}: no such file; expected the index of the training studies (--json-root){hint}"
        )
    if not valid_jsons:
        raise MissingFileError(f"{json_folder}: neither valid.json nor val.json; expected the validation studies")
    if len(valid_jsons) == 2 and not is_ct:
        raise UserError(
            f"{json_folder}: holds valid.json and val.json; remove or rename the one not meant, or take val.json with "
            "--is-ct"
        )
    return StudyFiles(data_folder, here(train_json), here(valid_jsons[-1]))


def find_study_folder(data_root: Place, split: str, studies: Sequence[str]) -> Place:
    """The folder that holds a split's studies: ROOT/<split> (valid may be called val and the reverse), else ROOT.

    Args:
        data_root: ROOT.
        split: stem of the JSON file.
        studies: some study ids to look for, or files below them.

    Raises:
        FileNotFoundError: none of these studies is in any of the folders.
    """
    names = [split, *([_SPLIT_ALIASES[split]] if split in _SPLIT_ALIASES else [])]
    candidates = [*(data_root / name for name in names), data_root]
    for folder in candidates:
        if any((folder / study).exists() for study in studies):
            return folder
    raise MissingFileError(
        f"none of {len(studies)} studies of {split}.json ({studies[0]}, …) is a folder in "
        f"{' or '.join(map(str, candidates))}; give the folder that holds STUDY/SERIES/{VOLUME_FILE}"
        f"{hint_for_folder(data_root, 'mri')}"
    )


def repeat_to_exactly(num_slots: int, num_series: int) -> list[int]:
    """Series of each slot in training: all in turn, again from the first when there are fewer than slots."""
    return [slot % num_series for slot in range(num_slots)]


def repeat_to_at_least(num_slots: int, num_series: int) -> list[int]:
    """Series of each slot in evaluation: the whole list as often as needed to fill the slots, never cut."""
    return list(range(num_series)) * -(-num_slots // num_series)


class BrainStudies(StudyDataset):
    """Whole studies: all series stacked, with the report's items.

    Training: series in random order, `num_series` slots (repeated when there are fewer), one random in-plane crop per
    study for files with a margin. Evaluation: series in the file's order, all of them, repeated to at least
    `num_series`, centre crop; studies then differ in S when they have more, so load them with batch size 1.

    Images are float32, 96 MB for 10 series of 48×224×224. On one core a study is read, cropped and normalised in 60 ms
    (uint8 files; float32 ones at 256×256: 86 ms) and joined to its batch in 57 ms, most of it for fresh memory. The 32
    studies of a published step take 4 workers 0.9 s, while the model computes 0.5 PFLOP (16 TFLOP per study with
    checkpointing; 1.7 s at 300 TFLOP/s), so no step should wait for data. Bytes until the device would take a third of
    that time and a quarter of the memory, but everything that reads a batch would have to know its grey range, and
    files of float values would lose digits.
    """

    def __init__(
        self,
        *,
        data_root: str | Place,
        json_path: str | Path,
        is_train: bool,
        num_items: int,
        seed: int,
        num_series: int = NUM_SERIES,
        volume_size: Size = BRAIN_SIZE,
        prepare: Preparation = "crop",
        reports: Mapping[str, Sequence[str]] | None = None,
        on_bad_sample: Literal["skip", "stop"] = "stop",
    ) -> None:
        """Open a split; reads the JSON file and looks for a few studies, no volume.

        Args:
            data_root: folder of studies, or of split folders named like the JSON file.
            json_path: index of the studies.
            is_train: see above.
            num_items: K, items drawn per training study; not used in evaluation.
            seed: seed of all random choices.
            num_series: series slots.
            volume_size: voxels (D, H, W) of every series, multiples of the model's patch.
            prepare: "resample" for files of another size than that.
            reports: study → items, used instead of the report in the JSON (see `read_report_table`).
            on_bad_sample: what to do about JSON entries that cannot be used: "stop" raises, "skip" leaves them out.

        Raises:
            MissingFileError: no JSON file, or none of a few of its studies below the data folder.
            UserError: num_items or num_series below 1, no usable study.
            BadSampleError: a JSON entry that cannot be used, with on_bad_sample="stop"; names study and field.
        """
        if num_series < 1:
            raise UserError(f"num_series must be at least 1, got {num_series}")
        self.num_series = num_series
        self.volume_size = volume_size
        self.prepare = prepare
        self.read_scan: ScanReader | None = None
        check = _EntryCheck(reports or {})
        index = StudyIndex(json_path, check, on_bad_sample=on_bad_sample)
        super().__init__(index, files_per_study=check.series_counts, is_train=is_train, num_items=num_items, seed=seed)
        spread = range(0, len(index), -(-len(index) // _STUDIES_LOOKED_FOR))
        root = place(data_root)
        looked_for = [index[row]["study"] for row in spread]
        if isinstance(root, Address):  # files, because a web server need not list folders
            looked_for = [f"{study}/{index[row]['series'][0]}/{VOLUME_FILE}" for study, row in zip(looked_for, spread)]
        self.study_folder = find_study_folder(root, index.path.stem, looked_for)

    @property
    def folder(self) -> Place:
        """The folder of the studies."""
        return self.study_folder

    def files(self, row: int) -> list[SeriesFile]:
        """The series of a study, in the JSON file's order."""
        entry = self.index[row]
        folder = self.study_folder / entry["study"]
        return [SeriesFile(name, folder / name / VOLUME_FILE) for name in entry["series"]]

    def load(self, row: int, generator: np.random.Generator | None) -> LoadedStudy:
        """See `StudyDataset`."""
        study, files = self.index[row]["study"], self.files(row)
        if generator is None:
            loaded = load_study(
                study,
                files,
                size=self.volume_size,
                arrange=lambda num: repeat_to_at_least(self.num_series, num),
                prepare=self.prepare,
                read_scan=self.read_scan,
            )
        else:
            crop_at = (float(generator.random()), float(generator.random()))
            loaded = load_study(
                study,
                [files[i] for i in generator.permutation(len(files))],
                size=self.volume_size,
                arrange=lambda num: repeat_to_exactly(self.num_series, num),
                max_series=self.num_series,
                crop_at=crop_at,
                prepare=self.prepare,
                read_scan=self.read_scan,
            )
        for file, message in loaded.skipped:
            self.skipped.add(row, files.index(file), message)
        return loaded

    def why_unusable(self, row: int) -> str | None:
        """See `StudyDataset`."""
        messages = []
        for file in self.files(row):
            if self.read_scan is not None and not is_volume_file(file.path) and file.path.exists():
                return None
            try:
                volume = read_volume(file.path, memory_map=True)
                if self.prepare == "crop":
                    crop_series(volume, self.volume_size, source=file.path)
            except BadSampleError as error:
                messages.append(f"study {self.index[row]['study']}, series {file.name}: {error}")
                continue
            return None
        more = f" (and {len(messages) - 1} more series)" if len(messages) > 1 else ""
        return f"{messages[0]}{more}"

    def without_folder(self) -> list[str]:
        """See `StudyDataset`."""
        on_disk = names_in(self.study_folder)
        if not on_disk and isinstance(self.study_folder, Address):
            return []  # a web server that lists no folders: what is missing shows when it is read
        return [study for study in self.studies if study not in on_disk]

    def describe_first_study(self) -> str:
        """One sentence for the log: where the studies are and how the first one's values and sizes were taken.

        Raises:
            BadSampleError: the first study cannot be used.
        """
        study = self.index[0]["study"]
        loaded = load_study(study, self.files(0), size=self.volume_size, prepare=self.prepare)
        ranges = " and ".join(sorted(set(loaded.grey_ranges)))
        return (
            f"{len(self):,} studies of {self.index.path} in {self.study_folder}; the first, {study}, has "
            f"{len(loaded.names)} series ({', '.join(loaded.names)}) with grey values taken as {ranges}"
        )


@dataclass(frozen=True)
class _EntryCheck:
    """Checks one entry of the index; `reports` replace its report.

    Attributes:
        reports: study → items.
        series_counts: number of series of each study that passed, in order.
    """

    reports: Mapping[str, Sequence[str]]
    series_counts: list[int] = field(default_factory=list)

    def __call__(self, study: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        check_names([study], "study")
        series = entry.get("series")
        if not isinstance(series, dict) or not series:
            found = "nothing" if series is None else repr(series)[:60]
            raise UserError(f"field 'series': expected an object with at least one series name, found {found}")
        if study in self.reports:
            items = list(self.reports[study])
        elif "report" not in entry:
            raise UserError("field 'report' is missing; expected a list of texts")
        else:
            try:
                items = report_items(entry["report"])
            except ValueError as error:
                raise UserError(f"field 'report': {error}") from None
        names = check_names(list(series), "series")
        self.series_counts.append(len(names))
        return {"series": names, "report": items}
