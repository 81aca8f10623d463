"""The image index: built, brought up to date, interrupted and damaged; searched exactly and after the prefilter."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from itemizedclip.commands.cli import main as cli
from itemizedclip.data.images import decode_photograph
from itemizedclip.evaluation.tcsim import GlobalScorer
from itemizedclip.models.factory import create_model, create_transform, load_pretrained, transform_spec
from itemizedclip.search import build, store
from itemizedclip.search.build import build_index
from itemizedclip.search.index import open_index
from itemizedclip.search.plan import BuildOptions, find_images
from itemizedclip.search.recall import (
    BUILT_IN_QUERIES,
    CANDIDATE_COUNTS,
    PrefilterRecall,
    default_candidates,
    global_ranks,
)
from itemizedclip.search.regions import attended_region
from itemizedclip.search.store import FeatureSource, ImageIndexError, read_manifest
from itemizedclip.viewer.geometry import Geometry, map_to_input

TINY = {
    "name": "tiny",
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    "head_heads": 4,
}
TEXTS = ["two planes near a hangar", "a lake", "red roofs"]
NUM_IMAGES = 23


def save_model(path: Path, seed: int = 0, config: dict | None = None) -> Path:
    """A checkpoint with weights large enough that images score differently."""
    torch.manual_seed(seed)
    model = create_model(config or TINY)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    torch.save({"state_dict": model.state_dict(), "model_config": model.config}, path)
    return path


def write_picture(path: Path, seed: int) -> None:
    """Noise and a coloured patch, of a size of its own."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 70, 2)
    pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8) // 3
    top, left = rng.integers(0, height - 10), rng.integers(0, width - 10)
    pixels[top : top + 10, left : left + 10] = rng.integers(0, 255, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_pictures(folder: Path, count: int = NUM_IMAGES) -> Path:
    """Pictures in the folder and in two folders below it."""
    for number in range(count):
        write_picture(folder / ("", "b", "a/deep")[number % 3] / f"{number:02d}.{('png', 'jpg')[number % 2]}", number)
    return folder


def index(*flags: object) -> None:
    """`itemizedclip index`, small batches and shards unless told."""
    defaults = ["--batch-size", 3, "--shard-size", 8, "--workers", 0, "--device", "cpu"]
    cli(["index", *map(str, defaults), *map(str, flags)])


def refused(capfd, *argv: object) -> str:
    """What a command says on standard error when it exits with an error: one line, no trace."""
    with pytest.raises(SystemExit) as ended:
        cli([str(argument) for argument in argv])
    assert ended.value.code not in (0, None)
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return err


@dataclass(frozen=True)
class World:
    """Images, a checkpoint, and their index; read only."""

    images: Path
    checkpoint: Path
    index: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("index")
    made = World(write_pictures(root / "photos"), save_model(root / "tiny.pt"), root / "photos.index")
    (made.images / "notes.txt").write_text("no image")
    write_picture(made.images / ".hidden.png", 99)
    write_picture(made.images / ".thumbnails/0.png", 99)
    index(made.images, "--checkpoint", made.checkpoint)
    return made


@pytest.fixture
def copy(world, tmp_path) -> World:
    """The same, free to be changed; files keep their times."""
    for source in (world.images, world.index):
        shutil.copytree(source, tmp_path / source.name)
    shutil.copy2(world.checkpoint, tmp_path)
    made = World(tmp_path / "photos", tmp_path / "tiny.pt", tmp_path / "photos.index")
    manifest = read_manifest(made.index)
    store.write_manifest(made.index, replace(manifest, folder=str(made.images), checkpoint=str(made.checkpoint)))
    return made


def contents(folder: Path) -> dict[str, bytes]:
    """Name → bytes of the files of an index, besides its lock."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def paths_below(folder: Path) -> list[str]:
    """Images that an index should hold, by path."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*g")]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.split("/")))


@torch.no_grad()
def plain_features(world: World) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Paths, global features and tokens, one image at a time, rounded as the index keeps them."""
    loaded = load_pretrained(world.checkpoint)
    transform = create_transform(loaded.config, is_train=False)
    paths = paths_below(world.images)
    features = [
        loaded.model.encode_image(transform(Image.open(world.images / path).convert("RGB"))[None]) for path in paths
    ]
    global_ND = torch.cat([one.global_BD for one in features]).half().float()
    return paths, global_ND, torch.cat([one.tokens_BLD for one in features]).half().float()


@torch.no_grad()
def plain_scores(world: World, texts: list[str]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Paths, TCSim (M, N) by a double loop over the head, and global cosines (M, N)."""
    loaded = load_pretrained(world.checkpoint)
    paths, global_ND, tokens_NLD = plain_features(world)
    texts_MD = loaded.model.encode_text(loaded.tokenizer(texts))
    tcsim = torch.tensor(
        [
            [F.cosine_similarity(text, loaded.model.head(text[None, None], tokens[None])[0, 0], dim=0)
             for tokens in tokens_NLD]
            for text in texts_MD
        ]
    )  # fmt: skip
    return paths, tcsim, F.cosine_similarity(texts_MD[:, None], global_ND[None], dim=-1)


