"""The synthetic cohort: planted findings, their masks, determinism, and every folder through its own reader."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from itemizedclip_radiology.benchmarks.chest_ct import open_ct_rate, open_rad_chestct
from itemizedclip_radiology.benchmarks.head_ct import CQ500_PROMPTS, RSNA_PROMPTS, open_cq500, open_rsna
from itemizedclip_radiology.benchmarks.pub_brain_5 import open_pub_brain_5
from itemizedclip_radiology.data.brain import BrainStudies, find_study_files
from itemizedclip_radiology.data.chest import ChestInput, ChestScans, load_chest_volume
from itemizedclip_radiology.synthetic.cohort import (
    CohortFolder,
    main,
    open_cohort,
    write_cohort,
    write_ct_rate,
    write_studies,
)
from itemizedclip_radiology.synthetic.drawing import FINDINGS, render_study

from itemizedclip.data.items import is_normal_study

BRAIN = (16, 64, 64)
CHEST = (32, 96, 96)
SIZES = {"mri": BRAIN, "head_ct": BRAIN, "chest_ct": CHEST}
ALL_FINDINGS = [(kind, finding.name) for kind, findings in FINDINGS.items() for finding in findings]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohort")
    write_cohort(root, num_train=8, num_valid=4, num_test=10, seed=3, brain_size=(8, 32, 32), chest_size=(16, 48, 48))
    return root


# --- one study -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), ALL_FINDINGS)
def test_finding_is_seen_where_its_mask_says_and_in_no_other_series(kind, name):
    """Against the same anatomy without the finding."""
    for index in range(3):
        with_it, without = (
            render_study(kind, seed=0, stream="test", index=index, size=SIZES[kind], findings=findings)
            for findings in ([name], [])
        )
        (planted,) = with_it.findings
        assert with_it.names == {name}
        assert planted.mask.sum() >= 30
        assert set(planted.series) <= set(with_it.volumes)
        # As shares of the range that the model sees. The noise of the two studies is drawn anew.
        scale, noise = (1500, 12 / 1500) if kind == "chest_ct" else (1, 0.02)
        for series, volume in with_it.volumes.items():
            difference = np.abs(volume - without.volumes[series]) / scale
            if series in planted.series:
                assert difference[planted.mask].mean() > 0.08
                assert difference[~planted.mask].max() < 9 * noise
            else:
                assert difference.max() < 9 * noise


def test_studies_follow_from_their_arguments():
    def digest(**changes) -> str:
        options = {"seed": 0, "stream": "train", "index": 5, "size": (8, 32, 32)} | changes
        study = render_study("mri", **options)
        parts = [name.encode() + volume.tobytes() for name, volume in study.volumes.items()]
        return hashlib.sha256(b"".join(parts) + json.dumps(study.items).encode()).hexdigest()

    assert digest() == digest()
    others = [digest(seed=1), digest(stream="valid"), digest(index=6), digest(size=(8, 40, 40))]
    assert len({digest(), *others}) == 5


def test_findings_of_a_study_do_not_hide_one_another():
    seen = set()
    for index in range(30):
        study = render_study("head_ct", seed=0, stream="t", index=index, size=BRAIN)
        assert len(study.findings) <= 3
        seen |= study.names
        assert len(study.items) == max(1, len(study.findings))
        masks = [finding.mask for finding in study.findings]
        for first in range(len(masks)):
            for second in range(first):
                assert not (masks[first] & masks[second]).any()
    assert seen == {finding.name for finding in FINDINGS["head_ct"]}


@pytest.mark.parametrize("kind", ["mri", "head_ct", "chest_ct"])
def test_normal_studies_are_recognised_as_such(kind):
    normal = 0
    for index in range(24):
        study = render_study(kind, seed=0, stream="t", index=index, size=(8, 24, 24))
        assert is_normal_study(study.items, chest_ct=kind == "chest_ct") == (not study.findings)
        normal += not study.findings
    assert 1 <= normal <= 14


def test_texts_name_the_side_in_which_the_finding_lies():
    sided = 0
    for index in range(40):
        study = render_study("mri", seed=0, stream="side", index=index, size=BRAIN, findings=["Stroke"])
        (finding,) = study.findings
        columns = np.nonzero(finding.mask.any((0, 1)))[0]
        assert finding.side == ("left" if columns.mean() > 31.5 else "right")
        assert study.items[0] in ("Acute stroke.", f"Acute stroke in the {finding.side} hemisphere.")
        sided += finding.side in study.items[0]
    assert 8 <= sided <= 32


def test_unknown_finding_and_small_size():
    with pytest.raises(ValueError, match="no finding 'Cold' among those of mri; expected one of Stroke"):
        render_study("mri", seed=0, stream="t", index=0, size=BRAIN, findings=["Cold"])
    with pytest.raises(ValueError, match="at least 8"):
        render_study("mri", seed=0, stream="t", index=0, size=(4, 64, 64))


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["mri", "ct"])
def test_training_folders_open_as_they_are(cohort, part):
    files = find_study_files(cohort / part)
    assert files.valid_json.name == ("valid.json" if part == "mri" else "val.json")
    planted = open_cohort(cohort / part)
    ids = []
    for json_path, is_train in ((files.train_json, True), (files.valid_json, False)):
        dataset = BrainStudies(
            data_root=files.data_root,
            json_path=json_path,
            is_train=is_train,
            num_items=7,
            seed=0,
            num_series=6,
            volume_size=(8, 32, 32),
        )
        assert len(dataset) == (8 if is_train else 4)
        for index in range(len(dataset)):
            sample = dataset[(0, index)]
            ids.append(sample.sample_id)
            assert sample.image.shape[1:] == (1, 8, 32, 32)
            assert len(sample.image) == 6 if is_train else len(sample.image) >= 6
            findings = planted.studies[sample.sample_id]
            assert sample.is_normal == (not findings)
            if findings:
                assert sorted(sample.items) == sorted(str(finding["item"]) for finding in findings)
        assert len(dataset.skipped) == 0
    assert len(set(ids)) == 12
    assert set(ids) == set(planted.studies)


def test_masks_lie_on_the_finding_in_the_files(cohort):
    planted = open_cohort(cohort / "mri")
    checked = 0
    for study, findings in planted.studies.items():
        masks = planted.masks(study)
        assert set(masks) == {finding["finding"] for finding in findings}
        for finding in findings:
            mask = masks[str(finding["finding"])]
            assert mask.dtype == torch.bool
            split = "train" if "TRAIN" in study else "valid"
            volume = torch.load(cohort / "mri" / split / study / finding["series"][0] / "img.pt")
            assert mask.shape == volume.shape
            if finding["finding"] in ("Stroke", "Meningioma", "Metastasis"):
                assert float(volume[mask].float().mean()) > 220
                checked += 1
    assert checked


def test_head_ct_benchmarks(cohort):
    for benchmark, prompts in (
        (open_rsna(cohort / "rsna" / "RSNA.csv", cohort / "rsna"), RSNA_PROMPTS),
        (open_cq500(cohort / "cq500" / "CQ500.csv", cohort / "cq500"), CQ500_PROMPTS),
    ):
        assert len(benchmark) == 10
        assert benchmark.classes == tuple(prompts)
        assert benchmark.unlisted == []
        assert benchmark.labels_NC.any()
        assert not benchmark.labels_NC.all()
        planted = open_cohort(cohort / benchmark.name)
        for row, study in enumerate(benchmark.studies):
            folder = study.study_id if benchmark.name == "cq500" else f"RSNA_{study.study_id}"
            names = {finding["finding"] for finding in planted.studies[folder]}
            shown = {name for finding in planted.studies[folder] for name in finding["series"]}
            assert shown <= {series.name for series in study.series}
            bleeds = {"IPH", "IVH", "SDH", "EDH", "SAH"}
            assert benchmark.labels_NC[row, 0] == bool(names & bleeds)
            loaded = benchmark.load(row, size=(8, 32, 32))
            assert loaded.image.shape == (len(study.series), 1, 8, 32, 32)
            assert len(study.series) % 3 == 0


def test_pub_brain_5(cohort):
    full = open_pub_brain_5(cohort / "pub_brain_5" / "pub_brain_5.csv", cohort / "pub_brain_5")
    subset = open_pub_brain_5(cohort / "pub_brain_5" / "pub_brain_5_gt.csv", cohort / "pub_brain_5")
    assert (len(full), len(subset)) == (10, 5)
    assert full.labels_NC.sum(0).tolist() == [2, 2, 2, 2, 2]
    loaded = full.load(1, size=(8, 32, 32))
    assert set(loaded.grey_ranges) == {"0-1"}
    assert set(loaded.names) <= {"AX_T1", "AX_T2", "AX_FLAIR", "AX_DWI", "AX_T1_POST", "AX_SWI"}
    # The mask, carried into the model's voxels, lies on the bright stroke.
    mask = open_cohort(cohort / "pub_brain_5").masks(full.studies[1].study_id)["Stroke"]
    slot = loaded.names.index("AX_DWI")
    d, h, w = np.meshgrid(*(np.arange(n) for n in (8, 32, 32)), indexing="ij")
    source = loaded.voxel_maps[slot].to_input((d, h, w))
    inside = mask.numpy()[tuple(np.clip(np.floor(s + 0.5).astype(int), 0, n - 1) for s, n in zip(source, mask.shape))]
    grey = loaded.image[slot, 0].numpy() * 0.226 + 0.449
    assert inside.sum() > 10
    assert grey[inside].mean() > 0.85
    assert grey[~inside].mean() < 0.3


def test_chest_folders(cohort):
    options = ChestInput(size=(16, 48, 48))
    dataset = ChestScans(
        data_root=cohort / "ct_rate",
        items_json=cohort / "ct_rate" / "itemized.json",
        is_train=True,
        num_items=10,
        seed=0,
        options=options,
    )
    assert len(dataset) == 8
    for index in range(8):
        sample = dataset[(1, index)]
        assert sample.image.shape == (1, 1, 16, 48, 48)
        assert sample.is_normal == (not open_cohort(cohort / "ct_rate").studies[sample.sample_id])
    valid = open_ct_rate(cohort / "ct_rate" / "valid_labels.csv", cohort / "ct_rate")
    assert len(valid) == 6  # every other of the four scans has two reconstructions
    rad = open_rad_chestct(cohort / "rad_chestct" / "rad_chestct_labels.csv", cohort / "rad_chestct")
    assert len(rad) == 10
    for benchmark in (valid, rad):
        planted = open_cohort(cohort / benchmark.name)
        for row, study in enumerate(benchmark.studies):
            scan = study.study_id.rsplit("_", 1)[0] if benchmark.name == "ct_rate" else study.study_id
            names = {str(finding["finding"]) for finding in planted.studies[scan]}
            for name in names:
                assert benchmark.labels_NC[row, benchmark.classes.index(name)] == 1
            assert load_chest_volume(study.series[0].path, options).image.shape == (1, 1, 16, 48, 48)


def test_saved_margin_is_cropped_away(tmp_path):
    write_studies(tmp_path, kind="mri", num_train=1, num_valid=1, size=(8, 28, 28), with_margin=True)
    (path, *_) = sorted((tmp_path / "train").rglob("img.pt"))
    assert torch.load(path).shape == (8, 32, 32)
    dataset = BrainStudies(
        data_root=tmp_path,
        json_path=tmp_path / "train.json",
        is_train=True,
        num_items=3,
        seed=0,
        volume_size=(8, 28, 28),
    )
    assert dataset[0].image.shape == (10, 1, 8, 28, 28)


def test_chosen_findings_only(tmp_path):
    chosen = ["Emphysema", "Hiatal hernia"]
    folder = write_ct_rate(tmp_path, num_train=6, num_valid=1, size=(16, 48, 48), choose_from=chosen)
    names = {finding["finding"] for findings in folder.studies.values() for finding in findings}
    assert names == set(chosen)


def test_command_line(tmp_path, capsys):
    arguments = ["--num-train", "1", "--num-valid", "1", "--num-test", "5"]
    arguments += ["--brain-size", "8", "16", "16", "--chest-size", "8", "24", "24"]
    assert main(["--root", str(tmp_path / "c"), *arguments]) == 0
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "cq500", "ct", "ct_rate", "mri", "pub_brain_5", "rad_chestct", "rsna",
    ]  # fmt: skip
    assert main(["--root", str(tmp_path / "c"), *arguments]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err
    assert main(["--root", str(tmp_path / "d"), "--num-train", "0"]) == 2
    assert capsys.readouterr().err == "error: --num-train is 0; expected at least 1\n"
    assert main(["--root", str(tmp_path / "chest"), *arguments, "--parts", "ct_rate", "rad_chestct"]) == 0
    assert sorted(path.name for path in (tmp_path / "chest").iterdir()) == ["ct_rate", "rad_chestct"]
    with pytest.raises(FileNotFoundError, match=r"findings\.json"):
        open_cohort(tmp_path)
    assert isinstance(open_cohort(tmp_path / "c" / "mri"), CohortFolder)
