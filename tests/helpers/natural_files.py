"""Writes small natural-image data in the published formats, for tests: webdataset shards with an item file, COCO and
Flickr30k folders.

The pictures are those of `rsicd_files`: a coloured shape per image, and texts that name it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import webdataset
from rsicd_files import RsicdScene, make_scene

CLASSES = 30


@dataclass(frozen=True)
class ShardFolder:
    """A written folder of shards.

    Attributes:
        scenes: key → what the picture shows.
        items: index → items, as in the item file.
    """

    folder: Path
    shards: list[Path]
    items_path: Path
    scenes: dict[str, RsicdScene] = field(default_factory=dict)
    items: dict[int, list[str]] = field(default_factory=dict)

    def pattern(self, first: int = 0, last: int | None = None) -> str:
        """The brace range of shards first … last."""
        last = len(self.shards) - 1 if last is None else last
        return f"{self.folder}/{{{first:05d}..{last:05d}}}.tar"


def sample_key(shard: int, position: int) -> str:
    """img2dataset's key: shard number, then the position in it."""
    return f"{shard:05d}{position:04d}"


def write_shards(
    folder: Path,
    *,
    num_shards: int = 3,
    per_shard: int = 6,
    gaps: Collection[str] = (),
    without_items: Collection[str] = (),
    sizes: bool = False,
    image_size: int = 40,
    seed: int = 0,
) -> ShardFolder:
    """Write 00000.tar, 00001.tar, … and first_300000_rewrites.json.

    Args:
        gaps: keys of failed downloads, which the shards lack.
        without_items: keys that the item file lacks.
        sizes: also write sizes.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    written = ShardFolder(
        folder, [folder / f"{shard:05d}.tar" for shard in range(num_shards)], folder / "first_300000_rewrites.json"
    )
    counts = {}
    for shard, path in enumerate(written.shards):
        with webdataset.TarWriter(str(path)) as tar:
            for position in range(per_shard):
                key = sample_key(shard, position)
                scene = make_scene((shard * per_shard + position) % CLASSES, position, image_size, rng)
                if key in gaps:
                    continue
                written.scenes[key] = scene
                if key not in without_items:
                    written.items[shard * 5000 + position] = [item.strip() for item in scene.items]
                fields = {
                    "key": key,
                    "status": "success",
                    "raw_caption": [scene.captions[0]],
                    "shortIB_captions": scene.captions[:2],
                }
                tar.write({"__key__": key, "jpg": scene.jpeg, "json": fields, "txt": scene.captions[0]})
                counts[path.name] = counts.get(path.name, 0) + 1
    written.items_path.write_text(json.dumps({str(i): items for i, items in written.items.items()}), encoding="utf-8")
    if sizes:
        (folder / "sizes.json").write_text(json.dumps(counts), encoding="utf-8")
    return written


@dataclass(frozen=True)
class CaptionedImages:
    """Images of a retrieval set, in the order of its annotation file: file name → captions."""

    root: Path
    captions: dict[str, list[str]]


def _scenes(count: int, seed: int) -> list[RsicdScene]:
    rng = np.random.default_rng(seed)
    return [make_scene(number % CLASSES, number, 48, rng) for number in range(count)]


def write_coco(root: Path, *, num_images: int = 9, seed: int = 1) -> CaptionedImages:
    """annotations/captions_val2017.json and images/val2017, official layout; annotations are not sorted by image.

    Every third image has six captions, the others five.
    """
    names, captions, annotations, images = [], {}, [], []
    (root / "annotations").mkdir(parents=True)
    (root / "images/val2017").mkdir(parents=True)
    for number, scene in enumerate(_scenes(num_images, seed)):
        image_id = 1000 + 37 * number % 999
        name = f"{image_id:012d}.jpg"
        (root / "images/val2017" / name).write_bytes(scene.jpeg)
        names.append(name)
        images.append({"id": image_id, "file_name": name, "height": 48, "width": 48, "license": 1})
        captions[name] = scene.captions + ([f"picture number {number}"] if number % 3 == 0 else [])
        annotations += [{"image_id": image_id, "caption": caption} for caption in captions[name]]
    order = np.random.default_rng(seed).permutation(len(annotations))
    shuffled = [{**annotations[i], "id": 7 + place} for place, i in enumerate(order)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": shuffled}
    (root / "annotations/captions_val2017.json").write_text(json.dumps(content), encoding="utf-8")
    in_file_order = {name: [] for name in names}
    for entry in shuffled:
        in_file_order[f"{entry['image_id']:012d}.jpg"].append(entry["caption"])
    return CaptionedImages(root, in_file_order)


def write_karpathy(root: Path, *, num_images: int = 6, as_2017: bool = False, seed: int = 2) -> CaptionedImages:
    """dataset_coco.json with all four splits, and the images of the test split under their 2014 or 2017 names."""
    root.mkdir(parents=True, exist_ok=True)
    images, captions = [], {}
    for number, scene in enumerate(_scenes(num_images, seed)):
        coco_id = 500 + number
        name = f"COCO_val2014_{coco_id:012d}.jpg"
        split = ("test", "test", "train", "restval", "val")[number % 5]
        images.append(
            {
                "filepath": "val2014", "filename": name, "cocoid": coco_id, "imgid": number, "split": split,
                "sentids": [5 * number + s for s in range(5)],
                "sentences": [{"raw": text, "tokens": text.split(), "imgid": number} for text in scene.captions],
            }
        )  # fmt: skip
        if split == "test":
            place = root / "train2017" / f"{coco_id:012d}.jpg" if as_2017 else root / "images/val2014" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(scene.jpeg)
            captions[name] = scene.captions
    (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}), encoding="utf-8")
    return CaptionedImages(root, captions)


def write_flickr(root: Path, *, split: str = "val", num_images: int = 8, seed: int = 3) -> CaptionedImages:
    """flickr30k_<split>.json, a list of image and captions, with the images in the folder itself."""
    root.mkdir(parents=True, exist_ok=True)
    captions = {}
    for number, scene in enumerate(_scenes(num_images, seed)):
        name = f"{10_000 + number}.jpg"
        (root / name).write_bytes(scene.jpeg)
        captions[name] = scene.captions
    entries = [{"image": f"flickr30k-images/{name}", "caption": texts} for name, texts in captions.items()]
    (root / f"flickr30k_{split}.json").write_text(json.dumps(entries), encoding="utf-8")
    return CaptionedImages(root, captions)
