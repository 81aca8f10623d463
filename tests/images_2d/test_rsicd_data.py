"""RSICD: reading the Kaggle CSV once into a cache, the dataset, item files, validation split and class labels."""

from __future__ import annotations

import csv
import hashlib
import logging
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from itemizedclip_2d import rsicd_table
from itemizedclip_2d.rsicd import (
    RSICD_CLASSES,
    RsicdDataset,
    caption_items,
    load_class_labels,
    load_external_captions,
    resolve_validation_split,
)
from itemizedclip_2d.rsicd_table import CACHE_FOLDER, open_rsicd_table
from PIL import Image
from rsicd_files import captions_cell, encode_image, image_cell, write_rsicd_csv, write_rsicd_folder
from torch.utils.data import DataLoader
from torchvision import transforms

from itemizedclip.data.batch import BadSampleError, ItemCollator
from itemizedclip.data.items import diverse_sample, load_item_lists, sample_rng
from itemizedclip.runtime.errors import UserError

JPEG = encode_image(Image.new("RGB", (8, 8), (200, 30, 30)))
CAPTIONS = ["a park lies beside a wide river with two bridges .", "many green trees stand around a small round pond ."]
# The captions print on two lines, so a row that follows this one first in a file starts at line 4.
GOOD_ROW = ("rsicd_images/park_0.jpg", captions_cell(CAPTIONS), image_cell(JPEG))

plain_transform = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
random_transform = transforms.Compose([transforms.RandomResizedCrop(16, scale=(0.5, 1.0)), transforms.ToTensor()])


@pytest.fixture(scope="module")
def rsicd(tmp_path_factory):
    return write_rsicd_folder(tmp_path_factory.mktemp("rsicd"))


def open_dataset(csv_path: Path, **changes) -> RsicdDataset:
    options = {"transform": plain_transform, "items": None, "num_items": 3, "is_train": False, "seed": 0}
    return RsicdDataset(csv_path=csv_path, **(options | changes))


def cache_folders(csv_path: Path) -> list[str]:
    return sorted(path.name for path in (csv_path.parent / CACHE_FOLDER).iterdir() if path.is_dir())


# --- the table -------------------------------------------------------------------------------------------------------


def test_table_holds_what_was_written(rsicd):
    table = open_rsicd_table(rsicd.csv_path("train"))
    scenes = rsicd.scenes["train"]
    assert table.filenames == [scene.filename for scene in scenes]
    assert table.captions == [scene.captions for scene in scenes]
    assert [table.image_bytes(row) for row in range(len(table))] == [scene.jpeg for scene in scenes]
    assert table.bad_rows == []
    assert table.csv_sha256 == hashlib.sha256(rsicd.csv_path("train").read_bytes()).hexdigest()


def test_table_agrees_with_pandas_and_python_literals(rsicd):
    """The same cells read by pandas and, since this file is our own, evaluated as Python."""
    frame = pd.read_csv(rsicd.csv_path("test"))
    table = open_rsicd_table(rsicd.csv_path("test"))
    for row, (captions, image) in enumerate(zip(frame["captions"], frame["image"])):
        joined = eval(captions)[0]
        assert "".join(table.captions[row]) == joined
        assert table.image_bytes(row) == eval(image)["bytes"]
        published_items = [part.strip().lower() for part in joined.split(".") if part.strip()]
        assert caption_items(table.captions[row]) == published_items


def test_columns_are_found_by_name_and_long_cells_are_read(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
    png = encode_image(noise, "PNG")
    path = tmp_path / "train.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["", "image", "filename", "captions"])
        writer.writerow(["0", image_cell(png), "a.png", "['noise .']"])
        file.write("\r\n")
    assert len(image_cell(png)) > 131_072
    limit = csv.field_size_limit()
    table = open_rsicd_table(path)
    assert csv.field_size_limit() == limit
    assert len(table) == 1
    assert np.array_equal(np.asarray(table.image(0)), np.asarray(noise))


def test_cell_beyond_the_limit_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(rsicd_table, "MAX_CELL_CHARS", 5000)
    path = write_rsicd_csv(tmp_path / "train.csv", [GOOD_ROW, ("b.jpg", "['b']", "x" * 6000)])
    with pytest.raises(ValueError, match=r"train\.csv: row starting at line 4: field larger than field limit .*5000"):
        open_rsicd_table(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"filename,image\na,b\n", r"train\.csv: column 'captions' missing; expected .*found 'filename', 'image'"),
        (b"", r"column 'filename', 'captions', 'image' missing.*found an empty file"),
        (b"filename,captions,image\n", r"train\.csv: no row below the header"),
        (b"filename,captions,image\na,\xff,b\n", r"train\.csv: is no UTF-8 text at or after line 1"),
    ],
)
def test_files_that_are_no_rsicd_csv(tmp_path, content, message):
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_rsicd_table(path)
    assert cache_folders(path) == []


