"""Itemized scenes: a benchmark of images with several independent text items, made from a seed, without a network.

A scene shows a few real handwritten digits (`sklearn.datasets.load_digits`), each in a colour and a size, at random
places of a textured background with distractors. Each digit is one item ("a small red seven") with the mask of its
visible pixels, so zero-shot classes, pointing game and mIoU all have an exact answer. Harder levels have items that are
not one digit: several of a kind, a relation, an absence, the scene as a whole. Contrasts are pairs of a right and a
wrong text that differ in one respect.

Axes: H, W image rows and columns (pixels), K items of one scene, N scenes, C classes (colour-digit pairs).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset

from itemizedclip.data.batch import ItemSample
from itemizedclip.runtime.errors import UserError

GENERATOR_VERSION = 1
"""Raise when a change makes other pixels or items from the same arguments; part of the fingerprint."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 45),
    "green": (50, 205, 60),
    "blue": (70, 105, 255),
    "yellow": (250, 235, 50),
    "magenta": (240, 70, 225),
    "cyan": (50, 225, 235),
    "white": (250, 250, 250),
    "orange": (250, 145, 25),
}
"""Colour names and their RGB values, brighter or more saturated than every background."""

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE_WORDS = ("small", "large")
DIRECTIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""Words of a relation and their opposites."""

SPLIT_SHARES = {"train": 0.7, "valid": 0.1, "test": 0.2}
"""Share of each digit's handwritten images that a split may use."""

ClassPair = tuple[int, int]
"""One class: (row of COLOURS, digit 0 … 9)."""

_PALETTE = np.array(list(COLOURS.values()), dtype=np.int32)
_POSITIONS_PER_ITEM = 48
_LAYOUT_ATTEMPTS = 64
_COLOUR_JITTER = 12  # grey levels per channel
_INK_ALPHA = 128  # a pixel belongs to a digit where the digit covers at least half of it


@dataclass(frozen=True)
class SceneLevel:
    """One difficulty level; `dataclasses.replace(LEVELS["standard"], name=..., max_items=4)` makes another.

    Raises ValueError naming the field when the values contradict each other.
    """

    name: str
    """Used in messages and sample ids; does not influence the pixels."""
    image_size: int = 64
    """Height and width of a scene, px."""
    min_items: int = 2
    """Fewest digits in a scene."""
    max_items: int = 7
    """Most digits in a scene; every count in between is equally likely."""
    small_px: int = 14
    """Mean height of a "small" digit, px."""
    large_px: int = 22
    """Mean height of a "large" digit, px."""
    size_jitter_px: int = 1
    """Heights vary by up to this much around the mean, px."""
    max_overlap: float = 0.1
    """Largest fraction of a digit's pixels that later digits may hide; 0 keeps the digits apart."""
    snap_px: int = 1
    """Digits begin at multiples of this many px (plus a margin of 1); 1 allows every place."""
    num_distractors: int = 3
    """Most shapes without a text (dots, blocks, triangles, squiggles); those that find no free place are left out."""
    num_colours: int = len(COLOURS)
    """The first so many of COLOURS are used."""
    texture_amplitude: int = 16
    """Background contrast: largest deviation from its base colour, grey levels of 255."""
    noise_amplitude: int = 8
    """Grain on the whole image: uniform in ± this many grey levels of 255."""
    held_out_fraction: float = 0.0
    """Share of the colour-digit pairs that only test scenes show (see `held_out_pairs`)."""
    shared_kinds: int = 0
    """All digits of a scene come from so many colours and so many digits, so that items share their parts; 0: any."""
    max_copies: int = 1
    """Most digits of one kind, which are one item ("two small red sevens"); every number is equally likely."""
    num_relations: int = 0
    """Most items like "a red seven left of a green two"; their mask is both digits."""
    num_absent: int = 0
    """Items like "no red two", whose mask is empty."""
    scene_item: bool = False
    """Whether an item tells of the scene as a whole ("five digits"); its mask is everything."""

    def __post_init__(self) -> None:
        rules = [
            (1 <= self.min_items <= self.max_items, "min_items, max_items", "1 ≤ min_items ≤ max_items"),
            (self.size_jitter_px >= 0, "size_jitter_px", "at least 0"),
            (self.small_px - self.size_jitter_px >= 8, "small_px", "at least 8 after size_jitter_px, to stay legible"),
            (
                self.small_px + self.size_jitter_px < self.large_px - self.size_jitter_px,
                "small_px, large_px",
                "small_px + size_jitter_px < large_px − size_jitter_px, so that the two sizes differ",
            ),
            (self.large_px * 2 <= self.image_size, "large_px, image_size", "large_px of at most half of image_size"),
            (0 <= self.max_overlap < 1, "max_overlap", "0 ≤ max_overlap < 1"),
            (self.snap_px >= 1, "snap_px", "at least 1"),
            (self.num_distractors >= 0, "num_distractors", "at least 0"),
            (1 <= self.num_colours <= len(COLOURS), "num_colours", f"1 … {len(COLOURS)}"),
            (0 <= self.texture_amplitude <= 40, "texture_amplitude", "0 … 40, so that digits stand out"),
            (0 <= self.noise_amplitude <= 40, "noise_amplitude", "0 … 40, so that digits stand out"),
            (
                0 <= self.held_out_fraction <= min(0.5, (self.num_colours - 1) / len(DIGIT_WORDS)),
                "held_out_fraction, num_colours",
                "0 … 0.5 and at most (num_colours − 1) / 10, so that training sees every colour and every digit",
            ),
            (
                self.shared_kinds == 0 or 2 <= self.shared_kinds <= min(self.num_colours, len(DIGIT_WORDS)),
                "shared_kinds, num_colours",
                "0, or 2 … num_colours",
            ),
            (1 <= self.max_copies < len(DIGIT_WORDS), "max_copies", "1 … 9"),
            (self.num_relations >= 0 and self.num_absent >= 0, "num_relations, num_absent", "at least 0"),
            (not self.scene_item or self.max_items < len(DIGIT_WORDS), "max_items", "at most 9 with scene_item"),
        ]
        for holds, field_names, expected in rules:
            if not holds:
                values = ", ".join(f"{field}={getattr(self, field)}" for field in field_names.split(", "))
                raise UserError(f"scene level {self.name!r}: {values}; expected {expected}")
        num_pairs = self.num_colours * len(DIGIT_WORDS)
        seen = num_pairs - round(self.held_out_fraction * num_pairs)
        if self.max_items > seen:
            raise UserError(
                f"scene level {self.name!r}: max_items={self.max_items}; expected at most {seen}, the colour-digit "
                "pairs that training may show, since no scene shows a pair twice"
            )

    @property
    def max_texts(self) -> int:
        """Most items of a scene, those that are no digit included."""
        return self.max_items + self.num_relations + self.num_absent + self.scene_item


