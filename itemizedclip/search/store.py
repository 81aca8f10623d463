"""An image index on disk: one index.json, and shards of features that are read through memory maps.

    INDEX/index.json                    what was encoded and how; written last, whole or not at all
    INDEX/shard-000000.safetensors      global (n, D) and tokens (n, L, D), float16 or bfloat16

A shard's header names its images too, so that shards of a build that was stopped are found and kept.

Axes: N images of the index, n images of a shard, B images of a batch, L image tokens, D joint width.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from itemizedclip.data.images import MAX_PIXELS
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.factory import check_config
from itemizedclip.runtime.errors import UserError, about
from itemizedclip.runtime.fields import (
    Rule,
    check_fields,
    either,
    nothing,
    one_of,
    plain_object,
    several,
    text,
    whole,
)
from itemizedclip.runtime.fields import number as fields_number
from itemizedclip.runtime.files import check_readable, parse_json, read_json, replacing
from itemizedclip.search.recall import PrefilterRecall

FORMAT = 1
INDEX_FILE = "index.json"

Storage = Literal["float16", "bfloat16"]
"""How features are kept: 11 significant bits up to 65,504, or 8 up to 10³⁸."""

STORAGE_DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}

IMAGES_PER_READ = 32
"""Images whose tokens are copied out of the maps at once (6 MB at ViT-B/16)."""

_SHARD_NAME = re.compile(r"shard-(\d{6,})\.safetensors")
_HEADER_KEYS = ("source", "images", "unreadable")
_HEADER_KEY = "shard"  # one key only: safetensors writes several in no fixed order


class ImageIndexError(UserError):
    """An index that cannot be used: the message names the file, what was expected and what to do."""


@dataclass(frozen=True)
class FeatureSource:
    """All that the features of an index depend on, besides the images.

    Attributes:
        checkpoint_sha256: of the checkpoint file.
        model_config: of the model.
        transform: what is done to images, as plain data.
        storage: see `Storage`.
        precision: of the image tower.
    """

    checkpoint_sha256: str
    model_config: dict[str, Any]
    transform: dict[str, Any]
    storage: Storage
    precision: str

    def difference(self, other: FeatureSource) -> str | None:
        """What tells two sources apart, as a sentence's part; None when they are equal."""
        for name in (f.name for f in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine == theirs:
                continue
            if name == "checkpoint_sha256":
                return f"another checkpoint (sha256 {mine[:12]}…, not {theirs[:12]}…)"
            if isinstance(mine, str):
                return f"another {name} ({mine}, not {theirs})"
            return f"another {name.replace('_', ' ')}"
        return None


@dataclass(frozen=True)
class IndexedImage:
    """One image of an index.

    Attributes:
        path: relative to the image folder, parts joined by "/".
        size: of the file, bytes.
        mtime_ns: when the file was changed, ns.
        height: of the upright image, pixels.
        width: of the upright image, pixels.
        shard: number of the shard that holds its features.
        row: its row there.
    """

    path: str
    size: int
    mtime_ns: int
    height: int
    width: int
    shard: int
    row: int


@dataclass(frozen=True)
class UnreadableImage:
    """A file that could not be read as an image, and why."""

    path: str
    size: int
    mtime_ns: int
    reason: str


@dataclass(frozen=True)
class Manifest:
    """Contents of index.json.

    Attributes:
        folder: the image folder, absolute.
        checkpoint: file the model came from, absolute.
        source: what the features depend on.
        grid: how the L tokens lie in the image, (h, w).
        images: N images by path.
        unreadable: files left out.
        recall: what the prefilter keeps, once measured.
        format: version of this layout.
    """

    folder: str
    checkpoint: str
    source: FeatureSource
    grid: tuple[int, ...]
    images: list[IndexedImage]
    unreadable: list[UnreadableImage] = field(default_factory=list)
    recall: PrefilterRecall | None = None
    format: int = FORMAT

    def with_recall(self, recall: PrefilterRecall) -> Manifest:
        """The same with another measurement."""
        return replace(self, recall=recall)


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself.

    Attributes:
        source: what its features depend on.
        images: in the order of its rows.
        unreadable: files left out of it.
    """

    source: FeatureSource
    images: list[IndexedImage]
    unreadable: list[UnreadableImage]


# --- index.json ------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write index.json; it appears whole or not at all.

    Raises:
        ImageIndexError: a folder that cannot be written to.
    """
    # Not asdict(), which copies every image deeply: seconds for a million.
    content = {**vars(manifest), "source": vars(manifest.source), "recall": _plain(manifest.recall)}
    content["images"] = [vars(image) for image in manifest.images]
    content["unreadable"] = [vars(image) for image in manifest.unreadable]
    _write_whole(folder / INDEX_FILE, lambda path: path.write_text(json.dumps(content) + "\n", encoding="utf-8"))


def read_manifest(folder: Path) -> Manifest:
    """Read index.json.

    Raises:
        ImageIndexError: no index, one whose build did not finish, a damaged one, or one of a newer version.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        if shard_files(folder):
            raise ImageIndexError(
                f"{folder}: this index is not finished; run the same `itemizedclip index` command again, which goes on "
                "where it stopped"
            )
        raise ImageIndexError(f"{folder}: no index here ({INDEX_FILE} is missing); make one with `itemizedclip index`")
    try:
        content = read_json(path, holding="an image index")
        if isinstance(content, dict) and type(content.get("format")) is int and content["format"] > FORMAT:
            raise ImageIndexError(
                f"{path}: written by a newer version (format {content['format']}, this one reads {FORMAT}); update"
            )
        with about(path):
            check_fields(content, _MANIFEST_RULES, required=_MANIFEST_RULES)
            recall = content["recall"]
            return Manifest(
                **{
                    **content,
                    "source": _source_of(content["source"]),
                    "grid": tuple(content["grid"]),
                    "images": _images_of(content["images"]),
                    "unreadable": _unreadable_of(content["unreadable"]),
                    "recall": None if recall is None else _recall_of(recall),
                }
            )
    except ImageIndexError:
        raise
    except UserError as error:
        raise ImageIndexError(
            f"{error}. This is not the index.json of an image index, or damaged: delete that file and run "
            "`itemizedclip index` again, which keeps the encoded images"
        ) from error


# Contents come from whoever made the index: each field is what it must be, and no path leads out of its folder.


_LEADS_OUT = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|\0|^[A-Za-z]:[/\\]")
"""An empty part, "." or ".." of a path, NUL, or a drive."""


def _is_inside(path: Any) -> bool:
    return type(path) is str and _LEADS_OUT.search(path) is None


_WHOLE = whole(0, 2**62)
_SHARE = fields_number(0, 1)
_INSIDE = Rule("a path inside the image folder, parts joined by /", _is_inside)

_MANIFEST_RULES: dict[str, Rule] = {
    "folder": text(),
    "checkpoint": text(),
    "source": plain_object(),
    "grid": several(whole(1, 4096), longest=4),
    "images": Rule("a list of images", lambda value: type(value) is list),
    "unreadable": Rule("a list of files", lambda value: type(value) is list),
    "recall": either(plain_object(), nothing()),
    "format": whole(1, FORMAT),
}
_SOURCE_RULES: dict[str, Rule] = {
    "checkpoint_sha256": text(64),
    "model_config": plain_object(),
    "transform": plain_object(),
    "storage": one_of(STORAGE_DTYPES),
    "precision": text(100),
}
_IMAGE_RULES: dict[str, Rule] = {
    "path": _INSIDE,
    "size": _WHOLE,
    "mtime_ns": whole(-(2**62), 2**62),
    "height": whole(1, MAX_PIXELS),
    "width": whole(1, MAX_PIXELS),
    "shard": whole(0, 2**31 - 1),
    "row": whole(0, 2**31 - 1),
}
_UNREADABLE_RULES: dict[str, Rule] = {
    "path": _INSIDE,
    "size": _WHOLE,
    "mtime_ns": _IMAGE_RULES["mtime_ns"],
    "reason": Rule("a text", lambda value: type(value) is str),
}
_RECALL_RULES: dict[str, Rule] = {
    "k": whole(1, 2**31),
    "num_images": _WHOLE,
    "num_queries": _WHOLE,
    "queries": text(),
    "at": Rule(
        "recall by number of candidates",
        lambda value: (
            type(value) is dict
            and all(key.isascii() and key.isdecimal() and len(key) < 18 for key in value)
            and all(_SHARE.holds(share) for share in value.values())
        ),
    ),
}


def _source_of(content: Any) -> FeatureSource:
    source = FeatureSource(**check_fields(content, _SOURCE_RULES, place="source", required=_SOURCE_RULES))
    check_config(source.model_config, source="source")
    return source


def _images_of(content: list[Any]) -> list[IndexedImage]:
    fields = list(_IMAGE_RULES.items())
    for row, image in enumerate(content):
        # A million images: the long way, which finds words for it, only for one that is wrong.
        if (
            type(image) is not dict
            or len(image) != len(fields)
            or not all(key in image and rule.holds(image[key]) for key, rule in fields)
        ):
            check_fields(image, _IMAGE_RULES, place=f"images[{row}]", required=_IMAGE_RULES)
    return [IndexedImage(**image) for image in content]


def _unreadable_of(content: list[Any]) -> list[UnreadableImage]:
    return [
        UnreadableImage(
            **check_fields(file, _UNREADABLE_RULES, place=f"unreadable[{number}]", required=_UNREADABLE_RULES)
        )
        for number, file in enumerate(content)
    ]


def _recall_of(content: Any) -> PrefilterRecall:
    return PrefilterRecall.from_plain(check_fields(content, _RECALL_RULES, place="recall", required=_RECALL_RULES))


def _plain(recall: PrefilterRecall | None) -> dict[str, Any] | None:
    return None if recall is None else asdict(recall)


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        with replacing(path, durable=True) as part:
            write(part)
    except OSError as error:
        raise ImageIndexError(
            f"{path}: cannot be written ({error.strerror or error}); what is done stays, mend it and run again"
        ) from error


# --- shards ----------------------------------------------------------------------------------------------------------


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:06d}.safetensors"


def shard_files(folder: Path) -> dict[int, Path]:
    """Number → file of the shards that lie in an index folder, used or not."""
    found = ((path, _SHARD_NAME.fullmatch(path.name)) for path in folder.glob("shard-*.safetensors"))
    return dict(sorted((int(match[1]), path) for path, match in found if match))


def write_shard(folder: Path, number: int, global_nD: Tensor, tokens_nLD: Tensor, header: ShardHeader) -> None:
    """Write features, already in their storage type; the file appears whole or not at all.

    Raises:
        ImageIndexError: a folder that cannot be written to.
    """
    text = json.dumps(
        {
            "source": vars(header.source),
            "images": [vars(image) for image in header.images],
            "unreadable": [vars(image) for image in header.unreadable],
        }
    )
    tensors = {"global": global_nD.contiguous(), "tokens": tokens_nLD.contiguous()}
    # Not save_file(), whose files only their owner can read.
    content = save(tensors, metadata={_HEADER_KEY: text})
    _write_whole(shard_path(folder, number), lambda path: path.write_bytes(content))


def read_shard_header(path: Path) -> ShardHeader:
    """What a shard says of itself; its features are not read.

    Raises:
        ImageIndexError: a damaged file, or none of an index.
    """
    try:
        check_readable(path, holding="a part of an image index")
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER_KEY, "")
        content = parse_json(header, source=path, holding="the header of a part of an image index")
        check_fields(content, {key: _MANIFEST_RULES[key] for key in _HEADER_KEYS}, required=_HEADER_KEYS)
        return ShardHeader(
            _source_of(content["source"]), _images_of(content["images"]), _unreadable_of(content["unreadable"])
        )
    except (OSError, SafetensorError, UserError) as error:
        raise _damaged(path, error) from error


def map_shard(path: Path) -> ImageFeatures:
    """Features of a shard as views of the file: pages are read when they are touched.

    Raises:
        ImageIndexError: a missing or damaged file.
    """
    try:
        check_readable(path, holding="a part of an image index")
        with safe_open(path, framework="pt") as file:
            global_nD, tokens_nLD = file.get_tensor("global"), file.get_tensor("tokens")
        if global_nD.dim() != 2 or tokens_nLD.dim() != 3 or len(global_nD) != len(tokens_nLD):
            raise ValueError(f"global {tuple(global_nD.shape)} and tokens {tuple(tokens_nLD.shape)} are no features")
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, error) from error
    return ImageFeatures(global_nD, tokens_nLD, (tokens_nLD.shape[1],))


def _damaged(path: Path, error: Exception) -> ImageIndexError:
    what = "is missing" if not path.is_file() else f"is damaged ({error})"
    return ImageIndexError(
        f"{path}: this part of the index {what}; run the same `itemizedclip index` command again, which encodes its "
        "images anew"
    )


# --- reading ---------------------------------------------------------------------------------------------------------


class FeatureStore:
    """The features of an index, read where they lie.

    Args:
        folder: of the index.
        manifest: its index.json.
        device: where features are brought.

    Raises:
        ImageIndexError: shards that are missing; damage inside a shard shows when it is opened.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        self.folder = folder
        self.manifest = manifest
        self.device = device
        self._maps: dict[int, ImageFeatures] = {}
        self._shard_N = torch.tensor([image.shard for image in manifest.images], dtype=torch.int64)
        self._row_N = torch.tensor([image.row for image in manifest.images], dtype=torch.int64)
        self._place_N = (self._shard_N << 32) | self._row_N  # orders images as they lie on disk
        present = shard_files(folder)
        for number in self.shard_numbers:
            if number not in present:
                raise _damaged(shard_path(folder, number), FileNotFoundError())

    def __len__(self) -> int:
        """N."""
        return len(self.manifest.images)

    @property
    def shard_numbers(self) -> list[int]:
        """Shards that hold images of the index."""
        return self._shard_N.unique().tolist()

    def global_batches(self, *, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, ImageFeatures]]:
        """Image numbers and global features, shard by shard, without tokens (L = 0).

        Args:
            share: (r, W): of the shards, in order, only r, r + W, …
        """
        for numbers, shard in self._shards(share):
            global_nD = shard.global_BD[self._row_N[numbers]].to(self.device, torch.float32)
            yield numbers.to(self.device), ImageFeatures(global_nD, global_nD.new_empty((len(numbers), 0, 1)), (0,))

    def batches(self, *, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, ImageFeatures]]:
        """Image numbers and features of all images, a few at a time; `share` as for `global_batches`."""
        for numbers, _ in self._shards(share):
            for part in numbers.split(IMAGES_PER_READ):
                yield part.to(self.device), self.features(part.tolist())

    def chosen_batches(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor, ImageFeatures]]:
        """The same for some images, in the order in which they lie on disk."""
        chosen = torch.tensor(numbers, dtype=torch.int64)
        for part in chosen[self._place_N[chosen].argsort()].split(IMAGES_PER_READ):
            yield part.to(self.device), self.features(part.tolist())

    def features(self, numbers: Sequence[int]) -> ImageFeatures:
        """Features of B images, in the order asked for, in their storage type."""
        shards = [self._map(int(self._shard_N[n])) for n in numbers]
        rows = self._row_N[torch.tensor(numbers, dtype=torch.int64)].tolist()
        global_BD = torch.stack([shard.global_BD[row] for shard, row in zip(shards, rows)])
        tokens_BLD = torch.stack([shard.tokens_BLD[row] for shard, row in zip(shards, rows)])
        return ImageFeatures(global_BD.to(self.device), tokens_BLD.to(self.device), self.manifest.grid)

    def _shards(self, share: tuple[int, int]) -> Iterator[tuple[Tensor, ImageFeatures]]:
        """Image numbers by row, and the features, of each shard of the share."""
        by_place = self._place_N.argsort()
        numbers, counts = self._shard_N[by_place].unique_consecutive(return_counts=True)
        parts = list(zip(numbers.tolist(), by_place.split(counts.tolist())))
        for number, images in parts[share[0] :: share[1]]:
            yield images, self._map(number)

    def _map(self, number: int) -> ImageFeatures:
        if number not in self._maps:
            features = map_shard(path := shard_path(self.folder, number))
            rows = int(self._row_N[self._shard_N == number].max()) + 1
            D, L = self.manifest.source.model_config["embed_dim"], math.prod(self.manifest.grid)
            if len(features.global_BD) < rows or features.tokens_BLD.shape[1:] != (L, D):
                shape = tuple(features.tokens_BLD.shape)
                error = ValueError(f"tokens {shape}, index.json speaks of {rows} images of {L} × {D}")
                raise _damaged(path, error)
            self._maps[number] = features
        return self._maps[number]
