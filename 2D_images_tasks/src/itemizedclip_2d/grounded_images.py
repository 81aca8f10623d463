"""Phrases with boxes: Flickr30k Entities (photographs) and DIOR-RSVG (remote sensing).

    itemizedclip evaluate flickr30k-entities --data-dir flickr30k_entities --images flickr30k-images --checkpoint …
    itemizedclip evaluate dior-rsvg --data-dir DIOR_RSVG --checkpoint …

Flickr30k Entities: DIR holds Annotations/ID.xml, Sentences/ID.txt and test.txt, val.txt, train.txt of ids. A line of
Sentences is a caption in which "[/EN#17/people Two boys]" is a phrase about entity 17; the .xml gives its boxes, or
says that it is the scene or has none. Every phrase with a box is an item; phrases of one image that read the same and
mean the same entity are one.

DIOR-RSVG: DIR holds Annotations/*.xml, JPEGImages/ and test.txt, val.txt, train.txt. Every <object> of an .xml has a
<bndbox> and a <description>; the .txt count objects from 0, over all .xml in the order of their names.

Axes: K phrases of an image, H W pixels of the picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal
from xml.etree import ElementTree

import numpy as np
import tyro

from itemizedclip.data.batch import ItemSample
from itemizedclip.data.images import decode_photograph
from itemizedclip.evaluation.benchmark import Benchmark, Subject
from itemizedclip.evaluation.grounding import Box, GroundingEvaluator, Truth
from itemizedclip.evaluation.grounding_options import GroundingOptions
from itemizedclip.evaluation.lattice import Lattice
from itemizedclip.models.factory import create_transform
from itemizedclip.models.image_text_2d import ItemizedCLIP2D
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.files import read_lines, read_text
from itemizedclip.runtime.processes import main_first
from itemizedclip.viewer.geometry import geometry_of_transform
from itemizedclip_2d.retrieval_sets import Transform

_PHRASE = re.compile(r"\[/EN#(?P<entity>\d+)/(?P<kinds>\S+) (?P<text>[^\]]*)\]")
LARGEST_XML = 2**22
"""Characters of an annotation; real ones have thousands."""

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class GroundedImage:
    """An image, its K phrases, and where they are.

    Attributes:
        name: of the picture.
        path: of the picture.
        items: K phrases.
        boxes: of each phrase, at least one.
    """

    name: str
    path: Path
    items: tuple[str, ...]
    boxes: tuple[tuple[Box, ...], ...]


@dataclass
class GroundedImages:
    """Images as the evaluator reads them (see `GroundingEvaluator`).

    Attributes:
        entries: N images.
        transform: RGB image → float tensor (3, H, W).
    """

    entries: Sequence[GroundedImage]
    transform: Transform

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, row: int) -> ItemSample:
        """Raises BadSampleError when it cannot be read."""
        entry = self.entries[row]
        picture = decode_photograph(entry.path, source=str(entry.path))
        return ItemSample(entry.name, self.transform(picture), list(entry.items))

    def items(self, row: int) -> list[str]:
        """Its phrases."""
        return list(self.entries[row].items)

    def sample_id(self, row: int) -> str:
        """The name of an image."""
        return self.entries[row].name

    def truth(self, row: int, grid: tuple[int, ...]) -> Truth:
        """Boxes as masks, and how the tokens lie over the picture."""
        entry = self.entries[row]
        picture = decode_photograph(entry.path, source=str(entry.path))
        size = (picture.height, picture.width)
        way = geometry_of_transform(self.transform, size)
        lattice = Lattice(way.input_size, way.view_size, way.scale, way.offset, tuple(grid))
        masks = []
        for boxes in entry.boxes:
            mask = np.zeros(size, dtype=bool)
            for top, left, bottom, right in boxes:
                mask[top:bottom, left:right] = True
            masks.append(mask)
        return Truth(lattice, masks, entry.boxes)


# --- files -----------------------------------------------------------------------------------------------------------


def read_annotation(path: Path) -> ElementTree.Element:
    """The root of an annotation, without entities or document types, which annotations do not need.

    Raises:
        MissingFileError: no such file.
        UserError: no XML, or XML that asks for more.
    """
    text = read_text(path, holding="an annotation (XML)")
    if len(text) > LARGEST_XML or "<!" in text.replace("<!--", ""):
        raise UserError(f"{path}: expected a plain annotation of less than {LARGEST_XML:,} characters, without <!…>")
    try:
        return ElementTree.fromstring(text)  # noqa: S314  neither entities nor a document type: checked above
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: no XML ({error}); expected an annotation; copy it again") from None


def _box(element: ElementTree.Element, path: Path) -> Box:
    values = {}
    for name in ("xmin", "ymin", "xmax", "ymax"):
        found = element.findtext(name)
        if found is None or not re.fullmatch(r"\s*\d{1,6}(\.0*)?\s*", found):
            raise UserError(f"{path}: bndbox: {name} is {found!r}; expected a whole number of pixels")
        values[name] = int(float(found))
    # Pixels are counted from 1 and both ends belong to the box, as in PASCAL VOC; some boxes begin at 0.
    box = (max(values["ymin"] - 1, 0), max(values["xmin"] - 1, 0), values["ymax"], values["xmax"])
    if box[0] >= box[2] or box[1] >= box[3]:
        raise UserError(f"{path}: bndbox {values} is empty; expected xmin < xmax and ymin < ymax")
    return box


def _inside(root: ElementTree.Element, boxes: Sequence[Box], path: Path) -> None:
    """Refuse boxes that begin outside the picture whose size the annotation gives."""
    size = [root.findtext(f"size/{name}") for name in ("height", "width")]
    if all(side is not None and side.strip().isdecimal() for side in size):
        height, width = (int(str(side)) for side in size)
        for box in boxes:
            if box[0] >= height or box[1] >= width:
                raise UserError(f"{path}: a box begins at {box[:2]}, outside the picture of {height} × {width}")


def read_entities(annotation: Path, sentences: Path) -> dict[tuple[str, str], tuple[Box, ...]]:
    """(entity, phrase) → boxes of one image of Flickr30k Entities, in the order of the captions.

    Raises:
        MissingFileError: no such file.
        UserError: not such files.
    """
    root = read_annotation(annotation)
    boxes: dict[str, list[Box]] = {}
    for entry in root.iter("object"):
        bounds = entry.find("bndbox")
        if bounds is None:
            continue
        box = _box(bounds, annotation)
        for name in entry.findall("name"):
            boxes.setdefault((name.text or "").strip(), []).append(box)
    _inside(root, [box for own in boxes.values() for box in own], annotation)
    found = {}
    for line in read_lines(sentences, holding="captions with phrases [/EN#1/people Two boys]"):
        for match in _PHRASE.finditer(line):
            key = match["entity"], " ".join(match["text"].split())
            if key[1] and key[0] in boxes:
                found[key] = tuple(boxes[key[0]])
    return found


def read_flickr_entities(root: Path, images: Path, split: Split) -> list[GroundedImage]:
    """Images of a split that have a phrase with a box.

    Raises:
        MissingFileError, UserError: what is missing or wrong, in one sentence.
    """
    names = read_lines(root / f"{split}.txt", holding="ids of images, one a line")
    entries = []
    for name in names:
        if not re.fullmatch(r"\d+", name):
            raise UserError(f"{root / f'{split}.txt'}: {name!r}; expected ids of images, one a line")
        phrases = read_entities(root / "Annotations" / f"{name}.xml", root / "Sentences" / f"{name}.txt")
        if phrases:
            items = tuple(text for _, text in phrases)
            entries.append(GroundedImage(f"{name}.jpg", images / f"{name}.jpg", items, tuple(phrases.values())))
    return _checked(entries, root, images)


def read_dior_rsvg(root: Path, split: Split) -> list[GroundedImage]:
    """Images of a split with the expressions of that split.

    Raises:
        MissingFileError, UserError: what is missing or wrong, in one sentence.
    """
    listed = root / f"{split}.txt"
    lines = read_lines(listed, holding="numbers of objects, one a line")
    if not all(re.fullmatch(r"\d{1,9}", line) for line in lines):
        raise UserError(f"{listed}: expected numbers of objects, one a line")
    wanted = {int(line) for line in lines}
    paths = sorted((root / "Annotations").glob("*.xml"))
    if not paths:
        raise MissingFileError(f"{root / 'Annotations'}: holds no .xml; expected DIOR-RSVG's annotations")
    entries, number = [], 0
    for path in paths:
        tree = read_annotation(path)
        items: list[str] = []
        boxes: list[tuple[Box, ...]] = []
        for entry in tree.iter("object"):
            if number in wanted:
                text, bounds = (entry.findtext("description") or "").strip(), entry.find("bndbox")
                if not text or bounds is None:
                    raise UserError(f"{path}: an object without description or bndbox; expected both")
                items.append(text)
                boxes.append((_box(bounds, path),))
            number += 1
        if items:
            _inside(tree, [box for (box,) in boxes], path)
            name = Path((tree.findtext("filename") or path.with_suffix(".jpg").name).strip()).name
            entries.append(GroundedImage(name, root / "JPEGImages" / name, tuple(items), tuple(boxes)))
    if wanted and max(wanted) >= number:
        raise UserError(f"{listed}: has object {max(wanted):,}; the annotations have {number:,}, counted from 0")
    return _checked(entries, root, root / "JPEGImages")


def _checked(entries: list[GroundedImage], root: Path, images: Path) -> list[GroundedImage]:
    if not entries:
        raise UserError(f"{root}: no image of this split has a phrase with a box")
    missing = [entry.path for entry in entries if not entry.path.is_file()]
    if missing:
        raise MissingFileError(
            f"{missing[0]}: no such file; {len(missing):,} of {len(entries):,} images are not in {images}"
        )
    return entries


# --- the benchmarks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GroundedImageOptions(GroundingOptions):
    """What both are asked for."""

    data_dir: Annotated[Path, tyro.conf.arg(aliases=("--data-root",))]
    """Folder of the annotations and of train.txt, val.txt and test.txt."""

    split: Split = "test"
    """train or val to choose the threshold by."""

    model: str | None = "ViT-B-16-ItemizedCLIP"
    """Config of a released checkpoint; checkpoints of runs carry their own."""

    def opened(self, subject: Subject, entries: list[GroundedImage], name: str) -> Benchmark:
        """A set of images, opened for a model."""
        dataset = GroundedImages(entries, create_transform(subject.loaded.config, is_train=False))
        evaluator = GroundingEvaluator(
            dataset,
            subject.loaded.tokenizer,
            name=name,
            normalise_tokens=self.normalise_tokens,
            encoding=subject.encoding,
            threshold=self.chosen_threshold(),
        )
        results = self.output or self.checkpoint.with_suffix(f".{name}.{self.split}.json")
        title = f"{name}, {self.split}: {len(entries):,} images, {sum(len(e.items) for e in entries):,} phrases"
        opened = self.benchmark(evaluator, title, results, {"split": self.split})
        return replace(opened, notes=[])

    def check_model(self, subject: Subject) -> None:
        """Raises UserError for a model of studies."""
        if not isinstance(subject.loaded.model, ItemizedCLIP2D):
            raise UserError(f"{self.checkpoint}: its model reads studies; give one of photographs")


@dataclass(frozen=True, kw_only=True)
class FlickrEntitiesOptions(GroundedImageOptions):
    """Phrases and their boxes (Flickr30k Entities): pointing, box accuracy, IoU, with chance and ceiling."""

    images: Path | None = None
    """Folder of the pictures; default: --data-dir/flickr30k-images."""

    def open(self, subject: Subject) -> Benchmark:
        """The images of a split."""
        self.check_model(subject)
        root = self.data_dir.expanduser()
        images = (self.images or root / "flickr30k-images").expanduser()
        entries = main_first(lambda: read_flickr_entities(root, images, self.split))
        return self.opened(subject, entries, "flickr30k-entities")


@dataclass(frozen=True, kw_only=True)
class DiorRsvgOptions(GroundedImageOptions):
    """Expressions and boxes of remote sensing (DIOR-RSVG): pointing, box accuracy, IoU, with chance and ceiling."""

    def open(self, subject: Subject) -> Benchmark:
        """The images of a split."""
        self.check_model(subject)
        entries = main_first(lambda: read_dior_rsvg(self.data_dir.expanduser(), self.split))
        return self.opened(subject, entries, "dior-rsvg")
