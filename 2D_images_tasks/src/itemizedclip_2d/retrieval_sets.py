"""Captioned images for retrieval: COCO val2017, COCO's 5k test split of Karpathy and Fei-Fei, Flickr30k.

    coco_val2017    ROOT/annotations/captions_val2017.json, ROOT/images/val2017/ (or ROOT/val2017/)
    coco_karpathy   ROOT/dataset_coco.json (or in ROOT/annotations/), images of COCO 2014 or 2017 in ROOT or ROOT/images
    flickr30k       ROOT/flickr30k_val.json or _test.json, [{"image": "folder/1.jpg", "caption": ["…", …]}, …]; without
                    it ROOT/dataset_flickr30k.json in Karpathy's form; the folder of the images may have any name

An image's captions are its items, in the order of the file. Nothing is left out unasked: a bad entry or a missing image
ends the evaluation, because numbers over other images cannot be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from itemizedclip.data.batch import ItemSample
from itemizedclip.data.images import decode_photograph
from itemizedclip.data.items import check_id
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.files import file_sha256, read_json

Transform = Callable[[Image.Image], Tensor]

PUBLISHED_COUNTS = {
    "coco_val2017": (5000, 25_014),
    "coco_karpathy_test": (5000, 25_010),
    "flickr30k_val": (1014, 5070),
    "flickr30k_test": (1000, 5000),
}
"""Images and captions of the whole sets."""

KARPATHY_SOURCE = "caption_datasets.zip from https://cs.stanford.edu/people/karpathy/deepimagesent"


@dataclass(frozen=True)
class CaptionedImage:
    """An image file and its captions, at least one."""

    path: Path
    captions: list[str]


class RetrievalSet(Dataset[ItemSample]):
    """Images with their captions, in evaluation mode.

    Attributes:
        name: of the set, a key of `PUBLISHED_COUNTS`.
        annotations: the file that names images and captions.
        entries: the images, in the order of that file.
    """

    def __init__(
        self, name: str, annotations: Path, entries: Sequence[CaptionedImage], transform: Transform, remedy: str
    ) -> None:
        """Check that every image file exists.

        Args:
            name: of the set.
            annotations: for messages and results.
            entries: the images.
            transform: RGB image → float tensor (3, H, W).
            remedy: what to do about missing images.

        Images without a caption are left out and counted.

        Raises:
            FileNotFoundError: image files that do not exist.
            ValueError: no image at all.
        """
        self.without_captions = [entry.path.name for entry in entries if not entry.captions]
        entries = [entry for entry in entries if entry.captions]
        if not entries:
            raise UserError(f"{annotations}: names no image of {name}; expected {PUBLISHED_COUNTS[name][0]}")
        missing = [entry.path for entry in entries if not entry.path.is_file()]
        if missing:
            raise MissingFileError(
                f"{len(missing)} of the {len(entries)} images that {annotations} names do not exist, the first: "
                f"{missing[0]}; {remedy}"
            )
        self.name = name
        self.annotations = annotations
        self.entries = list(entries)
        self._transform = transform

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> ItemSample:
        """Raises BadSampleError when the image cannot be decoded."""
        entry = self.entries[index]
        image = decode_photograph(entry.path, source=str(entry.path))
        return ItemSample(entry.path.name, self._transform(image), list(entry.captions))

    def items(self, index: int) -> list[str]:
        """All captions of an image."""
        return list(self.entries[index].captions)

    def sample_id(self, index: int) -> str:
        """The file name of an image."""
        return self.entries[index].path.name

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of images and of captions."""
        return len(self), sum(len(entry.captions) for entry in self.entries)

    @property
    def incomplete(self) -> str | None:
        """A sentence when this is not the whole published set, else None."""
        if self.counts == PUBLISHED_COUNTS[self.name]:
            return None
        expected = "{:,} images and {:,} captions".format(*PUBLISHED_COUNTS[self.name])
        found = "{:,} and {:,}".format(*self.counts)
        if self.without_captions:
            left_out = f"{len(self.without_captions)} images without a caption are left out ({self.without_captions[0]}"
            found += f"; {left_out}{', …' if len(self.without_captions) > 1 else ''})"
        return f"{self.name} has {expected}, {self.annotations} {found}: these numbers compare with no published ones"

    def facts(self) -> dict[str, Any]:
        """What result files say of the set."""
        names = "\n".join(entry.path.name for entry in self.entries)
        return {
            "dataset": self.name,
            "is_whole_set": self.incomplete is None,
            "without_captions": self.without_captions,
            "annotations": str(self.annotations),
            "annotations_sha256": file_sha256(self.annotations),
            "image_names_sha256": hashlib.sha256(names.encode()).hexdigest(),
        }


