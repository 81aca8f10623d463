"""Label files of the five zero-shot benchmarks: readers, builders, studies on disk, protocols."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from itemizedclip_radiology.benchmarks import chest_ct as chest
from itemizedclip_radiology.benchmarks import head_ct
from itemizedclip_radiology.benchmarks import pub_brain_5 as pub
from itemizedclip_radiology.data.label_table import LabelTable, count_differences, read_label_csv, write_label_csv
from itemizedclip_radiology.prepare import labels as builders


def write_csv(path: Path, header, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def save(path: Path, value: int = 7, shape=(2, 4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.full(shape, value, dtype=torch.uint8), path)


# --- any table -------------------------------------------------------------------------------------------------------


def read_plain(path: Path, **changes) -> LabelTable:
    options = {"id_columns": ["study"], "class_columns": {"A": "A", "B": "B"}}
    return read_label_csv(path, **(options | changes))


def test_columns_are_found_by_name_in_any_order(tmp_path):
    rows = [["x", "1", "s1", "0.0"], ["y", "-1", "s2", "1"]]
    path = write_csv(tmp_path / "l.csv", ["junk", "b ", "Study", "A"], rows)
    table = read_plain(path)
    assert table.ids == ["s1", "s2"]
    assert table.classes == ("A", "B")
    np.testing.assert_array_equal(table.labels_NC, [[0, 1], [1, -1]])
    assert table.positives() == {"A": 1, "B": 1}
    assert table.select(["B"]).rows([1]).labels_NC.tolist() == [[-1]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("study,A\ns,1\n", "no column 'B'; found study, A"),
        ("", "no column 'study'; found an empty file"),
        ("study,A,B,b\ns,1,0,0\n", "2 columns are called 'B'"),
        ("study,A,B\n", "no row"),
        ("study,A,B\ns,1,2\n", "line 2: column 'B': '2'; expected 0, 1 or -1"),
        ("study,A,B\ns,1,\n", "line 2: column 'B': ''"),
        ("study,A,B\ns,1\n", "line 2: 2 values for 3 columns"),
        ("study,A,B\ns,1,0\ns,1,0\n", "line 3: 's' stands twice"),
    ],
)
def test_bad_label_file_is_named_with_line_and_column(tmp_path, text, words):
    path = tmp_path / "l.csv"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_plain(path)
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)


def test_missing_label_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_plain(tmp_path / "no.csv")


def test_repeated_rows_must_agree(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("study,A,B\ns,1,0\ns,1,0\nt,0,0\n")
    assert read_plain(path, rows_may_repeat=True).ids == ["s", "t"]
    path.write_text("study,A,B\ns,1,0\ns,1,1\n")
    with pytest.raises(ValueError, match="line 3: 's' stands twice with different labels"):
        read_plain(path, rows_may_repeat=True)


def test_written_tables_read_back(tmp_path):
    table = LabelTable(tmp_path, ["s1", "s,2"], ("A", "B"), np.array([[1, 0], [-1, 1]], dtype=np.int8))
    write_label_csv(tmp_path / "new" / "out.csv", table, id_column="study")
    back = read_plain(tmp_path / "new" / "out.csv")
    assert back.ids == table.ids
    np.testing.assert_array_equal(back.labels_NC, table.labels_NC)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.csv"]
    assert count_differences(back, rows=2, positives={"A": 1, "B": 1}) == []
    assert count_differences(back, rows=3, positives={"A": 4}) == ["2 rows, published 3", "A: 1 positive, published 4"]


# --- Pub-Brain-5 -----------------------------------------------------------------------------------------------------

PUB_STUDIES = {"open_bhb/n1": 0, "stroke/s1": 1, "brats23/train/adult_glioma/BraTS-GLI-1": 2, "nyu_mets/m1": 4}


def write_pub(root: Path, *, prefix: str = "data/pub_brain_5") -> Path:
    rows = []
    for study, column in PUB_STUDIES.items():
        rows.append([f"/data/pub_brain_5/{study}", *(int(c == column) for c in range(5))])
        for scan in ("BraTS-GLI-1-000-t1c.pt", "dwi.pt"):
            save(root / prefix / study / scan)
        save(root / prefix / study / "._dwi.pt")
        (root / prefix / study / "notes.txt").write_text("x")
    return write_csv(root / "pub.csv", ["study", *pub.PROMPTS], rows)


def test_pub_brain_paths():
    assert pub.study_path("/data/pub_brain_5/stroke/sub-1") == "stroke/sub-1"
    assert pub.study_path("pub_brain_5/stroke/sub-1") == pub.study_path("stroke/sub-1") == "stroke/sub-1"
    for bad in ("", "/", "/data/pub_brain_5/../../etc"):
        with pytest.raises(ValueError, match="expected a path"):
            pub.study_path(bad)


@pytest.mark.parametrize("prefix", ["data/pub_brain_5", "pub_brain_5", ""])
def test_pub_brain_studies(tmp_path, prefix):
    benchmark = pub.open_pub_brain_5(write_pub(tmp_path, prefix=prefix), tmp_path)
    assert [study.study_id for study in benchmark.studies] == list(PUB_STUDIES)
    assert [file.name for file in benchmark.studies[2].series] == ["AX_t1c", "AX_dwi"]
    assert benchmark.labels_NC.argmax(1).tolist() == [0, 1, 2, 4]
    assert benchmark.classes == ("Normal", "Stroke", "Glioma", "Meningioma", "Metastasis")
    assert benchmark.prompts == ("Study is unremarkable", "Acute stroke", "Glioma", "Meningioma", "Metastasis")
    loaded = benchmark.load(0, size=(4, 7, 7))
    assert loaded.image.shape == (2, 1, 4, 7, 7)
    assert benchmark.reader.facts() == {"prepare": "resample", "grey_range": None}


def test_pub_brain_published_protocol_divides_by_255(tmp_path):
    path = write_pub(tmp_path)
    scan = tmp_path / "data/pub_brain_5/open_bhb/n1/dwi.pt"
    torch.save(torch.full((2, 4, 4), 0.5), scan)
    shown = {}
    for protocol in ("corrected", "published"):
        benchmark = pub.open_pub_brain_5(path, tmp_path, protocol=protocol)
        loaded = benchmark.load(0, size=(2, 7, 7))
        shown[protocol] = float(loaded.image[loaded.names.index("AX_dwi")].mean())
    assert shown["corrected"] == pytest.approx((0.5 - 0.449) / 0.226, abs=1e-4)
    assert shown["published"] == pytest.approx((0.5 / 255 - 0.449) / 0.226, abs=1e-4)


def test_pub_brain_missing_and_empty_studies(tmp_path):
    path = write_pub(tmp_path)
    for scan in (tmp_path / "data/pub_brain_5/stroke/s1").glob("*.pt"):
        scan.unlink()
    benchmark = pub.open_pub_brain_5(path, tmp_path)
    assert list(benchmark.excluded) == ["stroke/s1"]
    assert len(benchmark) == 3
    folder = tmp_path / "data/pub_brain_5/nyu_mets/m1"
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"1 of 3 studies .* nyu_mets/m1.*--allow-missing"):
        pub.open_pub_brain_5(path, tmp_path)
    benchmark = pub.open_pub_brain_5(path, tmp_path, allow_missing=True)
    assert benchmark.missing == ["nyu_mets/m1"]
    assert benchmark.missing_labels_MC.tolist() == [[0, 0, 0, 0, 1]]
    assert benchmark.labels_NC.shape == (2, 5)
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        pub.open_pub_brain_5(path, tmp_path / "nowhere", allow_missing=True)


def test_pub_brain_labels_are_one_hot(tmp_path):
    path = write_csv(tmp_path / "p.csv", ["study", *pub.PROMPTS], [["/data/pub_brain_5/stroke/s", 1, 1, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"'stroke/s'.*exactly one 1"):
        pub.read_labels(path)


def test_pub_brain_tasks():
    assert pub.TASKS["stroke"] == ("Normal", "Stroke")
    assert pub.TASKS["tumour"] == ("Glioma", "Meningioma", "Metastasis")
    assert len(pub.TASKS) == 6
    assert sum(pub.PUBLISHED_COUNTS["pub_brain_5"].values()) == 18343
    assert sum(pub.PUBLISHED_COUNTS["pub_brain_5_gt"].values()) == 8944


# --- RSNA ------------------------------------------------------------------------------------------------------------


def write_rsna(root: Path) -> Path:
    ids = ["00aa11bb22", "00aa11bb23", "00aa11bb24"]
    rows = [[f"ID_{ids[0]}", 1, 0, 1, 1, 0, 0], [f"ID_{ids[1]}", 0, 0, 0, 0, 0, 0], [f"ID_{ids[2]}", 1, 1, 0, 0, 0, 1]]
    for number, name in enumerate(ids):
        for window in head_ct.WINDOWS:
            save(root / "data" / f"{'RSNA_' if number else ''}ID_{name}" / "series2" / window, number)
    return write_csv(root / "RSNA.csv", ["study", *head_ct.RSNA_COLUMNS], rows)


def test_rsna_ids():
    for text in ("ID_00aa11bb22", "RSNA_ID_00AA11BB22", " 00aa11bb22 "):
        assert head_ct.rsna_id(text) == "ID_00aa11bb22"
    for bad in ("ID_00aa11bb2", "ID_00aa11bb2z", "CQ500CT1"):
        with pytest.raises(ValueError, match="expected a study id"):
            head_ct.rsna_id(bad)


def test_rsna_studies(tmp_path):
    path = write_rsna(tmp_path)
    save(tmp_path / "data" / "ID_00aa11bb22" / "series1" / "img_brain.pt")
    save(tmp_path / "data" / "RSNA_ID_ffffffffff" / "s" / "img_brain.pt")
    (tmp_path / "data" / "README").write_text("no study")
    benchmark = head_ct.open_rsna(path, tmp_path / "data")
    assert [study.study_id for study in benchmark.studies] == ["ID_00aa11bb22", "ID_00aa11bb23", "ID_00aa11bb24"]
    assert [file.name for file in benchmark.studies[1].series] == [
        "MPR-AX_HEAD-protocol_BloodWindow",
        "MPR-AX_HEAD-protocol_BoneWindow",
        "MPR-AX_HEAD-protocol_BrainWindow",
    ]
    assert [file.path.name for file in benchmark.studies[1].series] == ["img_blood.pt", "img_bone.pt", "img_brain.pt"]
    # Any, intraparenchymal, intraventricular, subarachnoid, subdural: by name, epidural left out.
    assert benchmark.classes == ("Any", "Intraparenchymal", "Intraventricular", "Subarachnoid", "Subdural")
    assert benchmark.labels_NC.tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]]
    assert benchmark.prompts[4] == "Intracranial hemorrhage with subdural hemorrhage"
    assert benchmark.unlisted == ["ID_ffffffffff"]
    # Two series: the first by name is used, although it lacks two windows, and both facts are said.
    assert benchmark.studies[0].series[0].path.parent.name == "series1"
    notes = " ".join(benchmark.notes)
    assert "1 studies have several series" in notes
    assert "lack a window" in notes


def test_rsna_missing_studies(tmp_path, caplog):
    path = write_rsna(tmp_path)
    (tmp_path / "data" / "RSNA_ID_00aa11bb24").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="ID_00aa11bb24"):
        head_ct.open_rsna(path, tmp_path / "data")
    corrected = head_ct.open_rsna(path, tmp_path / "data", allow_missing=True)
    published = head_ct.open_rsna(path, tmp_path / "data", allow_missing=True, protocol="published")
    assert corrected.missing == published.missing == ["ID_00aa11bb24"]
    assert not corrected.missing_score_zero
    assert published.missing_score_zero
    assert published.missing_labels_MC.tolist() == [[1, 0, 0, 0, 1]]
    said = [record.getMessage() for record in caplog.records]
    assert [message.rpartition("; ")[2] for message in said] == [
        "they are left out", "they count with score 0, as published",
    ]  # fmt: skip
    assert "1 listed studies missing, which count with score 0, as published" in published.describe()
    assert "score 0" not in corrected.describe()


def test_rsna_study_lists(tmp_path):
    path = write_rsna(tmp_path)
    (tmp_path / "a.txt").write_text("RSNA_ID_00aa11bb23\nID_00aa11bb22")
    listed = head_ct.read_study_list([tmp_path / "a.txt"])
    benchmark = head_ct.open_rsna(path, tmp_path / "data", studies=listed)
    assert [study.study_id for study in benchmark.studies] == listed == ["ID_00aa11bb23", "ID_00aa11bb22"]
    with pytest.raises(ValueError, match="no labels for 1 of 1 listed studies, such as ID_eeeeeeeeee"):
        head_ct.open_rsna(path, tmp_path / "data", studies=["ID_eeeeeeeeee"])
    for text, words in [("ID_xyz\n", "line 1"), ("00aa11bb22\n00aa11bb22\n", "stands twice"), ("\n", "no study id")]:
        (tmp_path / "b.txt").write_text(text)
        with pytest.raises(ValueError, match=words):
            head_ct.read_study_list([tmp_path / "b.txt"])


def test_two_folders_of_one_study_are_refused(tmp_path):
    path = write_rsna(tmp_path)
    save(tmp_path / "data" / "RSNA_ID_00aa11bb22" / "s" / "img_brain.pt")
    with pytest.raises(ValueError, match="are the same study"):
        head_ct.open_rsna(path, tmp_path / "data")


def write_rsna_official(root: Path, *, drop: str | None = None) -> tuple[Path, Path]:
    """Three images of two studies; study ID_0000000001 bleeds on its second image only."""
    positive = {"ID_00000000b_subdural", "ID_00000000b_any", "ID_00000000c_any", "ID_00000000c_epidural"}
    rows = [
        [name, int(name in positive)]
        for image in ("a", "b", "c")
        for kind in ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any")
        if (name := f"ID_00000000{image}_{kind}") != drop
    ]
    labels = write_csv(root / "stage_2_train.csv", ["ID", "Label"], [*rows, rows[0]])  # one row repeated
    images = [[f"ID_00000000{image}", 5, f"ID_000000000{study}"] for image, study in ("a1", "c2", "b1")]
    table = write_csv(root / "images.csv", ["SOPInstanceUID", "Rows", "StudyInstanceUID"], images)
    return labels, table


def test_rsna_builder_takes_the_maximum_over_slices(tmp_path):
    labels, images = write_rsna_official(tmp_path)
    table = builders.build_rsna(labels, images)
    assert table.ids == ["ID_0000000001", "ID_0000000002"]
    assert table.classes == ("Any", "Epidural", "Intraparenchymal", "Intraventricular", "Subarachnoid", "Subdural")
    assert table.labels_NC.tolist() == [[1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0]]
    output = str(tmp_path / "o.csv")
    assert builders.main(["rsna", "--labels", str(labels), "--images", str(images), "--output", output]) == 0
    assert head_ct.read_rsna_labels(tmp_path / "o.csv").labels_NC.tolist() == [[1, 0, 0, 0, 1], [1, 0, 0, 0, 0]]


def test_rsna_builder_refuses_what_it_cannot_assign(tmp_path):
    labels, images = write_rsna_official(tmp_path, drop="ID_00000000b_subdural")
    with pytest.raises(ValueError, match="ID_00000000b: rows are missing"):
        builders.build_rsna(labels, images)
    labels, images = write_rsna_official(tmp_path)
    images.write_text(images.read_text().replace("ID_00000000b", "ID_00000000f"))
    with pytest.raises(ValueError, match=r"no study for 1 of 3 images.*ID_00000000b.*--allow-unknown-images"):
        builders.build_rsna(labels, images)
    table = builders.build_rsna(labels, images, allow_unknown_images=True)
    assert table.labels_NC.tolist() == [[0] * 6, [1, 1, 0, 0, 0, 0]]
    labels.write_text(labels.read_text() + "ID_00000000a_any,1\n")
    with pytest.raises(ValueError, match="line 21: ID_00000000a, any: has rows with 0 and with 1"):
        builders.build_rsna(labels, images)
    labels.write_text("ID,Label\nID_00000000a_skull,1\n")
    with pytest.raises(ValueError, match="line 2: ID_00000000a_skull,1; expected"):
        builders.build_rsna(labels, images)


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_rsna_image_table_from_dicom_headers(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    for name, study in (("ID_00000000a", "ID_0000000001"), ("ID_00000000b", "ID_0000000002")):
        header = pydicom.Dataset()
        header.SOPInstanceUID, header.StudyInstanceUID = name, study
        header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        header.save_as(tmp_path / f"{name}.dcm", enforce_file_format=True)
    assert builders.list_rsna_images(tmp_path, workers=1) == [
        ("ID_00000000a", "ID_0000000001"),
        ("ID_00000000b", "ID_0000000002"),
    ]
    (tmp_path / "bad.dcm").write_bytes(b"no dicom")
    with pytest.raises(ValueError, match=r"1 of 3 files .*bad\.dcm"):
        builders.list_rsna_images(tmp_path, workers=1)


# --- CQ500 -----------------------------------------------------------------------------------------------------------


def cq500_row(**present: int) -> list[int]:
    return [present.get(name.replace("-", "_"), 0) for name in head_ct.CQ500_COLUMNS]


CQ500_ROWS = {
    "CQ500CT000": cq500_row(ICH=1, IPH=1, BleedLocation_Left=1, MassEffect=1),
    "CQ500CT007": cq500_row(MassEffect=1, MidlineShift=1),
    "CQ500CT163": cq500_row(ICH=1),
}


def write_cq500(root: Path) -> Path:
    for study, series in (("CQ500CT0", ["CT_Thin", "CT_Plain"]), ("CQ500-CT-7", ["CT_Plain"])):
        for name in series:
            for window in head_ct.WINDOWS:
                save(root / "data" / study / name / window)
    rows = [[study, *row] for study, row in CQ500_ROWS.items()]
    return write_csv(root / "CQ500.csv", ["study", *head_ct.CQ500_COLUMNS], rows)


def test_cq500_ids():
    for text in ("CQ500CT7", "CQ500CT007", "CQ500-CT-7", "CQ500CT7 CQ500CT7"):
        assert head_ct.cq500_id(text) == "CQ500CT007"
    with pytest.raises(ValueError, match="expected a study id"):
        head_ct.cq500_id("CQ500CTx")


def test_cq500_studies_and_the_swap(tmp_path):
    path = write_cq500(tmp_path)
    corrected = head_ct.open_cq500(path, tmp_path / "data")
    published = head_ct.open_cq500(path, tmp_path / "data", protocol="published")
    for benchmark in (corrected, published):
        assert [study.study_id for study in benchmark.studies] == ["CQ500CT000", "CQ500CT007"]
        assert benchmark.prompts[8:] == ("Midline shift", "Mass Effect")
        assert benchmark.classes[8:] == ("MidlineShift", "MassEffect")
        assert list(benchmark.excluded) == ["CQ500CT163"]
    assert corrected.labels_NC[:, 8:].tolist() == [[0, 1], [1, 1]]
    assert published.labels_NC[:, 8:].tolist() == [[1, 0], [1, 1]]
    assert corrected.labels_NC[0].tolist() == [1, 1, 0, 0, 0, 0, 1, 0, 0, 1]
    assert any("swapped" in note for note in published.notes)
    assert [file.name for file in corrected.studies[0].series] == [
        f"{series}_AX_{window}Window" for series in ("CT_Plain", "CT_Thin") for window in ("Blood", "Bone", "Brain")
    ]
    assert corrected.prompts[3:6] == tuple(
        f"Intracranial hemorrhage with {kind} hemorrhage" for kind in ("subdural", "epidural", "subarachnoid")
    )


def test_cq500_table_with_a_row_per_series(tmp_path):
    header = ["subject", "study", "serie"]
    for name in head_ct.CQ500_COLUMNS:
        header += [f"R1_{name}", f"R2_{name}", f"R3_{name}", f"consensus_{name}"]
    rows = []
    for study, values in CQ500_ROWS.items():
        for series in ("a", "b"):
            rows.append([study, study, series, *(v for value in values for v in (1 - value, 1 - value, 1, value))])
    table = head_ct.read_cq500_labels(write_csv(tmp_path / "c.csv", header, rows))
    assert table.ids == list(CQ500_ROWS)
    assert table.labels_NC.tolist() == list(CQ500_ROWS.values())


def test_cq500_builder_takes_two_of_three_readers(tmp_path):
    header = ["name", "Category"] + [f"R{r}:{name}" for r in (1, 2, 3) for name in head_ct.CQ500_COLUMNS]
    votes = np.zeros((4, 3, 14), dtype=int)
    votes[1, :2, 0] = 1
    votes[2, 1, 0] = 1
    votes[3, :, 13] = 1
    rows = [[f"CQ500-CT-{n}", "B1", *votes[n].ravel()] for n in range(4)]
    path = write_csv(tmp_path / "reads.csv", header, rows)
    table = builders.build_cq500(path)
    assert table.ids == ["CQ500CT000", "CQ500CT001", "CQ500CT002", "CQ500CT003"]
    assert table.column("ICH").tolist() == [0, 1, 0, 0]
    assert table.column("MidlineShift").tolist() == [0, 0, 0, 1]
    assert table.labels_NC.sum() == 2
    path.write_text(path.read_text().replace("CQ500-CT-3", "CQ500-CT-2"))
    with pytest.raises(ValueError, match="line 5: 'CQ500CT002' stands twice"):
        builders.build_cq500(path)


# --- CT-RATE and Rad-ChestCT -----------------------------------------------------------------------------------------


def write_ct_rate(root: Path) -> Path:
    rows = []
    for n, name in enumerate(("valid_1_a_1", "valid_1_a_2", "valid_2_b_1")):
        labels = [0] * 18
        labels[7 + n] = 1  # Emphysema, Atelectasis, Lung nodule
        rows.append([f"{name}.nii.gz", *labels])
        save(root / "data" / "valid" / name[:7] / name[:9] / f"{name}.pt")
    return write_csv(root / "valid_predicted_labels.csv", ["VolumeName", *chest.CT_RATE_COLUMNS], rows)


def test_ct_rate_volumes(tmp_path):
    benchmark = chest.open_ct_rate(write_ct_rate(tmp_path), tmp_path / "data")
    assert [study.study_id for study in benchmark.studies] == ["valid_1_a_1", "valid_1_a_2", "valid_2_b_1"]
    assert benchmark.studies[2].series[0].path == tmp_path / "data/valid/valid_2/valid_2_b/valid_2_b_1.pt"
    assert benchmark.classes == chest.CHEST_CLASSES
    assert len(benchmark.classes) == 16
    np.testing.assert_array_equal(benchmark.labels_NC, np.eye(3, 16, dtype=np.int8))
    benchmark.studies[0].series[0].path.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 studies"):
        chest.open_ct_rate(tmp_path / "valid_predicted_labels.csv", tmp_path / "data")


def test_chest_prompts():
    assert chest.chest_prompt("Emphysema") == "findings consistent with emphysema"
    assert chest.chest_prompt("Lung nodule") == "findings consistent with nodules or nodular density"
    assert chest.chest_prompt("Lung opacity") == "findings consistent with opacity"
    assert chest.chest_prompt("Bronchiectasis") == "findings consistent with bronchiectasis or bronchiectatic changes"
    assert "Medical material" not in chest.CHEST_CLASSES
    assert chest.RAD_CHESTCT_CLASSES.index("Coronary artery wall calcification") < chest.RAD_CHESTCT_CLASSES.index(
        "Hiatal hernia"
    )


def test_ct_rate_builder_keeps_one_row_per_scan_when_asked(tmp_path):
    path = write_ct_rate(tmp_path)
    assert builders.build_ct_rate(path).ids == ["valid_1_a_1.nii.gz", "valid_1_a_2.nii.gz", "valid_2_b_1.nii.gz"]
    single = builders.build_ct_rate(path, first_reconstruction_only=True)
    assert single.ids == ["valid_1_a_1.nii.gz", "valid_2_b_1.nii.gz"]
    assert single.column("Lung nodule").tolist() == [0, 1]


def test_rad_chestct_layouts_and_merged_calcification(tmp_path):
    labels = np.zeros((3, 15), dtype=int)
    labels[1, 13:] = 1
    labels[2, 0] = 1
    ids = ["trn00001", "val00002", "tst00003"]
    rows = [[name, *(f"{value}.0" for value in row)] for name, row in zip(ids, labels)]
    path = write_csv(tmp_path / "rad.csv", ["NoteAcc_DEID", *chest.RAD_CHESTCT_COLUMNS], rows)
    save(tmp_path / "data" / "trn00001" / "trn00001.pt")
    save(tmp_path / "data" / "val00002.pt")
    save(tmp_path / "data" / "tst00003" / "tst00003.pt")
    benchmark = chest.open_rad_chestct(path, tmp_path / "data")
    assert [study.series[0].path.name for study in benchmark.studies] == [f"{name}.pt" for name in ids]
    assert len(benchmark.classes) == 15
    merged, classes = chest.merge_calcification(benchmark.labels_NC, benchmark.classes)
    assert len(classes) == 14
    assert merged[:, classes.index("Calcification")].tolist() == [0, 1, 0]
    assert merged[:, classes.index("Emphysema")].tolist() == [0, 0, 1]
    scores, _ = chest.merge_calcification(np.linspace(0, 1, 15)[None], benchmark.classes)
    assert scores[0, -1] == 1  # the larger of the two
    with pytest.raises(ValueError, match="both calcification columns"):
        chest.merge_calcification(merged, classes)


def test_rad_chestct_builder_joins_locations_and_files(tmp_path):
    sources = sorted(set(builders.RAD_CHESTCT_SOURCES.values()))
    places = ("left_lung", "right_lung", "other")
    columns = [f"{source}*{place}" for source in [*sources, "scattered_nod"] for place in places]

    def row(name, *present):
        return [name, *(f"{float(column in present)}" for column in columns)]

    paths = []
    for split, rows in {
        "train": [row("trn00001", "fibrosis*right_lung"), row("trn00002")],
        "valid": [row("val00001", "calcification*other", "scattered_nod*other")],
        "test": [row("tst00001", "bronchial_wall_thickening*left_lung", "hernia*other")],
    }.items():
        paths.append(write_csv(tmp_path / f"img{split}.csv", ["NoteAcc_DEID", *columns], rows))
    table = builders.build_rad_chestct(paths)
    assert table.ids == ["trn00001", "trn00002", "val00001", "tst00001"]
    present = [{name for name, value in zip(table.classes, row) if value} for row in table.labels_NC]
    assert present == [
        {"Pulmonary fibrotic sequela"},
        set(),
        set(chest.CALCIFICATION_CLASSES),
        {"Peribronchial thickening", "Hiatal hernia"},
    ]
    with pytest.raises(ValueError, match="'trn00001' stands twice"):
        builders.build_rad_chestct([paths[0], paths[0]])
    write_csv(tmp_path / "short.csv", ["NoteAcc_DEID", *columns[3:]], [])
    with pytest.raises(ValueError, match=r"short\.csv: no column atelectasis\*<location> for Atelectasis"):
        builders.build_rad_chestct([tmp_path / "short.csv"])


# --- command line ----------------------------------------------------------------------------------------------------


def test_builder_command_line(tmp_path, capsys):
    path = write_ct_rate(tmp_path)
    assert builders.main(["ct-rate", "--labels", str(path), "--output", str(tmp_path / "out.csv")]) == 0
    output = capsys.readouterr().out
    assert "3 rows" in output
    assert "differs from the published counts: 3 rows, published 3,039" in output
    assert (tmp_path / "out.csv").read_text() == path.read_text()
    with pytest.raises(SystemExit) as ended:
        builders.main(["cq500", "--reads", str(tmp_path / "no.csv"), "--output", str(tmp_path / "x.csv")])
    assert ended.value.code == 1
    assert f"error: {tmp_path / 'no.csv'}: no such file" in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()