_FIELDS_OF_VERSION_1 = 14
"""So many fields of a level always count in its random streams; later ones only where they are not the default, so
that levels from before them stay what they were."""


LEVELS: dict[str, SceneLevel] = {
    level.name: level
    for level in (
        SceneLevel("easy", max_items=4, max_overlap=0.0, num_distractors=0, texture_amplitude=8, noise_amplitude=4),
        SceneLevel("lattice", max_items=5, max_overlap=0.0, size_jitter_px=0, snap_px=8, num_distractors=2),
        SceneLevel("standard"),
        SceneLevel(
            "crowded", min_items=5, max_overlap=0.3, num_distractors=6, texture_amplitude=28, noise_amplitude=16
        ),
        SceneLevel("held_out", held_out_fraction=0.2),
        SceneLevel(
            "small", min_items=4, small_px=9, large_px=13, max_overlap=0.3, num_distractors=6, texture_amplitude=24
        ),
        SceneLevel("composed", min_items=3, max_items=6, shared_kinds=3, small_px=12, large_px=18),
        SceneLevel("relations", max_items=5, shared_kinds=3, num_relations=2, small_px=12, large_px=18),
        SceneLevel("counts", max_items=6, max_copies=3, scene_item=True, small_px=11, large_px=16),
        SceneLevel("negations", max_items=5, shared_kinds=3, num_absent=2, small_px=12, large_px=18),
        SceneLevel(
            "hard",
            min_items=3,
            max_items=6,
            small_px=11,
            large_px=16,
            max_overlap=0.3,
            num_distractors=6,
            texture_amplitude=28,
            noise_amplitude=16,
            held_out_fraction=0.2,
            shared_kinds=3,
            max_copies=2,
            num_relations=1,
            num_absent=1,
            scene_item=True,
        ),
    )
}
"""Levels by name. "lattice" places digits on the corners of 8-px patches, which a small model learns within minutes;
"held_out" is "standard" with a fifth of the colour-digit pairs kept for testing. "small" … "negations" are hard in one
respect each, "hard" in all of them."""


@dataclass(frozen=True)
class ItemClass:
    """What one digit of a scene is: rows of COLOURS, of DIGIT_WORDS and of SIZE_WORDS."""

    colour: int
    digit: int
    size: int

    @property
    def pair(self) -> ClassPair:
        """The zero-shot class: (colour, digit)."""
        return self.colour, self.digit

    @property
    def text(self) -> str:
        """For example "a small red seven"."""
        return self.text_of(1)

    def text_of(self, count: int) -> str:
        """Of several such digits: "two small red sevens"."""
        size, colour, digit = SIZE_WORDS[self.size], list(COLOURS)[self.colour], DIGIT_WORDS[self.digit]
        if count == 1:
            return f"a {size} {colour} {digit}"
        return f"{DIGIT_WORDS[count]} {size} {colour} {digit}{'es' if digit == 'six' else 's'}"

    @property
    def name(self) -> str:
        """Without its size and article: "red seven"."""
        return _pair_name(self.pair)


