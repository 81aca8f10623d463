"""Your own data in one file: images or studies with their text items, one a line.

    {"image": "a/0001.jpg", "items": ["a red roof", "two parked cars"]}
    {"series": {"AX_FLAIR": "s1/flair.pt", "AX_T2": "s1/t2.pt"}, "items": ["Old infarct."], "normal": false,
     "split": "train", "labels": {"infarct": 1, "haemorrhage": 0}}

Paths are relative to the file, or to another folder. Items are independent: each is one fact, in its own words. `id`,
`normal`, `split` and `labels` may be left out. The same as a .json of {"PATH": ["item", …]}, as a .csv with the columns
image and item (one row per item), or as a folder of pictures that holds one such file.

Axes: N entries, K item slots.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from itemizedclip.data.batch import BadSampleError, ItemSample
from itemizedclip.data.images import decode_photograph
from itemizedclip.data.items import diverse_sample, load_item_lists, sample_items, sample_rng, seeded_transforms
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.files import open_csv, parse_json, read_text
from itemizedclip.runtime.registry import Registry

logger = logging.getLogger(__name__)

HOLDING = '{"image": "PATH", "items": ["text", …]} on each line'

Split = Literal["train", "val", "test"]

_SPLITS: dict[str, Split] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_IMAGE_COLUMNS = ("image", "file_name", "filename", "path")
_ITEM_COLUMNS = ("item", "text", "caption")
_MOST_LISTED = 5


@dataclass(frozen=True)
class OwnEntry:
    """One image or study.

    Attributes:
        name: stable, for messages and result files: its `id`, else its image, else its line.
        image: path of a photograph; empty for a study.
        series: series name → path; empty for a photograph.
        items: its texts; may be empty where it has labels.
        normal: whether it shows no finding; None where the file does not say.
        split: part of the data it belongs to; None where the file does not say.
        labels: class → 1 or 0; classes that are not named are unknown.
        patient: whose it is; empty: nobody else's.
        whole_labels: `labels` was one class name or a list of them: classes that are not named are not there.
    """

    name: str
    image: str = ""
    series: Mapping[str, str] = field(default_factory=dict)
    items: tuple[str, ...] = ()
    normal: bool | None = None
    split: Split | None = None
    labels: Mapping[str, int] = field(default_factory=dict)
    whole_labels: bool = False
    patient: str = ""


@dataclass(frozen=True)
class OwnFile:
    """The N entries of a file that can be used.

    Attributes:
        path: the file.
        root: folder the paths are relative to.
        entries: in the file's order.
    """

    path: Path
    root: Path
    entries: tuple[OwnEntry, ...]

    def part(self, split: Split) -> OwnFile:
        """The entries of one part; where no entry names a part all are training entries."""
        named = any(entry.split is not None for entry in self.entries)
        wanted = [entry for entry in self.entries if (entry.split if named else "train") == split]
        return OwnFile(self.path, self.root, tuple(wanted))

    @cached_property
    def fingerprint(self) -> str:
        """Identity of names, paths, items and labels, the same on any machine. For checkpoints."""
        rows = [[e.image, dict(e.series), e.items, e.normal, e.split, dict(e.labels)] for e in self.entries]
        if not any(e.series or e.normal is not None or e.split or e.labels for e in self.entries):
            rows = [[e.image for e in self.entries], [e.items for e in self.entries]]  # as before there were others
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


OwnReader = Callable[[OwnFile, Mapping[str, Any], Mapping[str, Any]], Any]
"""(entries, model config, what a checkpoint says of its transform) → data set of an evaluation."""

OWN_READERS: Registry[OwnReader] = Registry("itemizedclip.own", "reader of own data")
"""Value of `vision_cfg.tower` → how entries become what such models read; photographs are read here."""


def read_own(
    path: str | Path, *, root: str | Path | None = None, on_bad_sample: Literal["skip", "stop"] = "stop"
) -> OwnFile:
    """Read a file of own data, or the one such file of a folder.

    Args:
        path: see the module's text.
        root: folder the paths are relative to; default the file's.
        on_bad_sample: a line that cannot be used is left out and named, or ends everything.

    Raises:
        MissingFileError: no such file.
        UserError: not such a file, or no usable line.
        BadSampleError: a line that cannot be used, with "stop".
    """
    path = _file_of(Path(path).expanduser())
    bad: list[str] = []
    entries: list[OwnEntry] = []
    for where, value in _values(path):
        try:
            entries.append(_entry(parse_json(value, source=where, holding=HOLDING) if isinstance(value, str) else value,
                                  where))  # fmt: skip
        except UserError as error:
            if on_bad_sample == "stop":
                raise BadSampleError(f"{error}. Fix it (--on-bad-sample skip goes on without it)") from None
            bad.append(str(error))
    if not entries:
        raise UserError(bad[0] if bad else f"{path}: holds no line; expected {HOLDING}")
    if bad:
        listed = "\n  ".join(bad[:_MOST_LISTED])
        logger.warning("%s: %d lines left out:\n  %s", path, len(bad), listed)
    return OwnFile(path, path.parent if root is None else Path(root).expanduser(), tuple(entries))


def _file_of(path: Path) -> Path:
    """The file itself, or the only one a folder has."""
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".jsonl", ".json", ".csv"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{path}: expected one .jsonl, .json or .csv with the items of its pictures, found {found}")
    return files[0]


def _values(path: Path) -> list[tuple[str, Any]]:
    """(where it stands, JSON text or plain data) of each entry."""
    if path.suffix.lower() == ".json":
        lists = load_item_lists(path)
        return [(f"{path}: key {name!r}", {"image": name, "items": items}) for name, items in lists.items()]
    if path.suffix.lower() == ".csv":
        return _csv_values(path)
    lines = read_text(path, holding=HOLDING).splitlines()
    return [(f"{path}: line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]


def _csv_values(path: Path) -> list[tuple[str, Any]]:
    holding = "the columns image and item"
    with open_csv(path, holding=holding) as reader:
        header = [name.strip().lower() for name in next(reader, [])]
        image = next((header.index(name) for name in _IMAGE_COLUMNS if name in header), None)
        item = next((header.index(name) for name in _ITEM_COLUMNS if name in header), None)
        if image is None or item is None:
            raise UserError(f"{path}: line 1: has the columns {', '.join(header) or 'none'}; expected {holding}")
        split = header.index("split") if "split" in header else None
        values: dict[str, tuple[str, dict[str, Any]]] = {}
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            where = f"{path}: line {reader.line}"
            if len(row) != len(header):
                raise UserError(f"{where}: {len(row)} columns; expected {len(header)}")
            entry = values.setdefault(row[image], (where, {"image": row[image], "items": []}))[1]
            entry["items"].append(row[item])
            part = row[split].strip() if split is not None else ""
            if part and entry.setdefault("split", part) != part:
                raise UserError(f"{where}: {row[image]!r} is {part!r} here and {entry['split']!r} above")
    return list(values.values())


def _entry(value: object, where: str) -> OwnEntry:
    """One line, checked."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected {HOLDING}")
    image, series = value.get("image"), value.get("series")
    if series is not None:
        _check_series(series, where, also_image=image is not None)
        image = ""
    elif not isinstance(image, str) or not image.strip() or "\0" in image:
        raise UserError(f"{where}: field 'image': expected the path of an image, found {json.dumps(image)[:60]}")
    given_labels = value.get("labels", {})
    labels = _labels(given_labels, where)
    items = value.get("items", [] if labels else None)
    if not isinstance(items, Sequence) or isinstance(items, str) or not all(isinstance(text, str) for text in items):
        raise UserError(f"{where}: field 'items': expected a list of texts, found {json.dumps(items)[:60]}")
    texts = tuple(text.strip() for text in items if text.strip())
    if not texts and not labels:
        raise UserError(f"{where}: field 'items' holds no text; expected at least one")
    normal = value.get("normal")
    if normal is not None and not isinstance(normal, bool):
        raise UserError(f"{where}: field 'normal': expected true or false, found {json.dumps(normal)[:60]}")
    split = value.get("split")
    if split is not None and (not isinstance(split, str) or split.lower() not in _SPLITS):
        raise UserError(f"{where}: field 'split': expected train, val or test, found {json.dumps(split)[:60]}")
    given = value.get("id")
    name = given if isinstance(given, str) and given.strip() else image or where.rpartition(": ")[2]
    part = None if split is None else _SPLITS[split.lower()]
    patient = value.get("patient", "")
    if not isinstance(patient, str):
        raise UserError(f"{where}: field 'patient': expected a text, found {json.dumps(patient)[:60]}")
    whole = not isinstance(given_labels, dict)
    return OwnEntry(name, image, dict(series or {}), texts, normal, part, labels, whole, patient.strip())


