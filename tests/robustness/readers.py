"""Every reader of files that others write, with a file that it takes.

A reader is a function of a path. Its sound file is plain data (written as JSON) or bytes; what is tested with it is
made of that by `mutations`.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel
import numpy as np
import pydicom
import torch
from itemizedclip_2d.grounded_images import read_annotation
from itemizedclip_2d.retrieval_sets import coco_karpathy, coco_val2017, flickr30k
from itemizedclip_2d.rsicd import load_class_labels
from itemizedclip_2d.rsicd_table import open_rsicd_table
from itemizedclip_2d.shard_index import listed_counts, read_shard
from itemizedclip_radiology.benchmarks.grounded_scans import read_rexgrounding
from itemizedclip_radiology.benchmarks.head_ct import CQ500_COLUMNS, RSNA_COLUMNS, read_rsna_labels, read_study_list
from itemizedclip_radiology.benchmarks.mr_rate import read_patients, read_prompts
from itemizedclip_radiology.data.archives import unpacked_archive
from itemizedclip_radiology.data.brain import _EntryCheck
from itemizedclip_radiology.data.chest import _check_scan
from itemizedclip_radiology.data.dicom import find_dicom_series, read_dicom, usable_series
from itemizedclip_radiology.data.label_table import read_label_csv
from itemizedclip_radiology.data.nifti import read_label_volumes, read_nifti
from itemizedclip_radiology.data.reports import StudyIndex, read_report_table
from itemizedclip_radiology.data.volumes import read_volume
from itemizedclip_radiology.models.text_tower import bert_config_of, load_bert_tokenizer
from itemizedclip_radiology.models.weight_files import read_state_dict
from itemizedclip_radiology.prepare.labels import build_cq500, build_rsna
from itemizedclip_radiology.prepare.public import MrRate, RadChestCt
from itemizedclip_radiology.prepare.sources import Entry
from photograph_cases import photograph_cases
from rsicd_files import image_cell
from safetensors.torch import save
from scan_files import write_dicom
from torchvision.transforms.functional import pil_to_tensor

from itemizedclip.commands.index import read_queries
from itemizedclip.commands.questions import read_items_file
from itemizedclip.data.images import decode_mask, decode_photograph
from itemizedclip.data.items import load_item_lists
from itemizedclip.data.jsonl import ImageItems
from itemizedclip.evaluation.calibration import Calibration, FindingCalibration, OperatingPoint, read_calibration
from itemizedclip.evaluation.cases import read_cases
from itemizedclip.evaluation.scores import ScoreStore
from itemizedclip.models.factory import check_config, create_model, create_tokenizer, load_model_config, load_pretrained
from itemizedclip.search.store import map_shard, read_manifest, read_shard_header
from itemizedclip.training.checkpoint import Checkpoint, load_checkpoint
from itemizedclip.training.tracking import drop_lines_after
from itemizedclip.viewer.page.serve import read_question
from itemizedclip.viewer.sets import read_item_file, read_masks

JPEG = photograph_cases()["JPEG"].encoded
FIXTURES = Path(__file__).parents[1] / "fixtures"
LARGEST_BUILT = 3_000_000
"""Numbers of a model that is still built, to see whether what was taken can be."""


@dataclass(frozen=True)
class Reader:
    """A reader and its sound file.

    Attributes:
        read: takes the path.
        sound: makes the content.
        file: name, below a folder of its own.
        names: what its refusals hold instead of the file's name.
        always: it takes any file, and passes over what it cannot use.
    """

    read: Callable[[Path], object]
    sound: Callable[[], Any]
    file: str
    names: str = ""
    always: bool = False


# --- sound files -----------------------------------------------------------------------------------------------------

TINY = {
    "embed_dim": 8,
    "head_heads": 2,
    "init_logit_scale": 2.6,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 8, "head_width": 4, "layers": 1, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 4, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1},
    "preprocess": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "train_scale": [0.9, 1.0]},
}


def studies_config() -> dict[str, Any]:
    config = load_model_config("HLIPSN_debug")
    config["vision_cfg"] |= {"volume_size": [8, 16, 16], "width": 12, "num_heads": 2, "block_scopes": ["series"]}
    config["text_cfg"]["hf_config"] |= {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    return config


def build(path: Path) -> None:
    """What is taken can be built, and has a tokenizer."""
    config = load_model_config(path)
    if check_config(config, source=path) <= LARGEST_BUILT:
        create_model(str(path))
        create_tokenizer(config, source=path)


@cache
def checkpoint_bytes() -> bytes:
    model = create_model(TINY)
    file = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "model_config": TINY}, file)
    return file.getvalue()


def checkpoint_fields() -> dict[str, Any]:
    state: dict[str, Any] = {
        "state_dict": {"w": torch.zeros(2)},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [0], "lr": 0.1}]},
        "scaler": None,
        "step": 4, "epoch": 0, "step_in_epoch": 4, "samples_seen": 16, "total_steps": 20, "run_id": "r",
        "options": {
            "loading": {"batch_size": 4, "accum_batch": 1, "accum_freq": 1},
            "optimizer": {"epochs": 2, "lr": 0.1},
        },
        "model_config": TINY, "transform": {"image_size": 8}, "data_fingerprint": "f", "world_size": 1,
        "metrics": {"a/b": 0.5}, "tracking": {"wandb": "x"}, "format": 1, "shards": None,
    }  # fmt: skip
    assert set(state) == {f.name for f in fields(Checkpoint)}
    return state


def calibration_fields() -> dict[str, Any]:
    finding = FindingCalibration(
        "a", ("an a",), 5, 7, "isotonic", (0.1, 0.2), (0.0, 1.0), 0.0, 0.0, (OperatingPoint(0.9, 0.1, 0.8, None),), 0.1,
        None, {"brier": 0.1},
    )  # fmt: skip
    whole = Calibration("5" * 64, "tcsim", True, "fp32", 0.9, "own", ("6" * 32,), (finding,), {"b": "too few"})
    return {"format": 1, **json.loads(json.dumps(asdict(whole)))}


def tar_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def shard_bytes() -> bytes:
    fields_of = {"key": "000000000", "shortIB_captions": ["a lake"], "width": 36}
    return tar_bytes({"000000000.jpg": JPEG, "000000000.json": json.dumps(fields_of).encode()})


def csv_bytes(*rows: list[str]) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()


def cq500_bytes() -> bytes:
    readers = [f"R{number}:{finding}" for finding in CQ500_COLUMNS for number in (1, 2, 3)]
    return csv_bytes(["name", *readers], *([f"CQ500-CT-{n}", *("01"[(n + c) % 2] for c in range(len(readers)))]
                                           for n in range(3)))  # fmt: skip


def rsna_slices() -> bytes:
    kinds = [column.lower() for column in RSNA_COLUMNS]
    return csv_bytes(["ID", "Label"], *([f"ID_{image:09x}_{kind}", "0"] for image in range(2) for kind in kinds))


def read_rsna(path: Path) -> object:
    images = path.with_name("images.csv")
    rows = [[f"ID_{image:09x}", f"ID_{image:010x}"] for image in range(2)]
    images.write_bytes(csv_bytes(["ImageID", "StudyInstanceUID"], *rows))
    return build_rsna(path, images)


def npz_bytes() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **{"1": np.eye(6, dtype=bool), "2": np.ones((6, 6), np.uint8)})
    return file.getvalue()


def torch_bytes(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def nifti_bytes() -> bytes:
    return nibabel.Nifti1Image(np.arange(512, dtype=np.int16).reshape(8, 8, 8), np.eye(4)).to_bytes()


@cache
def dicom_files() -> dict[str, bytes]:
    """Name → content of a series of four slices."""
    with TemporaryDirectory() as folder:
        write_dicom(Path(folder), np.arange(256.0).reshape(8, 8, 4), np.diag([1.0, 1.0, 5.0, 1.0]))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def dicom_bytes() -> bytes:
    return next(iter(dicom_files().values()))


def dicom_fields() -> dict[str, Any]:
    """What the headers of such a series may hold, as JSON: one of the slices has it."""
    return {
        "Rows": 8, "Columns": 8, "NumberOfFrames": 1, "SamplesPerPixel": 1, "BitsAllocated": 16, "BitsStored": 16,
        "HighBit": 15, "PixelRepresentation": 0, "PhotometricInterpretation": "MONOCHROME2", "RescaleSlope": 1,
        "RescaleIntercept": -1024, "PixelSpacing": [1, 1], "SliceThickness": 5, "InstanceNumber": 2, "SeriesNumber": 1,
        "ImagePositionPatient": [0, 0, 5], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "SeriesDescription": "chest", "SeriesInstanceUID": "1.2.3.4",
        "StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4", "PatientID": "1", "EchoTime": 3,
        "DiffusionBValue": 0, "TemporalPositionIdentifier": 1, "AcquisitionNumber": 1, "ConvolutionKernel": "b",
    }  # fmt: skip


NIFTI_FIELDS: dict[str, Any] = {
    "dim": [3, 8, 8, 8, 1, 1, 1, 1], "pixdim": [1, 1, 1, 1, 0, 0, 0, 0], "datatype": 4, "bitpix": 16, "vox_offset": 352,
    "scl_slope": 1, "scl_inter": 0, "xyzt_units": 2, "qform_code": 1, "sform_code": 1, "quatern_b": 0, "qoffset_x": 0,
    "srow_x": [1, 0, 0, 0], "srow_y": [0, 1, 0, 0], "srow_z": [0, 0, 1, 0], "sizeof_hdr": 348, "slice_end": 0,
    "intent_code": 0, "cal_max": 0,
}  # fmt: skip


def zip_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


# --- readers ---------------------------------------------------------------------------------------------------------


def studies(check: Callable[[], Any]) -> Callable[[Path], object]:
    return lambda path: StudyIndex(path, check(), on_bad_sample="stop")[0]


def own_images(path: Path) -> object:
    return len(ImageItems(path, pil_to_tensor, num_items=2, is_train=False))


def flickr(path: Path) -> object:
    return len(flickr30k(path.parent, "val", pil_to_tensor))


def checked_masks(path: Path) -> object:
    return read_masks(path)


def stored_scores(path: Path) -> object:
    store = ScoreStore(path.parent, {"k": 1}, ["a", "b"])
    path.rename(store.path(0))
    return store.take_over()


def shard(path: Path) -> object:
    found = read_shard(path, caption_field="shortIB_captions", decode_images=True)
    for name, reason in found.bad:
        assert name
        assert len(reason) < 500
    return found


def dicom(path: Path) -> object:
    """The series of a folder of which one file is damaged."""
    for name, content in list(dicom_files().items())[1:]:
        path.with_name(name).write_bytes(content)
    return study(path.parent)


def study(folder: Path) -> object:
    scans = [read_dicom(series) for series in usable_series(find_dicom_series(folder))[0]]
    for scan in scans:
        assert np.isfinite(scan.voxels).all()
        assert np.isfinite(scan.affine).all()
    return scans


def dicom_with(path: Path) -> object:
    """A series in one of whose headers these fields are."""
    name, content = next(iter(dicom_files().items()))
    data, usual = pydicom.dcmread(io.BytesIO(content)), dicom_fields()
    found = json.loads(path.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key, value in found.items() if isinstance(found, dict) else ():
            # What the format itself cannot hold, nobody can send.
            with contextlib.suppress(Exception):
                before = data.get(key)
                if key in usual and usual[key] == value:
                    continue
                setattr(data, key, value)
                try:
                    pydicom.dcmwrite(io.BytesIO(), data, enforce_file_format=True)
                except Exception:
                    setattr(data, key, before)
        pydicom.dcmwrite(path.with_name(name), data, enforce_file_format=True)
    path.unlink()
    return dicom(path.with_name(name))


def nifti_with(path: Path) -> object:
    """A volume in whose header these fields are."""
    content = bytearray(nifti_bytes())
    header = np.frombuffer(content, nibabel.Nifti1Header.template_dtype, count=1)
    found = json.loads(path.read_bytes())
    for key, value in found.items() if isinstance(found, dict) else ():
        # What the format itself cannot hold, nobody can send.
        with contextlib.suppress(Exception), np.errstate(all="ignore"):
            header[key][0] = value
    volume = path.with_suffix(".nii")
    volume.write_bytes(content)
    return nifti(volume)


def nifti(path: Path) -> object:
    scans = read_nifti(path)
    for scan in scans:
        assert np.isfinite(scan.voxels).all()
        assert np.isfinite(scan.affine).all()
    return scans


def packed_study(path: Path) -> object:
    with unpacked_archive(path) as folder:
        return study(folder)


def read_rad_chestct(path: Path) -> object:
    return RadChestCt().read(Entry(path, study="trn00001"), path, fill=False)


def scan_npz_bytes() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, ct=np.zeros((3, 4, 5), dtype=np.int16))
    return file.getvalue()


JSON_READERS: dict[str, Reader] = {
    "texts of MR-RATE": Reader(
        read_prompts, lambda: {"pathologies": {"Glioma": {"positive": "There is glioma", "negative": "no"}}}, "p.json"
    ),
    "index of MR-RATE": Reader(
        lambda path: read_patients(path.parent, "test"), lambda: {"S1": {"series": {}, "patient": "P1"}}, "test.json"
    ),
    "config of photographs": Reader(build, lambda: TINY, "config.json"),
    "config of studies": Reader(build, studies_config, "config.json"),
    "BERT's config": Reader(
        bert_config_of, lambda: load_model_config("HLIPSN_debug")["text_cfg"]["hf_config"], "config.json"
    ),
    "index.json": Reader(
        lambda path: read_manifest(path.parent),
        lambda: json.loads((FIXTURES / "pictures.index" / "index.json").read_text()),
        "index.json",
    ),
    "item lists": Reader(load_item_lists, lambda: {"a": ["x", "y"], "b": []}, "items.json"),
    "items by number": Reader(
        lambda path: load_item_lists(path, integer_keys=True), lambda: {"1": ["x"], "2": ["y"]}, "items.json"
    ),
    "items of a set": Reader(
        read_item_file, lambda: {"a": ["x", {"item": "y", "series": ["T1"], "finding": "f"}]}, "items.json"
    ),
    "--items-file": Reader(read_items_file, lambda: ["a", "b"], "items.json"),
    "studies of the brain": Reader(
        studies(lambda: _EntryCheck({})),
        lambda: {"s": {"series": {"T1": [1, 2]}, "report": ["x", "y"]}, "t": {"series": {"a": 1}, "report": "1. x"}},
        "studies.json",
    ),
    "scans of the chest": Reader(
        studies(lambda: _check_scan),
        lambda: {"train_1_a": {"recons": ["train_1_a_1.nii.gz", "train_1_a_2.nii.gz"], "report": ["x"]}},
        "scans.json",
    ),
    "COCO": Reader(
        lambda path: coco_val2017(path.parents[1], pil_to_tensor),
        lambda: {
            "images": [{"id": 1, "file_name": "a.jpg"}],
            "annotations": [{"image_id": 1, "caption": "a cat"}, {"image_id": 1, "caption": "it"}],
        },
        "annotations/captions_val2017.json",
    ),
    "Karpathy": Reader(
        lambda path: coco_karpathy(path.parent, pil_to_tensor),
        lambda: {
            "images": [
                {"split": "test", "filepath": "val2014", "filename": "a.jpg", "cocoid": 7, "sentences": [{"raw": "x"}]}
            ]
        },
        "dataset_coco.json",
    ),
    "Flickr30k": Reader(flickr, lambda: [{"image": "a.jpg", "caption": ["x", "y"]}], "flickr30k_val.json"),
    "class labels": Reader(lambda path: load_class_labels(path, 4), lambda: [0, 1, 29], "labels.json"),
    "sizes.json": Reader(
        lambda path: listed_counts([path.with_name("0.tar")]), lambda: {"0.tar": 5, "1.tar": 6}, "sizes.json"
    ),
    "a question": Reader(
        lambda path: read_question(path.read_bytes()), lambda: {"items": ["a", "b"]}, "question.json", names=" "
    ),
}

BYTE_READERS: dict[str, Reader] = {
    "JPEG": Reader(lambda path: decode_photograph(path, source=str(path)), lambda: JPEG, "a.jpg"),
    "PNG": Reader(
        lambda path: decode_photograph(path, source=str(path)), lambda: photograph_cases()["PNG"].encoded, "a.png"
    ),
    "TIFF": Reader(
        lambda path: decode_photograph(path, source=str(path)), lambda: photograph_cases()["TIFF"].encoded, "a.tif"
    ),
    "GIF": Reader(
        lambda path: decode_photograph(path, source=str(path)),
        lambda: photograph_cases()["GIF, two frames"].encoded,
        "a.gif",
    ),
    "WebP": Reader(
        lambda path: decode_photograph(path, source=str(path)), lambda: photograph_cases()["WebP"].encoded, "a.webp"
    ),
    "mask": Reader(
        lambda path: decode_mask(path, source=str(path)), lambda: photograph_cases()["PNG"].encoded, "m.png"
    ),
    "masks .npz": Reader(checked_masks, npz_bytes, "m.npz"),
    "masks .pt": Reader(checked_masks, lambda: torch_bytes({"1": torch.eye(6, dtype=torch.bool)}), "m.pt"),
    "shard": Reader(shard, shard_bytes, "0.tar"),
    "features": Reader(
        lambda path: (read_shard_header(path), map_shard(path)),
        lambda: next((FIXTURES / "pictures.index").glob("shard-*")).read_bytes(),
        "shard-000000.safetensors",
    ),
    "checkpoint": Reader(load_pretrained, checkpoint_bytes, "c.pt"),
    "safetensors": Reader(read_state_dict, lambda: save({"w": torch.ones(3, 2)}), "w.safetensors"),
    "state of a run": Reader(load_checkpoint, lambda: torch_bytes(checkpoint_fields()), "epoch_1.pt"),
    "BERT's vocabulary": Reader(
        lambda path: load_bert_tokenizer(path, 8)(["a stroke"]),
        lambda: b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\nstroke\n",
        "vocab.txt",
    ),
    "BERT's tokenizer": Reader(
        lambda path: load_bert_tokenizer(path, 8)(["a stroke"]),
        lambda: load_bert_tokenizer("builtin", 8).to_json().encode(),
        "tokenizer.json",
    ),
    "reports": Reader(
        read_report_table, lambda: csv_bytes(["study", "report"], ["a", "1. x\n2. y, z"], ["b", '1. "q"']), "r.csv"
    ),
    "labels": Reader(
        lambda path: read_label_csv(path, id_columns=["id"], class_columns={"c": "c", "d": "d"}),
        lambda: csv_bytes(["id", "c", "d"], ["a", "1", "0"], ["b", "-1", "0"]),
        "labels.csv",
    ),
    "labels of RSNA": Reader(
        read_rsna_labels, lambda: csv_bytes(["study", *RSNA_COLUMNS], ["ID_0123456789", *"000001"]), "rsna.csv"
    ),
    "list of studies": Reader(
        lambda path: read_study_list([path]), lambda: b"ID_0123456789\nID_0123456780\n", "studies.csv"
    ),
    "official labels of CQ500": Reader(build_cq500, cq500_bytes, "reads.csv"),
    "official labels of RSNA": Reader(read_rsna, rsna_slices, "stage_2_train.csv", names=".csv"),
    "RSICD": Reader(
        open_rsicd_table,
        lambda: csv_bytes(["filename", "captions", "image"], ["a.jpg", "['a lake .' 'it']", image_cell(JPEG[:200])]),
        "test.csv",
    ),
    "queries": Reader(read_queries, lambda: b"a lake\n\na roof\r\n", "q.txt"),
    "own images": Reader(
        own_images,
        lambda: b'{"image": "a.jpg", "items": ["x", "y"]}\n{"image": "b.jpg", "items": ["z"]}\n',
        "own.jsonl",
    ),
    "metrics of a run": Reader(
        lambda path: drop_lines_after(path, 16),
        lambda: b'{"kind": "train", "samples": 8, "loss": 1.0}\n{"kind": "eval", "samples": 16, "a/b": 0.5}\n',
        "metrics.jsonl",
        always=True,
    ),
    "scores of an evaluation": Reader(
        stored_scores,
        lambda: b'{"study": "s", "scores": {"a": 0.5, "b": 1}, "series": ["T1"], "skipped": []}\n' * 2,
        "s.jsonl",
        always=True,
    ),
    "volume .pt": Reader(read_volume, lambda: torch_bytes(torch.zeros(4, 6, 6, dtype=torch.int16)), "v.pt"),
    "masks in NIfTI": Reader(read_label_volumes, nifti_bytes, "v.nii"),
    "findings with masks": Reader(
        lambda path: read_rexgrounding(path, "val"),
        lambda: {"val": [{"name": "train_1_a_1.nii.gz", "findings": {"0": "A nodule.", "1": "An effusion."}}]},
        "dataset.json",
    ),
    "boxes": Reader(
        read_annotation, lambda: b"<annotation><object><name>1</name></object></annotation>", "1.xml", names=".xml"
    ),
    "cases of an evaluation": Reader(
        read_cases,
        lambda: {
            "classes": ["a"],
            "one_each": False,
            "cases": [
                {"id": "1", "patient": "p", "scores": [0.5], "labels": [1]},
                {"id": "2", "patient": "p", "scores": [-0.5], "labels": [None]},
            ],
        },
        "x.cases.json",
    ),
    "calibration": Reader(read_calibration, calibration_fields, "calibration.json"),
    "NIfTI": Reader(nifti, nifti_bytes, "v.nii"),
    "NIfTI, packed": Reader(nifti, lambda: gzip.compress(nifti_bytes(), mtime=0), "v.nii.gz"),
    "DICOM": Reader(dicom, dicom_bytes, "a.dcm", names="own"),
    "study .zip": Reader(packed_study, lambda: zip_bytes(dicom_files()), "s.zip"),
    "study .tar": Reader(packed_study, lambda: tar_bytes(dicom_files()), "s.tar"),
    "study .tar.gz": Reader(
        packed_study, lambda: gzip.compress(tar_bytes(dicom_files()), mtime=0), "s.tar.gz", names=""
    ),
    "Rad-ChestCT": Reader(read_rad_chestct, scan_npz_bytes, "trn00001.npz"),
    "splits of MR-RATE": Reader(
        lambda path: MrRate().patients_and_splits(path.parent),
        lambda: csv_bytes(["batch_id", "patient_uid", "study_uid", "split"], ["b", "P1", "S1", "train"]),
        "splits.csv",
    ),
}

HEADERS: dict[str, Reader] = {
    "DICOM": Reader(dicom_with, dicom_fields, "fields.json", names="own"),
    "NIfTI": Reader(nifti_with, lambda: NIFTI_FIELDS, "v.json", names="v.nii"),
}
"""Scans whose headers hold the fields of a JSON file."""
