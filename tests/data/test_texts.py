"""Texts of users are read by one rule: marks, quotes, control characters and halves of characters, on every way in."""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from itemizedclip_2d.retrieval_sets import coco_val2017, flickr30k
from itemizedclip_2d.rsicd import load_class_labels
from itemizedclip_2d.rsicd_table import open_rsicd_table
from itemizedclip_2d.shard_index import open_shards
from itemizedclip_2d.shards import ShardDataset
from itemizedclip_radiology.data.label_table import read_label_csv
from itemizedclip_radiology.data.reports import StudyIndex, read_report_table
from photograph_cases import photograph_cases
from rich.console import Console
from rich.table import Table
from rsicd_files import image_cell, write_rsicd_csv
from torchvision.transforms.functional import pil_to_tensor

from itemizedclip.commands.index import read_queries
from itemizedclip.commands.questions import QuestionOptions, read_items_file
from itemizedclip.commands.search import SearchOptions
from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.items import load_item_lists
from itemizedclip.data.preflight import PreflightError
from itemizedclip.evaluation.results import metrics_table
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import open_csv, parse_json
from itemizedclip.runtime.logs import literal, logging_to_console, logging_to_file, progress_bar, shown
from itemizedclip.viewer.page.serve import read_question
from itemizedclip.viewer.sets import read_item_file

BOM = b"\xef\xbb\xbf"
JPEG = photograph_cases()["JPEG"].encoded
NASTY = "a \x1b[31mred\x1b[0m \x07 roof \x9b2J [bold] :warning: \u202eabc\r"
"""What terminals obey: colours, a bell, erasing, changes of direction, going back; and rich's markup and emoji."""


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


# --- every way in: file content → the texts that were read -----------------------------------------------------------


def items_of_shard(path: Path, text: bytes) -> list[str]:
    write_tar(path, {"photo.jpg": JPEG, "photo.json": text})
    (shard,) = open_shards([path], caption_field="caption")
    if shard.bad:
        raise BadSampleError(f"{path}: {shard.bad[0][1]}")
    return ShardDataset([shard], transform=pil_to_tensor, items=None, num_items=9, is_train=False, seed=0).items(0)


def written(read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    def read_bytes(path: Path, text: bytes) -> object:
        path.write_bytes(text)
        return read(path)

    return read_bytes


def items_of_studies(path: Path) -> list[str]:
    return StudyIndex(path, lambda study, entry: dict(entry), on_bad_sample="stop")[0]["report"]


def captions_of_coco(path: Path) -> list[str]:
    root = path.parent / "coco"
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "val2017").mkdir(exist_ok=True)
    (root / "val2017" / "photo.jpg").write_bytes(JPEG)
    (root / "annotations" / "captions_val2017.json").write_bytes(path.read_bytes())
    return coco_val2017(root, pil_to_tensor).items(0)


def captions_of_flickr(path: Path) -> list[str]:
    (path.parent / "photo.jpg").write_bytes(JPEG)
    path.rename(path.with_name("flickr30k_val.json"))
    return flickr30k(path.parent, "val", pil_to_tensor).items(0)


def coco(item: str) -> str:
    return (
        f'{{"images": [{{"id": 1, "file_name": "photo.jpg"}}], "annotations": [{{"image_id": 1, "caption": {item}}}]}}'
    )


JSON_WAYS = {
    "item lists": (written(lambda path: load_item_lists(path)["7"]), '{{"7": [{}]}}'.format),
    "items by number": (written(lambda path: load_item_lists(path, integer_keys=True)[7]), '{{"7": [{}]}}'.format),
    "items of a set": (written(lambda path: [one.text for one in read_item_file(path)["7"]]), '{{"7": [{}]}}'.format),
    "--items-file": (written(read_items_file), "[{}]".format),
    "shard": (items_of_shard, '{{"caption": [{}]}}'.format),
    "studies": (written(items_of_studies), '{{"S": {{"report": [{}]}}}}'.format),
    "COCO": (written(captions_of_coco), coco),
    "Flickr30k": (written(captions_of_flickr), '[{{"image": "photo.jpg", "caption": [{}]}}]'.format),
    "question": (lambda path, text: read_question(text), '{{"items": [{}]}}'.format),
}
"""JSON that holds one text, given as JSON."""