def test_missing_csv(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"valid\.csv: no such file; expected an RSICD CSV"):
        open_rsicd_table(tmp_path / "valid.csv")


def test_cache_folder_that_cannot_be_written(tmp_path):
    path = write_rsicd_csv(tmp_path / "train.csv", [GOOD_ROW])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file: cannot build the image cache here.*give a cache folder"):
        open_rsicd_table(path, tmp_path / "file")


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted_builds(monkeypatch):
    built = []
    write = rsicd_table._write_cache

    def counted_write(csv_path: Path, folder: Path) -> None:
        built.append(csv_path)
        write(csv_path, folder)

    monkeypatch.setattr(rsicd_table, "_write_cache", counted_write)
    return built


def test_cache_is_reused_until_the_csv_changes(tmp_path, counted_builds):
    path = write_rsicd_csv(tmp_path / "train.csv", [GOOD_ROW])
    open_rsicd_table(path)
    open_rsicd_table(path)
    assert len(counted_builds) == 1

    os.utime(path, ns=(1, 1))
    open_rsicd_table(path)
    assert len(counted_builds) == 2

    content = path.read_bytes()
    path.write_bytes(content.replace(b"green", b"brown"))
    os.utime(path, ns=(1, 1))  # same size and time: the content tells
    assert open_rsicd_table(path).captions == [[CAPTIONS[0], CAPTIONS[1].replace("green", "brown")]]
    assert len(counted_builds) == 3


def test_cache_dir_takes_the_cache(tmp_path):
    (tmp_path / "data").mkdir()
    path = write_rsicd_csv(tmp_path / "data" / "train.csv", [GOOD_ROW])
    table = open_rsicd_table(path, tmp_path / "cache" / "rsicd")
    assert table.cache_folder.parent == tmp_path / "cache" / "rsicd"
    assert [p.name for p in path.parent.iterdir()] == ["train.csv"]


@pytest.mark.parametrize("damage", ["truncate images", "truncate index", "remove index"])
def test_damaged_cache_is_rebuilt(tmp_path, damage, counted_builds):
    path = write_rsicd_csv(tmp_path / "train.csv", [GOOD_ROW])
    folder = open_rsicd_table(path).cache_folder
    victim = folder / ("images.bin" if "images" in damage else "index.json")
    if "truncate" in damage:
        victim.write_bytes(victim.read_bytes()[:-5])
    else:
        victim.unlink()
    assert open_rsicd_table(path).image_bytes(0) == JPEG
    assert len(counted_builds) == 2


def _build_killed_midway(path: Path) -> None:
    parse = rsicd_table._parse_cells
    seen = []

    def parse_then_die(cells):
        seen.append(cells)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return parse(cells)

    rsicd_table._parse_cells = parse_then_die
    open_rsicd_table(path)


