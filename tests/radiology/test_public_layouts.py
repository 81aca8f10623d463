"""Public data sets as they are downloaded → what the recipes and benchmarks of their names read."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import ROOT, run
from itemizedclip_radiology.benchmarks.chest_ct import open_ct_rate
from itemizedclip_radiology.benchmarks.head_ct import open_cq500, open_rsna
from itemizedclip_radiology.benchmarks.mr_rate import MR_RATE_PROMPTS, open_mr_rate
from itemizedclip_radiology.benchmarks.pub_brain_5 import open_pub_brain_5
from itemizedclip_radiology.benchmarks.zero_shot import auc_intervals
from itemizedclip_radiology.data.brain import BrainStudies
from itemizedclip_radiology.data.chest import ChestInput, ChestScans
from itemizedclip_radiology.prepare import studies as module
from itemizedclip_radiology.prepare.studies import PrepareStudiesOptions, SeriesRecord, join_items, open_tasks, prepare
from public_trees import (
    write_brats,
    write_cq500,
    write_ct_rate,
    write_mr_rate,
    write_rad_chestct,
    write_rsna,
)
from sklearn.metrics import roc_auc_score

from itemizedclip.commands import evaluate, train
from itemizedclip.data.report_files import read_reports
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.jobs import JobEnd

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # RSNA's names are no UIDs

CT_RATE_HEADER = (
    "VolumeName,Medical material,Arterial wall calcification,Cardiomegaly,Pericardial effusion,Coronary artery wall "
    "calcification,Hiatal hernia,Lymphadenopathy,Emphysema,Atelectasis,Lung nodule,Lung opacity,Pulmonary fibrotic "
    "sequela,Pleural effusion,Mosaic attenuation pattern,Peribronchial thickening,Consolidation,Bronchiectasis,"
    "Interlobular septal thickening"
)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Processes of their own are tested elsewhere."""

    def run(function, jobs, **_):
        for number, job in enumerate(jobs):
            function(*job)
            yield JobEnd(number, "", 0.1)

    monkeypatch.setattr(module, "run_jobs", run)


def prepared(source: Path, to: Path, layout: str, **more: object) -> list[SeriesRecord]:
    """What the command does, without its tables."""
    options = PrepareStudiesOptions(source=source, to=to, layout=layout, **more)
    tasks = open_tasks(options)
    records = prepare(options, tasks)
    module.write_results(to, options.recipe, records, items=join_items(options, tasks), layout=layout)
    return records


def index_of(to: Path, name: str) -> dict:
    return json.loads((to / name).read_text())


def test_mr_rate(tmp_path):
    splits = write_mr_rate(tmp_path / "mr-rate")
    (tmp_path / "mr-rate/mri/batch00/not_listed/img").mkdir(parents=True)
    to = tmp_path / "out"
    records = prepared(tmp_path / "mr-rate", to, "mr-rate", items=tmp_path / "mr-rate/sentences.jsonl")
    assert {record.reason for record in records} == {""}
    indices = {name: index_of(to, f"{name}.json") for name in ("train", "valid", "test")}
    of = {"train": "train", "val": "valid", "test": "test"}
    assert {study: name for name, index in indices.items() for study in index} == {s: of[p] for s, p in splits.items()}
    assert list(indices["train"]["22B0000"]["series"]) == ["AX_T1W", "AX_T1W_2", "SAG_FLAIR"]
    assert indices["train"]["22B0000"]["patient"] == indices["train"]["22B0001"]["patient"] == "P000"
    assert indices["train"]["22B0001"]["report"] == ["There is infarct.", "Lesion in the left hemisphere."]
    assert indices["train"]["22B0002"]["report"] == []  # its sentences are marked as unreadable
    sidecar = json.loads((to / "22B0001/SAG_FLAIR/img.json").read_text())
    assert sidecar["source"]["file"].endswith("22B0001_flair-raw-sag.nii.gz")  # unpacked from its zip
    data = BrainStudies(
        data_root=to, json_path=to / "train.json", is_train=False, num_items=3, seed=0, on_bad_sample="skip"
    )
    assert tuple(data[0].image[:, 0].shape[1:]) == (48, 224, 224)
    # The lesions of odd and even studies lie on opposite sides, in the same place of every series.
    middles = [
        torch.load(to / f"{study}/AX_T1W/img.pt").float().argmax() % 224 < 112 for study in ("22B0003", "22B0004")
    ]
    assert sorted(middles) == [False, True]
    # Reports of all batches are read together, by study.
    assert {report.key for report in read_reports(tmp_path / "mr-rate/reports").reports} == set(splits)
    (tmp_path / "mr-rate/splits.csv").unlink()
    with pytest.raises(UserError, match=r"no splits\.csv in it"):
        prepared(tmp_path / "mr-rate", to, "mr-rate")


