"""Findings in words with 3-D masks: ReXGroundingCT (chest CT) and BraTS-style tumour masks (brain MRI).

    itemizedclip evaluate rexgroundingct --data-dir ReXGroundingCT --volumes CT-RATE --checkpoint epoch_80.pt
    itemizedclip evaluate brats --data-dir BraTS2021 --checkpoint epoch_24.pt

ReXGroundingCT: DIR holds dataset.json (or MICCAI_challenge_dataset.json) and segmentations/NAME; a mask file is NIfTI
(F, H, W, D), findings first, or (H, W, D) where there is one, on the grid of CT-RATE's volume NAME. Values are numbers
of instances. Volumes are CT-RATE's own .nii.gz, in its folders or all in one. Predictions are written as the
leaderboard takes them: NAME in one folder, uint8 (F, H, W, D) with the volume's affine.

BraTS: DIR holds a folder per case with CASE_flair.nii.gz, CASE_t1, CASE_t1ce, CASE_t2 and CASE_seg (2018 to 2021), or
CASE-t2f, CASE-t1n, CASE-t1c, CASE-t2w and CASE-seg (from 2023), all on one grid. Labels 1 (necrosis), 2 (oedema) and 3
or 4 (enhancing) make the whole tumour, its core (without oedema), and what enhances.

Axes: F findings, H W D voxels of the files, S series.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import nibabel
import numpy as np
import tyro

from itemizedclip.data.batch import BadSampleError, ItemSample
from itemizedclip.data.items import normalise_item
from itemizedclip.evaluation.benchmark import Benchmark, Subject
from itemizedclip.evaluation.grounding import GroundingEvaluator, Mask, Truth
from itemizedclip.evaluation.grounding_options import GroundingOptions
from itemizedclip.evaluation.lattice import Lattice
from itemizedclip.models.factory import LoadedModel
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.files import check_writable, read_json, replacing
from itemizedclip.runtime.processes import on_main
from itemizedclip.viewer.inputs import FileGrid, InputView, ModelInput, SeriesChoice
from itemizedclip_radiology.data.chest import ChestSettings
from itemizedclip_radiology.data.ct_rate_tree import parse_volume_name
from itemizedclip_radiology.data.nifti import read_label_volumes
from itemizedclip_radiology.viewing.inputs import body_of, open_input

REXGROUNDING_FILES = ("dataset.json", "MICCAI_challenge_dataset.json")

BRATS_FILES = {"flair": "flair", "t1": "t1", "t1ce": "t1c", "t2": "t2", "t2f": "flair", "t1n": "t1", "t1c": "t1c",
               "t2w": "t2"}  # fmt: skip
"""Ending of a file's name → series."""

Reader = Literal["chest", "brain"]


@dataclass(frozen=True)
class GroundedScan:
    """One case.

    Attributes:
        name: of the case, and of its prediction's file.
        source: scan file, or folder of the series.
        items: F texts.
        masks: file of the masks; None where nobody has them.
        patient: whose it is.
    """

    name: str
    source: Path
    items: tuple[str, ...]
    masks: Path | None
    patient: str