LINE_WAYS = {
    "--items-file": (written(read_items_file), "{}\n".format),
    "--queries": (written(read_queries), "\n{}\n".format),
    "reports": (written(lambda path: read_report_table(path)["S"]), 'S,"1. {}"\n'.format),
}
"""Files of lines that hold one text."""

WAYS = {
    f"{name}, {kind}": way for kind, ways in (("JSON", JSON_WAYS), ("lines", LINE_WAYS)) for name, way in ways.items()
}


def fill(name: str, text: str) -> str:
    return WAYS[name][1](json.dumps(text, ensure_ascii=False) if "JSON" in name else text)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, name, line_end):
    read, _ = WAYS[name]
    content = fill(name, "a lake, größer").replace("\n", line_end).encode()
    for mark in (b"", BOM):
        assert list(read(tmp_path / "x.json" if "JSON" in name else tmp_path / "x.txt", mark + content)) == [
            "a lake, größer"
        ]


@pytest.mark.parametrize("name", WAYS)
def test_models_get_the_text_as_it_is(tmp_path, name):
    read, _ = WAYS[name]
    text = NASTY.replace("\r", "") + "x"
    content = WAYS[name][1](json.dumps(text)) if "JSON" in name else fill(name, text)
    assert list(read(tmp_path / ("x.json" if "JSON" in name else "x.txt"), content.encode())) == [text]


@pytest.mark.parametrize("name", JSON_WAYS)
@pytest.mark.parametrize(
    ("item", "words"),
    [('"a \\ud800 b"', r"\ud800 is half of a character"), ('"a", ', "not valid JSON"), ('"\xff"', "no UTF-8 text")],
)
def test_json_that_is_none_is_one_sentence(tmp_path, name, item, words):
    read, fill_json = JSON_WAYS[name]
    with pytest.raises(UserError) as refused:
        read(tmp_path / "x.json", fill_json(item).encode("latin-1"))
    assert words in str(refused.value)
    assert "json" in str(refused.value) or name == "question"
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", LINE_WAYS)
def test_lines_that_are_no_utf8(tmp_path, name):
    with pytest.raises(UserError, match=r"x\.txt: .*no UTF-8 text"):
        LINE_WAYS[name][0](tmp_path / "x.txt", LINE_WAYS[name][1]("a \xff").encode("latin-1"))


def test_nan_in_a_field_of_others_is_no_reason_to_refuse_a_sample(tmp_path):
    assert items_of_shard(tmp_path / "0.tar", b'{"caption": ["a lake"], "aesthetic": NaN, "similarity": 1e999}') == [
        "a lake"
    ]
    with pytest.raises(UserError, match="NaN"):
        parse_json('{"a": NaN}', source="x", holding="numbers")


def test_texts_of_the_command_line_are_utf8():
    broken = "a \udcff roof"  # how Python passes on a byte that is no UTF-8
    with pytest.raises(UserError, match=r"--items: 'a \\\\udcff roof' is no UTF-8 text"):
        QuestionOptions(checkpoint=Path("x.pt"), items=broken)
    with pytest.raises(UserError, match="is no UTF-8 text"):
        SearchOptions(index=Path("x"), texts=(broken,)).all_texts()
    assert QuestionOptions(checkpoint=Path("x.pt"), items=NASTY).texts == [NASTY.strip()]


def test_line_ends_end_lines_and_nothing_else(tmp_path):
    (tmp_path / "x.txt").write_bytes("a\x0cb\u2028c\x85d\r\n\r\nlake\rroof\n".encode())
    assert read_queries(tmp_path / "x.txt") == ["a\x0cb\u2028c\x85d", "lake", "roof"]


# --- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (load_item_lists, '{"a\\u0000b": ["x"]}'),
        (read_item_file, '{"a\\u0000b": ["x"]}'),
        (items_of_studies, '{"a\\u0000b": {"report": ["x"]}}'),
        (captions_of_flickr, '[{"image": "a\\u0000b", "caption": ["x"]}]'),
        (captions_of_coco, coco('"x"').replace("photo", "a\\u0000b")),
        (read_report_table, "a\0b,1. x\n"),
        (lambda path: read_label_csv(path, id_columns=["id"], class_columns={"c": "c"}), "id,c\na\0b,1\n"),
    ],
    ids=["item lists", "items of a set", "studies", "Flickr30k", "COCO", "reports", "labels"],
)
def test_names_with_nul_are_refused(tmp_path, read, content):
    (tmp_path / "x").write_text(content)
    with pytest.raises(UserError, match=r"x|json.*NUL") as refused:
        read(tmp_path / "x")
    assert re.search(r"holds NUL|line contains NUL", str(refused.value))
    assert "\0" not in shown(refused.value)