# --- MR-RATE from its files to its score -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mr_rate(tmp_path_factory) -> Path:
    """A small MR-RATE beside what was prepared of it: source/, out/."""
    root = tmp_path_factory.mktemp("mr")
    write_mr_rate(root / "source", num_train=5, num_valid=3, num_test=6)
    options = PrepareStudiesOptions(
        source=root / "source", to=root / "out", layout="mr-rate", items=root / "source/sentences.jsonl"
    )
    tasks = open_tasks(options)
    for task in tasks:
        module.prepare_entry(task)
    records = module.read_records(root / "out")
    module.write_results(root / "out", "mri", records, items=join_items(options, tasks), layout="mr-rate")
    return root


def flags_of_training(root: Path, name: str) -> list[str]:
    labels = str(root / "source/pathology_labels/mrrate_labels.csv")
    return [
        "--data-root", str(root / "out"), "--labels", labels, "--prompts", str(root / "source/pathologies.json"),
        "--volume-size", "8", "32", "32", "--logs", str(root / "logs"), "--name", name,
        "--epochs", "1", "--warmup", "0", "--batch-size", "2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(mr_rate) -> Path:
    train.main(["mr-rate_debug", *flags_of_training(mr_rate, "one")])
    return mr_rate / "logs/one"


def flags_of_evaluation(root: Path, run: Path, output: Path) -> list[str]:
    return [
        "mr-rate", "--data-dir", str(root / "out"), "--labels",
        str(root / "source/pathology_labels/mrrate_labels.csv"), "--checkpoint", str(run / "checkpoints/epoch_1.pt"),
        "--output", str(output),
    ]  # fmt: skip


def test_mr_rate_is_trained_on_and_scored(mr_rate, trained, tmp_path):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    (measured,) = [line for line in lines if line["kind"] == "eval"]
    assert {"valid/mean_item_rank", "mr_rate_valid/macro_auc"} <= set(measured)
    evaluate.main(flags_of_evaluation(mr_rate, trained, tmp_path))
    results = json.loads((tmp_path / "mr_rate.results.json").read_text())
    facts = results["facts"]
    assert facts["num_studies"] == 6
    assert {"auc/Cerebral infarction", "auc/Intracranial meningioma", "mean_auc"} == set(results["metrics"])
    low, high = facts["auc_intervals_95"]["mean"]
    assert low <= results["metrics"]["mean_auc"] <= high
    assert facts["prompts"] == {name: MR_RATE_PROMPTS[name] for name in facts["prompts"]}
    assert "the label file has no column for 35 findings" in facts["notes"][0]


@pytest.mark.slow
def test_mr_rate_on_two_processes(mr_rate, trained, tmp_path):
    launched = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--",
        str(ROOT / "itemizedclip/__main__.py"),
    ]  # fmt: skip
    result = run(*launched, "train", "mr-rate_debug", *flags_of_training(mr_rate, "two"), OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert "mr_rate_valid/macro_auc" in (mr_rate / "logs/two/metrics.jsonl").read_text()
    evaluate.main(flags_of_evaluation(mr_rate, trained, tmp_path / "one"))
    command = [*launched, "evaluate", *flags_of_evaluation(mr_rate, trained, tmp_path / "two")]
    result = run(*command, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    metrics = [json.loads((tmp_path / name / "mr_rate.results.json").read_text())["metrics"] for name in ("one", "two")]
    assert metrics[0] == metrics[1]


def test_what_mr_rate_needs(mr_rate, tmp_path):
    labels = mr_rate / "source/pathology_labels/mrrate_labels.csv"
    assert len(open_mr_rate(labels, mr_rate / "out", split="all")) == 14
    with pytest.raises(
        UserError, match=r"test\.json: no such file; expected what `itemizedclip prepare studies MR-RATE"
    ):
        open_mr_rate(labels, tmp_path)
    (tmp_path / "labels.csv").write_text("study_uid,Health\nA,1\n")
    with pytest.raises(
        UserError, match="no column of a finding such as 'Cerebral infarction'; found study_uid, Health"
    ):
        open_mr_rate(tmp_path / "labels.csv", mr_rate / "out")
    (tmp_path / "prompts.json").write_text(json.dumps({"pathologies": {"Glioma": {"negative": "no"}}}))
    with pytest.raises(UserError, match="'Glioma' has no positive text"):
        open_mr_rate(labels, mr_rate / "out", prompts=tmp_path / "prompts.json")


def test_intervals_are_those_of_resampled_patients():
    generator = np.random.default_rng(3)
    labels = generator.integers(-1, 2, (40, 2)).astype(np.int8)
    scores = np.round(generator.normal(size=(40, 2)) + labels * 0.5, 1)  # with ties
    groups = [f"P{n // 3}" for n in range(40)]
    found = auc_intervals(scores, labels, ("a", "b"), groups, resamples=50, seed=5)
    # The same, plainly: the studies of each drawn patient as often as it was drawn.
    names = sorted(set(groups))
    draws = np.random.default_rng(5).multinomial(len(names), np.full(len(names), 1 / len(names)), size=50)
    aucs = np.array([
        [
            roc_auc_score(labels[rows, c], scores[rows, c])
            for c in (0, 1)
            if (rows := [n for n in range(40) for _ in range(draw[names.index(groups[n])]) if labels[n, c] >= 0])
        ]
        for draw in draws
    ])  # fmt: skip
    for key, values in (("a", aucs[:, 0]), ("b", aucs[:, 1]), ("mean", aucs.mean(1))):
        np.testing.assert_allclose(found[key], np.percentile(values, (2.5, 97.5)), atol=1e-12)


# --- the others ------------------------------------------------------------------------------------------------------


def test_ct_rate_is_rescaled_exactly_once(tmp_path):
    items = tmp_path / "items.json"
    items.write_text(json.dumps({"train_1_a_1.nii.gz": ["Emphysema."], "valid_1_a_1.nii.gz": ["No effusion."]}))
    volumes = {}
    for first_release in (False, True):
        source, to = tmp_path / f"source{first_release}", tmp_path / f"out{first_release}"
        write_ct_rate(source, first_release=first_release)
        records = prepared(source, to, "ct-rate", items=items)
        assert [record.reason for record in records if record.reason] == []
        volumes[first_release] = torch.load(to / "train/train_1/train_1_a/train_1_a_2.pt")
    assert torch.equal(volumes[False], volumes[True])
    # As the published converter does it: trilinear on the array as it lies, sizes cut to whole voxels.
    nifti = nibabel.load(tmp_path / "sourceFalse/dataset/train/train_1/train_1_a/train_1_a_2.nii.gz")
    array = torch.from_numpy(np.asarray(nifti.dataobj).transpose(2, 1, 0).astype(np.float32))
    expected = F.interpolate(array[None, None], size=(40, 112, 112), mode="trilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(volumes[False].float(), expected, atol=0.51, rtol=0)
    assert index_of(to, "itemized.json")["train_1_a"] == {
        "recons": ["train_1_a_1.nii.gz", "train_1_a_2.nii.gz"], "report": ["Emphysema."],
    }  # fmt: skip
    assert list(index_of(to, "valid_items.json")) == ["valid_1_a"]
    scans = ChestScans(
        data_root=to, items_json=to / "itemized.json", is_train=False, num_items=1, seed=0, options=ChestInput(),
        on_bad_sample="skip",
    )  # fmt: skip
    assert len(scans) == 1
    labels = tmp_path / "valid_labels.csv"
    labels.write_text(f"{CT_RATE_HEADER}\nvalid_1_a_1.nii.gz,{','.join('0' * 18)}\n")
    assert open_ct_rate(labels, to).load(0, size=(112, 336, 336)).image.shape == (1, 1, 112, 336, 336)


def test_rad_chestct_lies_as_it_is_stored(tmp_path):
    array = write_rad_chestct(tmp_path / "download/in folders")
    (tmp_path / "download/tst00009.npz").write_bytes(b"PK\x03\x04 cut short")
    records = prepared(tmp_path / "download", tmp_path / "out", "rad-chestct")
    assert [record.study for record in records if record.reason] == ["tst00009"]
    volume = torch.load(tmp_path / "out/trn00001/trn00001.pt")
    size = tuple(int(n * 0.8 / mm + 1e-3) for n, mm in zip(array.shape, (3, 1, 1)))
    expected = F.interpolate(
        torch.from_numpy(array).float()[None, None], size=size, mode="trilinear", align_corners=False
    )[0, 0]
    torch.testing.assert_close(volume.float(), expected, atol=0.51, rtol=0)
    assert not (tmp_path / "out/itemized.json").exists()


def test_rsna(tmp_path):
    write_rsna(tmp_path / "rsna")
    records = prepared(tmp_path / "rsna/stage_2_train", tmp_path / "out", "rsna")
    assert len(records) == 6
    labels = tmp_path / "rsna.csv"
    labels.write_text(
        "study,Any,Epidural,Intraparenchymal,Intraventricular,Subarachnoid,Subdural\n"
        "ID_00aa11bb22,1,0,0,0,0,1\nID_0123456789,0,0,0,0,0,0\n"
    )
    studies = open_rsna(labels, tmp_path / "out")
    assert studies.load(0, size=(48, 224, 224)).names == [
        f"MPR-AX_HEAD-protocol_{window}" for window in ("BloodWindow", "BoneWindow", "BrainWindow")
    ]
    # The headers are read but once: which slice is whose is known from then on.
    (tmp_path / "out/.prepare/rsna_images.csv").write_text("ImageID,StudyInstanceUID\nID_000000000,ID_0000000001\n")
    options = PrepareStudiesOptions(source=tmp_path / "rsna/stage_2_train", to=tmp_path / "out", layout="rsna")
    assert [task.entry.study for task in open_tasks(options)] == ["RSNA_ID_0000000001"]


def test_cq500(tmp_path):
    write_cq500(tmp_path / "cq500")
    records = prepared(tmp_path / "cq500", tmp_path / "out", "cq500")
    assert len(records) == 9
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("img_bone.pt")}
    series = ("CQ500CT000/CT_Plain", "CQ500CT000/CT_4cc_sec_150cc_D3D_on", "CQ500CT007/CT_Plain")
    assert found == {f"{name}/img_bone.pt" for name in series}
    labels = tmp_path / "CQ500.csv"
    names = "ICH IPH IVH SDH EDH SAH BleedLocation-Left BleedLocation-Right ChronicBleed Fracture CalvarialFracture"
    names += " OtherFracture MassEffect MidlineShift"
    labels.write_text(
        f"study,{','.join(names.split())}\nCQ500CT0,{','.join('1' * 14)}\nCQ500CT7,{','.join('0' * 14)}\n"
    )
    studies = open_cq500(labels, tmp_path / "out")
    assert [len(study.series) for study in studies.studies] == [6, 3]


def test_brats_becomes_a_part_of_pub_brain_5(tmp_path):
    write_brats(tmp_path / "brats")
    records = prepared(tmp_path / "brats", tmp_path / "out", "brats")
    assert sum(record.reason == "its name says segmentation" for record in records) == 3
    labels = tmp_path / "pub_brain_5.csv"
    rows = [
        ("train/adult_glioma/BraTS-GLI-00000-000", "0,0,1,0,0"),
        ("train/adult_glioma/BraTS-GLI-00001-001", "0,0,1,0,0"),
        ("test/adult_metastasis/BraTS-MET-00002-000", "0,0,0,0,1"),
    ]
    lines = [f"/data/pub_brain_5/brats23/{path},{values}" for path, values in rows]
    labels.write_text("\n".join(["study,Normal,Stroke,Glioma,Meningioma,Metastasis", *lines]) + "\n")
    studies = open_pub_brain_5(labels, tmp_path / "out")
    loaded = studies.load(0, size=(48, 224, 224))
    assert loaded.names == ["AX_t1c", "AX_t2f"]
    # Its own size, turned to columns to the right, rows to the back, slices to the feet, in grey values.
    volume = torch.load(loaded.sources[0])
    nifti = nibabel.as_closest_canonical(nibabel.load(next((tmp_path / "brats").rglob("*GLI-00000*-t1c.nii.gz"))))
    array = np.asarray(nifti.dataobj).transpose(2, 1, 0)[::-1, ::-1, :].astype(np.float64)  # RAS → RPI
    low, high = np.percentile(array, (0.5, 99.5))
    expected = (array.clip(low, high) - low) / (high - low) * 255
    np.testing.assert_allclose(volume.numpy(), expected, atol=0.51)


def test_flags_that_contradict(tmp_path):
    with pytest.raises(UserError, match="--from is 'mrrate'; expected mr-rate, ct-rate"):
        PrepareStudiesOptions(source=tmp_path, to=tmp_path, layout="mrrate")
    with pytest.raises(UserError, match="--recipe is ct; --from mr-rate is for mri"):
        PrepareStudiesOptions(source=tmp_path, to=tmp_path, layout="mr-rate", recipe="ct")
    with pytest.raises(UserError, match="give --recipe mri, ct or chest-ct, or --from"):
        PrepareStudiesOptions(source=tmp_path, to=tmp_path)
    for layout in module.PUBLIC_LAYOUTS:
        source = tmp_path / "empty"
        source.mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"expected|no \.dcm file"):
            open_tasks(PrepareStudiesOptions(source=source, to=tmp_path / "out", layout=layout))
    shutil.rmtree(tmp_path / "out")


def test_items_are_joined_by_the_names_of_the_source(tmp_path):
    from public_trees import brain
    from scan_files import write_nifti

    for name in ("Case7", "Case8"):
        write_nifti(tmp_path / f"in/{name}.nii.gz", *brain())
    (tmp_path / "reports.csv").write_text('Case7,"1. Old infarct.\n2. No mass."\nCase9,"1. Other."\n')
    options = PrepareStudiesOptions(
        source=tmp_path / "in", to=tmp_path / "out", recipe="mri", valid_share=0.0, key_file=tmp_path / "key",
        items=tmp_path / "reports.csv",
    )  # fmt: skip
    tasks = open_tasks(options)
    records = prepare(options, tasks)
    module.write_results(tmp_path / "out", "mri", records, items=join_items(options, tasks))
    reports = sorted(entry["report"] for entry in index_of(tmp_path / "out", "train.json").values())
    assert reports == [[], ["Old infarct.", "No mass."]]
    rows = list(csv.DictReader((tmp_path / "out/series.csv").open()))
    assert not any("Case" in " ".join(row.values()) for row in rows)