# --- building --------------------------------------------------------------------------------------------------------


def test_holds_every_image_once(world):
    manifest = read_manifest(world.index)
    assert [image.path for image in manifest.images] == paths_below(world.images)
    assert len(manifest.images) == NUM_IMAGES
    assert manifest.grid == (4, 4)
    for image in manifest.images:
        file = world.images / image.path
        assert (image.size, image.mtime_ns) == (file.stat().st_size, file.stat().st_mtime_ns)
        assert (image.width, image.height) == Image.open(file).size
    assert [path.name for path in store.shard_files(world.index).values()] == [
        f"shard-{number:06d}.safetensors" for number in range(3)
    ]
    shard = load_file(world.index / "shard-000000.safetensors")
    assert shard["tokens"].shape == (8, 16, 32)
    assert shard["tokens"].dtype == shard["global"].dtype == torch.float16


def test_features_are_those_of_the_tower(world):
    _, global_ND, tokens_NLD = plain_features(world)
    features = open_index(world.index, device="cpu").store.features(range(NUM_IMAGES))
    torch.testing.assert_close(features.global_BD.float(), global_ND, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(features.tokens_BLD.float(), tokens_NLD, rtol=2e-3, atol=2e-3)


def test_features_are_mapped_not_read(world):
    """Tokens are views of the file: /proc names it, and a change of the file is seen."""
    mapped = store.map_shard(store.shard_path(world.index, 1))
    if sys.platform == "linux":
        assert any("shard-000001" in line for line in Path("/proc/self/maps").read_text().splitlines())
    assert mapped.tokens_BLD.shape == (8, 16, 32)


def test_two_processes_write_the_same_files(world, tmp_path):
    made = tmp_path / "two.index"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", "-m",
         "itemizedclip.commands.index", str(world.images), "--checkpoint", str(world.checkpoint),
         "--output", str(made), "--batch-size", "3", "--shard-size", "8", "--workers", "0", "--device", "cpu"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(made) == contents(world.index)


def test_bfloat16_and_workers(world, tmp_path):
    index(
        world.images, "--checkpoint", world.checkpoint, "--output", tmp_path / "i", "--storage", "bfloat16",
        "--workers", 1, "--recall-queries", "none",
    )  # fmt: skip
    opened = open_index(tmp_path / "i", device="cpu")
    features = opened.store.features(range(NUM_IMAGES))
    assert features.tokens_BLD.dtype == torch.bfloat16
    torch.testing.assert_close(features.tokens_BLD.float(), plain_features(world)[2], rtol=2e-2, atol=2e-2)
    assert opened.manifest.recall is None


# --- bringing up to date ---------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the images that a build reads."""
    names: list[str] = []

    def noted(path: Path, *, source: str) -> Image.Image:
        names.append(path.name)
        return decode_photograph(path, source=source)

    monkeypatch.setattr(build, "decode_photograph", noted)
    return names


def assert_equals_fresh_index(copy: World, tmp_path: Path) -> None:
    """Searches of the index give what an index made at once gives."""
    fresh = tmp_path / "fresh.index"
    index(copy.images, "--checkpoint", copy.checkpoint, "--output", fresh)
    old, new = (open_index(folder, device="cpu") for folder in (copy.index, fresh))
    assert [image.path for image in old.manifest.images] == [image.path for image in new.manifest.images]
    for one, other in zip(old.search(TEXTS, 9, exact=True), new.search(TEXTS, 9, exact=True)):
        assert [hit.image.path for hit in one.hits] == [hit.image.path for hit in other.hits]
        assert [hit.score for hit in one.hits] == pytest.approx([hit.score for hit in other.hits], abs=1e-4)
        assert [hit.region.box for hit in one.hits] == [hit.region.box for hit in other.hits]


def test_nothing_to_do(copy, read, capfd):
    before = contents(copy.index)
    index(copy.images, "--checkpoint", copy.checkpoint)
    assert read == []
    assert "23 images (0 encoded now, 23 kept, 0 dropped)" in capfd.readouterr().out
    assert contents(copy.index) == before


def test_only_new_and_changed_images_are_encoded(copy, read, tmp_path, capfd):
    write_picture(copy.images / "new/30.png", 30)
    write_picture(copy.images / "00.png", 31)
    os.utime(copy.images / "b/01.jpg", ns=(1, 1))  # touched
    (copy.images / "b/04.png").unlink()
    index(copy.images, "--checkpoint", copy.checkpoint)
    assert sorted(read) == ["00.png", "01.jpg", "30.png"]
    assert "23 images (3 encoded now, 20 kept, 3 dropped)" in capfd.readouterr().out
    assert_equals_fresh_index(copy, tmp_path)


def test_deleted_images_give_their_space_back(copy, read, tmp_path):
    images = read_manifest(copy.index).images
    for image in images[:6] + images[8:16]:  # most of the first shard, all of the second
        (copy.images / image.path).unlink()
    before = sum(map(len, contents(copy.index).values()))
    index(copy.images, "--checkpoint", copy.checkpoint)
    assert read == []
    rows = [len(store.map_shard(path).global_BD) for path in store.shard_files(copy.index).values()]
    assert sorted(rows) == [2, 7]
    assert sum(map(len, contents(copy.index).values())) < before / 2
    assert_equals_fresh_index(copy, tmp_path)


def test_a_moved_folder_keeps_its_features(copy, read, tmp_path):
    moved = copy.images.rename(tmp_path / "moved")
    index(moved, "--checkpoint", copy.checkpoint, "--output", copy.index)
    assert read == []
    (found,) = open_index(copy.index, device="cpu").search(TEXTS[:1], 1)
    assert found.hits[0].file.is_file()


def test_a_killed_build_goes_on(world, tmp_path, capfd):
    """SIGKILL while the third shard is being written: what was whole is kept, and the files end up the same."""
    made = tmp_path / "killed.index"
    program = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from itemizedclip.commands.cli import main\n"
        "whole = os.replace\n"
        "def replace(part, path):\n"
        "    if Path(path).name == 'shard-000002.safetensors':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return whole(part, path)\n"
        "os.replace = replace\n"
        f"main(['index', {str(world.images)!r}, '--checkpoint', {str(world.checkpoint)!r}, '--output', {str(made)!r},"
        " '--batch-size', '3', '--shard-size', '8', '--workers', '0'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(made.glob(".*.part"))) == 1
    assert "this index is not finished" in refused(capfd, "search", "a lake", "--index", made)
    index(world.images, "--checkpoint", world.checkpoint, "--output", made)
    assert "23 images (7 encoded now, 16 kept, 0 dropped)" in capfd.readouterr().out
    assert contents(made) == contents(world.index)


def test_a_stopped_build_remembers_unreadable_images(world, tmp_path, read, capfd):
    images, made = tmp_path / "p", tmp_path / "p.index"
    shutil.copytree(world.images, images)
    (images / "00.png").write_bytes(b"no image")
    message = refused(
        capfd, "index", images, "--checkpoint", world.checkpoint, "--batch-size", 3, "--shard-size", 8, "--workers", 0
    )
    assert "1 unreadable images, more than --max-bad-fraction allows (0)" in message
    assert "00.png: no readable image" in message
    assert len(read) == 8  # stopped after the first shard, which is kept
    index(images, "--checkpoint", world.checkpoint, "--max-bad-fraction", 0.05)
    assert len(read) == NUM_IMAGES
    said = capfd.readouterr().out
    assert "22 images (15 encoded now, 7 kept" in said
    assert "1 unreadable images were skipped, the first" in said
    assert [bad.path for bad in read_manifest(made).unreadable] == ["00.png"]
    # The next run looks again, for it may have been mended.
    write_picture(images / "00.png", 0)
    index(images, "--checkpoint", world.checkpoint)
    assert read[NUM_IMAGES:] == ["00.png"]
    assert read_manifest(made).unreadable == []


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_shard_is_encoded_anew(copy, read, tmp_path, capfd, damage):
    path = store.shard_path(copy.index, 1)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    message = refused(capfd, "search", "a lake", "--index", copy.index, "--exact", "--device", "cpu")
    assert str(path) in message
    assert "run the same `itemizedclip index` command again" in message
    index(copy.images, "--checkpoint", copy.checkpoint)
    assert len(read) == 8
    assert_equals_fresh_index(copy, tmp_path)


def test_a_damaged_index_json(copy, read, capfd):
    (copy.index / "index.json").write_text('{"format": 1')
    message = refused(capfd, "search", "a lake", "--index", copy.index)
    assert "not the index.json of an image index" in message
    (copy.index / "index.json").unlink()
    index(copy.images, "--checkpoint", copy.checkpoint)
    assert read == []
    (copy.index / "index.json").write_text(json.dumps({"format": 99}))
    assert "written by a newer version" in refused(capfd, "search", "a lake", "--index", copy.index)


def changed(content: dict, field: str, value: object) -> dict:
    *above, last = field.split(".")
    place = content
    for key in above:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    return content


HOSTILE = {
    "images.3.path": ["../../etc/passwd", "/etc/passwd", "a/../../b.png", "", 5, None, "a\0.png", "C:/a.png"],
    "images.2.shard": [-1, True, "0", 2**40],
    "images.2.row": [-1, 1.0, 10**400],
    "images.1.height": [0, "40", 10**10],
    "images.0": [[], "x", {}],
    "images": [{}, None, "x"],
    "unreadable": [{"path": "x"}, [3]],
    "grid": [[], [0, 4], 4, [4, 4, 4, 4, 4]],
    "recall": [[], {"k": 1}],
    "source": [[], "x"],
    "source.storage": ["float64", {}],
    "source.model_config": ["ViT-B-16-ItemizedCLIP", {}],
    "source.model_config.embed_dim": [10**9],
    "checkpoint": [5, ""],
    "format": ["x", None, 0, True],
    "more": [1],
}


@pytest.mark.parametrize("field", HOSTILE)
def test_an_index_json_of_a_stranger_is_refused_with_its_name(copy, capfd, field):
    path = copy.index / "index.json"
    before = path.read_text()
    for value in HOSTILE[field]:
        path.write_text(json.dumps(changed(json.loads(before), field, value)))
        message = refused(capfd, "search", "a lake", "--index", copy.index, "--device", "cpu")
        assert f"error: {path}: " in message, value
        assert "delete that file and run" in message
        assert len(message) < 1200


@pytest.mark.parametrize("text", ["[" * 10**6, '{"format": 1, "format": 1}', '{"format": NaN}', "\ud800"])
def test_an_index_json_that_is_no_json(copy, capfd, text):
    (copy.index / "index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "delete that file" in refused(capfd, "search", "a lake", "--index", copy.index, "--device", "cpu")


@pytest.mark.parametrize(("field", "value"), [("images.0.row", 7_000_000), ("grid", [2, 4]), ("images.0.shard", 999)])
def test_an_index_json_that_does_not_fit_its_shards(copy, capfd, field, value):
    path = copy.index / "index.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), field, value)))
    message = refused(capfd, "search", "a lake", "--index", copy.index, "--exact", "--device", "cpu")
    assert "this part of the index is" in message
    assert "run the same `itemizedclip index` command again" in message


def test_a_shard_header_of_a_stranger_costs_its_images_anew(copy, read, tmp_path):
    path = store.shard_path(copy.index, 0)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("global", "tokens")}
        header = json.loads(file.metadata()["shard"])
    save_file(tensors, path, metadata={"shard": json.dumps(changed(header, "images.0.path", "../../etc/passwd"))})
    index(copy.images, "--checkpoint", copy.checkpoint)
    assert len(read) == 8
    assert_equals_fresh_index(copy, tmp_path)


def test_a_file_whose_name_is_no_text_is_passed_over(copy, capfd):
    name = os.fsdecode(b"caf\xe9.png")
    write_picture(copy.images / name, 5)
    index(copy.images, "--checkpoint", copy.checkpoint)
    assert "its name is no UTF-8 text" in capfd.readouterr().err
    assert len(read_manifest(copy.index).images) == NUM_IMAGES


# --- refusing --------------------------------------------------------------------------------------------------------


def test_wrong_folders_of_images(world, tmp_path, capfd):
    def said(folder: Path) -> str:
        return refused(capfd, "index", folder, "--checkpoint", world.checkpoint, "--output", tmp_path / "i")

    assert "does not exist; expected a folder of images" in said(tmp_path / "nowhere")
    assert "is a file" in said(world.images / "notes.txt")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no file that is an image by its name" in said(empty)
    (empty / "a.txt").write_text("text")
    assert "only 1 other files, none that is an image" in said(empty)
    (empty / "a.png").write_text("text")
    assert "more than --max-bad-fraction allows" in said(empty)
    arguments = ["index", empty, "--checkpoint", world.checkpoint, "--max-bad-fraction", 1]
    assert "no image can be read; the first" in refused(capfd, *arguments)


def test_wrong_settings(world, copy, tmp_path, capfd):
    other = save_model(tmp_path / "other.pt", seed=1)
    start = ["index", copy.images, "--checkpoint"]
    assert "made with another checkpoint (sha256" in refused(capfd, *start, other)
    assert "another storage (float16, not bfloat16)" in refused(capfd, *start, copy.checkpoint, "--storage", "bfloat16")
    assert "another precision (fp32, not amp_bf16)" in refused(
        capfd, *start, copy.checkpoint, "--precision", "amp_bf16"
    )
    other_images = write_pictures(tmp_path / "q", 1).rename(tmp_path / "r")
    (other_images / "00.png").rename(other_images / "another.png")
    message = refused(capfd, "index", other_images, "--checkpoint", copy.checkpoint, "--output", copy.index)
    assert "has none of its 23 images" in message
    assert "does not exist" in refused(capfd, *start, tmp_path / "no.pt")
    assert "is a folder" in refused(capfd, *start, tmp_path)
    assert "--shard-size is 0" in refused(capfd, *start, copy.checkpoint, "--shard-size", 0)
    assert "--max-bad-fraction is 2.0" in refused(capfd, *start, copy.checkpoint, "--max-bad-fraction", 2)
    assert "batch_size is 0" in refused(capfd, *start, copy.checkpoint, "--batch-size", 0)
    assert "no such file; expected one query per line" in refused(
        capfd, *start, copy.checkpoint, "--recall-queries", tmp_path / "no.txt"
    )
    file = tmp_path / "file"
    file.write_text("")
    assert "an index cannot be kept there" in refused(capfd, *start, copy.checkpoint, "--output", file / "i")
    assert contents(copy.index).keys() == contents(world.index).keys()


def test_another_build_of_the_same_index(copy, capfd):
    with build._locked(copy.index):
        message = refused(capfd, "index", copy.images, "--checkpoint", copy.checkpoint)
    assert "another process is building this index" in message


@pytest.mark.parametrize(
    ("value", "message"), [(1e6, "more than float16 holds; use --storage bfloat16"), (float("nan"), "not finite")]
)
def test_features_that_cannot_be_kept(world, tmp_path, value, message):
    loaded = load_pretrained(world.checkpoint)
    with torch.no_grad():
        loaded.model.image_post.proj.mul_(value)
    source = FeatureSource("0" * 64, loaded.config, transform_spec(loaded.config), "float16", "fp32")
    with pytest.raises(ImageIndexError, match=message):
        build_index(
            loaded.model, world.images, tmp_path / "i", checkpoint=world.checkpoint,
            transform=create_transform(loaded.config, is_train=False), source=source, options=BuildOptions(),
        )  # fmt: skip


def test_a_model_of_volumes(world, tmp_path, capfd):
    checkpoint = save_model(tmp_path / "volumes.pt", config=create_model("HLIPSN_debug").config)
    message = refused(capfd, "index", world.images, "--checkpoint", checkpoint, "--output", tmp_path / "i")
    assert "which reads volumes; expected a model of photographs" in message


def test_links_are_followed_once(world, tmp_path):
    (tmp_path / "p/a").mkdir(parents=True)
    write_picture(tmp_path / "p/a/0.PNG", 0)
    (tmp_path / "p/a/loop").symlink_to(tmp_path / "p")
    (tmp_path / "p/linked").symlink_to(world.images / "b")
    (tmp_path / "p/i").mkdir()
    write_picture(tmp_path / "p/i/1.png", 0)
    found, others = find_images(tmp_path / "p", tmp_path / "p/i")
    in_b = sorted(path.name for path in (world.images / "b").iterdir())
    assert [image.path for image in found] == ["a/0.PNG", *(f"linked/{name}" for name in in_b)]
    assert others == 0


# --- searching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_texts", [3, 40], ids=["few texts", "many texts"])
def test_exact_search_equals_a_double_loop(world, num_texts):
    """40 texts are more than D / (H − 1), so that the other scorer is at work."""
    texts = (TEXTS + list(BUILT_IN_QUERIES) + [f"{number} boats" for number in range(9)])[:num_texts]
    paths, tcsim_MN, _ = plain_scores(world, texts)
    opened = open_index(world.index, device="cpu")
    for text, scores_N, found in zip(texts, tcsim_MN, opened.search(texts, 7, exact=True)):
        assert found.text == text
        best = scores_N.topk(7)
        assert [hit.score for hit in found.hits] == pytest.approx(best.values.tolist(), abs=1e-4)
        own = [scores_N[paths.index(hit.image.path)].item() for hit in found.hits]
        assert own == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [hit.rank for hit in found.hits] == list(range(1, 8))
        assert [float(hit.maps.scores[0]) for hit in found.hits] == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize("candidates", [3, 9])
def test_prefiltered_search_ranks_its_candidates_exactly(world, candidates):
    paths, tcsim_MN, cosine_MN = plain_scores(world, TEXTS)
    opened = open_index(world.index, device="cpu")
    differ = False
    for m, found in enumerate(opened.search(TEXTS, 3, candidates=candidates)):
        kept = cosine_MN[m].topk(candidates).indices
        expected = kept[tcsim_MN[m, kept].sort(descending=True).indices][:3]
        assert [hit.image.path for hit in found.hits] == [paths[n] for n in expected]
        differ |= set(expected.tolist()) != set(tcsim_MN[m].topk(3).indices.tolist())
    assert differ  # the prefilter loses something here, so the two searches are told apart
    # Candidates beyond the index: the exact search.
    (all_of_them,) = opened.search(TEXTS[:1], 30, candidates=500)
    assert len(all_of_them.hits) == NUM_IMAGES


def test_recall_equals_a_plain_computation(world):
    _, tcsim_MN, cosine_MN = plain_scores(world, TEXTS)
    opened = open_index(world.index, device="cpu")
    for k, C in ((3, 9), (5, 12)):
        expected = [
            len(set(tcsim.topk(k).indices.tolist()) & set(cosine.topk(C).indices.tolist())) / k
            for tcsim, cosine in zip(tcsim_MN, cosine_MN)
        ]
        measured = opened.recall(TEXTS, k=k, candidates=C)
        assert measured.at[C] == pytest.approx(sum(expected) / len(TEXTS))
        assert 0 < measured.at[C] < 1
        assert measured.at[20] >= measured.at[C]
        assert measured.at[NUM_IMAGES] == 1
        assert (measured.k, measured.num_images, measured.num_queries) == (k, NUM_IMAGES, 3)
    # What the build measured and kept.
    _, tcsim_MN, cosine_MN = plain_scores(world, list(BUILT_IN_QUERIES))
    found = [
        len(set(tcsim.topk(10).indices.tolist()) & set(cosine.topk(20).indices.tolist())) / 10
        for tcsim, cosine in zip(tcsim_MN, cosine_MN)
    ]
    kept = opened.manifest.recall
    assert kept is not None
    assert kept.at == {20: pytest.approx(sum(found) / len(found)), NUM_IMAGES: 1.0}
    assert kept.queries == "32 built-in phrases"


def test_global_ranks_with_ties():
    """Equal cosines go to the lower number, as in the prefilter itself."""

    class Repeated:
        def global_batches(self, *, share):
            features = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0]])
            for part in torch.arange(4).split(2):
                yield part, store.ImageFeatures(features[part], features[part][:, None], (1,))

    ranks = global_ranks(GlobalScorer(torch.tensor([[1.0, 0.0]])), Repeated(), torch.tensor([[0, 1, 2, 3]]), (0, 1))
    assert ranks.tolist() == [[1, 4, 2, 3]]