# --- the sets --------------------------------------------------------------------------------------------------------


def coco_val2017(root: Path, transform: Transform) -> RetrievalSet:
    """All of COCO val2017 with its five to seven captions per image, as the published evaluation takes it.

    Raises:
        FileNotFoundError, ValueError: see the top of the file for what is expected.
    """
    _check_folder(root, "COCO's folder with annotations/ and images/val2017/")
    annotations = root / "annotations" / "captions_val2017.json"
    remedy = "unpack val2017.zip there (images) and annotations_trainval2017.zip (captions) from cocodataset.org"
    _check_file(annotations, f"COCO's captions; {remedy}")
    content = read_json(annotations, holding="COCO captions")
    images, captions = _lists_of(content, annotations, "images", "annotations")
    texts: dict[int, list[str]] = {}
    folder = _first_folder(root / "images" / "val2017", root / "val2017")
    paths: dict[int, Path] = {}
    for number, image in enumerate(images):
        where = f"{annotations}: images[{number}]"
        image_id = _field(image, "id", int, where)
        if image_id in paths:
            raise UserError(f"{where}: id {image_id} appears twice")
        paths[image_id] = folder / _plain_path(_field(image, "file_name", str, where), where)
        texts[image_id] = []
    for number, caption in enumerate(captions):
        where = f"{annotations}: annotations[{number}]"
        image_id = _field(caption, "image_id", int, where)
        if image_id not in texts:
            raise UserError(f"{where}: image_id {image_id} is the id of no image; download the file again")
        texts[image_id].append(_field(caption, "caption", str, where))
    entries = [_entry(paths[i], texts[i], f"{annotations}: image {i}") for i in paths]
    return RetrievalSet("coco_val2017", annotations, entries, transform, remedy)


def coco_karpathy(root: Path, transform: Transform) -> RetrievalSet:
    """The test split of Karpathy and Fei-Fei, 5,000 images of COCO 2014, with all of its captions.

    Raises:
        FileNotFoundError, ValueError: see the top of the file for what is expected.
    """
    _check_folder(root, "COCO's folder with dataset_coco.json and the images")
    annotations = _first_file(root / "dataset_coco.json", root / "annotations" / "dataset_coco.json")
    _check_file(annotations, f"the splits of Karpathy and Fei-Fei; bring dataset_coco.json ({KARPATHY_SOURCE})")
    remedy = "unpack val2014.zip (or train2017.zip and val2017.zip) from cocodataset.org in that folder"
    entries = _karpathy_entries(annotations, "test", lambda image, where: _coco_image(root, image, where))
    return RetrievalSet("coco_karpathy_test", annotations, entries, transform, remedy)


def flickr30k(root: Path, split: str, transform: Transform) -> RetrievalSet:
    """Flickr30k "val" (1,014 images, as published) or "test" (the usual 1,000), five captions each.

    Raises:
        FileNotFoundError, ValueError: see the top of the file for what is expected.
    """
    _check_folder(root, f"Flickr30k's folder with flickr30k_{split}.json and the images")
    name = f"flickr30k_{split}"
    annotations = root / f"{name}.json"
    remedy = "bring the images of Flickr30k (flickr30k-images.tar.gz) into that folder, under any name"
    karpathy = root / "dataset_flickr30k.json"
    if not annotations.is_file() and karpathy.is_file():
        entries = _karpathy_entries(karpathy, split, lambda image, where: _image_name(image, "filename", where))
        return RetrievalSet(name, karpathy, _below(root, entries), transform, remedy)
    _check_file(
        annotations, 'a list of {"image": "flickr30k-images/1.jpg", "caption": ["…", …]}; bring it, or '
        f"dataset_flickr30k.json ({KARPATHY_SOURCE})",
    )  # fmt: skip
    content = read_json(annotations, holding="Flickr30k captions")
    if not isinstance(content, list):
        raise UserError(f'{annotations}: expected a list of {{"image": …, "caption": […]}}')
    entries = []
    for number, image in enumerate(content):
        where = f"{annotations}: entry {number}"
        captions = _field(image, "caption", list, where)
        entries.append(_entry(_image_name(image, "image", where), captions, where))
    return RetrievalSet(name, annotations, _below(root, entries), transform, remedy)