READERS_OF_IDS = {
    "item lists": (load_item_lists, '{"ID": ["x"], "b": ["x"]}', "{}"),
    "items by number": (lambda path: load_item_lists(path, integer_keys=True), '{"ID": ["x"], "7": ["x"]}', "{}"),
    "items of a set": (read_item_file, '{"ID": ["x"], "b": ["x"]}', "{}"),
    "studies": (items_of_studies, '{"ID": {"report": ["x"]}, "b": {"report": ["x"]}}', "{}"),
    "Flickr30k": (
        captions_of_flickr, '[{"image": "ID", "caption": ["x"]}, {"image": "b", "caption": ["x"]}]', "[]",
    ),
    "COCO": (captions_of_coco, coco('"x"').replace("photo.jpg", "ID"), '{"images": [], "annotations": []}'),
    "reports": (read_report_table, "ID,1. x\nb,1. x\n", "study,report\n"),
    "labels": (
        lambda path: read_label_csv(path, id_columns=["id"], class_columns={"c": "c"}), "id,c\nID,1\nb,0\n", "id,c\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS_OF_IDS)
def test_blank_names_and_empty_tables_are_refused(tmp_path, name):
    read, content, empty = READERS_OF_IDS[name]
    for text in (content.replace("ID", ""), content.replace("ID", "  "), empty):
        (tmp_path / "x").write_text(text)
        with pytest.raises(UserError) as refused:
            read(tmp_path / "x")
        assert re.search(r"/(x|captions_val2017\.json|flickr30k_val\.json): ", str(refused.value)), text


@pytest.mark.parametrize("name", [name for name in READERS_OF_IDS if name not in ("COCO", "Flickr30k")])
def test_names_that_stand_twice_are_refused_with_their_place(tmp_path, name):
    read, content, _ = READERS_OF_IDS[name]
    (tmp_path / "x").write_text(content.replace("ID", "7" if "7" in content else "b"))
    with pytest.raises(UserError, match=r"x: (line \d|.*'(b|7)').*twice"):
        read(tmp_path / "x")


def test_a_key_with_nul_is_refused(tmp_path):
    with pytest.raises(BadSampleError, match=r"field key .* holds NUL"):
        items_of_shard(tmp_path / "0.tar", b'{"key": "a\\u0000", "caption": ["a lake"]}')


# --- CSV -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["", "study,report\n", "Study, Report\r\n"])
def test_a_quote_that_never_closes_is_refused_with_its_row(tmp_path, header):
    path = tmp_path / "reports.csv"
    path.write_text(f'{header}Z,1. old infarct\nA,"1. left stroke\nB,1. meningioma\nC,1. normal\n')
    line = 2 + bool(header)
    with pytest.raises(UserError, match=rf"reports\.csv: row starting at line {line}: a quote opens in it that never"):
        read_report_table(path)
    path.write_text(f'{header}Z,1. old infarct\nA,"1. left stroke\n2. shift"\n\nB,1. meningioma\n')
    assert list(read_report_table(path).items()) == [
        ("Z", ["old infarct"]), ("A", ["left stroke", "shift"]), ("B", ["meningioma"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "after", ['B,"1. meningioma"\n', "B,1. meningioma\n" * 10_000], ids=["a later quote", "a long file"]
)
def test_an_open_quote_before_others(tmp_path, after):
    (tmp_path / "reports.csv").write_text('Z,1. old infarct\nA,"1. left stroke\n' + after)
    with pytest.raises(UserError, match=r"reports\.csv: row starting at line 2: .*\(a quote may be open\)"):
        read_report_table(tmp_path / "reports.csv")


def test_rows_know_the_line_they_begin_at(tmp_path):
    (tmp_path / "x.csv").write_bytes(BOM + b'a,b\r\n"1\n2\n3",c\r\n\r\nd,e\r\n')
    with open_csv(tmp_path / "x.csv", holding="letters") as rows:
        assert [(rows.line, row) for row in rows] == [(1, ["a", "b"]), (2, ["1\n2\n3", "c"]), (5, []), (6, ["d", "e"])]
    with (
        pytest.raises(UserError, match=r"no\.csv: no such file; expected a CSV with letters"),
        open_csv(tmp_path / "no.csv", holding="letters"),
    ):
        pass


def test_an_open_quote_in_labels_and_in_rsicd(tmp_path):
    (tmp_path / "labels.csv").write_text('id,c\na,1\nb,"0\nc,1\n')
    with pytest.raises(UserError, match=r"labels\.csv: row starting at line 3: a quote opens"):
        read_label_csv(tmp_path / "labels.csv", id_columns=["id"], class_columns={"c": "c"})
    path = write_rsicd_csv(tmp_path / "train.csv", [("a.jpg", "['a .']", image_cell(JPEG))] * 3)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], lines[2].rstrip(b'"'), *lines[3:]])[: -len(lines[3]) - 1])
    with pytest.raises(UserError, match=r"train\.csv: row starting at line 3: a quote opens"):
        open_rsicd_table(path)