def _check_series(series: object, where: str, *, also_image: bool) -> None:
    if also_image:
        raise UserError(f"{where}: has both fields 'image' and 'series'; expected one of them")
    plain = isinstance(series, dict) and all(isinstance(path, str) and path.strip() for path in series.values())
    if not plain or not series:
        expected = '{"NAME": "PATH of its volume", …}'
        raise UserError(f"{where}: field 'series': expected {expected}, found {json.dumps(series)[:60]}")


def _labels(value: object, where: str) -> dict[str, int]:
    """Class → 1 or 0; class names alone are the classes that are there."""
    if isinstance(value, str):
        return {value: 1}
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return dict.fromkeys(value, 1)
    if not isinstance(value, dict):
        raise UserError(f"{where}: field 'labels': expected {{\"CLASS\": 1 or 0}}, found {json.dumps(value)[:60]}")
    labels: dict[str, int] = {}
    for name, label in value.items():
        if label is None or (isinstance(label, (int, float)) and (label == -1 or math.isnan(label))):
            continue
        if label not in (0, 1):
            raise UserError(f"{where}: field 'labels': {name!r} is {json.dumps(label)}; expected 1, 0 or null")
        labels[name] = int(label)
    return labels


class ImageItems(Dataset[ItemSample]):
    """Images of a file of own data and their items.

    Training draws K texts per image and crops at random; evaluation gives every item, in order. All random choices of
    a training sample, those of the transform included, follow from (seed, epoch, index).

    Args:
        path: the file, or its entries that were read before.
        transform: RGB image → float tensor (3, H, W).
        num_items: K, texts drawn per training image; not used in evaluation.
        is_train: see above.
        seed: seed of the draws.
        join_items: training texts are 1 … 3 items joined (paper: diverse sampling) instead of single ones.
        image_root: folder the paths are relative to; default the file's.
        on_bad_sample: a line that cannot be used is left out and named, or ends everything.

    Raises:
        MissingFileError: no such file.
        UserError: not such a file, no usable line, or studies instead of images.
        BadSampleError: a line that cannot be used, with "stop".
    """

    def __init__(
        self,
        path: str | Path | OwnFile,
        transform: Callable[[Image.Image], Tensor],
        *,
        num_items: int,
        is_train: bool,
        seed: int = 0,
        join_items: bool = False,
        image_root: str | Path | None = None,
        on_bad_sample: Literal["skip", "stop"] = "stop",
    ) -> None:
        self.file = path if isinstance(path, OwnFile) else read_own(path, root=image_root, on_bad_sample=on_bad_sample)
        for entry in self.file.entries:
            if entry.series:
                raise UserError(
                    f"{self.file.path}: {entry.name} is a study of series, and this model reads images; take a model "
                    "of studies (itemizedclip train own --like mri), or give 'image'"
                )
            if is_train and not entry.items:
                raise UserError(f"{self.file.path}: {entry.name} has no item to train on; expected at least one")
        self.path, self.root = self.file.path, self.file.root
        self.transform = transform
        self.num_items = num_items
        self.is_train = is_train
        self.seed = seed
        self.join_items = join_items

    @property
    def images(self) -> list[str]:
        """Paths of the images, in order."""
        return [entry.image for entry in self.file.entries]

    def __len__(self) -> int:
        return len(self.file.entries)

    def __getitem__(self, key: int | tuple[int, int]) -> ItemSample:
        """Sample of an index, or of (epoch, index); an index alone means epoch 0.

        Raises:
            IndexError: index outside the dataset.
            BadSampleError: an image that is missing or cannot be decoded.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        entry = self.file.entries[index]
        name, items, normal = entry.name, list(entry.items), bool(entry.normal)
        picture = decode_photograph(self.root / entry.image, source=str(self.root / entry.image))
        if not self.is_train:
            return ItemSample(name, self.transform(picture), items, normal)
        generator = sample_rng(self.seed, epoch, index)
        if self.join_items:
            texts = diverse_sample(items, self.num_items, generator, limit_joined_to_items=True)
        else:
            texts = sample_items(items, self.num_items, generator)
        with seeded_transforms(generator):
            return ItemSample(name, self.transform(picture), texts, normal)

    def items(self, index: int) -> list[str]:
        """All items of an image, in order; the image is not read."""
        return list(self.file.entries[index].items)

    def sample_id(self, index: int) -> str:
        """The name of an image; the image is not read."""
        return self.file.entries[index].name

    @property
    def fingerprint(self) -> str:
        """Identity of the images' names and items, the same on any machine. For checkpoints."""
        return self.file.fingerprint


def check_files(file: OwnFile, *, max_missing: float = 0.0) -> list[str]:
    """Entries none of whose files is there, before hours are spent on the others.

    Args:
        file: the entries.
        max_missing: share of the entries that may be missing.

    Returns:
        their names.

    Raises:
        MissingFileError: more of them; names the first.
    """
    missing = []
    for entry in file.entries:
        paths = [file.root / path for path in (entry.series.values() if entry.series else [entry.image])]
        if not any(path.is_file() for path in paths):
            missing.append((entry.name, paths[0]))
    if len(missing) > max_missing * len(file.entries):
        raise MissingFileError(
            f"{missing[0][1]}: no such file; {len(missing):,} of the {len(file.entries):,} entries of {file.path} have "
            "none (paths are relative to that file, or to --image-root)"
        )
    return [name for name, _ in missing]