def _karpathy_entries(
    annotations: Path, split: str, locate: Callable[[dict[str, Any], str], Path]
) -> list[CaptionedImage]:
    """Images of one split in Karpathy's form: {"images": [{"split", "filename", "sentences": [{"raw"}]}]}."""
    (images,) = _lists_of(read_json(annotations, holding="Karpathy's splits"), annotations, "images")
    entries = []
    for number, image in enumerate(images):
        where = f"{annotations}: images[{number}]"
        if _field(image, "split", str, where) == split:
            sentences = _field(image, "sentences", list, where)
            captions = [_field(sentence, "raw", str, f"{where}.sentences") for sentence in sentences]
            entries.append(_entry(locate(image, where), captions, where))
    return entries


# --- where images lie ------------------------------------------------------------------------------------------------


def _coco_image(root: Path, image: dict[str, Any], where: str) -> Path:
    """The image under its name of 2014 or, since COCO 2017 is the same images, under that of 2017."""
    name_2014 = _plain_path(_field(image, "filepath", str, where), where) / _image_name(image, "filename", where)
    name_2017 = f"{_field(image, 'cocoid', int, where):012d}.jpg"
    candidates = [
        folder / name
        for name in (name_2014, Path("train2017") / name_2017, Path("val2017") / name_2017)
        for folder in (root / "images", root)
    ]
    return _first_file(*candidates)


def _below(root: Path, entries: Sequence[CaptionedImage]) -> list[CaptionedImage]:
    """The entries with their paths below `root` or beside it, wherever the first image is found.

    The published layout names the images' own folder as root and repeats its name in the file.
    """
    if not entries:
        return []
    root = root.resolve()
    name = entries[0].path
    subfolders = sorted(path for path in root.iterdir() if path.is_dir())
    folders: list[tuple[Path, bool]] = [(root, False), (root.parent, False), (root, True)]
    folders += [(folder, True) for folder in subfolders]
    for folder, is_flat in folders:
        if (folder / (name.name if is_flat else name)).is_file():
            break
    else:
        folder, is_flat = root, False
    return [CaptionedImage(folder / (entry.path.name if is_flat else entry.path), entry.captions) for entry in entries]


def _first_file(*candidates: Path) -> Path:
    return next((path for path in candidates if path.is_file()), candidates[0])


def _first_folder(*candidates: Path) -> Path:
    return next((path for path in candidates if path.is_dir()), candidates[0])


# --- fields ----------------------------------------------------------------------------------------------------------


def _check_folder(root: Path, expected: str) -> None:
    if not root.is_dir():
        raise MissingFileError(f"{root}: no such folder; expected {expected}")


def _check_file(path: Path, expected: str) -> None:
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; expected {expected}")


def _lists_of(content: object, path: Path, *names: str) -> tuple[list[Any], ...]:
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object with {' and '.join(names)}")
    return tuple(_field(content, name, list, str(path)) for name in names)


def _field(entry: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        what = {int: "a whole number", str: "a string", list: "a list"}[kind]
        raise UserError(f"{where}: expected field {name} to be {what}, found {str(value)[:40]!r}")
    return value


def _image_name(image: Mapping[str, Any], name: str, where: str) -> Path:
    return _plain_path(_field(image, name, str, where), where)


def _plain_path(name: str, where: str) -> Path:
    """A relative path that stays below its folder."""
    path = PurePosixPath(check_id(name, where))
    if not name or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{where}: image {name[:80]!r}; expected a relative path below the data folder")
    return Path(path)


def _entry(path: Path, captions: Sequence[object], where: str) -> CaptionedImage:
    if not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise UserError(f"{where} ({path.name}): expected captions that are texts, none empty")
    return CaptionedImage(path, [str(caption) for caption in captions])
