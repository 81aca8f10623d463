"""Photographs are decoded by one rule: the decoder, and every path to it with every kind of file."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from itemizedclip_2d.recipes import RsicdData
from itemizedclip_2d.retrieval_sets import coco_val2017, flickr30k
from itemizedclip_2d.rsicd import RsicdDataset
from itemizedclip_2d.shard_index import open_shards
from itemizedclip_2d.shards import ShardDataset
from itemizedclip_2d.visualize_rsicd import RsicdPictures, RsicdSource
from itemizedclip_2d.visualize_shards import ShardPictures, ShardPictureSource
from photograph_cases import Case, encode, photograph_cases, picture, png_header, turned
from PIL import Image, ImageFile
from rsicd_files import image_cell, write_rsicd_csv
from torchvision.transforms.functional import pil_to_tensor

from itemizedclip.commands import explain as explain_command
from itemizedclip.commands import report as report_command
from itemizedclip.commands.cli import main as cli
from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.images import MAX_ASPECT, decode_mask, decode_photograph
from itemizedclip.data.jsonl import ImageItems
from itemizedclip.models.factory import LoadedModel, create_model, load_pretrained
from itemizedclip.search import build, searcher
from itemizedclip.search.index import open_index
from itemizedclip.search.plan import FoundImage
from itemizedclip.viewer.inputs import open_input
from itemizedclip.viewer.sets import open_explain_set, read_masks

ROOT = Path(__file__).parents[2]
CASES = photograph_cases()
TINY = {
    "name": "tiny",
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    "head_heads": 4,
}

# --- the decoder -----------------------------------------------------------------------------------------------------


def check(case: Case, decode: Callable[[], np.ndarray], source: str) -> None:
    """The pixels of the case, or one sentence that names the source, what was expected and what to do."""
    if case.pixels is not None:
        found = decode()
        assert found.shape == case.pixels.shape
        assert np.abs(found.astype(int) - case.pixels).max() <= case.rounding
        return
    with pytest.raises(BadSampleError) as refused:
        decode()
    message = str(refused.value)
    assert case.words in message
    assert source in message
    assert "\n" not in message
    assert re.search("save it|scale it|copy it|crop it", message)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["bytes", "path", "file"])
def test_every_kind_from_bytes_path_and_file(tmp_path, name, form):
    case, path = CASES[name], tmp_path / "photo.jpg"
    path.write_bytes(case.encoded)
    data = {"bytes": case.encoded, "path": path, "file": io.BytesIO(case.encoded)}[form]

    def decode() -> np.ndarray:
        decoded = decode_photograph(data, source="photo 7")
        assert decoded.mode == "RGB"
        assert type(decoded) is Image.Image
        assert decoded.info == {}
        return np.asarray(decoded)

    check(case, decode, "photo 7")


@pytest.mark.parametrize("size", [(640, 480), (31, 17), (1, 1), (8, 8 * MAX_ASPECT)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_ordinary_files_keep_every_bit(size, kind):
    rng = np.random.default_rng(0)
    encoded = encode(Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)), kind)
    plain = Image.open(io.BytesIO(encoded)).convert("RGB")
    assert decode_photograph(encoded, source="x").tobytes() == plain.tobytes()


def test_16_bits_become_8_by_division():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    decoded = np.asarray(decode_photograph(encode(Image.fromarray(values), "PNG"), source="x"))
    assert np.array_equal(decoded[..., 0], np.rint(values / 257).astype(np.uint8))


def test_a_picture_saved_again_is_not_turned_twice(tmp_path):
    decode_photograph(encode(Image.fromarray(picture()), "PNG", exif=turned(6)), source="x").save(tmp_path / "x.png")
    assert np.array_equal(np.asarray(decode_photograph(tmp_path / "x.png", source="x")), np.rot90(picture(), -1))


def test_files_that_are_none(tmp_path):
    for path, words in (
        (tmp_path / "absent.jpg", "no such file; expected a JPEG"),
        (tmp_path, "is a folder; expected a JPEG"),
        (Path("/dev/null"), "is no regular file"),
    ):
        with pytest.raises(BadSampleError, match=f"{path}: {words}"):
            decode_photograph(path, source=str(path))


def test_sizes_are_judged_before_anything_is_decoded(monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for limit in (Image.MAX_IMAGE_PIXELS, None):  # some libraries lift Pillow's own limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadSampleError, match="more than the 178,956,970"):
            decode_photograph(png_header(20_000, 10_000), source="x")
        with pytest.raises(BadSampleError, match="1000 × 4 pixels; expected a longer side"):
            decode_photograph(png_header(1000, 4), source="x")


def test_masks_are_white_where_something_is():
    seen = picture()[..., 0] > 127
    white = Image.fromarray(seen)
    assert np.array_equal(decode_mask(encode(white, "PNG"), source="x"), seen)
    sixteen = Image.fromarray(seen.astype(np.uint16) * 65535)
    assert np.array_equal(decode_mask(encode(sixteen, "PNG"), source="x"), seen)
    painted = Image.new("RGBA", white.size, (255, 255, 255, 0))
    painted.paste((255, 255, 255, 255), mask=white)
    assert np.array_equal(decode_mask(encode(painted, "PNG"), source="x"), seen)


def test_nothing_else_opens_images():
    """`Image.open` stands in the decoder and nowhere else in the product."""
    files = [
        path
        for place in ("itemizedclip", "2D_images_tasks", "Radiology_Tasks")
        for path in (ROOT / place).rglob("*.py")
    ]
    assert len(files) > 80
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_open = isinstance(node, ast.Attribute) and node.attr == "open" and "Image" in ast.unparse(node.value)
            is_import = isinstance(node, ast.ImportFrom) and node.module == "PIL.Image"
            if is_open or is_import:
                found.append(path.relative_to(ROOT).as_posix())
    assert set(found) == {"itemizedclip/data/images.py"}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert not [page.name for page in pages if "Image.open" in page.read_text(encoding="utf-8")]


# --- every path to it ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class World:
    """What the paths need besides the photograph.

    Attributes:
        folder: of this test.
        loaded: a small model, and the checkpoint it came from.
    """

    folder: Path
    loaded: LoadedModel
    checkpoint: Path
    monkeypatch: pytest.MonkeyPatch

    def write(self, encoded: bytes) -> Path:
        path = self.folder / "photo.jpg"
        path.write_bytes(encoded)
        return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    torch.save({"state_dict": create_model(TINY).state_dict(), "model_config": TINY}, path)
    return path


@pytest.fixture(scope="module")
def loaded(checkpoint) -> LoadedModel:
    return load_pretrained(checkpoint)


def rows_of(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def write_shard(world: World, encoded: bytes) -> Path:
    path = world.folder / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("photo.jpg", encoded), ("photo.json", b'{"caption": ["a lake"]}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def by_training_shards(world: World, encoded: bytes) -> np.ndarray:
    dataset = ShardDataset(
        open_shards([write_shard(world, encoded)], caption_field="caption"),
        transform=pil_to_tensor, items=None, num_items=2, is_train=True, seed=0,
    )  # fmt: skip
    return rows_of(dataset[0, 0].image)


def by_checked_shards(world: World, encoded: bytes) -> np.ndarray:
    (shard,) = open_shards([write_shard(world, encoded)], caption_field="caption", decode_images=True)
    if shard.bad:
        raise BadSampleError(shard.bad[0][1])
    return by_training_shards(world, encoded)


def by_rsicd(world: World, encoded: bytes) -> np.ndarray:
    path = write_rsicd_csv(world.folder / "train.csv", [("photo.jpg", "['a lake .']", image_cell(encoded or b"\0"))])
    dataset = RsicdDataset(
        csv_path=path, transform=pil_to_tensor, items=None, num_items=2, is_train=True, seed=0
    )  # fmt: skip
    return rows_of(dataset[0, 0].image)


def by_coco(world: World, encoded: bytes) -> np.ndarray:
    (world.folder / "annotations").mkdir()
    (world.folder / "val2017").mkdir()
    (world.folder / "val2017" / "photo.jpg").write_bytes(encoded)
    content = {
        "images": [{"id": 1, "file_name": "photo.jpg"}], "annotations": [{"image_id": 1, "caption": "a lake"}],
    }  # fmt: skip
    (world.folder / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    return rows_of(coco_val2017(world.folder, pil_to_tensor)[0].image)


def by_flickr(world: World, encoded: bytes) -> np.ndarray:
    world.write(encoded)
    content = [{"image": "flickr30k-images/photo.jpg", "caption": ["a lake"]}]
    (world.folder / "flickr30k_val.json").write_text(json.dumps(content))
    return rows_of(flickr30k(world.folder, "val", pil_to_tensor)[0].image)


def by_index(world: World, encoded: bytes) -> np.ndarray:
    path = world.write(encoded)
    found = build._Photographs(world.folder, [FoundImage(path.name, 0, 0)], pil_to_tensor)[0]
    if found.pixels is None:
        raise BadSampleError(found.reason)
    assert found.size == tuple(found.pixels.shape[1:])
    return rows_of(found.pixels)


def by_open_input(world: World, encoded: bytes) -> np.ndarray:
    return open_input(world.write(encoded), world.loaded).views[0].values


def _by_command(world: World, encoded: bytes, main: Callable, module, name: str) -> np.ndarray:
    shown = []

    def note(explanation, *others, **more):
        shown.append(explanation.source.views[0].values)
        return "" if name == "report_html" else [world.folder / "results.json"]

    world.monkeypatch.setattr(module, name, note)
    world.monkeypatch.setattr(module, "load_pretrained", lambda *others, **more: world.loaded)
    errors: list[str] = []
    world.monkeypatch.setattr("itemizedclip.runtime.errors._end", lambda prog, message, *status: errors.append(message))
    flags = ["--checkpoint", str(world.checkpoint), "--items", "a lake", "--device", "cpu"]
    main([str(world.write(encoded)), *flags, "--output", str(world.folder / "out.html")])
    if errors:
        raise BadSampleError(errors[0])
    return shown[0]


def by_report(world: World, encoded: bytes) -> np.ndarray:
    return _by_command(world, encoded, report_command.main, report_command, "report_html")


def by_explain(world: World, encoded: bytes) -> np.ndarray:
    return _by_command(world, encoded, explain_command.main, explain_command, "write_with_progress")


def by_explain_set(world: World, encoded: bytes) -> np.ndarray:
    world.write(encoded)
    (world.folder / "items.json").write_text('{"photo": ["a lake"]}')
    dataset = open_explain_set(world.folder, world.folder / "items.json", world.loaded)
    dataset[0]
    return dataset._open(0).views[0].values


def by_pictures_of_rsicd(world: World, encoded: bytes) -> np.ndarray:
    write_rsicd_csv(world.folder / "test.csv", [("photo.jpg", "['a lake .']", image_cell(encoded or b"\0"))])
    data = RsicdPictures(**vars(RsicdData(rsicd_dir=world.folder, external_captions="captions")))
    return np.asarray(RsicdSource(data, ["a lake"]).picture(0).image)


def by_pictures_of_shards(world: World, encoded: bytes) -> np.ndarray:
    data = ShardPictures(val_data=str(write_shard(world, encoded)), caption_field="caption")
    return np.asarray(ShardPictureSource(data, None).picture(0).image)


@pytest.fixture(scope="module")
def searched(checkpoint, tmp_path_factory):
    """An index of one photograph, and the hit of a text."""
    folder = tmp_path_factory.mktemp("searched") / "photos"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(CASES["JPEG"].encoded)
    flags = ["--checkpoint", str(checkpoint), "--device", "cpu", "--workers", "0", "--recall-queries", "none"]
    cli(["index", str(folder), *flags])
    opened = open_index(folder.with_name("photos.index"), device="cpu")
    return opened, opened.search(["a lake"])[0].hits[0]


def by_search_pictures(world: World, encoded: bytes) -> np.ndarray:
    opened, hit = world.searched
    path = world.write(encoded)
    status = path.stat()
    image = dataclasses.replace(hit.image, size=status.st_size, mtime_ns=status.st_mtime_ns)
    shown = []
    world.monkeypatch.setattr(searcher, "attention_figure", lambda seen, *others, **more: shown.append(seen))
    opened.draw("a lake", dataclasses.replace(hit, file=path, image=image))
    return np.asarray(shown[0])


def by_the_program_for_own_data(world: World, encoded: bytes) -> np.ndarray:
    """The dataset of docs/own-data.md."""
    program = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "own-data.md").read_text(), re.DOTALL)
    names: dict = {}
    world.monkeypatch.setenv("PICTURES", str(world.folder))
    exec(program[1].partition("\nmodel, ")[0], names)
    world.write(encoded)
    (world.folder / "items.json").write_text('{"photo.jpg": ["a lake"]}')
    dataset = names["PictureFolder"](world.folder / "items.json", pil_to_tensor, 1)
    return rows_of(dataset[0, 0].image)


def by_own_images(world: World, encoded: bytes) -> np.ndarray:
    """The JSONL of `itemizedclip train own`."""
    world.write(encoded)
    (world.folder / "own.jsonl").write_text('{"image": "photo.jpg", "items": ["a lake"]}')
    return rows_of(ImageItems(world.folder / "own.jsonl", pil_to_tensor, num_items=1, is_train=True)[0, 0].image)


PATHS = [
    by_training_shards, by_checked_shards, by_rsicd, by_coco, by_flickr, by_index, by_open_input, by_report, by_explain,
    by_explain_set, by_pictures_of_rsicd, by_pictures_of_shards, by_search_pictures, by_the_program_for_own_data,
    by_own_images,
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_every_path_reads_every_kind_alike(tmp_path, monkeypatch, loaded, checkpoint, searched, path, name):
    world = World(tmp_path, loaded, checkpoint, monkeypatch)
    world.searched = searched
    case = CASES[name]
    if not case.encoded and path in (by_rsicd, by_pictures_of_rsicd):
        case = dataclasses.replace(case, words="of no known format")  # there, empty bytes are a row that is refused
    check(case, lambda: path(world, case.encoded), "photo")


def test_an_index_of_every_kind(tmp_path, checkpoint, capsys, monkeypatch):
    """Built as a whole: what can be read is in, upright; what cannot is named."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, case in enumerate(CASES.values()):
        (folder / f"{number:03d}.png").write_bytes(case.encoded)
    flags = ["--checkpoint", str(checkpoint), "--device", "cpu", "--workers", "0", "--recall-queries", "none"]
    cli(["index", str(folder), *flags, "--max-bad-fraction", "1"])
    manifest = open_index(tmp_path / "photos.index", device="cpu").manifest
    sizes = {int(image.path[:3]): (image.height, image.width) for image in manifest.images}
    good = {n: case.pixels.shape[:2] for n, case in enumerate(CASES.values()) if case.pixels is not None}
    assert sizes == good
    assert [int(bad.path[:3]) for bad in manifest.unreadable] == [n for n in range(len(CASES)) if n not in good]
    # Features of photographs that were decoded by another rule are not mixed with these.
    monkeypatch.setattr("itemizedclip.commands.index.DECODER_VERSION", 1)
    with pytest.raises(SystemExit):
        cli(["index", str(folder), *flags])
    assert "this index was made with another transform" in capsys.readouterr().err


# --- masks of strangers ----------------------------------------------------------------------------------------------


def test_masks_that_unpack_to_gigabytes_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("1.npy", "w", force_zip64=True) as entry,
    ):
        np.lib.format.write_array_header_1_0(entry, {"descr": "|b1", "fortran_order": False, "shape": (33, 8192, 8192)})
        for _ in range(33):
            entry.write(bytes(2**26))
    assert path.stat().st_size < 4_000_000
    with pytest.raises(BadSampleError, match=r"a.npz: unpacks to 2,214,592,\d+ bytes, more than the 2,147,483,648"):
        read_masks(path)
    torch.save({"1": torch.zeros(1, dtype=torch.bool).expand(8192, 8192)}, tmp_path / "a.pt")
    with pytest.raises(BadSampleError, match=r"a.pt: masks cannot be read, 1 is \(8192, 8192\), larger"):
        read_masks(tmp_path / "a.pt")
    for content in (b"", b"PK\x03\x04", b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(BadSampleError, match="masks cannot be read"):
            read_masks(path)