def test_killed_build_leaves_no_cache_and_no_lock(tmp_path):
    path = write_rsicd_csv(tmp_path / "train.csv", [GOOD_ROW] * 4)
    process = multiprocessing.get_context("fork").Process(target=_build_killed_midway, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert ["building" in name for name in cache_folders(path)] == [True]

    table = open_rsicd_table(path)
    assert len(table) == 4
    assert cache_folders(path) == [table.cache_folder.name]  # the killed build's remains are gone


def test_failed_build_leaves_nothing(tmp_path, monkeypatch):
    path = write_rsicd_csv(tmp_path / "train.csv", [GOOD_ROW])

    def interrupt(cells):
        raise KeyboardInterrupt

    monkeypatch.setattr(rsicd_table, "_parse_cells", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_rsicd_table(path)
    assert cache_folders(path) == []


def test_csv_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write_rsicd_csv(tmp_path / "train.csv", [GOOD_ROW])
    parse = rsicd_table._parse_cells

    def parse_while_growing(cells):
        if cells is not None:
            with open(path, "a") as file:
                file.write("more")
        return parse(cells)

    monkeypatch.setattr(rsicd_table, "_parse_cells", parse_while_growing)
    with pytest.raises(ValueError, match=r"train\.csv: changed while it was read"):
        open_rsicd_table(path)
    assert cache_folders(path) == []


def _open_together(path: Path, barrier, builds: Path, results) -> None:
    write = rsicd_table._write_cache

    def slow_counted_write(csv_path, folder):
        with open(builds, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        write(csv_path, folder)

    rsicd_table._write_cache = slow_counted_write
    barrier.wait(30)
    results.put(open_rsicd_table(path).image_bytes(1))


def test_processes_that_start_together_build_once(tmp_path):
    path = write_rsicd_csv(tmp_path / "train.csv", [GOOD_ROW] * 3)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (path, barrier, tmp_path / "builds", results)
    processes = [context.Process(target=_open_together, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [JPEG] * 3
    for process in processes:
        process.join(60)
    assert (tmp_path / "builds").read_text() == "built\n"
    assert len(cache_folders(path)) == 1


def test_table_pickles_as_a_path(rsicd):
    table = open_rsicd_table(rsicd.csv_path("train"))
    pickled = pickle.dumps(table)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).image_bytes(3) == table.image_bytes(3)


# --- bad rows --------------------------------------------------------------------------------------------------------

BAD_CELLS = [
    (("a.jpg", "['a .']", "__import__('os').system('touch {marker}')"), "column 'image': expected a record"),
    (("a.jpg", "['a .']", "{'bytes': open('/etc/passwd').read()}"), "column 'image': expected a string, bytes or None"),
    (("a.jpg", "['a .']", "{'path': 'a.jpg'}"), r"column 'image': expected \{'bytes': b'...'\}"),
    (("a.jpg", "['a .']", "{'bytes': b''}"), r"column 'image': expected \{'bytes': b'...'\}"),
    (("a.jpg", "['a .']", "{'bytes': 'text'}"), r"column 'image': expected \{'bytes': b'...'\}"),
    (("a.jpg", "['a .']", image_cell(JPEG)[:-40]), "column 'image': the quote opened at character 11 is never closed"),
    (("a.jpg", "['a .']", "{" * 50_000), "column 'image': expected a quoted key"),
    (("a.jpg", "[exec('1')]", image_cell(JPEG)), "column 'captions': expected a quoted string"),
    (("", "['a .']", image_cell(JPEG)), "column 'filename': expected a file name, found ''"),
    (("a\n.jpg", "['a .']", image_cell(JPEG)), r"column 'filename': expected a file name, found 'a\\n.jpg'"),
]


@pytest.mark.parametrize(("cells", "reason"), BAD_CELLS, ids=range(len(BAD_CELLS)))
def test_bad_row_stops_with_file_row_and_reason(tmp_path, cells, reason):
    marker = tmp_path / "executed"
    cells = tuple(cell.replace("{marker}", str(marker)) for cell in cells)
    path = write_rsicd_csv(tmp_path / "train.csv", [GOOD_ROW, cells, GOOD_ROW])
    message = rf"(?s)train\.csv: 1 of 3 rows .*row 1 \(counted from 0, line 4\): {reason}"
    with pytest.raises(BadSampleError, match=message):
        open_dataset(path)
    assert not marker.exists()


def test_row_cut_short(tmp_path):
    path = write_rsicd_csv(tmp_path / "train.csv", [GOOD_ROW, GOOD_ROW])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(GOOD_ROW[0].encode()) + 9])
    with pytest.raises(BadSampleError, match=r"row 1 .*: the row has not as many fields as the header"):
        open_dataset(path)
    # Within a quoted cell the file has lost no one knows how many rows.
    path.write_bytes(whole[: -len(GOOD_ROW[2]) - 10])
    with pytest.raises(UserError, match=r"train\.csv: row starting at line 4: a quote opens in it that never closes"):
        open_dataset(path, on_bad_sample="skip")


def test_skipped_rows_are_listed_and_do_not_shift_the_others(tmp_path, caplog):
    names = "abcdefg"
    rows = [(f"{name}.jpg", f"['{name} one .']", image_cell(JPEG)) for name in names]
    rows[1] = ("b.jpg", "['b .']", "nan")
    rows[4] = ("e.jpg", "oops", image_cell(JPEG))
    path = write_rsicd_csv(tmp_path / "test.csv", rows)
    items = {row: [f"item of {name}"] for row, name in enumerate(names) if name != "g"}
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(path, items=items, items_path="testv1.json", on_bad_sample="skip")
    assert dataset.rows == [0, 2, 3, 5]
    assert [(sample.sample_id, sample.items) for sample in map(dataset.__getitem__, range(4))] == [
        (f"{name}.jpg", [f"item of {name}"]) for name in "acdf"
    ]
    assert [(bad.row, bad.line) for bad in dataset.skipped] == [(1, 3), (4, 6), (6, 8)]
    assert "testv1.json has no item under key '6'" in dataset.skipped[2].reason
    assert "3 of 7 rows cannot be used" in caplog.text
    assert "row 4 (counted from 0, line 6): column 'captions'" in caplog.text
    # The cache remembers bad rows: the second start lists the same ones.
    assert open_dataset(path, items=items, items_path="testv1.json", on_bad_sample="skip").skipped == dataset.skipped


def test_row_without_items_names_json_key_and_row(rsicd):
    items = load_item_lists(rsicd.items_path("test"), integer_keys=True)
    del items[5]
    with pytest.raises(BadSampleError, match=r"(?s)test\.csv: 1 of 8.*row 5 .*testv1\.json has no item under key '5'"):
        open_dataset(rsicd.csv_path("test"), items=items, items_path=rsicd.items_path("test"))


def test_items_of_another_split_are_refused(rsicd):
    items = load_item_lists(rsicd.items_path("train"), integer_keys=True)
    with pytest.raises(ValueError, match=r"trainv1.json: key 8 \(and 3 more\) is no row of .*test.csv.*rows 0 to 7"):
        open_dataset(rsicd.csv_path("test"), items=items, items_path="trainv1.json")
    with pytest.raises(ValueError, match=r"the item file: key '0' .* is no row of"):
        open_dataset(rsicd.csv_path("test"), items=load_item_lists(rsicd.items_path("test")))


def test_no_usable_row_is_fatal_even_when_skipping(tmp_path):
    path = write_rsicd_csv(tmp_path / "train.csv", [("a.jpg", "['.']", image_cell(JPEG))])
    with pytest.raises(ValueError, match=r"(?s)column 'captions' holds no text.*No row is left"):
        open_dataset(path, on_bad_sample="skip")


def test_damaged_image_is_reported_when_it_is_loaded(tmp_path):
    truncated = encode_image(Image.effect_noise((64, 64), 80))[:600]
    rows = [GOOD_ROW, ("b.jpg", "['b .']", image_cell(b"no image")), ("c.jpg", "['c .']", image_cell(truncated))]
    dataset = open_dataset(write_rsicd_csv(tmp_path / "train.csv", rows))
    assert dataset[0].image.shape == (3, 16, 16)
    with pytest.raises(BadSampleError, match=r"train\.csv row 1 \(counted from 0, line 4, b\.jpg\): column 'image'"):
        dataset[1]
    with pytest.raises(BadSampleError, match=r"row 2 .*c\.jpg\): .*truncated"):
        dataset[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 0}, "num_items .* at least 1, got 0"),
        ({"on_bad_sample": "ignore"}, '"skip" or "stop", got \'ignore\''),
    ],
)
def test_options_are_checked(rsicd, changes, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(rsicd.csv_path("test"), **changes)


# --- samples ---------------------------------------------------------------------------------------------------------


def test_training_draws_follow_seed_epoch_and_row(rsicd):
    items = load_item_lists(rsicd.items_path("train"), integer_keys=True)
    dataset = open_dataset(rsicd.csv_path("train"), items=items, num_items=6, is_train=True, seed=11)
    normalised = ["there is bareland", "a green circle", f"the circle lies on the {rsicd.scenes['train'][1].side}",
                  "grey specks cover the ground", "the bareland"]  # fmt: skip
    expected = diverse_sample(normalised, 6, sample_rng(11, 2, 1), limit_joined_to_items=True)
    assert dataset[(2, 1)].items == expected
    assert dataset[1].items == dataset[(0, 1)].items != expected
    reseeded = open_dataset(rsicd.csv_path("train"), items=items, num_items=6, is_train=True, seed=12)
    assert reseeded[(2, 1)].items != expected


def test_evaluation_gives_all_items_in_order_and_unjoined(rsicd):
    items = load_item_lists(rsicd.items_path("test"), integer_keys=True)
    dataset = open_dataset(rsicd.csv_path("test"), items=items, num_items=2)
    for index, scene in enumerate(rsicd.scenes["test"]):
        sample = dataset[(7, index)]
        assert sample.items == [item.strip().lower() for item in scene.items] == dataset.items(index)
        assert sample.sample_id == scene.filename


def test_captions_serve_as_items_without_an_item_file(rsicd):
    dataset = open_dataset(rsicd.csv_path("train"))
    scene = rsicd.scenes["train"][0]
    assert dataset[0].items == [
        "there is airport with a red circle", f"it's a red circle near the {scene.side}",
        "the circle isn't \"small\"", f"it lies on the {scene.side}",
        "many grey specks surround the red circle", "the airport is seen from above",
    ]  # fmt: skip


def test_captions_without_a_full_stop_stay_apart():
    assert caption_items(["Two boats", "a pier . water .", " "]) == ["two boats", "a pier", "water"]


def test_images_are_decoded_to_rgb(tmp_path):
    grey = encode_image(Image.new("L", (8, 8), 77), "PNG")
    dataset = open_dataset(write_rsicd_csv(tmp_path / "train.csv", [("a.png", "['a .']", image_cell(grey))]))
    assert torch.allclose(dataset[0].image, torch.full((3, 16, 16), 77 / 255))


def test_index_outside_the_dataset(rsicd):
    dataset = open_dataset(rsicd.csv_path("test"))
    assert len(list(dataset)) == len(dataset) == 8
    with pytest.raises(IndexError, match="index -1 of an RSICD split with 8 images"):
        dataset[(0, -1)]


def _collate(samples):
    return [(sample.sample_id, sample.items, sample.image) for sample in samples]


def test_samples_are_the_same_with_and_without_workers(rsicd):
    dataset = open_dataset(rsicd.csv_path("train"), transform=random_transform, num_items=4, is_train=True, seed=5)
    keys = [(epoch, index) for epoch in (0, 3) for index in (4, 0, 9, 4, 1, 7)]
    torch.manual_seed(0)
    loader = DataLoader(dataset, sampler=keys, batch_size=2, collate_fn=_collate)
    alone = [sample for batch in loader for sample in batch]
    torch.manual_seed(1)
    loader = DataLoader(dataset, sampler=keys[::-1], batch_size=3, collate_fn=_collate, num_workers=2)
    shared = [sample for batch in loader for sample in batch][::-1]
    for (name, items, image), (name_again, items_again, image_again) in zip(alone, shared, strict=True):
        assert (name, items) == (name_again, items_again)
        assert torch.equal(image, image_again)
    assert torch.equal(alone[0][2], alone[3][2])  # same epoch and index
    assert not torch.equal(alone[0][2], alone[6][2])  # another epoch crops differently


def test_dataset_survives_pickling_for_spawned_workers(rsicd):
    dataset = open_dataset(rsicd.csv_path("train"), transform=random_transform, is_train=True)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[(2, 3)].items == dataset[(2, 3)].items
    assert torch.equal(copy[(2, 3)].image, dataset[(2, 3)].image)


def test_transform_randomness_leaves_the_global_generator_alone(rsicd):
    dataset = open_dataset(rsicd.csv_path("train"), transform=random_transform, is_train=True)
    before = torch.get_rng_state()
    dataset[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_collate_into_a_batch(rsicd):
    dataset = open_dataset(rsicd.csv_path("train"), num_items=4, is_train=True)
    collate = ItemCollator(lambda texts: torch.tensor([[len(text)] for text in texts]), max_items=4)
    batch = collate([dataset[0], dataset[1]])
    assert batch.images.shape == (2, 3, 16, 16)
    assert batch.item_mask.all()


def test_fingerprint_follows_csv_items_and_skipped_rows(rsicd, tmp_path):
    items = load_item_lists(rsicd.items_path("test"), integer_keys=True)
    first = open_dataset(rsicd.csv_path("test"), items=items).fingerprint
    copy = tmp_path / "copy.csv"
    copy.write_bytes(rsicd.csv_path("test").read_bytes())
    assert open_dataset(copy, items=items).fingerprint == first
    changes = [{0: ["changed"]}, {0: []}, {1: []}]
    others = {open_dataset(copy, items=items | change, on_bad_sample="skip").fingerprint for change in changes}
    with open(copy, "a") as file:
        file.write("\n")
    others.add(open_dataset(copy, items=items).fingerprint)
    assert len(others - {first}) == 4


# --- item files, validation split, labels ----------------------------------------------------------------------------


def test_external_captions_of_two_and_three_splits(rsicd):
    train, valid, test = (rsicd.items_path(split) for split in ("train", "valid", "test"))
    assert load_external_captions(rsicd.external_captions) == {"train": train, "test": test}
    assert load_external_captions(f"{train}; {valid};{test}") == {"train": train, "valid": valid, "test": test}


@pytest.mark.parametrize("argument", ["{train}", "{train};", "", "{train};{test};{train};{test}", ";{test}"])
def test_external_captions_of_another_form(rsicd, argument):
    argument = argument.format(train=rsicd.items_path("train"), test=rsicd.items_path("test"))
    with pytest.raises(ValueError, match=r'expected "train.json;test.json" or "train.json;valid.json;test.json"'):
        load_external_captions(argument)


def test_external_captions_name_the_missing_file(rsicd):
    with pytest.raises(FileNotFoundError, match=r"absent\.json: no such file; expected the items of test\.csv"):
        load_external_captions(f"{rsicd.items_path('train')};absent.json")


def test_validation_split(rsicd, tmp_path):
    train, valid, test = (rsicd.items_path(split) for split in ("train", "valid", "test"))

    three = resolve_validation_split(rsicd.folder, {"train": train, "valid": valid, "test": test})
    assert (three.split, three.csv_path, three.items_path) == ("valid", rsicd.csv_path("valid"), valid)
    assert three.message == f"Validation reads {rsicd.csv_path('valid')} with the items of {valid}."

    two = resolve_validation_split(rsicd.folder, {"train": train, "test": test})
    assert (two.split, two.csv_path, two.items_path) == ("test", rsicd.csv_path("test"), test)
    assert "as the published code does" in two.message
    assert "chosen on the test set" in two.message

    captions = resolve_validation_split(rsicd.folder, None)
    assert (captions.split, captions.items_path) == ("valid", None)

    (tmp_path / "test.csv").write_text("")
    without_valid = resolve_validation_split(tmp_path, None)
    assert (without_valid.split, without_valid.items_path) == ("test", None)
    assert "there is no valid.csv" in without_valid.message
    with pytest.raises(FileNotFoundError, match=r"valid\.csv: no such file"):
        resolve_validation_split(tmp_path, {"train": train, "valid": valid, "test": test})


def test_class_order():
    assert len(RSICD_CLASSES) == len(set(RSICD_CLASSES)) == 30
    assert RSICD_CLASSES[24:26] == ("stadium", "school")
    # The published order is the sorted one, but for the stadium, which stands before the school.
    in_order = [name for name in sorted(RSICD_CLASSES) if name != "stadium"]
    in_order.insert(in_order.index("school"), "stadium")
    assert tuple(in_order) == RSICD_CLASSES


def test_class_labels_may_be_fewer_than_rows(rsicd, tmp_path):
    assert load_class_labels(rsicd.labels_path, 8) == [scene.class_id for scene in rsicd.scenes["test"]]
    assert load_class_labels(rsicd.labels_path, 1093) == list(range(8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0": 3}', r"labels\.json: expected a JSON array of class numbers 0 to 29.*found an object"),
        ("[]", r"labels\.json: 0 labels for a CSV of 5 rows"),
        ("[0, 1, 2, 3, 4, 5]", r"labels\.json: 6 labels for a CSV of 5 rows"),
        ("[0, 30]", r"labels\.json: label of row 1 is 30"),
        ("[0, -1]", r"label of row 1 is -1"),
        ("[true]", r"label of row 0 is True"),
        ("[1.0]", r"label of row 0 is 1\.0"),
        ('["airport"]', r"label of row 0 is 'airport'"),
        ("[1,", r"labels\.json: not valid JSON .*expected class labels"),
    ],
)
def test_class_labels_are_checked(tmp_path, content, message):
    path = tmp_path / "labels.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_class_labels(path, 5)
