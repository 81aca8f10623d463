"""Brain MRI and head CT studies: index files, folder layouts, series, items, broken files."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from itemizedclip_radiology.data.brain import (
    BrainStudies,
    find_study_files,
    repeat_to_at_least,
    repeat_to_exactly,
)
from itemizedclip_radiology.data.reports import StudyIndex, numbered_items, read_report_table, report_items
from itemizedclip_radiology.data.studies import SeriesFile, SkippedSeries, load_study
from itemizedclip_radiology.models.series_names import encode_series_name, encode_series_names
from torch.utils.data import DataLoader

from itemizedclip.data.batch import BadSampleError, ItemCollator
from itemizedclip.data.sampler import CheckedCollator, CheckedDataset

SIZE = (2, 7, 7)
"""Files may then be 2×7×7 or, with the margin, 2×8×8."""

STUDIES = {
    "S1": {
        "series": {"AX_T1": {}, "AX_FLAIR": {"num_slices": 24, "view": "axial"}, "SAG_T2": {}},
        "report": ["Old infarct.", "No mass.", "Mild atrophy."],
        "report_length": 3,
    },
    "S2": {"series": {"AX_DWI": {}}, "report": ["no significant abnormalities."]},
    "S3": {"series": {f"AX_{n}": {} for n in range(12)}, "report": "1. First finding.\n2. Second\nfinding."},
}


def value_of(study: str, series: str) -> int:
    """A grey value that tells every series of the test data from every other."""
    return 1 + sum(map(ord, study + series)) % 250


def write_studies(root: Path, studies=STUDIES, *, split: str = "train", level: str = "train", shape=(2, 7, 7)) -> Path:
    """Constant volumes, and the index; returns the JSON file."""
    for study, entry in studies.items():
        for series in entry["series"]:
            path = root / level / study / series / "img.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.full(shape, value_of(study, series), dtype=torch.uint8), path)
    json_path = root / f"{split}.json"
    json_path.write_text(json.dumps(studies))
    return json_path


def open_dataset(root: Path, json_path: Path, **changes) -> BrainStudies:
    options = {"is_train": True, "num_items": 2, "seed": 0, "num_series": 5, "volume_size": SIZE}
    return BrainStudies(data_root=root, json_path=json_path, **(options | changes))


def series_shown(sample, study: str) -> list[str]:
    """Series of each slot, told by the values of its volume."""
    names = {value_of(study, name): name for name in STUDIES[study]["series"]}
    greys = sample.image.flatten(1)[:, 0] * 0.226 + 0.449
    return [names[round(float(grey) * 255)] for grey in greys]


@pytest.fixture
def dataset(tmp_path):
    return open_dataset(tmp_path, write_studies(tmp_path))


# --- samples ---------------------------------------------------------------------------------------------------------


def test_slots():
    assert repeat_to_exactly(5, 3) == [0, 1, 2, 0, 1]
    assert repeat_to_at_least(10, 3) == [0, 1, 2] * 4
    assert repeat_to_at_least(10, 15) == list(range(15))
    assert repeat_to_at_least(10, 10) == list(range(10))


def test_training_sample(dataset):
    sample = dataset[(0, 0)]
    assert sample.sample_id == "S1"
    assert sample.image.shape == (5, 1, *SIZE)
    assert sample.image.dtype == torch.float32
    shown = series_shown(sample, "S1")
    assert set(shown[:3]) == set(STUDIES["S1"]["series"])
    assert shown[3:] == shown[:2]
    assert torch.equal(sample.series_names, encode_series_names(shown))
    assert len(sample.items) == 2
    assert set(sample.items) < set(STUDIES["S1"]["report"])
    assert not sample.is_normal
    assert dataset[1].is_normal


def test_more_series_than_slots_are_drawn_evenly(dataset):
    counts = dict.fromkeys(STUDIES["S3"]["series"], 0)
    for epoch in range(240):
        shown = series_shown(dataset[(epoch, 2)], "S3")
        assert len(set(shown)) == 5
        for name in shown:
            counts[name] += 1
    assert min(counts.values()) > 65  # 100 expected each, of 240 draws of 5 out of 12
    assert max(counts.values()) < 135


def test_sample_follows_from_seed_epoch_and_index_alone(tmp_path, dataset):
    again = open_dataset(tmp_path, tmp_path / "train.json")
    other = open_dataset(tmp_path, tmp_path / "train.json", seed=1)
    first, same = dataset[(3, 2)], again[(3, 2)]
    assert torch.equal(first.image, same.image)
    assert first.items == same.items
    changed = [not torch.equal(dataset[(epoch, 2)].image, first.image) for epoch in range(4, 8)]
    assert any(changed)
    assert any(not torch.equal(other[(epoch, 2)].image, dataset[(epoch, 2)].image) for epoch in range(4))
    assert torch.equal(dataset[(0, 2)].image, dataset[2].image)


def test_evaluation_keeps_order_and_everything(tmp_path):
    dataset = open_dataset(tmp_path, write_studies(tmp_path), is_train=False, num_series=10)
    assert series_shown(dataset[0], "S1") == list(STUDIES["S1"]["series"]) * 4
    assert series_shown(dataset[2], "S3") == list(STUDIES["S3"]["series"])
    assert dataset[0].items == STUDIES["S1"]["report"]
    assert dataset[2].items == ["First finding.", "Second finding."]
    assert dataset.items(2) == dataset[2].items


def test_crop_is_shared_by_the_series_of_a_study_and_random_in_training(tmp_path):
    rows = torch.arange(8, dtype=torch.uint8)
    volume = (10 + 8 * rows[:, None] + rows[None]).expand(2, 8, 8).contiguous()
    studies = {"S": {"series": {"A": {}, "B": {}}, "report": ["x"]}}
    json_path = write_studies(tmp_path, studies)
    for name in "AB":
        torch.save(volume, tmp_path / "train" / "S" / name / "img.pt")

    def corners(dataset, epoch):
        first = dataset[(epoch, 0)].image[:, 0, 0, 0, 0] * 0.226 + 0.449
        return [divmod(round(float(value) * 255) - 10, 8) for value in first]

    training = open_dataset(tmp_path, json_path, num_series=2)
    drawn = [corners(training, epoch) for epoch in range(40)]
    assert all(first == second for first, second in drawn)
    assert {first for first, _ in drawn} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert corners(open_dataset(tmp_path, json_path, is_train=False, num_series=2), 0) == [(0, 0), (0, 0)]


def test_float_files_of_either_range_give_the_same_sample(tmp_path):
    bytes_json = write_studies(tmp_path / "bytes")
    for folder, divisor in (("grey", 1), ("unit", 255)):
        write_studies(tmp_path / folder)
        for path in (tmp_path / folder).rglob("img.pt"):
            volume = torch.load(path).float()
            volume[0, 0, :2] = torch.tensor([0.0, 255.0])  # both ends, so that the range can be told
            torch.save(volume / divisor, path)
    expected = open_dataset(tmp_path / "bytes", bytes_json)[(1, 0)].image[..., 1, :, :]
    for folder in ("grey", "unit"):
        got = open_dataset(tmp_path / folder, tmp_path / folder / "train.json")[(1, 0)].image[..., 1, :, :]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_description_states_folder_and_range(tmp_path):
    text = open_dataset(tmp_path, write_studies(tmp_path)).describe_first_study()
    assert "3 studies" in text
    assert str(tmp_path / "train") in text
    assert "AX_T1, AX_FLAIR, SAG_T2" in text
    assert "taken as 0-255" in text


def test_batches_through_a_loader(dataset):
    def count_words(texts):
        return torch.tensor([[len(text), 1] for text in texts])

    loader = DataLoader(
        CheckedDataset(dataset, seed=0, on_bad_sample="stop"),
        batch_size=3,
        sampler=[(0, 0), (0, 1), (0, 2)],
        collate_fn=CheckedCollator(ItemCollator(count_words, max_items=2)),
    )
    batch = next(iter(loader)).batch
    assert batch.images.shape == (3, 5, 1, *SIZE)
    assert batch.series_names.shape == (3, 5, 110)
    assert batch.item_mask.tolist() == [[True, True], [True, False], [True, True]]
    assert batch.is_normal.tolist() == [False, True, False]


def test_fingerprint_changes_with_the_index(tmp_path, dataset):
    before = dataset.fingerprint
    assert set(json.loads(before)) == {"json_sha256", "num_studies", "num_skipped"}
    changed = STUDIES | {"S2": STUDIES["S2"] | {"report": ["Something."]}}
    after = open_dataset(tmp_path, write_studies(tmp_path, changed)).fingerprint
    assert before != after


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "level"), [("train", "train"), ("train", ""), ("valid", "valid"), ("valid", "val"), ("val", "valid")]
)
def test_study_folder_layouts(tmp_path, split, level):
    dataset = open_dataset(tmp_path, write_studies(tmp_path, split=split, level=level))
    assert dataset.study_folder == tmp_path / level
    assert series_shown(dataset[1], "S2") == ["AX_DWI"] * 5


def test_split_folder_goes_before_the_root(tmp_path):
    write_studies(tmp_path, level="")
    dataset = open_dataset(tmp_path, write_studies(tmp_path, level="train"))
    assert dataset.study_folder == tmp_path / "train"


def test_no_study_folder_names_where_was_looked(tmp_path):
    json_path = write_studies(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        open_dataset(tmp_path / "empty", json_path)
    assert str(tmp_path / "empty" / "train") in str(error.value)
    assert "S1" in str(error.value)


def test_files_from_flags_and_environment(tmp_path, monkeypatch):
    (tmp_path / "json").mkdir()
    for name in ("train", "val"):
        (tmp_path / "json" / f"{name}.json").write_text("{}")
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.delenv("JSON_ROOT", raising=False)
    with pytest.raises(ValueError, match="DATA_ROOT"):
        find_study_files()
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"train\.json"):
        find_study_files()
    monkeypatch.setenv("JSON_ROOT", str(tmp_path / "json"))
    files = find_study_files()
    assert (files.data_root, files.valid_json) == (tmp_path, tmp_path / "json" / "val.json")
    assert find_study_files(tmp_path / "json").data_root == tmp_path / "json"
    (tmp_path / "json" / "valid.json").write_text("{}")
    with pytest.raises(ValueError, match=r"valid\.json and val\.json"):
        find_study_files()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_study_files(tmp_path / "nowhere")


# --- index files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("not an object", "expected an object"),
        ({"report": ["a"]}, "field 'series'"),
        ({"series": {}, "report": ["a"]}, "field 'series'"),
        ({"series": ["AX"], "report": ["a"]}, "field 'series'"),
        ({"series": {"../../secret": {}}, "report": ["a"]}, "field 'series': '../../secret'"),
        ({"series": {"AX": {}}}, "field 'report' is missing"),
        ({"series": {"AX": {}}, "report": []}, "field 'report'"),
        ({"series": {"AX": {}}, "report": ["a", 3]}, "field 'report'"),
        ({"series": {"AX": {}}, "report": [" "]}, "field 'report'"),
        ({"series": {"AX": {}}, "report": "no numbers here"}, "field 'report'"),
    ],
)
def test_bad_entry_names_file_study_and_field(tmp_path, entry, words):
    json_path = write_studies(tmp_path)
    json_path.write_text(json.dumps(STUDIES | {"BAD": entry}))
    with pytest.raises(BadSampleError) as error:
        open_dataset(tmp_path, json_path)
    message = str(error.value)
    assert message.startswith(f"{json_path}: study 'BAD': ")
    assert words in message
    skipping = open_dataset(tmp_path, json_path, on_bad_sample="skip")
    assert len(skipping) == 3
    assert len(skipping.index.skipped) == 1
    assert json.loads(skipping.fingerprint)["num_skipped"] == 1


def test_study_names_do_not_lead_out_of_the_folder(tmp_path):
    json_path = write_studies(tmp_path)
    json_path.write_text(json.dumps({"../S1": STUDIES["S1"]}))
    with pytest.raises(BadSampleError, match="plain names"):
        open_dataset(tmp_path, json_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"S1": 1, "S1": 2}', "null"])
def test_file_that_is_no_index(tmp_path, text):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"train\.json"):
        StudyIndex(path, lambda study, entry: dict(entry), on_bad_sample="skip")


def test_index_is_compact_and_picklable(tmp_path):
    path = tmp_path / "train.json"
    entries = {f"S{n}": {"report": [f"finding {n}, ±ü"]} for n in range(50)}
    path.write_text(json.dumps(entries))
    index = pickle.loads(pickle.dumps(StudyIndex(path, lambda s, e: dict(e), on_bad_sample="stop")))
    assert [index[n] for n in range(50)] == [{"study": s, **entry} for s, entry in entries.items()]
    with pytest.raises(IndexError):
        index[50]
    assert len(StudyIndex(path, lambda s, e: dict(e), on_bad_sample="stop", studies=["S3", "S9"])) == 2


def test_numbered_reports():
    assert numbered_items("1. One.\n2. Two\n   more.\n\n10) Ten.") == ["One.", "Two more.", "Ten."]
    assert numbered_items("Impression:\n1. Size 3.5 cm.\r\n2. B") == ["Size 3.5 cm.", "B"]
    assert numbered_items("no number") == []
    assert report_items(["a ", "", " b"]) == ["a", "b"]


def test_report_table_replaces_reports(tmp_path):
    table = tmp_path / "reports.csv"
    table.write_text('S2,"1. Subdural hematoma.\n2. Midline shift."\n')
    dataset = open_dataset(tmp_path, write_studies(tmp_path), reports=read_report_table(table), is_train=False)
    assert dataset[1].items == ["Subdural hematoma.", "Midline shift."]
    assert not dataset[1].is_normal
    assert dataset[0].items == STUDIES["S1"]["report"]
    for text, words in [
        ("S2,a,b\n", "line 1: 3 columns"),
        ('S2,"1. a"\nS2,"1. b"\n', "'S2' stands twice"),
        ("S2,plain\n", "'S2': expected"),
    ]:
        table.write_text(text)
        with pytest.raises(ValueError, match=r"reports\.csv: line") as error:
            read_report_table(table)
        assert words in str(error.value)


# --- broken series ---------------------------------------------------------------------------------------------------


def break_series(folder: Path, case: str) -> None:
    path = folder / "img.pt"
    if case == "absent":
        path.unlink()
    elif case == "NaN":
        torch.save(torch.full((2, 7, 7), float("nan")), path)
    elif case == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    elif case == "4-D":
        torch.save(torch.zeros(1, 2, 7, 7), path)
    elif case == "another size":
        torch.save(torch.zeros(2, 9, 7, dtype=torch.uint8), path)
    elif case == "code":
        path.write_bytes(pickle.dumps(Path("x")))


@pytest.mark.parametrize("case", ["absent", "NaN", "truncated", "4-D", "another size", "code"])
def test_broken_series_is_skipped_counted_and_reported(tmp_path, caplog, case):
    json_path = write_studies(tmp_path)
    break_series(tmp_path / "train" / "S1" / "AX_FLAIR", case)
    dataset = open_dataset(tmp_path, json_path)
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            shown = series_shown(dataset[(epoch, 0)], "S1")
            assert set(shown) == {"AX_T1", "SAG_T2"}
            assert shown == (shown[:2] * 3)[:5]
    assert list(dataset.skipped) == [(0, 1)]
    warnings = [record.getMessage() for record in caplog.records if "series skipped" in record.getMessage()]
    assert len(warnings) == 1  # once, not once per epoch
    for part in ("study S1", "AX_FLAIR", str(tmp_path / "train" / "S1" / "AX_FLAIR" / "img.pt")):
        assert part in warnings[0]
    evaluating = open_dataset(tmp_path, json_path, is_train=False, num_series=10)
    assert series_shown(evaluating[0], "S1") == ["AX_T1", "SAG_T2"] * 5


def test_broken_series_does_not_change_the_items(tmp_path):
    json_path = write_studies(tmp_path)
    before = [open_dataset(tmp_path, json_path)[(epoch, 0)].items for epoch in range(6)]
    break_series(tmp_path / "train" / "S1" / "AX_T1", "truncated")
    assert [open_dataset(tmp_path, json_path)[(epoch, 0)].items for epoch in range(6)] == before


def test_study_without_any_series_is_a_bad_sample(tmp_path):
    json_path = write_studies(tmp_path)
    break_series(tmp_path / "train" / "S2" / "AX_DWI", "NaN")
    dataset = open_dataset(tmp_path, json_path)
    with pytest.raises(BadSampleError, match=r"study S2, series AX_DWI: .*no series of this study"):
        dataset[1]
    replaced, messages = CheckedDataset(dataset, seed=0, on_bad_sample="skip")[(0, 1)]
    assert replaced.sample_id != "S2"
    assert "S2" in messages[0]


def test_skips_in_loader_workers_reach_the_main_process(tmp_path):
    json_path = write_studies(tmp_path)
    break_series(tmp_path / "train" / "S1" / "SAG_T2", "absent")
    break_series(tmp_path / "train" / "S3" / "AX_7", "NaN")
    dataset = open_dataset(tmp_path, json_path, is_train=False)
    for _ in DataLoader(dataset, batch_size=None, num_workers=2):
        pass
    assert list(dataset.skipped) == [(0, 2), (2, 7)]
    assert len(dataset.skipped) == 2


def test_skipped_series_table():
    table = SkippedSeries([2, 0, 3])
    table.add(2, 1, "x")
    table.add(0, 1, "y")
    table.add(2, 1, "again")
    assert list(table) == [(0, 1), (2, 1)]


# --- one study -------------------------------------------------------------------------------------------------------


def test_load_study_repeats_and_stops(tmp_path):
    files = []
    for n in range(4):
        path = tmp_path / f"{n}.pt"
        torch.save(torch.full((2, 8, 8), 10 * (n + 1), dtype=torch.uint8), path)
        files.append(SeriesFile(f"AX_{n}", path))
    files.insert(1, SeriesFile("AX_missing", tmp_path / "no.pt"))
    loaded = load_study("S", files, size=SIZE, arrange=lambda num: [0, num - 1, 0], max_series=3)
    assert loaded.names == ["AX_0", "AX_2", "AX_0"]
    assert [entry.name for entry, _ in loaded.skipped] == ["AX_missing"]
    greys = (loaded.image.flatten(1)[:, 0] * 0.226 + 0.449) * 255
    np.testing.assert_allclose(greys, [10, 30, 10], atol=1e-3)
    assert loaded.sources[1] == tmp_path / "2.pt"
    assert loaded.voxel_maps[0].offset == (0, 0, 0)
    assert torch.equal(loaded.series_names[1], encode_series_name("AX_2"))
    forced = load_study("S", files[:1], size=SIZE, grey_range="0-1")
    assert float(forced.image[0, 0, 0, 0, 0]) == pytest.approx((10 - 0.449) / 0.226)


def test_bad_arguments(tmp_path):
    json_path = write_studies(tmp_path)
    for name in ("num_items", "num_series"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            open_dataset(tmp_path, json_path, **{name: 0})
    dataset = open_dataset(tmp_path, json_path)
    for index in (3, -1):
        with pytest.raises(IndexError):
            dataset[index]
