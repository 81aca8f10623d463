"""Drawing items, splitting captions, normal studies, item files, and the literal reader."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from itemizedclip.data.items import (
    diverse_sample,
    is_normal_study,
    load_item_lists,
    sample_items,
    sample_rng,
    seeded_transforms,
    split_captions,
)
from itemizedclip.data.literals import LiteralError, parse_flat_record, parse_string_array
from itemizedclip.runtime.files import read_json

ITEMS = ["a", "b", "c", "d", "e"]


def assert_close_to_expected(counts: Counter, expected: dict[str, float]) -> None:
    """Each count within five standard deviations of its binomial expectation, and nothing else counted."""
    total = sum(counts.values())
    assert set(counts) == set(expected)
    for outcome, probability in expected.items():
        spread = 5 * (total * probability * (1 - probability)) ** 0.5
        assert abs(counts[outcome] - total * probability) < spread, (outcome, counts[outcome], total * probability)


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_sample_rng_depends_on_each_argument_and_on_nothing_else():
    first = sample_rng(3, 5, 7).integers(2**62, size=4).tolist()
    assert sample_rng(3, 5, 7).integers(2**62, size=4).tolist() == first
    others = [(4, 5, 7), (3, 6, 7), (3, 5, 8), (7, 5, 3), (5, 3, 7), (3, 7, 5), (0, 0, 0)]
    streams = {tuple(sample_rng(*arguments).integers(2**62, size=4).tolist()) for arguments in others}
    assert len(streams) == len(others)
    assert tuple(first) not in streams


def test_sample_rng_refuses_negative_arguments():
    with pytest.raises(ValueError, match="must not be negative, got 0, -1, 2"):
        sample_rng(0, -1, 2)


def test_seeded_transforms_follow_the_generator_and_leave_global_state_alone():
    def draw(index: int) -> tuple[float, float]:
        with seeded_transforms(sample_rng(0, 0, index)):
            return torch.rand(1).item(), random.random()

    torch.manual_seed(1)
    random.seed(1)
    expected_next = torch.rand(1).item(), random.random()
    torch.manual_seed(1)
    random.seed(1)
    drawn = draw(4)
    assert (torch.rand(1).item(), random.random()) == expected_next
    assert draw(4) == drawn
    assert draw(5) != drawn


def test_seeded_transforms_restore_global_state_after_an_error():
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded_transforms(sample_rng(0, 0, 0)):
        raise RuntimeError
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_sample_items_draws_every_ordered_selection_equally_often():
    generator = np.random.default_rng(0)
    counts = Counter("".join(sample_items("abc", 2, generator)) for _ in range(6000))
    assert_close_to_expected(counts, dict.fromkeys(["ab", "ac", "ba", "bc", "ca", "cb"], 1 / 6))


def test_sample_items_keeps_all_items_of_a_short_report():
    assert sorted(sample_items(["x", "y"], 7, np.random.default_rng(0))) == ["x", "y"]


def test_diverse_sample_distribution_of_joined_texts():
    """Counts of every text against the probabilities written out: 4 items, up to 3 joined."""
    items = ["a", "b", "c", "d"]
    expected: dict[str, float] = Counter()
    for item in items:
        expected[item] += 1 / 3 / 4
    for _m, windows in ((2, ["ab", "bc", "cd"]), (3, ["abc", "bcd"])):
        for window in windows:
            expected[". ".join(window)] += 1 / 3 / 2 / len(windows)
    pairs = [(p, q) for p in items for q in items if p != q]
    triples = [(p, q, r) for p, q in pairs for r in items if r not in (p, q)]
    for group in (pairs, triples):
        for chosen in group:
            expected[". ".join(chosen)] += 1 / 3 / 2 / len(group)

    generator = np.random.default_rng(0)
    texts = diverse_sample(items, 60_000, generator, limit_joined_to_items=True)
    assert_close_to_expected(Counter(texts), dict(expected))


def test_diverse_sample_uses_the_last_window_as_often_as_the_others():
    """Windows of two neighbours, chi-square against equal counts; random pairs add the same to each of them."""
    texts = Counter(diverse_sample(ITEMS, 40_000, np.random.default_rng(1), limit_joined_to_items=True))
    windows = [texts[f"{a}. {b}"] for a, b in pairwise(ITEMS)]
    mean = sum(windows) / len(windows)
    chi_square = sum((count - mean) ** 2 / mean for count in windows)
    assert chi_square < 21.1  # 3 degrees of freedom, p = 1e-4
    reversed_pairs = [texts[f"{b}. {a}"] for a, b in pairwise(ITEMS)]
    assert min(windows) > 3 * max(reversed_pairs)  # windows come from both halves, reversed pairs from one


@pytest.mark.parametrize(
    ("limited", "expected"),
    [
        (True, {"x": 0.25, "y": 0.25, "x. y": 0.375, "y. x": 0.125}),
        # m is 1, 2 or 3 with equal chance, and 3 joins both items too
        (False, {"x": 1 / 6, "y": 1 / 6, "x. y": 2 / 3 * 0.75, "y. x": 2 / 3 * 0.25}),
    ],
)
def test_diverse_sample_with_fewer_items_than_joined(limited, expected):
    texts = diverse_sample(["x", "y"], 20_000, np.random.default_rng(2), limit_joined_to_items=limited)
    assert_close_to_expected(Counter(texts), expected)


def test_diverse_sample_of_one_item_repeats_it():
    for limited in (True, False):
        assert diverse_sample(["x"], 3, np.random.default_rng(0), limit_joined_to_items=limited) == ["x"] * 3


def test_diverse_sample_without_joining_gives_single_items():
    texts = diverse_sample(ITEMS, 100, np.random.default_rng(0), max_joined=1, limit_joined_to_items=False)
    assert set(texts) == set(ITEMS)


@pytest.mark.parametrize(
    ("items", "K", "max_joined", "message"),
    [([], 3, 3, "no text item"), (["a"], 0, 3, "at least 1, got 0"), (["a"], 1, 0, "max_joined must be at least 1")],
)
def test_draws_refuse_impossible_requests(items, K, max_joined, message):
    with pytest.raises(ValueError, match=message):
        diverse_sample(items, K, np.random.default_rng(0), max_joined=max_joined, limit_joined_to_items=True)
    if max_joined:
        with pytest.raises(ValueError, match=message):
            sample_items(items, K, np.random.default_rng(0))


# --- captions and normal studies ----------------------------------------------------------------------------------


def test_split_captions():
    text = "Many planes are parked .a Runway is NEARBY . . two roads."
    assert split_captions(text) == ["many planes are parked", "a runway is nearby", "two roads"]
    assert split_captions(" . .") == []


@pytest.mark.parametrize(
    ("items", "brain", "chest"),
    [
        (["no significant abnormalities."], True, False),
        (["no significant abnormalities"], False, True),
        (["No significant abnormalities."], False, False),
        (["No abnormalities detected"], False, True),
        (["no abnormalities detected", "mild scoliosis"], False, False),
        (["STUDY IS Unremarkable for age.", "No mass."], True, False),
        (["Mild sinusitis.", "Study is unremarkable."], False, False),
        (["no significant abnormalities.", "Stable."], True, False),
        ([], False, False),
    ],
)
def test_is_normal_study(items, brain, chest):
    assert is_normal_study(items, chest_ct=False) is brain
    assert is_normal_study(items, chest_ct=True) is chest


# --- item files ----------------------------------------------------------------------------------------------------


def test_load_item_lists(tmp_path):
    path = tmp_path / "items.json"
    path.write_text(json.dumps({"0": [" Two runways ", "", "é"], "12": []}), encoding="utf-8")
    assert load_item_lists(path) == {"0": ["Two runways", "é"], "12": []}
    assert load_item_lists(path, integer_keys=True) == {0: ["Two runways", "é"], 12: []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", r'items.json: expected an object \{"key".* found a list'),
        ('{"0": "one string"}', "items.json: key '0': expected a list of strings, found a string"),
        ('{"0": ["a", 3]}', "items.json: key '0': expected a list of strings, found a list with other values"),
        ('{"0": ["a"], "0": ["b"]}', "items.json: key '0' appears twice"),
        ('{"1": ["a"], "01": ["b"]}', "items.json: key '01': number 1 appears twice"),
        ('{"one": ["a"]}', "items.json: key 'one': expected a decimal index"),
        ('{"0": ["a"]', "items.json: not valid JSON"),
        ("[" * 200_000, "items.json: nested too deeply"),
        ("9" * 10_000, "items.json: not valid JSON"),
    ],
)
def test_load_item_lists_names_file_key_and_expectation(tmp_path, content, message):
    path = tmp_path / "items.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_item_lists(path, integer_keys=True)


def test_item_file_missing_or_not_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json: no such file; expected a JSON file with item lists"):
        load_item_lists(tmp_path / "absent.json")
    path = tmp_path / "latin.json"
    path.write_bytes(b'{"a": ["caf\xe9"]}')
    with pytest.raises(ValueError, match=r"latin\.json: byte 11 is no UTF-8 text .* with labels"):
        read_json(path, holding="labels")


# --- literals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "strings"),
    [
        ("['a b .' \"it's c .\"\n 'd \\'e\\' \"f\" .'\n'']", ["a b .", "it's c .", "d 'e' \"f\" .", ""]),
        ("['a', 'b' , \"c\",]", ["a", "b", "c"]),
        ("  [ ]\n", []),
        (r"['tab\there' 'back\\' 'caf\xe9 \u2022']", ["tab\there", "back\\", "café •"]),
        ("['[x] {y} # z, 1' 'None']", ["[x] {y} # z, 1", "None"]),
        ("['''quoted''']", ["", "quoted", ""]),
    ],
)
def test_parse_string_array(cell, strings):
    assert parse_string_array(cell) == strings


def test_parse_string_array_reads_what_numpy_prints():
    rng = np.random.default_rng(0)
    alphabet = list("ab '\"\\\n\t[],#{}é•")
    for _ in range(300):
        strings = ["".join(rng.choice(alphabet, rng.integers(0, 30))) for _ in range(rng.integers(1, 8))]
        assert parse_string_array(str(np.array(strings, dtype=object))) == strings
        assert parse_string_array(str(strings)) == strings


def test_parse_flat_record_reads_what_dict_prints():
    rng = np.random.default_rng(0)
    for size in (0, 1, 255, 5000):
        record = {"bytes": rng.bytes(size), "path": None, "it's": 'a "name"'}
        assert parse_flat_record(str(record)) == record
    assert parse_flat_record(" { } ") == {}


HOSTILE_ARRAYS = [
    "[__import__('os').system('touch {marker}')]",
    "__import__('os').system('touch {marker}')",
    "['a' + 'b']",
    "[f'{1+1}']",
    "['a' for a in 'b']",
    "['a' , , 'b']",
    "['a'",
    "['a",
    "['a\\",
    "[b'bytes']",
    "[['a']]",
    "['a'] ['b']",
    "['a' # comment\n]",
    "['line\nbreak']",
    r"['\ud800']",
    r"['\N{no such name}']",
    "nan",
    "",
    "[" * 1_000_000,
    "['" + "\\'" * 1_000_000,
    "[" + "'a' " * 300_000,
]


@pytest.mark.parametrize("cell", HOSTILE_ARRAYS, ids=range(len(HOSTILE_ARRAYS)))
def test_string_array_refuses_everything_else(cell, tmp_path):
    marker = tmp_path / "executed"
    started = time.monotonic()
    with pytest.raises(LiteralError) as error:
        parse_string_array(cell.replace("{marker}", str(marker)))
    assert time.monotonic() - started < 5
    assert len(str(error.value)) < 300
    assert not marker.exists()


HOSTILE_RECORDS = [
    "{'bytes': open('/etc/passwd').read()}",
    "{'bytes': __import__('os').system('touch {marker}')}",
    "{'bytes': b'a' b'b'}",
    "{'bytes': b'a' * 10**9}",
    "{'bytes': [b'a']}",
    "{'bytes': {'bytes': b'a'}}",
    "{'bytes': 1}",
    "{'bytes': rb'a'}",
    "{'bytes': b'a', 'bytes': b'b'}",
    "{b'bytes': b'a'}",
    "{'bytes': b'a'} + {}",
    "{'bytes' b'a'}",
    "{'bytes': b'a' 'path': None}",
    "{'bytes': b'é'}",
    r"{'bytes': b'\xzz'}",
    "{'bytes': b'\0'}",
    "{'bytes': Nonesense}",
    "('bytes', b'a')",
    "{" * 1_000_000,
    "(" * 1_000_000,
    "-" * 1_000_000 + "1",
    "{'bytes': b'" + "\\\\" * 1_000_000,
    "{'bytes':" * 100_000,
]


@pytest.mark.parametrize("cell", HOSTILE_RECORDS, ids=range(len(HOSTILE_RECORDS)))
def test_flat_record_refuses_everything_else(cell, tmp_path):
    marker = tmp_path / "executed"
    started = time.monotonic()
    with pytest.raises(LiteralError) as error:
        parse_flat_record(cell.replace("{marker}", str(marker)))
    assert time.monotonic() - started < 5
    assert len(str(error.value)) < 300
    assert not marker.exists()
