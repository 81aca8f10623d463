"""The itemized-scenes benchmark: exact labels, disjoint handwriting, one picture per (seed, split, index, level)."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from itemizedclip.data.batch import ItemCollator, ItemSample
from itemizedclip.data.scenes import (
    COLOURS,
    DIGIT_WORDS,
    LEVELS,
    SceneLevel,
    ScenesDataset,
    _glyph,
    class_labels,
    class_prompts,
    held_out_pairs,
    split_glyphs,
)

NUM_SCENES = 60
every_level = pytest.mark.parametrize("level", list(LEVELS))
DIGIT_LEVELS = ["easy", "lattice", "standard", "crowded", "held_out", "small", "composed"]
"""Every item is one digit."""
digit_levels = pytest.mark.parametrize("level", DIGIT_LEVELS)


def digest(dataset: ScenesDataset, indices: list[int]) -> str:
    """One hash of image, masks and items of the given scenes."""
    collected = hashlib.sha256()
    for index in indices:
        scene = dataset.scene(index)
        collected.update(scene.image.tobytes() + scene.masks.tobytes() + "|".join(scene.items).encode())
    return collected.hexdigest()


def scenes_of(level: str | SceneLevel, split: str = "train", num_scenes: int = NUM_SCENES) -> ScenesDataset:
    return ScenesDataset(split=split, num_scenes=num_scenes, level=level, seed=3)


def whole_ink(dataset: ScenesDataset, index: int) -> np.ndarray:
    """bool (K, H, W): each digit's pixels as if nothing lay over it, from its placement alone."""
    scene = dataset.scene(index)
    ink = np.zeros_like(scene.masks)
    for k, placed in enumerate(scene.placements):
        strokes = _glyph(placed.glyph, placed.height_px).ink[1:-1, 1:-1]
        rows = slice(placed.top_px, placed.top_px + strokes.shape[0])
        columns = slice(placed.left_px, placed.left_px + strokes.shape[1])
        ink[k, rows, columns] = strokes
    return ink


# ------------------------------------------------------------------------------------------------ determinism


@every_level
def test_a_scene_depends_on_its_index_alone(level):
    forwards, backwards, longer = scenes_of(level), scenes_of(level), scenes_of(level, num_scenes=10 * NUM_SCENES)
    digest(backwards, list(reversed(range(NUM_SCENES))))
    expected = digest(forwards, list(range(NUM_SCENES)))
    assert digest(backwards, list(range(NUM_SCENES))) == expected
    assert digest(longer, list(range(NUM_SCENES))) == expected


