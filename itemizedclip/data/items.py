"""Text items of an image or study: draw them for training, split captions, recognise normal studies, read item files.

Every random choice of a sample comes from one generator made from (seed, epoch, index), so a sample is the same on
any worker, any rank and after any resume.

Axes: K item slots.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch

from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import read_json
from itemizedclip.runtime.logs import shown

ITEM_SEPARATOR = ". "
"""What stands between items joined into one text."""

MAX_JOINED_ITEMS = 3
"""Largest number of items joined into one training text, in every published 2D recipe."""


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Generator for all random choices of sample `index` in `epoch`; independent streams for different arguments.

    Raises:
        ValueError: a negative argument.
    """
    if min(seed, epoch, index) < 0:
        raise UserError(f"seed, epoch and index must not be negative, got {seed}, {epoch}, {index}")
    return np.random.default_rng(np.random.SeedSequence(int(seed), spawn_key=(int(epoch), int(index))))


@contextmanager
def seeded_transforms(generator: np.random.Generator) -> Iterator[None]:
    """Make image transforms that use global randomness follow `generator` inside the block.

    torchvision and open_clip transforms draw from PyTorch's CPU generator and from `random`; both are set from
    `generator` on entry and put back on exit. Accelerator generators are not touched.
    """
    seed = int(generator.integers(2**63))
    random_state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would also reseed every accelerator, which fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(random_state)


def normalise_item(text: str) -> str:
    """An item as remote sensing and chest CT use it: no outer white space, lower case."""
    return text.strip().lower()


def split_captions(text: str) -> list[str]:
    """Items of running text: split at full stops, stripped, lower-cased, empties dropped."""
    return [item for part in text.split(".") if (item := normalise_item(part))]


def sample_items(items: Sequence[str], K: int, generator: np.random.Generator) -> list[str]:
    """Shuffle a study's items and keep the first K (radiology). Fewer than K items are all kept.

    Raises:
        ValueError: no item, or K < 1.
    """
    _check_draw(items, K)
    return [items[i] for i in generator.permutation(len(items))[:K]]


def diverse_sample(
    items: Sequence[str],
    K: int,
    generator: np.random.Generator,
    *,
    max_joined: int = MAX_JOINED_ITEMS,
    limit_joined_to_items: bool,
) -> list[str]:
    """Draw K training texts with replacement, each made of 1 … `max_joined` items (paper: diverse sampling).

    The number m of joined items is uniform. For m > 1, half of the texts join m consecutive items, every window
    equally likely, the last included; the other half join a random set of m different items in random order.
    The K texts are then shuffled.

    Args:
        items: the image's items, at least one.
        K: texts to draw.
        generator: see `sample_rng`.
        max_joined: largest m.
        limit_joined_to_items: draw m from 1 … min(max_joined, number of items), as RSICD does. Otherwise (natural
            images) m may exceed the number of items, and the text then joins all of them: an image with two items
            uses both in two of three draws.

    Raises:
        ValueError: no item, K < 1, or max_joined < 1.
    """
    _check_draw(items, K)
    if max_joined < 1:
        raise UserError(f"max_joined must be at least 1, got {max_joined}")
    max_drawn = min(max_joined, len(items)) if limit_joined_to_items else max_joined
    texts = []
    for _ in range(K):
        m = min(int(generator.integers(1, max_drawn + 1)), len(items))
        texts.append(ITEM_SEPARATOR.join(_draw_joined(items, m, generator)))
    return [texts[i] for i in generator.permutation(K)]


def _draw_joined(items: Sequence[str], m: int, generator: np.random.Generator) -> list[str]:
    consecutive = m == 1 or generator.random() < 0.5
    if consecutive:
        start = int(generator.integers(len(items) - m + 1))
        return list(items[start : start + m])
    return [items[i] for i in generator.choice(len(items), size=m, replace=False)]


def _check_draw(items: Sequence[str], K: int) -> None:
    if not items:
        raise UserError("no text item to draw from; expected at least one")
    if K < 1:
        raise UserError(f"K, the number of items per image, must be at least 1, got {K}")


def is_normal_study(items: Sequence[str], *, chest_ct: bool) -> bool:
    """Whether a study reports no finding (paper: normal check); two such studies are no negatives of each other.

    MRI and head CT: the *first* item is exactly "no significant abnormalities.", or contains "study is unremarkable"
    in any case. Chest CT: the *only* item is "no significant abnormalities" or "no abnormalities detected", in any
    case because chest CT lower-cases its items. Pass the items in the report's order, before shuffling.
    """
    if not items:
        return False
    if chest_ct:
        return len(items) == 1 and normalise_item(items[0]) in (
            "no significant abnormalities",
            "no abnormalities detected",
        )
    first = items[0].strip()
    return first == "no significant abnormalities." or "study is unremarkable" in first.lower()


def check_id(name: str, where: object) -> str:
    """The name of an image or study as it is, which may be part of a path.

    Raises:
        UserError: it is blank, holds NUL, at which file systems and arrays of texts end a name, or is longer than
            names of files can be.
    """
    if any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in name.split("/")):
        raise UserError(f"{where}: the name {name[:40]!r}… has more than the 255 bytes that names of files have")
    if not name.strip():
        raise UserError(f"{where}: the name is blank; expected the name of an image or study")
    if "\0" in name:
        raise UserError(f"{where}: name {shown(name)[:80]!r} holds NUL; expected the name of an image or study")
    return name


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a character, as other bytes become in Python."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def check_text(text: str, where: object) -> str:
    """A text of the command line as it is.

    Raises:
        UserError: it holds bytes that are no UTF-8, which models do not read.
    """
    if not is_text(text):
        raise UserError(f"{where}: {shown(text)[:80]!r} is no UTF-8 text; type it anew, or give it in a file")
    return text


@overload
def load_item_lists(path: str | Path, *, integer_keys: Literal[True]) -> dict[int, list[str]]: ...
@overload
def load_item_lists(path: str | Path, *, integer_keys: Literal[False] = False) -> dict[str, list[str]]: ...
def load_item_lists(path: str | Path, *, integer_keys: bool = False) -> dict[Any, list[str]]:
    """Read an item file: a JSON object that maps each image to its list of items.

    Args:
        path: JSON file, UTF-8.
        integer_keys: keys are decimal numbers (row or sample indices) and are returned as int; otherwise str.

    Returns:
        Key → items, stripped of outer white space, blank items left out. A list may be empty; what an image without
        items means is the dataset's decision.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not an object, a repeated key, a key that is no number, or a value that is not a list
            of strings; the message names file and key.
    """
    path = Path(path)
    entries = read_json(path, holding="item lists")
    expected = 'expected an object {"key": ["item", ...], ...}'
    if not isinstance(entries, dict):
        raise UserError(f"{path}: {expected}, found {_json_type(entries)}")
    if not entries:
        raise UserError(f"{path}: {expected}, found one without an entry")
    lists: dict[int | str, list[str]] = {}
    for key, items in entries.items():
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            found = _json_type(items) if not isinstance(items, list) else "a list with other values in it"
            raise UserError(f"{path}: key {key!r}: expected a list of strings, found {found}")
        name = _integer_key(path, key) if integer_keys else check_id(key, path)
        if name in lists:
            raise UserError(f"{path}: key {key!r}: number {name} appears twice")
        lists[name] = [item.strip() for item in items if item.strip()]
    return lists


def _integer_key(path: Path, key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 18):
        raise UserError(f'{path}: key {key!r}: expected a decimal index such as "12"')
    return int(key)


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