def test_recall_is_measured_when_much_changed_and_for_other_queries(copy, tmp_path):
    def measured() -> tuple[int, str]:
        recall = read_manifest(copy.index).recall
        return recall.num_images, recall.queries

    write_picture(copy.images / "30.png", 30)
    index(copy.images, "--checkpoint", copy.checkpoint)
    assert measured() == (23, "32 built-in phrases")  # one of 24 images is new
    for number in range(31, 34):
        write_picture(copy.images / f"{number}.png", number)
    index(copy.images, "--checkpoint", copy.checkpoint)
    assert measured() == (27, "32 built-in phrases")
    queries = tmp_path / "mine.txt"
    queries.write_text("a lake\n\nred roofs\n")
    index(copy.images, "--checkpoint", copy.checkpoint, "--recall-queries", queries)
    assert measured() == (27, "2 queries of mine.txt")
    queries.write_text("\n")
    with pytest.raises(SystemExit):
        index(copy.images, "--checkpoint", copy.checkpoint, "--recall-queries", queries)


@pytest.mark.parametrize(
    ("at", "expected"),
    [({20: 0.3, 50: 0.96, 100: 1.0}, 50), ({20: 0.1, 5000: 0.99}, 2000), ({20: 0.1, 2000: 0.5}, 2000)],
)
def test_default_candidates_follow_the_measurement(at, expected):
    recall = PrefilterRecall(10, 9000, 5, "queries", at)
    assert default_candidates(9000, recall) == expected
    assert default_candidates(9000, None) == 500
    assert default_candidates(2000, recall) == default_candidates(2000, None) == 2000
    assert recall.lower_bound(49) == (20, at[20])
    assert recall.lower_bound(19) is None


