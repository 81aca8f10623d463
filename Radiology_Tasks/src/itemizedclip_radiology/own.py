"""Own studies in one file (`itemizedclip.data.jsonl`), for `itemizedclip train own --like mri` and `evaluate own`.

    {"series": {"AX_FLAIR": "s1/flair.pt", "AX_T2": "s1/t2.pt"}, "items": ["Old infarct."], "split": "train"}

A volume file is what the recipe named after --like reads: grey values of the model's size for mri and head-ct, HU at
3×1×1 mm for chest-ct, where the series are reconstructions of one scan, of which one is drawn. A NIfTI file, or a file
or folder of a DICOM series, is read as it came from the scanner, anew each time: `itemizedclip prepare studies` makes
volume files, which are read many times faster. A head CT becomes three series by window.

Axes: S series, D H W voxels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.items import normalise_item
from itemizedclip.data.jsonl import OwnFile
from itemizedclip.models.factory import create_model, family_of
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.flags import at_least
from itemizedclip.runtime.processes import on_main
from itemizedclip.runtime.remote import Place
from itemizedclip.training.own import OwnData, checkpoint_config
from itemizedclip.training.recipes import Opening, TrainingData
from itemizedclip_radiology.data.brain import NUM_SERIES, BrainStudies
from itemizedclip_radiology.data.chest import ChestInput, ChestSettings, load_chest_volume
from itemizedclip_radiology.data.reports import StudyIndex
from itemizedclip_radiology.data.studies import LoadedStudy, Preparation, ScanReader, SeriesFile
from itemizedclip_radiology.data.study_dataset import StudyDataset, UsableStudies
from itemizedclip_radiology.data.volumes import BRAIN_SIZE, Size, is_volume_file, read_volume, volume_file
from itemizedclip_radiology.models.initial import RadiologyRun, trunk_config, volume_transform
from itemizedclip_radiology.recipes import ctrate, ctrate_debug, mri, mri_debug
from itemizedclip_radiology.viewing.inputs import body_of, chest_scan_hu, scan_series

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from itemizedclip_radiology.models.radiology_model import RadiologyItemizedCLIP


def _index(file: OwnFile, *, is_train: bool, lower_case: bool) -> StudyIndex:
    """The entries as an index of studies: "series" name → path, "report" the items, "normal" as the file says."""
    entries: dict[str, dict[str, Any]] = {}
    for entry in file.entries:
        if not entry.series:
            raise UserError(
                f"{file.path}: {entry.name} is an image, and this model reads studies; expected 'series' "
                '{"NAME": "PATH of its volume"}, or leave out --like'
            )
        if is_train and not entry.items:
            raise UserError(f"{file.path}: {entry.name} has no item to train on; expected at least one")
        if entry.name in entries:
            raise UserError(f"{file.path}: {entry.name} stands twice; give each entry an 'id' of its own")
        items = [normalise_item(item) if lower_case else item for item in entry.items]
        entries[entry.name] = {"series": dict(entry.series), "report": items, "normal": entry.normal}
    return StudyIndex(file.path, lambda study, entry: dict(entry), on_bad_sample="stop", entries=entries)


def _say_scans(file: OwnFile) -> None:
    """What reading scans costs, where there are any."""
    paths = [path for entry in file.entries for path in entry.series.values()]
    scans = [path for path in paths if not is_volume_file(Path(path))]
    if scans:
        logger.warning(
            "%s: %d of %d volumes are scans, such as %s, read and resampled anew each time; `itemizedclip prepare "
            "studies` makes files of them that are read many times faster", file.path, len(scans), len(paths), scans[0],
        )  # fmt: skip


def _without_files(index: StudyIndex, root: Place) -> list[str]:
    """Studies none of whose volumes is there."""
    rows = (index[row] for row in range(len(index)))
    return [row["study"] for row in rows if not any(_is_there(root / path) for path in row["series"].values())]


def _is_there(path: Place) -> bool:
    """A volume, packed or not, or the folder of a scan."""
    return path.exists() or volume_file(path).is_file()


class OwnBrainStudies(BrainStudies):
    """Brain MRI or head CT studies whose volumes lie where a file says."""

    def __init__(
        self,
        file: OwnFile,
        *,
        is_train: bool,
        num_items: int,
        seed: int = 0,
        num_series: int = NUM_SERIES,
        volume_size: Size = BRAIN_SIZE,
    ) -> None:
        self.num_series = num_series
        self.volume_size = volume_size
        self.prepare: Preparation = "crop"
        self.read_scan: ScanReader | None = scan_series
        index = _index(file, is_train=is_train, lower_case=False)
        counts = [len(entry.series) for entry in file.entries]
        StudyDataset.__init__(self, index, files_per_study=counts, is_train=is_train, num_items=num_items, seed=seed)
        self.study_folder = file.root

    def files(self, row: int) -> list[SeriesFile]:
        """The series of a study, in the file's order."""
        return [SeriesFile(name, self.study_folder / path) for name, path in self.index[row]["series"].items()]

    def without_folder(self) -> list[str]:
        """Studies none of whose volumes is there."""
        return _without_files(self.index, self.study_folder)