@dataclass
class GroundedScans:
    """Cases as the evaluator reads them (see `GroundingEvaluator`).

    Attributes:
        scans: N cases.
        loaded: the model.
        chest: how chest volumes are read.
        choice: which series of a case are read.
        regions: labels of a mask file that make each item, for files with one volume of labels; None: a volume each.
        lower_case: items as training of chest CT writes them.
    """

    scans: Sequence[GroundedScan]
    loaded: LoadedModel
    chest: ChestSettings = field(default_factory=ChestSettings)
    choice: SeriesChoice | None = None
    regions: Sequence[tuple[int, ...]] | None = None
    lower_case: bool = False
    _views: dict[int, InputView] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, row: int) -> ItemSample:
        """Raises BadSampleError when it cannot be read."""
        opened = self._open(row)
        return ItemSample(self.scans[row].name, opened.image, self.items(row), series_names=opened.series_names)

    def items(self, row: int) -> list[str]:
        """Its findings."""
        return [normalise_item(item) if self.lower_case else item for item in self.scans[row].items]

    def sample_id(self, row: int) -> str:
        """The name of a case."""
        return self.scans[row].name

    def truth(self, row: int, grid: tuple[int, ...]) -> Truth:
        """Masks in the view's order of axes, and how the tokens lie over them.

        Raises:
            BadSampleError: masks that cannot be read, or lie on another grid.
        """
        if row not in self._views:
            self._open(row)
        view = self._views[row]
        geometry = view.geometry
        lattice = Lattice(geometry.input_size, geometry.view_size, geometry.scale, geometry.offset, tuple(grid[-3:]))
        scan = self.scans[row]
        if scan.masks is None:
            return Truth(lattice)
        return Truth(lattice, self._masks(scan, scan.masks, _file_grid(view)))

    def write(self, row: int, predictions: Sequence[np.ndarray], folder: Path) -> None:
        """Predictions (D, H, W) of the view as NIfTI (F, H, W, D) on the grid of the file."""
        grid = _file_grid(self._views[row])
        voxels = np.stack([np.ascontiguousarray(grid.from_view(one)).astype(np.uint8) for one in predictions])
        name = self.scans[row].name
        name = name if name.endswith(".nii.gz") else f"{name}.nii.gz"
        with replacing(folder / name) as part:
            unfinished = part.with_name(f"{part.name}.nii.gz")  # nibabel goes by the ending
            nibabel.save(nibabel.Nifti1Image(voxels, grid.affine), unfinished)
            unfinished.replace(part)

    def _open(self, row: int) -> ModelInput:
        vision = self.loaded.config["vision_cfg"]
        size = tuple(vision["volume_size"])
        chest = None
        if body_of(self.loaded.config) == "chest":
            chest = self.chest.chest_input(size, self.loaded.meta.get("transform"))
        opened = open_input(self.scans[row].source, self.loaded, self.choice, chest)
        first = opened.views[0]
        for view in opened.views[1:]:
            if view.geometry != first.geometry:
                raise BadSampleError(
                    f"{self.scans[row].source}: {view.name} and {first.name} lie on different grids; expected series "
                    "that were brought to one grid, as BraTS gives them"
                )
        self._views.clear()  # one case at a time: a chest has a hundred million voxels
        self._views[row] = first
        return opened

    def _masks(self, scan: GroundedScan, path: Path, grid: FileGrid) -> list[Mask]:
        volumes = read_label_volumes(path)
        if volumes.shape[1:] != grid.shape:
            raise BadSampleError(
                f"{path}: masks of {'×'.join(map(str, volumes.shape[1:]))} voxels; expected "
                f"{'×'.join(map(str, grid.shape))}, the size of {scan.source.name}"
            )
        if self.regions is not None:
            return [grid.to_view(np.isin(volumes[0], region)) for region in self.regions]
        if len(volumes) != len(scan.items):
            raise BadSampleError(f"{path}: {len(volumes)} masks; expected {len(scan.items)}, one per finding")
        return [grid.to_view(volume) for volume in volumes]


def _file_grid(view: InputView) -> FileGrid:
    if view.file_grid is None:
        raise BadSampleError(f"{view.name}: says nothing about the file's grid; expected a NIfTI volume")
    return view.file_grid


# --- ReXGroundingCT --------------------------------------------------------------------------------------------------


def read_rexgrounding(path: Path, split: str) -> list[tuple[str, tuple[str, ...]]]:
    """(volume name, findings in the order of their masks) of one split.

    Raises:
        MissingFileError: no such file.
        UserError: not such a file, or no entry of the split.
    """
    holding = 'findings of ReXGroundingCT: {"train": [{"name": "train_1_a_1.nii.gz", "findings": {"0": "text"}}, …]}'
    values = read_json(path, holding=holding)
    if isinstance(values, dict):
        values = values.get(split, [])
    entries = list(values.values()) if isinstance(values, dict) else values
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: has no entries of split {split!r}; expected {holding}")
    found = []
    for number, entry in enumerate(entries):
        where = f"{path}: {split}[{number}]"
        name, findings = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "findings"))
        if not isinstance(name, str) or not isinstance(findings, dict) or not findings:
            raise UserError(f"{where}: expected name and findings, as {holding}")
        try:
            parse_volume_name(name)
        except ValueError as error:
            raise UserError(f"{where}: field 'name': {error}") from None
        if sorted(findings) != sorted(map(str, range(len(findings)))):
            raise UserError(f"{where}: field 'findings': has the keys {', '.join(findings)}; expected 0, 1, …")
        texts = [findings[str(key)] for key in range(len(findings))]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{where}: field 'findings': expected a text for each")
        found.append((name, tuple(text.strip() for text in texts)))
    return found


