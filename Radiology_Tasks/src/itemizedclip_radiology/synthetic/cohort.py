"""A synthetic cohort in the file formats of the real ones: studies with planted findings, made from a seed.

    python -m itemizedclip_radiology.synthetic.cohort --root cohort --num-train 120 --num-valid 30 --num-test 40

For trying out, testing and debugging everything from training to explanation without any real data. A study shows a
schematic head (MRI or CT) or chest (CT) and up to three findings, each a shape of its own that only the series one
would look at shows: an acute stroke in the diffusion series, a subdural hemorrhage in the blood window. Each finding
is one text item and comes with the mask of its voxels. Nothing here is anatomy; numbers from it say that code works.

A small model (16×64×64 voxels, 4 blocks) that trains on 480 MRI studies for a few minutes on one CPU core reaches a
mean zero-shot AUC above 0.95 on others (benchmarks/mri_cohort.py); with 240 it learns some of them by heart instead.

    ROOT/mri/{train,valid}/STUDY/SERIES/img.pt   train.json, valid.json          uint8
    ROOT/ct/{train,val}/STUDY/SERIES/img.pt      train.json, val.json            uint8
    ROOT/ct_rate/{train,valid}/…/NAME.pt         itemized.json, valid_labels.csv float16 HU
    ROOT/pub_brain_5/…/STUDY/SCAN.pt             pub_brain_5.csv, pub_brain_5_gt.csv   float32 0…1
    ROOT/rsna/STUDY/SERIES/img_*.pt              RSNA.csv                        uint8
    ROOT/cq500/STUDY/SERIES/img_*.pt             CQ500.csv                       uint8
    ROOT/rad_chestct/ID/ID.pt                    rad_chestct_labels.csv          float16 HU

Each of these folders also has findings.json (per study, by the name of its folder: finding, item, side, series) and
masks/STUDY.pt ({finding: bool (D, H, W)}, in the voxels of the study's files).

Axes: D H W voxels.
"""

from __future__ import annotations

import json
import sys
import typing
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip_radiology.benchmarks.chest_ct import CALCIFICATION_CLASSES, CT_RATE_COLUMNS, RAD_CHESTCT_COLUMNS
from itemizedclip_radiology.data.label_table import LabelTable, write_label_csv
from itemizedclip_radiology.data.volumes import Size, padded_in_plane
from itemizedclip_radiology.synthetic.drawing import (
    BLEEDS,
    BLOOD,
    BONE,
    BRAIN,
    CHEST_FINDINGS,
    CHEST_SERIES,
    Array,
    SyntheticStudy,
    render_study,
)

BRAIN_TEST_SIZE: Size = (16, 64, 64)
CHEST_TEST_SIZE: Size = (32, 96, 96)


@dataclass
class CohortFolder:
    """One written folder.

    Attributes:
        root: the folder.
        studies: study → what was planted in it, as in findings.json.
    """

    root: Path
    studies: dict[str, list[dict[str, object]]] = field(default_factory=dict)

    def masks(self, study: str) -> dict[str, torch.Tensor]:
        """Finding → bool (D, H, W), in the voxels of the study's files."""
        return torch.load(self.root / "masks" / f"{study.replace('/', '__')}.pt", weights_only=True)

    def add(self, study: str, rendered: SyntheticStudy) -> None:
        """Write the masks of a study and note its findings."""
        path = self.root / "masks" / f"{study.replace('/', '__')}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({f.name: torch.from_numpy(f.mask) for f in rendered.findings}, path)
        self.studies[study] = [
            {"finding": f.name, "item": f.item, "side": f.side, "series": f.series} for f in rendered.findings
        ]

    def finish(self) -> CohortFolder:
        """Write findings.json."""
        (self.root / "findings.json").write_text(json.dumps(self.studies, indent=1), encoding="utf-8")
        return self


def open_cohort(root: str | Path) -> CohortFolder:
    """A folder written earlier.

    Raises:
        FileNotFoundError: no findings.json in it.
    """
    path = Path(root) / "findings.json"
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; expected a folder that `write_cohort` wrote")
    return CohortFolder(Path(root), json.loads(path.read_text(encoding="utf-8")))