def test_another_process_draws_the_same_scenes():
    program = (
        "from itemizedclip.data.scenes import ScenesDataset as D; import hashlib; "
        "d = D(split='train', num_scenes=60, seed=3, transform=id); s = d.scene(40); "
        "print(hashlib.sha256(s.image.tobytes() + s.masks.tobytes() + '|'.join(s.items).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == digest(scenes_of("standard"), [40])


def test_loader_workers_return_what_the_dataset_returns():
    dataset = ScenesDataset(split="train", num_scenes=12, seed=1, shuffle_items=True)
    keys = [(2, index) for index in range(12)]
    collate = ItemCollator(lambda texts: torch.tensor([[sum(map(ord, text))] for text in texts]))
    loaded = list(DataLoader(dataset, batch_size=4, sampler=keys, num_workers=2, collate_fn=collate))
    expected = [collate([dataset[key] for key in keys[start : start + 4]]) for start in (0, 4, 8)]
    for batch, alone in zip(loaded, expected):
        assert batch.sample_ids == alone.sample_ids
        assert torch.equal(batch.images, alone.images)
        assert torch.equal(batch.item_tokens, alone.item_tokens)


def test_seed_split_level_and_index_each_change_the_scene():
    reference = ScenesDataset(split="train", num_scenes=2, level="standard", seed=0)
    others = [
        ScenesDataset(split="train", num_scenes=2, level="standard", seed=1),
        ScenesDataset(split="test", num_scenes=2, level="standard", seed=0),
        ScenesDataset(split="train", num_scenes=2, level="crowded", seed=0),
    ]
    digests = [digest(dataset, [0]) for dataset in [reference, *others]] + [digest(reference, [1])]
    assert len(set(digests)) == 5


GOLDEN_ITEMS = {
    "easy": [
        "a large orange eight",
        "a large yellow two",
        "a large white zero",
    ],
    "lattice": [
        "a large magenta five",
        "a large white two",
        "a large red six",
    ],
    "standard": [
        "a large magenta six",
        "a large green six",
        "a large magenta seven",
        "a small orange six",
        "a large magenta nine",
        "a large green zero",
    ],
    "crowded": [
        "a large cyan two",
        "a large orange four",
        "a small white seven",
        "a small green six",
        "a large red zero",
        "a large cyan seven",
    ],
    "held_out": [
        "a small magenta eight",
        "a large magenta two",
        "a small red four",
        "a large magenta six",
        "a large cyan six",
        "a large white three",
    ],
    "small": [
        "a small cyan nine",
        "a small blue five",
        "a small magenta five",
        "a large orange zero",
    ],
    "composed": [
        "a large blue nine",
        "a small magenta six",
        "a large blue four",
        "a large magenta nine",
        "a small orange four",
        "a small magenta four",
    ],
    "relations": [
        "a large magenta eight",
        "a small red six",
    ],
    "counts": [
        "a large cyan one",
        "two small magenta threes",
        "two large white ones",
        "a small blue three",
        "six digits",
    ],
    "negations": [
        "a large red seven",
        "a small red zero",
        "no orange four",
        "no blue seven",
    ],
    "hard": [
        "a large red two",
        "two small magenta fives",
        "two small magenta threes",
        "a large cyan three",
        "no cyan two",
        "six digits",
    ],
}


def test_random_streams_have_not_drifted():
    """Items drawn for seed 0; raise GENERATOR_VERSION and renew when the generator changes on purpose."""
    drawn = {level: ScenesDataset(split="train", num_scenes=1, level=level).scene(0).items for level in LEVELS}
    assert drawn == GOLDEN_ITEMS


FIRST_LEVELS = {
    "easy": ("5bc5de9f9b2fc7a2", "7eda66a0880bbf2f"),
    "lattice": ("539f2fff58ee9617", "6fa198a82844062a"),
    "standard": ("f190a05e697c9a4a", "ddf180919210dbfd"),
    "crowded": ("f82faa9295f501bf", "5cbd2eb8246d4c3a"),
    "held_out": ("6b79efe8766b95ff", "3c2911fa7ea691e7"),
}
"""Scenes 0 … 19 of seed 3 of the levels there were first, their pixels, masks and items, made before there were others;
and the fingerprints of these data sets."""


def test_the_first_levels_stay_as_they_were():
    datasets = {level: ScenesDataset(split="train", num_scenes=20, level=level, seed=3) for level in FIRST_LEVELS}
    found = {level: (digest(data, list(range(20)))[:16], data.fingerprint) for level, data in datasets.items()}
    assert found == FIRST_LEVELS


def test_fingerprint_tells_datasets_apart():
    def fingerprint(*, split="train", num_scenes=5, level="easy", seed=0, shuffle_items=False) -> str:
        dataset = ScenesDataset(split=split, num_scenes=num_scenes, level=level, seed=seed, shuffle_items=shuffle_items)
        return dataset.fingerprint

    changed = [fingerprint(split="valid"), fingerprint(num_scenes=6), fingerprint(level="crowded"), fingerprint(seed=1)]
    assert len({fingerprint(), *changed}) == 5
    assert fingerprint() == fingerprint(shuffle_items=True)
    assert len(fingerprint()) == 16


# ------------------------------------------------------------------------------------------------ handwriting


def test_splits_share_no_handwriting_and_use_all_of_it():
    target = load_digits().target
    rows = {split: split_glyphs(split) for split in ("train", "valid", "test")}
    used = [glyph for per_digit in rows.values() for glyphs in per_digit for glyph in glyphs]
    assert sorted(used) == list(range(len(target)))
    for per_digit in rows.values():
        for digit, glyphs in enumerate(per_digit):
            assert len(glyphs) >= 15
            assert all(target[glyph] == digit for glyph in glyphs)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_scenes_show_only_their_splits_handwriting(split):
    dataset, target = scenes_of("standard", split, 200), load_digits().target
    allowed = {glyph for glyphs in split_glyphs(split) for glyph in glyphs}
    seen = [(p.glyph, c.digit) for n in range(200) for p, c in zip(dataset.scene(n).placements, dataset.classes(n))]
    assert {glyph for glyph, _ in seen} <= allowed
    assert len({glyph for glyph, _ in seen}) > 0.5 * min(len(allowed), len(seen))
    assert all(target[glyph] == digit for glyph, digit in seen)


@pytest.mark.parametrize("height_px", [13, 22])
def test_enlarged_digits_look_like_the_handwriting(height_px):
    """Shrunk back to 8 rows and 8 columns, they correlate with the original cut to its strokes."""
    images = load_digits().images
    for glyph in range(0, 1797, 37):
        cut = images[glyph][np.ix_((images[glyph] > 3).any(1), (images[glyph] > 3).any(0))]
        enlarged = Image.fromarray(_glyph(glyph, height_px).alpha[1:-1, 1:-1])
        shrunk = enlarged.resize(cut.shape[::-1], Image.Resampling.BOX)
        assert np.corrcoef(np.asarray(shrunk).ravel(), cut.ravel())[0, 1] > 0.8, glyph


# ------------------------------------------------------------------------------------------------ items and masks


@digit_levels
def test_texts_match_classes_and_never_repeat(level):
    dataset = scenes_of(level)
    middle_px = (LEVELS[level].small_px + LEVELS[level].large_px) / 2
    counts = set()
    for n in range(NUM_SCENES):
        scene = dataset.scene(n)
        expected = [
            f"a {('small', 'large')[c.size]} {list(COLOURS)[c.colour]} {DIGIT_WORDS[c.digit]}" for c in scene.classes
        ]
        assert scene.items == expected
        assert len({(c.colour, c.digit) for c in scene.classes}) == len(scene.items) == len(scene.masks)
        assert [p.height_px > middle_px for p in scene.placements] == [c.size == 1 for c in scene.classes]
        counts.add(len(scene.items))
    assert counts == set(range(LEVELS[level].min_items, LEVELS[level].max_items + 1))


@digit_levels
def test_masks_are_the_visible_pixels(level):
    dataset = scenes_of(level)
    for n in range(NUM_SCENES):
        ink, masks = whole_ink(dataset, n), dataset.scene(n).masks
        for k in range(len(ink)):
            visible = ink[k] & ~ink[k + 1 :].any(0)
            assert np.array_equal(masks[k], visible)
            assert visible.sum() >= (1 - LEVELS[level].max_overlap) * ink[k].sum()
        assert masks.sum(0).max() == 1


def test_crowded_scenes_do_overlap_and_easy_ones_keep_a_gap():
    crowded, easy = scenes_of("crowded"), scenes_of("easy")
    assert any(whole_ink(crowded, n).sum(0).max() > 1 for n in range(NUM_SCENES))
    assert gap_holds(easy, same_colour_only=False)


@pytest.mark.parametrize("level", ["standard", "crowded"])
def test_digits_of_one_colour_never_touch(level):
    assert gap_holds(scenes_of(level), same_colour_only=True)


def gap_holds(dataset: ScenesDataset, *, same_colour_only: bool) -> bool:
    """No pixel of a digit has a pixel of another digit (of the same colour) among its eight neighbours."""
    for n in range(len(dataset)):
        masks, classes = dataset.scene(n).masks, dataset.classes(n)
        padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
        size = masks.shape[1]
        wide = np.zeros_like(masks)
        for down in range(3):
            for right in range(3):
                wide |= padded[:, down : down + size, right : right + size]
        for i in range(len(masks)):
            for j in range(len(masks)):
                if i == j or (same_colour_only and classes[i].colour != classes[j].colour):
                    continue
                if (wide[i] & masks[j]).any():
                    return False
    return True


@digit_levels
def test_mask_pixels_carry_the_items_colour(level):
    dataset = scenes_of(level)
    palette = np.array(list(COLOURS.values()))
    for n in range(NUM_SCENES):
        scene = dataset.scene(n)
        for mask, item_class in zip(scene.masks, scene.classes):
            colour = np.median(scene.image[mask], axis=0)
            assert np.abs(palette - colour).sum(1).argmin() == item_class.colour, (n, item_class)


def test_background_is_darker_than_the_digits():
    dataset = scenes_of("crowded")
    for n in range(NUM_SCENES):
        scene = dataset.scene(n)
        outside = np.median(scene.image[~scene.masks.any(0)].max(1))
        inside = [np.median(scene.image[mask].max(1)) for mask in scene.masks]
        assert min(inside) > outside + 80


# ------------------------------------------------------------------------------------------------ more than digits


MORE_LEVELS = ["relations", "counts", "negations", "hard"]


def name_of(item_class) -> str:
    return f"{list(COLOURS)[item_class.colour]} {DIGIT_WORDS[item_class.digit]}"


@pytest.mark.parametrize("level", MORE_LEVELS)
def test_items_of_harder_levels_are_true_and_wrong_texts_are_not(level):
    """Each text is read word by word and compared with the digits and their masks."""
    dataset, seen = scenes_of(level), set()
    for n in range(NUM_SCENES):
        scene = dataset.scene(n)
        assert len(set(scene.items)) == len(scene.items) == len(scene.masks) <= LEVELS[level].max_texts
        assert len(scene.classes) <= LEVELS[level].max_items
        for text in scene.items:
            assert is_true(text, scene), (n, text)
        for contrast in dataset.contrasts(n):
            assert is_true(contrast.right, scene), (n, contrast)
            assert not is_true(contrast.wrong, scene), (n, contrast)
            seen.add(contrast.kind)
        assert dataset.contrasts(n) == scenes_of(level).contrasts(n)
    level = LEVELS[level]
    expected = {"binding", *["number"] * (level.max_copies > 1), *["relation"] * bool(level.num_relations)}
    assert seen == expected | {*["absence"] * bool(level.num_absent), *["scene"] * level.scene_item}


def is_true(text: str, scene) -> bool:
    names = [name_of(c) for c in scene.classes]
    mask_of = dict(zip(scene.items, scene.masks))
    words = text.split()
    if words[-1] == "digits":
        if text in mask_of:
            assert mask_of[text].all()
        return DIGIT_WORDS.index(words[0]) == len(names)
    if words[0] == "no":
        if text in mask_of:
            assert not mask_of[text].any()
        return " ".join(words[1:]) not in names
    for direction, axis, sign in (("left of", 1, 1), ("right of", 1, -1), ("above", 0, 1), ("below", 0, -1)):
        first, found, second = text.partition(f" {direction} ")
        if found:
            places = []
            for phrase in (first, second):
                (own,) = [item for item in scene.items if item.endswith(f" {phrase.partition(' ')[2]}")
                          and item.startswith("a ") and direction not in item and " of " not in item
                          and not any(word in item.split() for word in ("above", "below"))]  # fmt: skip
                places.append(mask_of[own])
            if text in mask_of:
                assert np.array_equal(mask_of[text], places[0] | places[1])
            centres = [np.argwhere(place).mean(0) for place in places]
            return sign * (centres[1] - centres[0])[axis] > 0
    # A number, a size, a colour and a digit.
    count = 1 if words[0] == "a" else DIGIT_WORDS.index(words[0])
    digit = words[3] if words[0] == "a" else words[3].removesuffix("es" if words[3] == "sixes" else "s")
    sizes = [("small", "large")[c.size] for c in scene.classes if name_of(c) == f"{words[2]} {digit}"]
    if text in mask_of:
        assert mask_of[text].sum() >= count * 5
    return sizes == [words[1]] * count


@pytest.mark.parametrize("level", ["composed", "relations", "negations", "hard"])
def test_composed_scenes_share_colours_and_digits(level):
    dataset = scenes_of(level)
    for n in range(NUM_SCENES):
        classes = dataset.classes(n)
        assert max(len({c.colour for c in classes}), len({c.digit for c in classes})) <= LEVELS[level].shared_kinds


@pytest.mark.parametrize("level", MORE_LEVELS)
def test_digits_of_harder_levels_have_disjoint_masks(level):
    dataset = scenes_of(level)
    for n in range(NUM_SCENES):
        scene = dataset.scene(n)
        kinds = len({c.pair for c in scene.classes})
        assert scene.masks[:kinds].sum(0).max() == 1
        assert scene.masks[:kinds].any((1, 2)).all()


def test_training_texts_of_harder_levels_are_all_of_them_in_another_order():
    dataset = ScenesDataset(split="train", num_scenes=20, level="hard", shuffle_items=True)
    for n in range(20):
        assert sorted(dataset[(3, n)].items) == sorted(dataset.items(n))


# ------------------------------------------------------------------------------------------------ classes


def test_prompts_name_every_colour_digit_pair():
    prompts = class_prompts("standard")
    assert len(prompts) == 80
    assert prompts[7] == ("a red seven", (0, 7))
    assert {pair: text for text, pair in prompts}[(list(COLOURS).index("orange"), 8)] == "an orange eight"
    assert len(class_prompts(replace(LEVELS["easy"], num_colours=3))) == 30


def test_labels_say_which_classes_are_present():
    dataset = scenes_of("standard")
    labels_NC = class_labels(dataset)
    assert labels_NC.shape == (NUM_SCENES, 80)
    assert labels_NC.dtype == np.int64
    for n in range(NUM_SCENES):
        present = {text for (text, _), label in zip(class_prompts("standard"), labels_NC[n]) if label}
        stripped = {item.replace("small ", "").replace("large ", "") for item in dataset.scene(n).items}
        assert {text.replace("an orange", "a orange") for text in present} == stripped


def test_held_out_pairs_appear_in_test_scenes_only():
    level, num_scenes = "held_out", 300
    pairs = held_out_pairs(level, seed=3)
    assert len(pairs) == 16
    assert pairs != held_out_pairs(level, seed=4)
    shown = {
        split: {c.pair for n in range(num_scenes) for c in dataset.classes(n)}
        for split in ("train", "valid", "test")
        for dataset in [scenes_of(level, split, num_scenes)]
    }
    everything = {pair for _, pair in class_prompts(level)}
    assert shown["train"] == shown["valid"] == everything - pairs
    assert shown["test"] == everything
    assert held_out_pairs("standard", seed=3) == set()


@pytest.mark.parametrize(("num_colours", "fraction"), [(8, 0.5), (8, 0.2), (3, 0.2), (6, 0.47)])
def test_training_still_sees_every_colour_and_digit(num_colours, fraction):
    level = SceneLevel("own", num_colours=num_colours, held_out_fraction=fraction)
    for seed in range(5):
        left = {pair for _, pair in class_prompts(level)} - held_out_pairs(level, seed)
        assert {colour for colour, _ in left} == set(range(num_colours))
        assert {digit for _, digit in left} == set(range(10))


# ------------------------------------------------------------------------------------------------ samples


def test_sample_is_the_normalised_scene_with_its_items():
    dataset = scenes_of("standard")
    sample, scene = dataset[5], dataset.scene(5)
    assert isinstance(sample, ItemSample)
    assert sample.image.shape == (3, 64, 64)
    assert sample.image.dtype == torch.float32
    mean = np.array([0.48145466, 0.4578275, 0.40821073])  # CLIP's published statistics
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    expected = ((scene.image / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(sample.image.numpy(), expected, atol=1e-5)
    assert sample.items == scene.items
    assert sample.sample_id == "scenes-standard-seed3-train-000005"
    assert torch.equal(dataset.masks(5), torch.from_numpy(scene.masks))


def test_own_transform_gets_the_rgb_image():
    dataset = ScenesDataset(split="test", num_scenes=1, transform=lambda image: torch.tensor(image.size))
    assert dataset[0].image.tolist() == [64, 64]


def test_epochs_change_the_item_order_and_nothing_else():
    dataset = ScenesDataset(split="train", num_scenes=20, level="crowded", shuffle_items=True)
    orders = set()
    for epoch in range(6):
        sample = dataset[(epoch, 4)]
        assert sorted(sample.items) == sorted(dataset.scene(4).items)
        assert torch.equal(sample.image, dataset[4].image)
        assert dataset[(epoch, 4)].items == sample.items
        orders.add(tuple(sample.items))
    assert len(orders) > 3
    assert dataset[(0, 4)].items == dataset[4].items

    in_order = ScenesDataset(split="train", num_scenes=20, level="crowded")
    assert all(in_order[(epoch, 4)].items == in_order.scene(4).items for epoch in range(6))


def test_changing_a_returned_scene_leaves_the_dataset_alone():
    dataset = scenes_of("easy")
    before = digest(dataset, [0])
    scene = dataset.scene(0)
    scene.image[:] = 0
    scene.masks[:] = False
    scene.items.clear()
    scene.classes.clear()
    dataset.masks(0).zero_()
    assert digest(dataset, [0]) == before


def test_other_image_sizes_work():
    level = replace(LEVELS["standard"], name="double", image_size=128, small_px=28, large_px=44)
    scene = ScenesDataset(split="valid", num_scenes=3, level=level).scene(2)
    assert scene.image.shape == (128, 128, 3)
    assert scene.masks.shape[1:] == (128, 128)


# ------------------------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"level": "hopeless"},
            "unknown scene level 'hopeless'; expected one of easy, lattice, standard, crowded, held_out, small",
        ),
        ({"split": "val"}, "split='val'; expected one of train, valid, test"),
        ({"num_scenes": 0}, "num_scenes=0; expected at least 1"),
        ({"seed": -1}, "seed=-1; expected at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError) as error:
        ScenesDataset(**{"split": "train", "num_scenes": 5, **arguments})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"min_items": 0}, "min_items=0, max_items=7"),
        ({"min_items": 8}, "min_items=8, max_items=7"),
        ({"small_px": 6}, "small_px=6"),
        ({"small_px": 20}, "small_px=20, large_px=22"),
        ({"large_px": 40}, "large_px=40, image_size=64"),
        ({"size_jitter_px": -1}, "size_jitter_px=-1"),
        ({"max_overlap": 1.0}, "max_overlap=1.0"),
        ({"num_distractors": -1}, "num_distractors=-1"),
        ({"num_colours": 9}, "num_colours=9"),
        ({"texture_amplitude": 90}, "texture_amplitude=90"),
        ({"noise_amplitude": -2}, "noise_amplitude=-2"),
        ({"held_out_fraction": 0.6}, "held_out_fraction=0.6"),
        ({"held_out_fraction": 0.2, "num_colours": 2}, "held_out_fraction=0.2, num_colours=2"),
        ({"num_colours": 2, "max_items": 21}, "max_items=21; expected at most 20"),
        ({"shared_kinds": 1}, "shared_kinds=1, num_colours=8"),
        ({"max_copies": 0}, "max_copies=0"),
        ({"num_absent": -1}, "num_relations=0, num_absent=-1"),
        ({"scene_item": True, "max_items": 12}, "max_items=12"),
    ],
)
def test_contradictory_levels_are_refused(fields, named):
    with pytest.raises(ValueError) as error:
        SceneLevel("own", **fields)
    assert "scene level 'own'" in str(error.value)
    assert named in str(error.value)


def test_a_level_too_full_says_what_to_change():
    level = SceneLevel("full", min_items=30, max_items=30, max_overlap=0.0)
    with pytest.raises(ValueError, match=r"found no place for 30 digits.*lower max_items or the sizes"):
        ScenesDataset(split="train", num_scenes=1, level=level).scene(0)


@pytest.mark.parametrize("index", [-1, 5])
def test_index_outside_the_dataset(index):
    with pytest.raises(IndexError, match=f"scene {index}; expected 0 … 4"):
        ScenesDataset(split="train", num_scenes=5)[index]


def test_lattice_digits_begin_on_patch_borders():
    dataset = ScenesDataset(split="train", num_scenes=40, level="lattice")
    corners = [(p.top_px - 1, p.left_px - 1) for n in range(40) for p in dataset.scene(n).placements]
    assert len(set(corners)) > 20
    assert all(top % 8 == 0 and left % 8 == 0 for top, left in corners)