def test_wrong_searches(world, tmp_path, capfd):
    def said(*flags: object) -> str:
        return refused(capfd, "search", *flags, "--device", "cpu")

    at = ["--index", world.index]
    assert "no text to look for" in said(*at)
    assert "no text to look for" in said(" ", *at)
    assert "no index here" in said("a lake", "--index", tmp_path)
    assert "--top is 0" in said("a lake", *at, "--top", 0)
    assert "--candidates is -1" in said("a lake", *at, "--candidates", -1)
    assert "expected auto, cpu, cuda" in refused(capfd, "search", "a lake", *at, "--device", "tpu")
    assert "no such file; expected one query per line" in said(*at, "--queries", tmp_path / "none.txt")
    other = save_model(tmp_path / "other.pt", seed=1)
    assert "not the checkpoint that" in said("a lake", *at, "--checkpoint", other)
    assert "the checkpoint that" in said("a lake", *at, "--checkpoint", tmp_path / "none.pt")
    opened = open_index(world.index, device="cpu")
    with pytest.raises(ValueError, match="no text to search for"):
        opened.search([])
    with pytest.raises(ValueError, match="0 hits"):
        opened.search(["a lake"], 0)
    with pytest.raises(ValueError, match="0 candidates"):
        opened.search(["a lake"], candidates=0)