def test_class_labels_may_begin_with_a_mark(tmp_path):
    (tmp_path / "labels.json").write_bytes(BOM + b"[0, 3]")
    assert load_class_labels(tmp_path / "labels.json", 2) == [0, 3]


# --- shards of another layout ----------------------------------------------------------------------------------------


def test_shards_of_other_endings_say_what_was_found(tmp_path):
    members = {}
    for number in range(12):
        members |= {f"s{number:08d}.input.jpg": JPEG, f"s{number:08d}.outputs.txt": b"a cat", f"s{number}": b""}
    (shard,) = open_shards([write_tar(tmp_path / "0.tar", members)], caption_field="caption")
    for again in (shard, open_shards([tmp_path / "0.tar"], caption_field="caption")[0]):
        with pytest.raises(PreflightError) as refused:
            ShardDataset([again], transform=pil_to_tensor, items=None, num_items=1, is_train=True, seed=0)
        message = str(refused.value)
        assert "the shards hold no sample" in message
        assert "found members that end in .input.jpg (12), .outputs.txt (12), nothing (12)" in message
        assert "expected for each sample a member <key>.jpg|jpeg|png|webp and <key>.json" in message
        assert str(tmp_path / "0.tar") in message


# --- what is shown ---------------------------------------------------------------------------------------------------


def obeyed(text: str) -> set[str]:
    """Characters that a terminal would obey."""
    return {c for c in text if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" or c in "\u202e\u2066"}


def test_shown():
    assert shown("größe\t1\n語 😀 [red]") == "größe\t1\n語 😀 [red]"
    assert shown(NASTY) == r"a \x1b[31mred\x1b[0m \x07 roof \x9b2J [bold] :warning: \u202eabc\r"
    assert shown("\0 \x7f \x85 \ud800") == r"\x00 \x7f \x85 \ud800"
    assert shown(12) == "12"


def test_logs_hold_nothing_a_terminal_obeys(tmp_path, capfd):
    with logging_to_console(0), logging_to_file(tmp_path):
        logging.getLogger("itemizedclip.x").warning("bad item %s", NASTY)
        logging.getLogger("itemizedclip.x").info(NASTY)
    with pytest.raises(UserError), logging_to_file(tmp_path):
        raise UserError(NASTY)
    with pytest.raises(SystemExit), reported_errors("prog"):
        raise UserError(f"x.json: {NASTY}")
    said = capfd.readouterr().err
    for text in (said, (tmp_path / "log.txt").read_text()):
        assert text.count("[bold] :warning:") == 3
        assert r"\x1b[31mred" in text
        assert not obeyed(text)


def printed(content: object, *, colours: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=150, force_terminal=colours, color_system="truecolor" if colours else None
    )
    console.print(content)
    return console.file.getvalue()


def test_tables_show_texts_literally():
    table = Table()
    table.add_row(literal(NASTY))
    for content in (table, literal(NASTY), metrics_table(NASTY, {NASTY: 1.0})):
        assert shown(NASTY) in printed(content)
        assert "\x1b[31m" not in printed(content, colours=True)


def test_progress_shows_names_literally(monkeypatch):
    console = Console(file=io.StringIO(), width=150, force_terminal=True)
    monkeypatch.setattr("itemizedclip.runtime.logs.standard_error", lambda: console)
    with progress_bar(f"Reading [red]{{x}}{NASTY}.csv") as advance:
        advance(1, 2)
    assert "Reading [red]{x}a " in console.file.getvalue()
    assert "\x1b[31mred" not in console.file.getvalue()