def find_volume(root: Path, name: str) -> Path | None:
    """CT-RATE's file of a volume: in its folders (train, train_fixed, dataset/…), or directly below the root."""
    volume = parse_volume_name(name)
    inside = Path(f"{volume.split}_{volume.patient}", volume.scan, f"{volume.stem}.nii.gz")
    folders = [f"{above}{volume.split}{ending}" for above in ("", "dataset/") for ending in ("_fixed", "")]
    candidates = [root / f"{volume.stem}.nii.gz", *(root / folder / inside for folder in folders)]
    return next((path for path in candidates if path.is_file()), None)


@dataclass(frozen=True, kw_only=True)
class ReXGroundingOptions(GroundingOptions):
    """Findings in words on chest CT (ReXGroundingCT): Dice, hit rate, instances, pointing, with chance and ceiling."""

    data_dir: Annotated[Path, tyro.conf.arg(aliases=("--data-root",))]
    """Folder of ReXGroundingCT: dataset.json and segmentations/."""

    volumes: Path | None = None
    """Folder of CT-RATE's .nii.gz volumes; default: --data-dir/volumes."""

    findings: Path | None = None
    """File of the findings; default: dataset.json, else MICCAI_challenge_dataset.json in --data-dir."""

    split: Literal["train", "val", "test"] = "val"
    """train to choose the threshold by; test has no masks: only --predictions are made."""

    predictions: Path | None = None
    """Folder that gets a prediction per volume, as the leaderboard takes them."""

    allow_missing: bool = False
    """Go on without volumes that are not on disk; otherwise they are an error."""

    model: str | None = "CTRATE_HLIP_BiomedBERT_itemizedclip"
    """Config of a released checkpoint; checkpoints of runs carry their own."""

    input: Annotated[ChestSettings, tyro.conf.arg(name="")] = field(default_factory=ChestSettings)

    def open(self, subject: Subject) -> Benchmark:
        """The volumes of a split as the model reads them."""
        _check_body(subject, self.checkpoint, "chest", "a chest CT model (train_ctrate.sh)")
        scans, missing = on_main(self._read)
        dataset = GroundedScans(scans, subject.loaded, self.input, lower_case=True)
        return _opened(self, subject, dataset, "rexgroundingct", self.split, self.predictions, missing)

    def _read(self) -> tuple[list[GroundedScan], list[str]]:
        root = self.data_dir.expanduser()
        volumes = (self.volumes or root / "volumes").expanduser()
        for folder, flag in ((root, "--data-dir"), (volumes, "--volumes")):
            if not folder.is_dir():
                raise MissingFileError(f"{folder}: no such folder ({flag})")
        file = self.findings or next((root / name for name in REXGROUNDING_FILES if (root / name).is_file()), None)
        if file is None:
            raise MissingFileError(f"{root}: holds neither {' nor '.join(REXGROUNDING_FILES)}; give it by --findings")
        scans, missing = [], []
        for name, findings in read_rexgrounding(file, self.split):
            volume, masks = find_volume(volumes, name), root / "segmentations" / name
            if volume is None or (self.split != "test" and not masks.is_file()):
                missing.append(name)
                continue
            parsed = parse_volume_name(name)
            patient = f"{parsed.split}_{parsed.patient}"
            scans.append(GroundedScan(name, volume, findings, masks if masks.is_file() else None, patient))
        if missing and (not self.allow_missing or not scans):
            raise MissingFileError(
                f"{len(missing):,} of {len(missing) + len(scans):,} volumes of {file} lack the volume ({volumes}) or "
                f"the masks ({root / 'segmentations'}), the first: {missing[0]}. Add them, or give --allow-missing"
            )
        return scans, missing


# --- BraTS -----------------------------------------------------------------------------------------------------------

BRATS_REGIONS: dict[str, tuple[int, ...]] = {"whole": (1, 2, 3, 4), "core": (1, 3, 4), "enhancing": (3, 4)}
"""Region → labels."""


