"""Writes small RSICD folders in the Kaggle format, for tests: CSVs with images as text, item files, class labels.

The pictures can be learned: each scene class is one colour and one shape, and the items name class, colour, shape and
where the shape lies.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from itemizedclip_2d.rsicd import RSICD_CLASSES
from PIL import Image, ImageDraw

COLOURS = {
    "red": (210, 40, 40), "green": (50, 170, 60), "blue": (50, 80, 210),
    "yellow": (225, 205, 50), "white": (245, 245, 245), "purple": (150, 60, 180),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIDES = {"left": (0.3, 0.5), "right": (0.7, 0.5), "top": (0.5, 0.3), "bottom": (0.5, 0.7)}

ITEM_FILE_NAMES = {"train": "trainv1.json", "valid": "validv1.json", "test": "testv1.json"}


@dataclass(frozen=True)
class RsicdScene:
    """One invented scene: what the picture shows and what is said about it."""

    filename: str
    class_id: int
    colour: str
    shape: str
    side: str
    captions: list[str]
    items: list[str]
    jpeg: bytes


@dataclass(frozen=True)
class RsicdFolder:
    """A written folder: its paths and, by split, the scenes behind the rows."""

    folder: Path
    labels_path: Path
    scenes: dict[str, list[RsicdScene]] = field(default_factory=dict)

    def csv_path(self, split: str) -> Path:
        return self.folder / f"{split}.csv"

    def items_path(self, split: str) -> Path:
        return self.folder / ITEM_FILE_NAMES[split]

    @property
    def external_captions(self) -> str:
        """The published argument: train and test item files joined by ';'."""
        return f"{self.items_path('train')};{self.items_path('test')}"


def write_rsicd_folder(
    folder: Path,
    *,
    num_train: int = 12,
    num_valid: int = 4,
    num_test: int = 8,
    num_classes: int = len(RSICD_CLASSES),
    image_size: int = 48,
    seed: int = 0,
) -> RsicdFolder:
    """Write train.csv, valid.csv, test.csv, one item file for each, and large_label.json; classes take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    written = RsicdFolder(folder, folder / "large_label.json")
    for split, num_rows in (("train", num_train), ("valid", num_valid), ("test", num_test)):
        scenes = [make_scene(row % num_classes, row, image_size, rng) for row in range(num_rows)]
        written.scenes[split] = scenes
        write_rsicd_csv(
            written.csv_path(split), [(s.filename, captions_cell(s.captions), image_cell(s.jpeg)) for s in scenes]
        )
        items = {str(row): scene.items for row, scene in enumerate(scenes)}
        written.items_path(split).write_text(json.dumps(items), encoding="utf-8")
    written.labels_path.write_text(json.dumps([scene.class_id for scene in written.scenes["test"]]), encoding="utf-8")
    return written


def make_scene(class_id: int, row: int, image_size: int, rng: np.random.Generator) -> RsicdScene:
    """A coloured shape on speckled ground, with five captions and five items."""
    name = RSICD_CLASSES[class_id]
    colour = list(COLOURS)[class_id % len(COLOURS)]
    shape = SHAPES[class_id // len(COLOURS) % len(SHAPES)]
    side = list(SIDES)[rng.integers(len(SIDES))]
    captions = [
        f"there is {name} with a {colour} {shape} .",
        f"it's a {colour} {shape} near the {side} .",  # the apostrophe makes NumPy print double quotes
        f'the {shape} isn\'t "small" . it lies on the {side} .',  # both quotes: NumPy escapes one
        f"many grey specks surround the {colour} {shape} .",
        f"the {name} is seen from above .",
    ]
    items = [
        f"There is {name}", f"A {colour} {shape}", f" the {shape} lies on the {side}", "Grey specks cover the ground",
        f"the {name}",
    ]  # fmt: skip
    pixels = _draw_scene(colour, shape, side, image_size, rng)
    return RsicdScene(
        f"rsicd_images/{name.replace(' ', '')}_{row}.jpg", class_id, colour, shape, side, captions, items,
        encode_image(pixels),
    )  # fmt: skip


def _draw_scene(colour: str, shape: str, side: str, image_size: int, rng: np.random.Generator) -> Image.Image:
    ground = rng.integers(70, 120, (image_size, image_size, 1), dtype=np.uint8).repeat(3, axis=2)
    image = Image.fromarray(ground)
    draw = ImageDraw.Draw(image)
    x, y = (image_size * part for part in SIDES[side])
    r = image_size * 0.22
    box = (x - r, y - r, x + r, y + r)
    paint = COLOURS[colour]
    if shape == "circle":
        draw.ellipse(box, fill=paint)
    elif shape == "square":
        draw.rectangle(box, fill=paint)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=paint)
    elif shape == "cross":
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=paint)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=paint)
    else:
        draw.ellipse(box, outline=paint, width=max(2, int(r / 2.5)))
    return image


def encode_image(image: Image.Image, image_format: str = "JPEG") -> bytes:
    """Encoded file content of an image."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=90)
    return buffer.getvalue()


def captions_cell(captions: Sequence[str]) -> str:
    """Captions as the Kaggle CSV holds them: a NumPy array printed, so no commas, mixed quotes, line breaks."""
    return str(np.array(captions, dtype=object))


def image_cell(encoded: bytes) -> str:
    """An encoded image as the Kaggle CSV holds it: a dict printed, with a bytes literal."""
    return str({"bytes": encoded, "path": None})


def write_rsicd_csv(path: Path, rows: Sequence[tuple[str, str, str]]) -> Path:
    """Write cells (filename, captions, image) as they are, under the Kaggle header."""
    pd.DataFrame(list(rows), columns=["filename", "captions", "image"]).to_csv(path, index=False)
    return path