class OwnChestScans(StudyDataset):
    """Chest CT scans whose reconstructions lie where a file says; items are lower-cased."""

    what_files = "reconstructions"
    chest_ct = True

    def __init__(
        self, file: OwnFile, *, is_train: bool, num_items: int, seed: int = 0, options: ChestInput | None = None
    ) -> None:
        self.options = options or ChestInput()
        self.root = file.root
        index = _index(file, is_train=is_train, lower_case=True)
        counts = [len(entry.series) for entry in file.entries]
        super().__init__(index, files_per_study=counts, is_train=is_train, num_items=num_items, seed=seed)

    @property
    def folder(self) -> Path:
        """The folder that paths are relative to."""
        return self.root

    def load(self, row: int, generator: np.random.Generator | None) -> LoadedStudy:
        """See `StudyDataset`."""
        series = list(self.index[row]["series"].items())
        order = range(len(series)) if generator is None else generator.permutation(len(series)).tolist()
        messages = []
        for number in order:
            name, path = series[number]
            try:
                file = self.root / path
                hu = None if is_volume_file(file) else chest_scan_hu(file)
                volume = load_chest_volume(file, self.options, generator=generator, hu=hu)
            except BadSampleError as error:
                messages.append(f"{self.index[row]['study']}: {error}")
                self.skipped.add(row, number, messages[-1])
                continue
            return volume.as_study(name, file)
        more = f" (and {len(messages) - 1} more reconstructions)" if len(messages) > 1 else ""
        raise BadSampleError(f"{messages[0]}{more}: no reconstruction of this scan can be used")

    def why_unusable(self, row: int) -> str | None:
        """See `StudyDataset`."""
        messages = []
        for path in self.index[row]["series"].values():
            try:
                file = self.root / path
                if not is_volume_file(file) and file.exists():
                    return None
                read_volume(file, memory_map=True)
            except BadSampleError as error:
                messages.append(f"{self.index[row]['study']}: {error}")
                continue
            return None
        return messages[0]

    def without_folder(self) -> list[str]:
        """Scans none of whose reconstructions is there."""
        return _without_files(self.index, self.root)


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnStudyData(OwnData):
    """Your studies and their items."""

    volume_size: Size | None = None
    """Voxels (slices rows columns) of a series, multiples of the model's patch; None: the model's own."""

    num_series: int = NUM_SERIES
    """Series slots of a brain study in training, filled at random, with repeats when it has fewer."""

    chest: ChestSettings = field(default_factory=ChestSettings)

    def __post_init__(self) -> None:
        at_least(self, num_series=1)

    def open(self, opening: Opening) -> TrainingData:
        """See `itemizedclip.training.recipes.DataGroup`; validation retrieves among the studies of split val.

        Raises:
            UserError: no --data, or files that cannot be used.
        """
        loading = opening.options.loading
        vision = trunk_config(opening.model)
        size: Size = vision.volume_size
        is_chest = body_of(opening.model.config) == "chest"
        chest = self.chest.chest_input(size)
        on_main(lambda: self.check(opening.options))
        train, val = self.files(opening.options)

        def studies(file: OwnFile, *, is_train: bool) -> StudyDataset:
            common: dict[str, Any] = {
                "is_train": is_train, "num_items": loading.num_sampled_captions, "seed": opening.options.run.seed,
            }  # fmt: skip
            if is_chest:
                return OwnChestScans(file, options=chest, **common)
            return OwnBrainStudies(file, num_series=self.num_series, volume_size=size, **common)

        on_main(lambda: _say_scans(train))
        dataset = studies(train, is_train=True)
        evaluators = []
        if val is not None:
            valid = studies(val, is_train=False)
            rows = on_main(lambda: valid.usable_rows(loading.on_bad_sample))
            # Brain studies differ in their number of series.
            evaluators.append(opening.retrieval(UsableStudies(valid, rows), "val", batch_size=None if is_chest else 1))
        more: dict[str, Any] = {"num_series": self.num_series}
        if is_chest:
            more = {"input_info": [f"{chest.window.hu_min:g}", f"{chest.window.hu_max:g}", chest.fit]}
        return TrainingData(
            dataset,
            evaluators,
            train.fingerprint,
            transform=volume_transform(size, **more),
            at_end=lambda: dataset.report_skipped(f"{dataset.what_files} of the training studies"),
        )