@dataclass(frozen=True, kw_only=True)
class BratsOptions(GroundingOptions):
    """Tumour masks of brain MRI (BraTS): Dice, IoU, hit rate, pointing, with chance and the patch grid's ceiling."""

    data_dir: Annotated[Path, tyro.conf.arg(aliases=("--data-root",))]
    """Folder of the cases."""

    whole: str = "brain tumor with surrounding edema"
    """Text for the whole tumour; empty: not asked."""

    core: str = "solid and necrotic tumor core"
    """Text for the tumour without oedema; empty: not asked."""

    enhancing: str = "contrast-enhancing tumor"
    """Text for what enhances; empty: not asked."""

    predictions: Path | None = None
    """Folder that gets a prediction per case, NIfTI (regions, H, W, D)."""

    model: str | None = "HLIPSN_BiomedBERT_81616_itemizedclip"
    """Config of a released checkpoint; checkpoints of runs carry their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.texts:
            raise UserError("--whole, --core and --enhancing are empty; expected at least one text")

    @property
    def texts(self) -> dict[str, str]:
        """Region → what is asked."""
        asked = {"whole": self.whole, "core": self.core, "enhancing": self.enhancing}
        return {name: text.strip() for name, text in asked.items() if text.strip()}

    def open(self, subject: Subject) -> Benchmark:
        """The cases as the model reads them."""
        _check_body(subject, self.checkpoint, "brain", "a brain MRI model (train_mri.sh)")
        scans = on_main(lambda: find_brats(self.data_dir.expanduser(), tuple(self.texts.values())))
        regions = [BRATS_REGIONS[name] for name in self.texts]
        dataset = GroundedScans(scans, subject.loaded, choice=SeriesChoice(unwanted=("seg",)), regions=regions)
        return _opened(self, subject, dataset, "brats", "all", self.predictions, [])


def find_brats(root: Path, texts: tuple[str, ...]) -> list[GroundedScan]:
    """Cases that have a segmentation, in the order of their names.

    Raises:
        MissingFileError: no such folder, or no case in it.
    """
    if not root.is_dir():
        raise MissingFileError(f"{root}: no such folder (--data-dir)")
    scans = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        masks = [path for path in sorted(folder.iterdir()) if _ending(path) == "seg"]
        series = {BRATS_FILES[_ending(path)] for path in folder.iterdir() if _ending(path) in BRATS_FILES}
        if len(masks) == 1 and series:
            patient = folder.name.rpartition("-")[0] if folder.name.count("-") > 2 else folder.name
            scans.append(GroundedScan(folder.name, folder, texts, masks[0], patient))
    if not scans:
        raise MissingFileError(
            f"{root}: holds no case; expected folders such as BraTS2021_00000/ with "
            "BraTS2021_00000_flair.nii.gz, … and BraTS2021_00000_seg.nii.gz"
        )
    return scans


def _ending(path: Path) -> str:
    stem = path.name.removesuffix(".gz").removesuffix(".nii").lower()
    return "" if stem == path.name.lower() else stem.replace("-", "_").rpartition("_")[2]


# --- both ------------------------------------------------------------------------------------------------------------


def _check_body(subject: Subject, checkpoint: Path, wanted: Reader, expected: str) -> None:
    config = subject.loaded.config
    if config["vision_cfg"].get("tower") != "hlip" or body_of(config) != wanted:
        raise UserError(f"{checkpoint}: its model reads other inputs; give {expected}")


def _opened(
    options: GroundingOptions,
    subject: Subject,
    dataset: GroundedScans,
    name: str,
    split: str,
    predictions: Path | None,
    missing: Sequence[str],
) -> Benchmark:
    predict = None
    if predictions is not None:
        folder = on_main(lambda: check_writable(predictions, "--predictions"))

        def predict(row: int, masks: list[np.ndarray]) -> None:
            dataset.write(row, masks, folder)

    evaluator = GroundingEvaluator(
        dataset,
        subject.loaded.tokenizer,
        name=name,
        normalise_tokens=options.normalise_tokens,
        # Views are needed again for the masks: they are read in this process.
        encoding=replace(subject.encoding, batch_size=1, num_workers=0),
        unit="scans",
        patients=[scan.patient for scan in dataset.scans],
        threshold=options.chosen_threshold(),
        predict=predict,
    )
    results = options.output or options.checkpoint.with_suffix(f".{name}.{split}.json")
    facts: Mapping[str, Any] = {
        "split": split,
        "missing": list(missing),
        "predictions": predictions and str(predictions),
    }
    opened = options.benchmark(evaluator, f"{name}, {split}: {len(dataset):,} scans", results, facts)
    return replace(opened, missing=missing)