def test_the_checkpoint_may_move(copy, tmp_path, capfd):
    moved = copy.checkpoint.rename(tmp_path / "elsewhere.pt")
    message = refused(capfd, "search", "a lake", "--index", copy.index)
    assert f"{copy.checkpoint}: the checkpoint that" in message
    assert "give the file by --checkpoint" in message
    assert len(open_index(copy.index, checkpoint=moved, device="cpu")) == NUM_IMAGES


# --- where a text looked ---------------------------------------------------------------------------------------------


def test_region_of_a_planted_spot():
    """Around the peak, corners included; a second spot and weak neighbours stay out."""
    weights = np.full((4, 4), 0.01)
    weights[1, 1], weights[2, 2] = 0.3, 0.2
    weights[0, 3] = 0.25  # as strong, but apart from the peak
    weights[1, 2] = 0.1
    # An image of 60 rows and 100 columns, resized to 36 × 60, 32 × 32 of its middle cut out.
    geometry = Geometry.of_input((60, 100)).resize((36, 60)).crop((2, 14), (32, 32))
    region = attended_region(weights, 0.05, geometry)
    # Rows 1–2 of 8 pixels: 8 … 24 of the view, 10 … 26 of the 36 rows; columns 22 … 38 of the 60; both × 1 / 0.6.
    assert region.box == (36, 16, 64, 44)
    assert region.share == pytest.approx(0.5)
    assert region.nowhere == 0.05
    inside = np.isfinite(map_to_input(torch.from_numpy(weights), geometry))
    seen = map_to_input(torch.from_numpy(weights), geometry)[inside]
    assert seen.max() == pytest.approx(0.3)
    # Where padding was attended the box ends at the image.
    corner = np.zeros((2, 2))
    corner[1, 1] = 1
    padded = Geometry.of_input((10, 10)).crop((-5, -5), (20, 20))
    assert attended_region(corner, 0, padded).box == (5, 5, 10, 10)


