"""COCO and Flickr30k as retrieval sets: layouts, captions by image, and one sentence for whatever is wrong."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from itemizedclip_2d.retrieval_sets import (
    PUBLISHED_COUNTS,
    RetrievalSet,
    coco_karpathy,
    coco_val2017,
    flickr30k,
)
from natural_files import CaptionedImages, write_coco, write_flickr, write_karpathy
from PIL import Image

from itemizedclip.data.batch import BadSampleError
from itemizedclip.runtime.files import file_sha256


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def assert_holds(dataset: RetrievalSet, written: CaptionedImages) -> None:
    assert [entry.path.name for entry in dataset.entries] == list(written.captions)
    for index, (name, captions) in enumerate(written.captions.items()):
        sample = dataset[index]
        assert sample.items == dataset.items(index) == captions
        assert sample.sample_id == name
        encoded = next(written.root.parent.rglob(dataset.entries[index].path.name)).read_bytes()
        assert torch.equal(sample.image, to_tensor(Image.open(io.BytesIO(encoded)).convert("RGB")))


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed), encoding="utf-8")


# --- COCO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["images/val2017", "val2017"])
def test_coco_val2017(tmp_path, folder):
    written = write_coco(tmp_path / "coco")
    if folder == "val2017":
        (written.root / "images/val2017").rename(written.root / "val2017")
    dataset = coco_val2017(written.root, to_tensor)
    assert_holds(dataset, written)
    assert sorted({len(captions) for captions in written.captions.values()}) == [5, 6]
    assert dataset.counts == (9, 48)
    assert "coco_val2017 has 5,000 images and 25,014 captions" in dataset.incomplete
    assert "9 and 48" in dataset.incomplete
    facts = dataset.facts()
    assert facts["annotations_sha256"] == file_sha256(written.root / "annotations/captions_val2017.json")
    assert facts["is_whole_set"] is False
    json.dumps(facts)


def test_a_whole_set_is_told_from_a_part(tmp_path, monkeypatch):
    written = write_coco(tmp_path)
    monkeypatch.setitem(PUBLISHED_COUNTS, "coco_val2017", (9, 48))
    dataset = coco_val2017(written.root, to_tensor)
    assert dataset.incomplete is None
    assert dataset.facts()["is_whole_set"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [c], "captions_val2017.json: expected an object with images and annotations"),
        (lambda c: c.pop("annotations") and None, "expected field annotations to be a list, found 'None'"),
        (lambda c: c["images"][2].pop("id") and None, r"images\[2\]: expected field id to be a whole number"),
        (lambda c: c["images"].append(c["images"][0]), r"images\[9\]: id 1000 appears twice"),
        (lambda c: c["images"][1].update(file_name="../x.jpg"), r"images\[1\]: image '../x.jpg'; expected a relative"),
        (lambda c: c["annotations"][3].update(image_id=5), r"annotations\[3\]: image_id 5 is the id of no image"),
        (lambda c: c["annotations"][3].update(caption=7), r"annotations\[3\]: expected field caption to be a string"),
        (lambda c: c["annotations"].clear(), "names no image of coco_val2017; expected 5000"),
        (lambda c: c["annotations"][3].update(caption=" "), "expected captions that are texts, none empty"),
        (lambda c: c["images"].clear() or c["annotations"].clear(), "names no image of coco_val2017; expected 5000"),
    ],
)
def test_wrong_coco_captions(tmp_path, change, message):
    written = write_coco(tmp_path)
    change_json(tmp_path / "annotations/captions_val2017.json", change)
    with pytest.raises(ValueError, match=message):
        coco_val2017(written.root, to_tensor)


def test_images_without_a_caption_are_left_out_counted_and_said(tmp_path):
    """COCO's own files have none; files that were cut have."""
    written = write_coco(tmp_path / "coco")
    path = written.root / "annotations/captions_val2017.json"
    first = json.loads(path.read_text())["images"][0]
    change_json(path, lambda c: c.update(annotations=[a for a in c["annotations"] if a["image_id"] != first["id"]]))
    dataset = coco_val2017(written.root, to_tensor)
    assert len(dataset) == 8
    assert dataset.without_captions == [first["file_name"]] == dataset.facts()["without_captions"]
    assert f"1 images without a caption are left out ({first['file_name']})" in str(dataset.incomplete)
    write_flickr(tmp_path / "flickr")
    change_json(tmp_path / "flickr/flickr30k_val.json", lambda c: c[2].update(caption=[]))
    flickr = flickr30k(tmp_path / "flickr", "val", to_tensor)
    assert flickr.without_captions == ["10002.jpg"]
    assert all(flickr.items(row) for row in range(len(flickr)))


def test_missing_coco_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; expected COCO's folder"):
        coco_val2017(tmp_path / "none", to_tensor)
    with pytest.raises(FileNotFoundError, match=r"captions_val2017.json: no such file; .*annotations_trainval2017.zip"):
        coco_val2017(tmp_path, to_tensor)
    written = write_coco(tmp_path / "coco")
    gone = [written.root / "images/val2017" / name for name in list(written.captions)[3:5]]
    for path in gone:
        path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"2 of the 9 images .* first: {re.escape(str(gone[0]))}; .*val2017"):
        coco_val2017(written.root, to_tensor)