def _pair_name(pair: ClassPair) -> str:
    return f"{list(COLOURS)[pair[0]]} {DIGIT_WORDS[pair[1]]}"


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Contrast:
    """Two texts about one scene of which one is right, and which differ in one respect.

    Attributes:
        kind: "binding" (colour and digit are both in the scene, but not together), "number" (of digits of a kind),
            "relation" (the opposite direction), "absence" (denied what is there), "scene" (number of all digits).
        right: true of the scene.
        wrong: not.
    """

    kind: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Placement:
    """Where one digit of a scene comes from and where it lies.

    Attributes:
        glyph: row of `load_digits().images`, the handwritten digit shown.
        height_px: height of its pen strokes in the scene.
        top_px: row of the scene where it begins.
        left_px: column of the scene where it begins.
    """

    glyph: int
    height_px: int
    top_px: int
    left_px: int


@dataclass
class Scene:
    """One scene. Later digits lie over earlier ones.

    In levels whose items are digits, entry k of every list describes the same digit. Where there may be several of a
    kind, the first items are the kinds in the order of their first digits; items that are no digit come last.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        items: K texts, all different.
        masks: bool (K, H, W): the visible pixels of each item; of a relation those of both digits, of the whole scene
            everything, of what is absent none.
        classes: colour, digit and size of each digit; only those of one kind share colour and digit.
        placements: handwriting and position of each digit.
    """

    image: np.ndarray
    items: list[str]
    masks: np.ndarray
    classes: list[ItemClass]
    placements: list[Placement]


# ---------------------------------------------------------------------------------------------------------------
# Levels, classes, splits


def resolve_level(level: str | SceneLevel) -> SceneLevel:
    """The level itself or the one of that name; an unknown name raises ValueError listing the known ones."""
    if isinstance(level, SceneLevel):
        return level
    if level not in LEVELS:
        raise UserError(f"unknown scene level {level!r}; expected one of {', '.join(LEVELS)}")
    return LEVELS[level]


def class_pairs(level: str | SceneLevel) -> list[ClassPair]:
    """All colour-digit pairs of a level, colour by colour."""
    return [(colour, digit) for colour in range(resolve_level(level).num_colours) for digit in range(len(DIGIT_WORDS))]


def class_prompts(level: str | SceneLevel = "standard") -> list[tuple[str, ClassPair]]:
    """The zero-shot classes: C tuples of prompt ("a red seven") and (colour, digit)."""
    names = list(COLOURS)
    prompts = []
    for colour, digit in class_pairs(level):
        article = "an" if names[colour][0] in "aeiou" else "a"
        prompts.append((f"{article} {names[colour]} {DIGIT_WORDS[digit]}", (colour, digit)))
    return prompts


def held_out_pairs(level: str | SceneLevel, seed: int = 0) -> set[ClassPair]:
    """The colour-digit pairs that training and validation scenes of this level and seed never show.

    They are spread evenly: no colour and no digit loses more than one pair over its share.
    """
    level = resolve_level(level)
    num_digits = len(DIGIT_WORDS)
    rng = _generator("held out", level, seed)
    colours, digits = rng.permutation(level.num_colours), rng.permutation(num_digits)
    # Walk along the diagonals of the shuffled (colour, digit) table.
    diagonal = [
        (int(colours[row]), int(digits[(row + shift) % num_digits]))
        for shift in range(num_digits)
        for row in range(level.num_colours)
    ]
    return set(diagonal[: round(level.held_out_fraction * len(diagonal))])


def class_labels(dataset: ScenesDataset) -> np.ndarray:
    """int64 (N, C): 1 where scene n shows class c; columns in the order of `class_prompts(dataset.level)`."""
    column = {pair: c for c, pair in enumerate(class_pairs(dataset.level))}
    labels_NC = np.zeros((len(dataset), len(column)), dtype=np.int64)
    for n in range(len(dataset)):
        for item_class in dataset.classes(n):
            labels_NC[n, column[item_class.pair]] = 1
    return labels_NC


@lru_cache(maxsize=1)
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    """uint8 (1797, 8, 8) images of pen coverage and int64 (1797,) digits."""
    from sklearn.datasets import load_digits  # here, because importing it takes a second that most users don't need

    bundle = load_digits()
    return (bundle.images * (255 / 16)).round().astype(np.uint8), bundle.target