def test_regions_of_hits_hold_their_peak(world):
    opened = open_index(world.index, device="cpu")
    for found in opened.search(TEXTS, 5, exact=True):
        for hit in found.hits:
            geometry = opened._geometry((hit.image.height, hit.image.width))
            drawn = map_to_input(hit.maps.times_uniform()[0], geometry)
            top, left = np.unravel_index(np.nanargmax(drawn), drawn.shape)
            box = hit.region.box
            assert box[0] <= left < box[2] <= hit.image.width
            assert box[1] <= top < box[3] <= hit.image.height
            assert 0 < hit.region.share <= 1 - hit.region.nowhere + 1e-6


# --- the command -----------------------------------------------------------------------------------------------------


def test_json_through_the_installed_command(world):
    """Nothing but JSON on standard output, by the command as it is installed."""
    command = Path(sys.executable).with_name("itemizedclip")
    done = subprocess.run(
        [str(command), "search", *TEXTS[:2], "--index", str(world.index), "--top", "4", "--json", "--device", "cpu",
         "--candidates", "20", "--measure-recall"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["mode"] == "prefiltered"
    assert (told["num_images"], told["candidates"]) == (NUM_IMAGES, 20)
    assert told["is_recall_of_these_texts"]
    assert set(told["prefilter_recall"]["at"]) == {"20", "23"}
    assert 0 < told["search_seconds"] < 60
    assert [one["text"] for one in told["queries"]] == TEXTS[:2]
    found = open_index(world.index, device="cpu").search(TEXTS[:2], 4, candidates=20)
    for one, expected in zip(told["queries"], found):
        assert [hit["path"] for hit in one["hits"]] == [hit.image.path for hit in expected.hits]
        assert [tuple(hit["box"]) for hit in one["hits"]] == [hit.region.box for hit in expected.hits]
        assert [hit["score"] for hit in one["hits"]] == pytest.approx([hit.score for hit in expected.hits], abs=1e-5)


def test_tables_and_pictures(copy, tmp_path, capfd):
    queries = tmp_path / "more.txt"
    queries.write_text("red roofs\n")
    out = tmp_path / "out"
    (found, _) = open_index(copy.index, device="cpu").search(["a lake", "red roofs"], 3)
    gone, changed, drawn = (hit.file for hit in found.hits)
    gone.unlink()
    write_picture(changed, 77)
    with caplog_of("itemizedclip") as log:
        cli(["search", "a lake", "--queries", str(queries), "--index", str(copy.index), "--top", "3", "--device", "cpu",
             "--output", str(out)])  # fmt: skip
    said = capfd.readouterr().out
    assert found.hits[0].image.path in said
    assert "all 23 images were scored" in said
    assert "searched in" in said
    assert any(f"{gone}: no such file" in line for line in log)
    assert any("changed since it was encoded" in line and changed.name in line for line in log)
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert f"1_003_{drawn.stem}.png" in pictures
    assert not any(name.startswith(("1_001", "1_002")) for name in pictures)
    assert min(Image.open(out / pictures[0]).size) > 200
    assert json.loads((out / "hits.json").read_text())["queries"][0]["text"] == "a lake"
    file = tmp_path / "file"
    file.write_text("")
    message = refused(capfd, "search", "a lake", "--index", copy.index, "--output", file, "--device", "cpu")
    assert "cannot put pictures here" in message


class caplog_of:
    """Messages of a logger while the block runs; the command's own handlers stay."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)

    def __enter__(self) -> caplog_of:
        self.logger.addHandler(self.handler)
        return self

    def __exit__(self, *error: object) -> None:
        self.logger.removeHandler(self.handler)

    def __iter__(self):
        return iter(self.stream.getvalue().splitlines())


def test_the_prefilter_is_said_to_be_measured_or_not(copy, capfd):
    start = ["search", "a lake", "--index", str(copy.index), "--device", "cpu", "--top", "1", "--candidates", "21"]
    cli(start)
    said = capfd.readouterr().out
    assert "21 of 23 images were scored per text; the prefilter keeps" in said
    assert "of the exact first 10 with 20 candidates (measured on 32 built-in phrases, 23 images)" in said
    manifest = read_manifest(copy.index)
    store.write_manifest(copy.index, replace(manifest, recall=None))
    cli(start)
    assert "the recall of the prefilter was not measured" in capfd.readouterr().out
    cli([*start, "--measure-recall"])
    assert "of the exact first 1 (measured on these texts" in capfd.readouterr().out
    assert len(CANDIDATE_COUNTS) == len(set(CANDIDATE_COUNTS))


def test_a_text_longer_than_the_tower_reads(world):
    opened = open_index(world.index, device="cpu")
    long = "a very long text about a lake and hills and trees and roofs"
    assert opened.cut_texts(["a lake", long]) == [long]


def test_the_program_of_the_documentation_runs(copy):
    """The code block of docs/search.md, beside the index, as a user would type it."""
    page = (Path(__file__).parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert program is not None
    done = subprocess.run(
        [sys.executable, "-c", program[1]], cwd=copy.index.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 * 5 + 1
    assert len(list(copy.index.parent.glob("*.png"))) in (1, 2)


def test_help(capsys):
    for command, flags in (
        ("index", ("--checkpoint", "--storage", "--max-bad-fraction", "202 kB")),
        ("search", ("--exact", "--candidates", "--measure-recall", "--json")),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli([command, "--help"])
        assert stopped.value.code == 0
        told = " ".join(capsys.readouterr().out.split())
        assert all(flag in told for flag in flags)