def test_an_image_that_cannot_be_decoded_ends_the_evaluation(tmp_path):
    written = write_coco(tmp_path)
    dataset = coco_val2017(written.root, to_tensor)
    path = dataset.entries[4].path
    path.write_bytes(path.read_bytes()[:600])
    assert dataset.items(4)
    with pytest.raises(BadSampleError, match=rf"{path.name}: no readable image .*copy it again"):
        dataset[4]
    path.unlink()
    with pytest.raises(BadSampleError, match="no such file"):
        dataset[4]


# --- Karpathy's splits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_2017", [False, True])
@pytest.mark.parametrize("in_annotations", [False, True])
def test_coco_karpathy(tmp_path, as_2017, in_annotations):
    written = write_karpathy(tmp_path / "coco", as_2017=as_2017)
    if in_annotations:
        (written.root / "annotations").mkdir()
        (written.root / "dataset_coco.json").rename(written.root / "annotations/dataset_coco.json")
    dataset = coco_karpathy(written.root, to_tensor)
    assert dataset.counts == (3, 15)
    assert [dataset.items(index) for index in range(3)] == list(written.captions.values())
    ids = [int(re.search(r"(\d{12})\.jpg", entry.path.name)[1]) for entry in dataset.entries]
    assert ids == [500, 501, 505]
    assert all(dataset[index].image.shape == (3, 48, 48) for index in range(3))


def test_missing_karpathy_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset_coco.json: no such file; .*bring dataset_coco"):
        coco_karpathy(tmp_path, to_tensor)
    written = write_karpathy(tmp_path / "coco")
    (written.root / "images/val2014").rename(written.root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"3 of the 3 images .*val2014_000000000500.jpg; unpack val2014"):
        coco_karpathy(written.root, to_tensor)
    change_json(written.root / "dataset_coco.json", lambda c: c["images"][0].update(sentences="x"))
    with pytest.raises(ValueError, match=r"images\[0\]: expected field sentences to be a list"):
        coco_karpathy(written.root, to_tensor)


# --- Flickr30k -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["own folder", "published", "subfolder", "other subfolder", "beside"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_flickr_images_lie_anywhere(tmp_path, monkeypatch, layout, slash):
    root = tmp_path / ("flickr30k-images" if layout == "published" else "photos")
    written = write_flickr(root)
    images = sorted(root.glob("*.jpg"))
    target = {
        "subfolder": root / "flickr30k-images",
        "other subfolder": root / "jpg",
        "beside": tmp_path / "flickr30k-images",
    }.get(layout)
    if target:
        target.mkdir()
        for path in images:
            path.rename(target / path.name)
    assert_holds(flickr30k(Path(f"{root}{slash}"), "val", to_tensor), written)
    monkeypatch.chdir(root)
    assert_holds(flickr30k(Path("."), "val", to_tensor), written)


def test_flickr_test_split(tmp_path):
    written = write_flickr(tmp_path, split="test")
    dataset = flickr30k(tmp_path, "test", to_tensor)
    assert_holds(dataset, written)
    assert dataset.name == "flickr30k_test"
    with pytest.raises(FileNotFoundError, match=r"flickr30k_val.json: no such file; .*bring it, or dataset_fl"):
        flickr30k(tmp_path, "val", to_tensor)


def test_flickr_from_karpathys_file(tmp_path):
    written = write_flickr(tmp_path)
    (tmp_path / "flickr30k_val.json").unlink()
    images = [
        {"filename": name, "split": "val" if n % 2 else "test", "sentences": [{"raw": text} for text in captions]}
        for n, (name, captions) in enumerate(written.captions.items())
    ]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    for split, odd in (("val", 1), ("test", 0)):
        names = list(written.captions)[odd::2]
        assert_holds(
            flickr30k(tmp_path, split, to_tensor),
            CaptionedImages(tmp_path, {name: written.captions[name] for name in names}),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"images": c}, "flickr30k_val.json: expected a list of"),
        (lambda c: c[1].pop("image") and None, "entry 1: expected field image to be a string"),
        (lambda c: c[1].update(image="/etc/x.jpg"), "entry 1: image '/etc/x.jpg'; expected a relative path"),
        (lambda c: c[2].update(caption="one"), "entry 2: expected field caption to be a list"),
        (lambda c: c[2].update(caption=["a", " "]), "entry 2 .*none empty"),
        (lambda c: c.clear(), "names no image of flickr30k_val; expected 1014"),
    ],
)
def test_wrong_flickr_captions(tmp_path, change, message):
    write_flickr(tmp_path)
    change_json(tmp_path / "flickr30k_val.json", change)
    with pytest.raises(ValueError, match=message):
        flickr30k(tmp_path, "val", to_tensor)


def test_missing_flickr_images(tmp_path):
    written = write_flickr(tmp_path / "data")
    for path in written.root.glob("*.jpg"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"8 of the 8 images .*flickr30k-images/10000.jpg; bring the images"):
        flickr30k(written.root, "val", to_tensor)