@lru_cache(maxsize=len(SPLIT_SHARES))
def split_glyphs(split: str) -> tuple[tuple[int, ...], ...]:
    """Rows of `load_digits().images` that a split may show: ten tuples, one per digit.

    Each digit's images are cut in their order in the set, not at random: neighbours are by the same hand, so test
    scenes show mostly hands that training never saw (an RBF SVM on the plain digits: 95% right, 99% when shuffled).
    """
    if split not in SPLIT_SHARES:
        raise UserError(f"unknown split {split!r}; expected one of {', '.join(SPLIT_SHARES)}")
    names = list(SPLIT_SHARES)
    before = math.fsum(SPLIT_SHARES[name] for name in names[: names.index(split)])
    _, digit_of_glyph = _handwriting()
    chosen = []
    for digit in range(len(DIGIT_WORDS)):
        rows = np.flatnonzero(digit_of_glyph == digit)
        first, last = round(before * len(rows)), round((before + SPLIT_SHARES[split]) * len(rows))
        chosen.append(tuple(rows[first:last].tolist()))
    return tuple(chosen)


# ---------------------------------------------------------------------------------------------------------------
# Drawing. Pixels are integers throughout, so that a scene is the same on every machine.


def _digest(*parts: object) -> bytes:
    """sha256 of values that say everything a random stream, or a data set, depends on. Level names don't count."""
    texts = [_level_text(part) if isinstance(part, SceneLevel) else json.dumps(part) for part in parts]
    return hashlib.sha256(f"[{GENERATOR_VERSION}, {', '.join(texts)}]".encode()).digest()


@lru_cache(maxsize=64)
def _level_text(level: SceneLevel) -> str:
    values = {**asdict(level), "name": ""}
    later = [field for field in list(fields(level))[_FIELDS_OF_VERSION_1:] if values[field.name] == field.default]
    return json.dumps({name: value for name, value in values.items() if name not in {field.name for field in later}})


def _generator(*parts: object) -> np.random.Generator:
    return np.random.default_rng(np.frombuffer(_digest(*parts)[:16], dtype="<u4"))


@dataclass(frozen=True)
class _Glyph:
    """One handwritten digit at its size in the scene, with a margin of one pixel on every side."""

    alpha: np.ndarray  # uint8 (h + 2, w + 2): coverage
    ink: np.ndarray  # bool: the pixels that count as the digit's
    halo: np.ndarray  # bool: ink and its eight neighbours


def _framed(image: np.ndarray) -> np.ndarray:
    """With a margin of one pixel of 0; a tenth of the time of np.pad."""
    framed = np.zeros((image.shape[0] + 2, image.shape[1] + 2), dtype=image.dtype)
    framed[1:-1, 1:-1] = image
    return framed