def _save(volume: Array, path: Path, kind: Literal["uint8", "unit", "hu"] = "uint8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor = torch.from_numpy(np.ascontiguousarray(volume))
    if kind == "uint8":
        tensor = (tensor * 255).round().to(torch.uint8)
    torch.save(tensor.half() if kind == "hu" else tensor, path)


_CT_PREFIXES = ("MPR-AX_HEAD-protocol", "CT_Plain_AX", "CT_Thin_AX")
"""What comes before the window in the series names of RSNA and CQ500."""


def _with_series_prefix(study: SyntheticStudy, prefix: str) -> SyntheticStudy:
    """The study with its series named <prefix>_<window>, so that training meets the names of both benchmarks."""
    names = {name: f"{prefix}_{name.rsplit('_', 1)[1]}" for name in study.volumes}
    return SyntheticStudy(
        {names[name]: volume for name, volume in study.volumes.items()},
        [replace(finding, series=[names[name] for name in finding.series]) for finding in study.findings],
        study.items,
    )


def _with_findings_in_scans(study: SyntheticStudy, scans: Sequence[str]) -> SyntheticStudy:
    """The study with its findings in every scan, named as CQ500's series are: <scan>_AX_<window>."""
    findings = [
        replace(finding, series=[f"{scan}_AX_{name.rsplit('_', 1)[1]}" for scan in scans for name in finding.series])
        for finding in study.findings
    ]
    return replace(study, findings=findings)


def write_studies(
    root: str | Path,
    *,
    kind: Literal["mri", "head_ct"],
    num_train: int,
    num_valid: int,
    seed: int = 0,
    size: Size = BRAIN_TEST_SIZE,
    with_margin: bool = False,
    choose_from: Sequence[str] | None = None,
) -> CohortFolder:
    """Training and validation studies of MRI (valid.json) or head CT (val.json): ROOT/<split>/STUDY/SERIES/img.pt.

    Args:
        root: folder to write.
        kind: "mri" or "head_ct".
        num_train, num_valid: studies.
        seed: see `render_study`.
        size: voxels of the model's input.
        with_margin: save with the in-plane margin that loaders crop away (256 for 224).
        choose_from: see `render_study`.
    """
    folder = CohortFolder(Path(root))
    saved = (size[0], padded_in_plane(size[1]), padded_in_plane(size[2])) if with_margin else size
    valid = "valid" if kind == "mri" else "val"
    for split, count in (("train", num_train), (valid, num_valid)):
        index = {}
        for number in range(count):
            study = f"{'MRI' if kind == 'mri' else 'CT'}{seed}{split.upper()}{number:05d}"
            rendered = render_study(
                kind, seed=seed, stream=split, index=number, size=size, saved_size=saved, choose_from=choose_from
            )
            if kind == "head_ct":
                rendered = _with_series_prefix(rendered, _CT_PREFIXES[number % len(_CT_PREFIXES)])
            for name, volume in rendered.volumes.items():
                _save(volume, folder.root / split / study / name / "img.pt")
            index[study] = {"series": {name: {} for name in rendered.volumes}, "report": rendered.items}
            folder.add(study, rendered)
        folder.root.mkdir(parents=True, exist_ok=True)
        (folder.root / f"{split}.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return folder.finish()


def write_pub_brain_5(
    root: str | Path, *, num_studies: int, seed: int = 0, size: Size = BRAIN_TEST_SIZE
) -> CohortFolder:
    """Pub-Brain-5: one of five groups per study, scans of half as many slices again, grey values 0…1.

    pub_brain_5_gt.csv lists every other study.
    """
    folder = CohortFolder(Path(root))
    groups = {
        "Normal": "open_bhb",
        "Stroke": "stroke",
        "Glioma": "brats23/train/adult_glioma",
        "Meningioma": "brats23/train/adult_meningioma",
        "Metastasis": "ucsf_mets",
    }
    saved = (size[0] * 3 // 2, padded_in_plane(size[1]), padded_in_plane(size[2]))
    names = list(groups)
    rows: list[tuple[str, list[int]]] = []
    for number in range(num_studies):
        group = names[number % len(names)]
        study = f"{groups[group]}/sub-{number:05d}"
        rendered = render_study(
            "mri",
            seed=seed,
            stream="pub_brain_5",
            index=number,
            size=size,
            saved_size=saved,
            findings=[] if group == "Normal" else [group],
        )
        for name, volume in rendered.volumes.items():
            scan = f"sub-{number:05d}-{name.removeprefix('AX_')}.pt"
            _save(volume, folder.root / "pub_brain_5" / study / scan, "unit")
        rows.append((f"/data/pub_brain_5/{study}", [int(group == name) for name in names]))
        folder.add(study, rendered)
    for file, kept in (("pub_brain_5.csv", rows), ("pub_brain_5_gt.csv", rows[::2])):
        _write_labels(folder.root / file, "study", tuple(names), kept)
    return folder.finish()


def write_head_ct_benchmarks(
    root: str | Path, *, num_studies: int, seed: int = 0, size: Size = BRAIN_TEST_SIZE
) -> tuple[CohortFolder, CohortFolder]:
    """RSNA and CQ500: ROOT/rsna with RSNA.csv, ROOT/cq500 with CQ500.csv; `num_studies` in each."""
    rsna, cq500 = CohortFolder(Path(root) / "rsna"), CohortFolder(Path(root) / "cq500")
    files = {BLOOD: "img_blood.pt", BONE: "img_bone.pt", BRAIN: "img_brain.pt"}
    rsna_rows: list[tuple[str, list[int]]] = []
    cq500_rows: list[tuple[str, list[int]]] = []
    for number in range(num_studies):
        rendered = render_study("head_ct", seed=seed, stream="rsna", index=number, size=size)
        study = f"ID_{zlib.crc32(f'{seed}/{number}'.encode()):010x}"
        for name, volume in rendered.volumes.items():
            _save(volume, rsna.root / f"RSNA_{study}" / f"{number:06d}" / files[name])
        bleeds = [int(name in rendered.names) for name in ("EDH", "IPH", "IVH", "SAH", "SDH")]
        rsna_rows.append((study, [max(bleeds), *bleeds]))
        rsna.add(f"RSNA_{study}", rendered)
    for number in range(num_studies):
        rendered = render_study("head_ct", seed=seed, stream="cq500", index=number, size=size)
        # CQ500CT163 is left out by the evaluation.
        study = f"CQ500CT{number + (number >= 163):03d}"
        scans = ("CT_Plain", "CT_Thin")[: 1 + number % 2]
        for scan in scans:
            for name, volume in rendered.volumes.items():
                _save(volume, cq500.root / study / scan / files[name])
        sides = {f.side for f in rendered.findings if f.name in BLEEDS}
        present = rendered.names
        values = {
            "ICH": bool(sides),
            **{name: name in present for name in ("IPH", "IVH", "SDH", "EDH", "SAH")},
            "BleedLocation-Left": "left" in sides,
            "BleedLocation-Right": "right" in sides,
            "ChronicBleed": False,
            "Fracture": "Fracture" in present,
            "CalvarialFracture": "Fracture" in present,
            "OtherFracture": False,
            "MassEffect": "MassEffect" in present,
            "MidlineShift": "MidlineShift" in present,
        }
        cq500_columns = tuple(values)
        cq500_rows.append((study, [int(value) for value in values.values()]))
        cq500.add(study, _with_findings_in_scans(rendered, scans))
    rsna_columns = ("Any", "Epidural", "Intraparenchymal", "Intraventricular", "Subarachnoid", "Subdural")
    _write_labels(rsna.root / "RSNA.csv", "study", rsna_columns, rsna_rows)
    _write_labels(cq500.root / "CQ500.csv", "study", cq500_columns, cq500_rows)
    return rsna.finish(), cq500.finish()


def _chest_saved_size(number: int, size: Size) -> Size:
    """Volumes of varying size, some smaller and some larger than the model's input, as real ones are."""
    factors = ((1.1, 1.1, 1.1), (1.0, 1.0, 1.0), (0.95, 1.15, 1.15), (1.2, 0.97, 0.97))[number % 4]
    d, h, w = (round(n * f) for n, f in zip(size, factors))
    return d, h, w


def write_ct_rate(
    root: str | Path,
    *,
    num_train: int,
    num_valid: int,
    seed: int = 0,
    size: Size = CHEST_TEST_SIZE,
    choose_from: Sequence[str] | None = None,
) -> CohortFolder:
    """CT-RATE: scans with one or two reconstructions in HU, itemized.json (training), valid_labels.csv."""
    folder = CohortFolder(Path(root))
    itemized: dict[str, dict[str, list[str]]] = {}
    rows: list[tuple[str, list[int]]] = []
    for split, count in (("train", num_train), ("valid", num_valid)):
        for number in range(count):
            scan = f"{split}_{number + 1}_a"
            rendered = render_study(
                "chest_ct",
                seed=seed,
                stream=split,
                index=number,
                size=size,
                saved_size=_chest_saved_size(number, size),
                choose_from=choose_from,
            )
            recons = [f"{scan}_{recon}" for recon in (1, 2)[: 1 + number % 2]]
            noise = np.random.default_rng([seed, number, zlib.crc32(split.encode())])
            for recon in recons:
                volume = rendered.volumes[CHEST_SERIES]
                # Reconstructions of one scan differ in noise.
                grain = np.rint(8 * noise.standard_normal(volume.shape, dtype=np.float32))
                _save(volume + grain, folder.root / split / f"{split}_{number + 1}" / scan / f"{recon}.pt", "hu")
                rows.append((f"{recon}.nii.gz", [int(name in rendered.names) for name in CT_RATE_COLUMNS]))
            if split == "train":
                itemized[scan] = {"recons": [f"{recon}.nii.gz" for recon in recons], "report": rendered.items}
            folder.add(scan, rendered)
    folder.root.mkdir(parents=True, exist_ok=True)
    (folder.root / "itemized.json").write_text(json.dumps(itemized, indent=1), encoding="utf-8")
    for split in ("train", "valid"):
        kept = [row for row in rows if row[0].startswith(split)]
        if kept:
            _write_labels(folder.root / f"{split}_labels.csv", "VolumeName", CT_RATE_COLUMNS, kept)
    return folder.finish()


def write_rad_chestct(
    root: str | Path, *, num_studies: int, seed: int = 0, size: Size = CHEST_TEST_SIZE
) -> CohortFolder:
    """Rad-ChestCT: <id>/<id>.pt and <id>.pt in turn, rad_chestct_labels.csv; either calcification sets both columns."""
    folder = CohortFolder(Path(root))
    rows: list[tuple[str, list[int]]] = []
    choose_from = [finding.name for finding in CHEST_FINDINGS if finding.name in RAD_CHESTCT_COLUMNS]
    for number in range(num_studies):
        name = f"{('trn', 'val', 'tst')[number % 3]}{number:05d}"
        rendered = render_study(
            "chest_ct",
            seed=seed,
            stream="rad_chestct",
            index=number,
            size=size,
            saved_size=_chest_saved_size(number, size),
            choose_from=choose_from,
        )
        place = Path(name, f"{name}.pt") if number % 2 else Path(f"{name}.pt")
        _save(np.clip(rendered.volumes[CHEST_SERIES], -1000, 1000), folder.root / place, "hu")
        calcified = bool(rendered.names & set(CALCIFICATION_CLASSES))
        rows.append(
            (
                name,
                [int(calcified if c in CALCIFICATION_CLASSES else c in rendered.names) for c in RAD_CHESTCT_COLUMNS],
            )
        )
        folder.add(name, rendered)
    _write_labels(folder.root / "rad_chestct_labels.csv", "NoteAcc_DEID", RAD_CHESTCT_COLUMNS, rows)
    return folder.finish()


def _write_labels(path: Path, id_column: str, classes: tuple[str, ...], rows: Iterable[tuple[str, list[int]]]) -> None:
    ids, labels = zip(*rows)
    write_label_csv(path, LabelTable(path, list(ids), classes, np.array(labels, dtype=np.int8)), id_column=id_column)


Part = Literal["mri", "ct", "ct_rate", "pub_brain_5", "rsna_cq500", "rad_chestct"]


def write_cohort(
    root: Path,
    num_train: int = 120,
    num_valid: int = 30,
    num_test: int = 40,
    seed: int = 0,
    brain_size: Size = BRAIN_TEST_SIZE,
    chest_size: Size = CHEST_TEST_SIZE,
    parts: tuple[Part, ...] = typing.get_args(Part),
) -> None:
    """Write the synthetic cohort, or parts of it.

    Args:
        root: folder to write.
        num_train: training studies of MRI, of head CT and of chest CT.
        num_valid: validation studies of each.
        num_test: studies of each zero-shot benchmark.
        seed: seed of everything.
        brain_size: voxels of an MRI or head CT series; multiples of the model's patch.
        chest_size: voxels of the chest CT model's input.
        parts: which folders to write; default all.
    """
    for name, value in (("--num-train", num_train), ("--num-valid", num_valid), ("--num-test", num_test)):
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root}: is not empty; give a new folder (--root), so that no older studies are mixed in")
    counts: dict[str, Any] = {"num_train": num_train, "num_valid": num_valid, "seed": seed}
    writers: dict[Part, Callable[[], object]] = {
        "mri": lambda: write_studies(root / "mri", kind="mri", size=brain_size, **counts),
        "ct": lambda: write_studies(root / "ct", kind="head_ct", size=brain_size, **counts),
        "ct_rate": lambda: write_ct_rate(root / "ct_rate", size=chest_size, **counts),
        "pub_brain_5": lambda: write_pub_brain_5(
            root / "pub_brain_5", num_studies=num_test, seed=seed, size=brain_size
        ),
        "rsna_cq500": lambda: write_head_ct_benchmarks(root, num_studies=num_test, seed=seed, size=brain_size),
        "rad_chestct": lambda: write_rad_chestct(
            root / "rad_chestct", num_studies=num_test, seed=seed, size=chest_size
        ),
    }
    for part in parts:
        writers[part]()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `write_cohort`; returns the exit code."""
    try:
        tyro.cli(write_cohort, args=argv, prog="python -m itemizedclip_radiology.synthetic.cohort")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