@dataclass(frozen=True)
class OwnStudyRun(RadiologyRun):
    """A run on your own studies."""

    data: OwnStudyData = field(default_factory=OwnStudyData)

    def create_model(self) -> RadiologyItemizedCLIP:
        """See `RunOptions`; with an empty --model the one of --pretrained."""
        from itemizedclip_radiology.models.radiology_model import RadiologyItemizedCLIP

        config = on_main(lambda: checkpoint_config(self.model))
        if config is None:
            return super().create_model()
        if family_of(config).input_kind != "studies":
            raise UserError(f"{self.model.pretrained}: its model reads photographs; leave out --like {self.data.like}")
        if self.data.volume_size is not None:
            config["vision_cfg"] = {**config["vision_cfg"], "volume_size": list(self.data.volume_size)}
        model = create_model(config)
        assert isinstance(model, RadiologyItemizedCLIP)
        return model


def _own(recipe: RadiologyRun, **data: Any) -> OwnStudyRun:
    return OwnStudyRun(
        model=recipe.model,
        objective=replace(recipe.objective, mask_duplicates=True),
        optimizer=recipe.optimizer,
        loading=recipe.loading,
        initial=recipe.initial,
        data=OwnStudyData(**data),
    )


def own_mri() -> OwnStudyRun:
    """Brain MRI studies: as the recipe mri."""
    return _own(mri())


def own_mri_debug() -> OwnStudyRun:
    """Debug size of mri, seconds on a CPU."""
    return _own(mri_debug(), num_series=6)


def own_head_ct() -> OwnStudyRun:
    """Head CT studies, their windows as series: as the recipe ct."""
    return _own(mri())


def own_chest_ct() -> OwnStudyRun:
    """Chest CT scans, their reconstructions as series: as the recipe ctrate."""
    return _own(ctrate())


def own_chest_ct_debug() -> OwnStudyRun:
    """Debug size of chest-ct, seconds on a CPU."""
    return _own(ctrate_debug())


# --- evaluation ------------------------------------------------------------------------------------------------------


def open_own(file: OwnFile, config: Mapping[str, Any], transform: Mapping[str, Any]) -> StudyDataset:
    """Entries as evaluators read them (entry point `itemizedclip.own`)."""
    size: Size = tuple(config["vision_cfg"]["volume_size"])
    if body_of(config) == "chest":
        chest = ChestSettings().chest_input(size, transform)
        return OwnChestScans(file, is_train=False, num_items=1, options=chest)
    slots = int(transform.get("num_series") or 1)
    return OwnBrainStudies(file, is_train=False, num_items=1, num_series=slots, volume_size=size)