@lru_cache(maxsize=16384)
def _glyph(row: int, height_px: int) -> _Glyph:
    """Handwritten digit `row` of the set, cut to its pen strokes and enlarged to `height_px`."""
    images, _ = _handwriting()
    coverage = _framed(images[row])
    rows, columns = np.flatnonzero((coverage > 50).any(1)), np.flatnonzero((coverage > 50).any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    width_px = max(1, round((right - left) * height_px / (bottom - top)))
    enlarged = Image.fromarray(coverage).resize(
        (width_px, height_px), Image.Resampling.BICUBIC, box=(left, top, right, bottom)
    )
    # Enlarged as they are, 8 × 8 cells look out of focus and the holes of 4, 6, 8 fill up: sharpen by one cell.
    sharp = enlarged.filter(ImageFilter.UnsharpMask(radius=height_px / 8, percent=150, threshold=0))
    steep = np.clip((np.asarray(sharp, dtype=np.int32) - 95) * 255 // 110, 0, 255)
    alpha = _framed(steep.astype(np.uint8))
    ink = alpha >= _INK_ALPHA
    halo = np.asarray(Image.fromarray(ink.astype(np.uint8)).filter(ImageFilter.MaxFilter(3)), dtype=bool)
    return _Glyph(alpha, ink, halo)


@lru_cache(maxsize=16)
def _distractor_alphas(largest_px: int, count: int = 96) -> tuple[np.ndarray, ...]:
    """`count` shapes, uint8 (h, w) coverage: dots, blocks, triangles, and squiggles too wide to pass for a digit."""
    rng = _generator("distractors", largest_px)
    oversampling = 4
    shapes = []
    for number in range(count):
        kind = number % 4
        size = int(rng.integers(largest_px // (2 if kind == 3 else 3), largest_px * 3 // 4 + 1))
        canvas = Image.new("L", (largest_px * 2 * oversampling, largest_px * 2 * oversampling))
        draw = ImageDraw.Draw(canvas)
        centre = largest_px * oversampling
        radius = size * oversampling / 2
        if kind == 0:
            draw.ellipse((centre - radius, centre - radius, centre + radius, centre + radius), fill=255)
        elif kind in (1, 2):
            corners = 4 if kind == 1 else 3
            draw.regular_polygon((centre, centre, radius * 1.2), corners, rotation=int(rng.integers(90)), fill=255)
        else:
            x = centre + np.linspace(-1.6, 1.6, 6) * radius
            y = centre + 0.45 * radius * np.array([1, -1] * 3) * rng.uniform(0.7, 1.0, 6)
            thickness = max(oversampling, round(0.35 * radius))
            draw.line([(int(a), int(b)) for a, b in zip(x, y)], fill=255, width=thickness, joint="curve")
        box = canvas.getbbox()
        assert box is not None
        shapes.append(np.asarray(canvas.crop(box).reduce(oversampling)))
    return tuple(shapes)


def _background(level: SceneLevel, rng: np.random.Generator) -> np.ndarray:
    """int32 (H, W, 3): a dark base colour with blotches, a gradient or stripes."""
    size, amplitude = level.image_size, level.texture_amplitude
    base = rng.integers(28, 70, size=3, dtype=np.int32)
    kind = int(rng.integers(3))
    cells = int(rng.integers(5, 12)) if kind == 0 else 2
    coarse = rng.integers(128 - amplitude, 128 + amplitude + 1, size=(cells, cells, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), dtype=np.int32)
    canvas = smooth + (base - 128)
    if kind == 2:
        period_px, slope_x, slope_y = (int(v) for v in rng.integers((size // 10, -4, -4), (size // 4, 5, 5)))
        steps = np.arange(size) * 2
        phase = (steps[:, None] * (slope_y or 1) + steps[None, :] * slope_x) % (8 * period_px)
        wave = np.abs(phase - 4 * period_px) * amplitude // (4 * period_px)
        canvas += (wave - amplitude // 2)[:, :, None]
    return canvas


def _paint(canvas: np.ndarray, alpha: np.ndarray, top: int, left: int, colour: np.ndarray) -> None:
    """Blend `colour` (3,) into the int32 canvas (H, W, 3), in place, with the coverage `alpha` (h, w)."""
    window = canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]]
    window += (colour - window) * alpha[:, :, None].astype(np.int32) // 255


def _place(
    glyphs: list[_Glyph], colours: list[int], level: SceneLevel, rng: np.random.Generator
) -> tuple[list[tuple[int, int]], np.ndarray] | None:
    """Rejection sampling of (top, left) for each digit; also the map (H, W) of who is visible, −1 nobody.

    Digits of one colour never touch: nobody could tell their strokes apart. None when a digit found no place.
    """
    size = level.image_size
    owner = np.full((size, size), -1, dtype=np.int8)
    corners: list[tuple[int, int]] = []
    may_lose: list[int] = []  # pixels that later digits may still hide
    draws = rng.random((len(glyphs), _POSITIONS_PER_ITEM, 2))
    for k, glyph in enumerate(glyphs):
        height, width = glyph.alpha.shape
        apart = [level.max_overlap == 0 or colour == colours[k] for colour in colours[:k]]
        spots = (draws[k] * (size - height + 1, size - width + 1)).astype(int) // level.snap_px * level.snap_px
        for top, left in spots.tolist():
            window = owner[top : top + height, left : left + width]
            if level.max_overlap == 0:
                if (window[glyph.halo] < 0).all():
                    break
                continue
            hidden = np.bincount(window[glyph.ink] + 1, minlength=k + 1)[1:].tolist()
            touched = np.bincount(window[glyph.halo] + 1, minlength=k + 1)[1:].tolist()
            if all(
                lost <= allowed and not (alone and near)
                for lost, near, allowed, alone in zip(hidden, touched, may_lose, apart)
            ):
                break
        else:
            return None
        window[glyph.ink] = k
        corners.append((top, left))
        if level.max_overlap > 0:
            may_lose = [allowed - lost for lost, allowed in zip(hidden, may_lose)]
            may_lose.append(int(level.max_overlap * int(glyph.ink.sum())))
    return corners, owner


@dataclass(frozen=True)
class _Rendered:
    """What the dataset keeps of a scene: 4 bytes per pixel."""

    image: np.ndarray
    owner: np.ndarray  # int8 (H, W): the item visible in a pixel, −1 for none
    classes: list[ItemClass]
    placements: list[Placement]
    kinds: list[int]  # the item that each digit belongs to
    extras: list[_Extra]  # items that are no digit, after those

    @property
    def items(self) -> list[str]:
        counts = np.bincount(self.kinds).tolist()
        of_kind = dict(zip(self.kinds, self.classes))
        return [*(of_kind[k].text_of(counts[k]) for k in range(len(counts))), *(extra.text for extra in self.extras)]

    @property
    def masks(self) -> np.ndarray:
        item_of_digit = np.array([*self.kinds, -1])  # the last entry is nobody's, −1
        owner = item_of_digit[self.owner]
        own = owner == np.arange(max(self.kinds) + 1)[:, None, None]
        if not self.extras:
            return own
        return np.concatenate([own, np.stack([self._extra_mask(extra, owner) for extra in self.extras])])

    def _extra_mask(self, extra: _Extra, owner: np.ndarray) -> np.ndarray:
        if extra.kinds is None:
            return np.ones(owner.shape, dtype=bool)
        return np.isin(owner, list(extra.kinds)) if extra.kinds else np.zeros(owner.shape, dtype=bool)


@dataclass(frozen=True)
class _Extra:
    """An item that is no digit: its text, the wrong text beside it, and the kinds that it tells of (None: all)."""

    contrast: Contrast
    kinds: tuple[int, ...] | None

    @property
    def text(self) -> str:
        return self.contrast.right


def _absent_pairs(classes: list[ItemClass]) -> list[tuple[ItemClass, ClassPair]]:
    """(a digit of the scene, the pair of its colour and another one's digit) wherever no digit is that pair."""
    present = {c.pair for c in classes}
    found = [(c, (c.colour, other.digit)) for c in classes for other in classes]
    return [(c, pair) for c, pair in dict.fromkeys(found) if pair not in present]


def _relations(rendered: _Rendered) -> list[tuple[int, str, int]]:
    """(kind, direction, kind) wherever one digit clearly lies to one side of another, both the only ones of a kind."""
    counts = np.bincount(rendered.kinds)
    single = [(d, k) for d, k in enumerate(rendered.kinds) if counts[k] == 1]
    where = {k: np.argwhere(rendered.owner == d).mean(0) for d, k in single}
    far = rendered.owner.shape[0] / 8
    found = []
    for i, from_px in where.items():
        for j, to_px in where.items():
            down, right = (to_px - from_px).tolist()
            if max(abs(down), abs(right)) < far or i == j:
                continue
            if abs(right) >= 2 * abs(down):
                found.append((i, "left of" if right > 0 else "right of", j))
            elif abs(down) >= 2 * abs(right):
                found.append((i, "above" if down > 0 else "below", j))
    return found


def _extra_items(rendered: _Rendered, level: SceneLevel, rng: np.random.Generator) -> list[_Extra]:
    """Relations, absences and the scene as a whole, as the level asks for, as far as the scene has any."""
    of_kind = dict(zip(rendered.kinds, rendered.classes))
    extras = []
    if level.num_relations:
        taken: set[frozenset[int]] = set()
        candidates = _relations(rendered)
        for row in rng.permutation(len(candidates)).tolist():
            i, direction, j = candidates[row]
            if len(taken) < level.num_relations and frozenset((i, j)) not in taken:
                taken.add(frozenset((i, j)))
                first, second = _with_article(of_kind[i].name), _with_article(of_kind[j].name)
                texts = (f"{first} {word} {second}" for word in (direction, DIRECTIONS[direction]))
                extras.append(_Extra(Contrast("relation", *texts), (i, j)))
    if level.num_absent:
        present = {c.pair for c in rendered.classes}
        near = list(dict.fromkeys(pair for _, pair in _absent_pairs(rendered.classes)))
        others = [pair for pair in class_pairs(level) if pair not in present and pair not in near]
        # What is easily mistaken for something there comes first.
        ordered = [near[row] for row in rng.permutation(len(near))] + [
            others[row] for row in rng.permutation(len(others))
        ]
        for pair in ordered[: level.num_absent]:
            there = rendered.classes[int(rng.integers(len(rendered.classes)))]
            extras.append(_Extra(Contrast("absence", f"no {_pair_name(pair)}", f"no {there.name}"), ()))
    if level.scene_item:
        count = len(rendered.classes)
        counts = [n for n in range(level.min_items, level.max_items + 1) if n != count]
        wrong = counts[int(rng.integers(len(counts)))] if counts else count + 1
        whole = Contrast("scene", f"{DIGIT_WORDS[count]} digits", f"{DIGIT_WORDS[wrong]} digits")
        extras.append(_Extra(whole, None))
    return extras


def _shared(pairs: list[ClassPair], level: SceneLevel, rng: np.random.Generator) -> list[ClassPair]:
    """The pairs of a few colours and a few digits; at least as many as the largest scene needs, if there are any."""
    best: list[ClassPair] = []
    for _ in range(16):
        colours = set(rng.choice(level.num_colours, level.shared_kinds, replace=False).tolist())
        digits = set(rng.choice(len(DIGIT_WORDS), level.shared_kinds, replace=False).tolist())
        found = [pair for pair in pairs if pair[0] in colours and pair[1] in digits]
        best = max(best, found, key=len)
        if len(best) >= level.max_items:
            break
    return best


def _render(level: SceneLevel, pairs: list[ClassPair], split: str, rng: np.random.Generator) -> _Rendered:
    handwriting = split_glyphs(split)
    K = int(rng.integers(level.min_items, level.max_items + 1))
    if level.shared_kinds:
        pairs = _shared(pairs, level, rng)
        K = min(K, len(pairs))
    chosen = rng.choice(len(pairs), size=K, replace=False)
    sizes = rng.integers(len(SIZE_WORDS), size=K).tolist()
    classes = [ItemClass(pairs[row][0], pairs[row][1], size) for row, size in zip(chosen.tolist(), sizes)]
    kinds = list(range(K))
    if level.max_copies > 1:
        copies = rng.integers(1, level.max_copies + 1, size=K)
        kinds = np.repeat(np.arange(K), copies)[:K].tolist()
        classes = [classes[k] for k in kinds]
    jitter = rng.integers(-level.size_jitter_px, level.size_jitter_px + 1, size=K).tolist()
    heights = [(level.small_px, level.large_px)[c.size] + j for c, j in zip(classes, jitter)]
    rows = [handwriting[c.digit][int(u * len(handwriting[c.digit]))] for c, u in zip(classes, rng.random(K))]
    glyphs = [_glyph(row, height) for row, height in zip(rows, heights)]

    colours = [c.colour for c in classes]
    layout = next(filter(None, (_place(glyphs, colours, level, rng) for _ in range(_LAYOUT_ATTEMPTS))), None)
    if layout is None:
        raise UserError(
            f"scene level {level.name!r}: found no place for {K} digits of {level.small_px} to {level.large_px} px in "
            f"{level.image_size} px with max_overlap={level.max_overlap}; lower max_items or the sizes, or raise "
            "max_overlap or image_size"
        )
    corners, owner = layout

    canvas = _background(level, rng)
    _scatter_distractors(canvas, owner, level, rng)
    tints = rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=(K, 3), dtype=np.int32)
    for glyph, (top, left), colour, tint in zip(glyphs, corners, colours, tints):
        _paint(canvas, glyph.alpha, top, left, _PALETTE[colour] + tint)
    noise = level.noise_amplitude
    canvas += rng.integers(-noise, noise + 1, size=canvas.shape, dtype=np.int8)
    image = np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)
    placements = [Placement(row, height, top + 1, left + 1) for row, height, (top, left) in zip(rows, heights, corners)]
    rendered = _Rendered(image, owner, classes, placements, kinds, [])
    rendered.extras.extend(_extra_items(rendered, level, rng))
    return rendered


def _scatter_distractors(canvas: np.ndarray, owner: np.ndarray, level: SceneLevel, rng: np.random.Generator) -> None:
    """Paint up to `num_distractors` shapes, grey or in the level's colours, where no digit is near."""
    shapes = _distractor_alphas(level.small_px)
    size = level.image_size
    taken = owner >= 0
    for _ in range(int(rng.integers(level.num_distractors + 1))):
        alpha = shapes[int(rng.integers(len(shapes)))]
        height, width = alpha.shape
        grey = int(rng.integers(95, 170))
        colour_row = int(rng.integers(2 * level.num_colours))
        colour = _PALETTE[colour_row] if colour_row < level.num_colours else np.full(3, grey, dtype=np.int32)
        for u, v in rng.random((6, 2)).tolist():
            top, left = int(u * (size - height + 1)), int(v * (size - width + 1))
            around = taken[max(0, top - 2) : top + height + 2, max(0, left - 2) : left + width + 2]
            if not around.any():
                _paint(canvas, alpha, top, left, colour)
                taken[top : top + height, left : left + width] = True
                break


# ---------------------------------------------------------------------------------------------------------------
# The dataset


def _clip_transform() -> Callable[[Image.Image], Tensor]:
    # Imported here: both take seconds to load, which scenes with a transform of their own don't need.
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision.transforms import Compose, Normalize, ToTensor

    return Compose([ToTensor(), Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)])


class ScenesDataset(Dataset[ItemSample]):
    """`num_scenes` scenes of one split; training, validation and test scenes show different handwritten digits.

    Scene i depends on (level, seed, split, i) alone: not on the order of access, the worker, the process or
    `num_scenes`. Scenes are drawn on first use (about 0.5 ms each at 64 px) and kept (16 KB each at 64 px, per
    worker process); nothing is written to disk.

    Args:
        split: "train", "valid" or "test".
        num_scenes: length of the dataset.
        level: name in LEVELS, or a SceneLevel of your own.
        seed: of the whole benchmark, also of the held-out pairs; at least 0.
        transform: PIL RGB image → float tensor (3, H, W); default: scaled to 0 … 1, then normalised with CLIP's
            mean and standard deviation.
        shuffle_items: training: items in a random order that changes with the epoch. Otherwise in the scene's order,
            the order of `masks` and `classes`.
        keep_pixels: the transform draws nothing, so what it returns is kept, too (48 KB each at 64 px).

    Raises ValueError for an unknown split or level, fewer than one scene or a negative seed.
    """

    def __init__(
        self,
        *,
        split: str,
        num_scenes: int,
        level: str | SceneLevel = "standard",
        seed: int = 0,
        transform: Callable[[Image.Image], Tensor] | None = None,
        shuffle_items: bool = False,
        keep_pixels: bool = False,
    ) -> None:
        if split not in SPLIT_SHARES:
            raise UserError(f"split={split!r}; expected one of {', '.join(SPLIT_SHARES)}")
        if num_scenes < 1:
            raise UserError(f"num_scenes={num_scenes}; expected at least 1")
        if seed < 0:
            raise UserError(f"seed={seed}; expected at least 0")
        self.split = split
        self.num_scenes = int(num_scenes)
        self.level = resolve_level(level)
        self.seed = int(seed)
        self.transform = transform or _clip_transform()
        self.shuffle_items = shuffle_items
        held_out = set() if split == "test" else held_out_pairs(self.level, self.seed)
        self._pairs = [pair for pair in class_pairs(self.level) if pair not in held_out]
        self.keep_pixels = keep_pixels
        self._rendered: dict[int, _Rendered] = {}
        self._pixels: dict[int, Tensor] = {}
        self._draws: tuple[int, np.ndarray] | None = None  # of the last epoch

    def __len__(self) -> int:
        return self.num_scenes

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with anything that changes the scenes: level, seed, split, length, generator."""
        return _digest("data set", self.level, self.seed, self.split, self.num_scenes).hex()[:16]

    def scene(self, index: int) -> Scene:
        """Scene `index` with everything known about it; IndexError outside 0 … len − 1."""
        rendered = self._render(index)
        return Scene(
            image=rendered.image.copy(),
            items=rendered.items,
            masks=rendered.masks,
            classes=list(rendered.classes),
            placements=list(rendered.placements),
        )

    def masks(self, index: int) -> Tensor:
        """bool (K, H, W): the visible pixels of each item, in the scene's order (that of `shuffle_items=False`)."""
        return torch.from_numpy(self.scene(index).masks)

    def classes(self, index: int) -> list[ItemClass]:
        """Colour, digit and size of each digit, in the scene's order."""
        return list(self._render(index).classes)

    def items(self, index: int) -> list[str]:
        """The K texts of scene `index`, in the order of its masks."""
        return self._render(index).items

    def contrasts(self, index: int) -> list[Contrast]:
        """Right and wrong texts about scene `index`: one binding where the scene allows one, one per item of several
        digits, and one per item that is no digit; the same at every call."""
        rendered = self._render(index)
        counts = np.bincount(rendered.kinds).tolist()
        found = []
        for item_class, pair in _absent_pairs(rendered.classes)[:1]:
            count = counts[rendered.kinds[rendered.classes.index(item_class)]]
            other = ItemClass(*pair, item_class.size)
            found.append(Contrast("binding", item_class.text_of(count), other.text_of(count)))
        for k, item_class in dict(zip(rendered.kinds, rendered.classes)).items():
            if self.level.max_copies > 1:
                # One more, or one fewer where that is more than a scene ever shows.
                wrong = counts[k] + 1 if counts[k] < self.level.max_copies else counts[k] - 1
                found.append(Contrast("number", item_class.text_of(counts[k]), item_class.text_of(wrong)))
        return found + [extra.contrast for extra in rendered.extras]

    def __getitem__(self, key: int | tuple[int, int]) -> ItemSample:
        """Scene `index` of epoch `epoch`, key = (epoch, index) or just index (epoch 0); only the item order changes."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rendered = self._render(index)
        items = rendered.items
        if self.shuffle_items:
            draws = self._item_draws(int(epoch))[index, : len(items)]
            items = [items[k] for k in np.argsort(draws).tolist()]
        return ItemSample(
            sample_id=f"scenes-{self.level.name}-seed{self.seed}-{self.split}-{index:06d}",
            image=self._transformed(index, rendered),
            items=items,
        )

    def _item_draws(self, epoch: int) -> np.ndarray:
        """float64 (num_scenes, max_texts): what the items of each scene are sorted by; row i whatever the length."""
        if self._draws is None or self._draws[0] != epoch:
            rng = _generator("item order", self.seed, epoch)
            self._draws = (epoch, rng.random((self.num_scenes, self.level.max_texts)))
        return self._draws[1]

    def _transformed(self, index: int, rendered: _Rendered) -> Tensor:
        pixels = self._pixels.get(index)
        if pixels is None:
            pixels = self.transform(Image.fromarray(rendered.image))
            if self.keep_pixels:
                self._pixels[index] = pixels
        return pixels

    def _render(self, index: int) -> _Rendered:
        if not 0 <= index < self.num_scenes:
            raise IndexError(f"scene {index}; expected 0 … {self.num_scenes - 1}")
        if index not in self._rendered:
            rng = _generator("scene", self.level, self.seed, self.split, int(index))
            self._rendered[index] = _render(self.level, self._pairs, self.split, rng)
        return self._rendered[index]
