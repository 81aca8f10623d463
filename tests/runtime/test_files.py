"""Files are written whole or not at all, and read by one set of rules."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from itemizedclip.data.batch import BadSampleError
from itemizedclip.runtime.errors import EXIT_FAULT, MissingFileError, UserError, reported_errors
from itemizedclip.runtime.files import (
    check_writable,
    file_sha256,
    read_json,
    read_lines,
    read_text,
    replacing,
    write_json,
    written_whole,
)

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("durable", [False, True])
def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, durable):
    path = tmp_path / "x.pt"
    with written_whole(path, durable=durable) as file:
        torch.save({"step": 1}, file)
    with pytest.raises(Exception, match="pickle"), written_whole(path, durable=durable) as file:
        torch.save({"step": 2, "bad": lambda: None}, file)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_in_one_process_do_not_meet(tmp_path):
    path = tmp_path / "deep" / "x.txt"
    with written_whole(path, text=True) as first, written_whole(path, text=True) as second:
        first.write("first\r\n")
        second.write("second\n")
    assert path.read_bytes() == b"first\r\n"  # the outer block ends last
    with replacing(path) as part:
        assert part.parent == path.parent
        part.write_text("third")
    assert path.read_text() == "third"


def test_json_is_written_with_finite_numbers_only(tmp_path):
    write_json(tmp_path / "x.json", {"é": [1, 2.5, None]})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"é": [1, 2.5, None]}
    for value in (float("nan"), float("inf"), object()):
        with pytest.raises(UserError, match=r"y\.json: cannot be written as JSON"):
            write_json(tmp_path / "y.json", value)
    assert not (tmp_path / "y.json").exists()


@pytest.mark.parametrize("mark", [b"", BOM])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, mark):
    (tmp_path / "items.txt").write_bytes(mark + b"a lake\r\n\r\n  two planes \r\n")
    assert read_lines(tmp_path / "items.txt", holding="texts") == ["a lake", "two planes"]
    (tmp_path / "items.json").write_bytes(mark + b'{"0": ["a lake"]}')
    assert read_json(tmp_path / "items.json", holding="items") == {"0": ["a lake"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"0": ["a"], "0": ["b"]}', "key '0' appears twice"),
        (b'["a", "\\ud83d"]', r"\\ud83d is half of a character"),
        (b'{"\\uDFFF": 1}', r"\\udfff is half of a character"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "1e999 is no number that a computer holds"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"[1,", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'["\xff"]', "byte 2 is no UTF-8 text"),
    ],
    ids=range(11),
)
def test_json_that_means_two_things_is_refused_with_its_file(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        read_json(tmp_path / "x.json", holding="class labels")
    assert str(tmp_path / "x.json") in str(refused.value)
    assert "class labels" in str(refused.value)


def test_whole_characters_may_be_written_as_two_halves(tmp_path):
    (tmp_path / "x.json").write_text('["\\ud83d\\ude00", "\\\\ud83d"]')
    assert read_json(tmp_path / "x.json", holding="texts") == ["\U0001f600", "\\ud83d"]


def test_missing_files_folders_and_permissions(tmp_path):
    with pytest.raises(MissingFileError, match=r"absent\.txt: no such file; expected one text per line"):
        read_text(tmp_path / "absent.txt", holding="one text per line")
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path, holding="one text per line")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"results cannot be written there .* --output"):
        check_writable(tmp_path / "file" / "below", "--output")
    assert check_writable(tmp_path / "new" / "folder", "--output").is_dir()


def test_the_digest_is_that_of_the_content(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- one kind of error, also from loader workers ---------------------------------------------------------------------


class Damaged(Dataset):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        raise self.error


@pytest.mark.parametrize("kind", [UserError, BadSampleError, MissingFileError])
@pytest.mark.parametrize("message", ["scan.pt: no volume; copy it again", "two: lines\n  of UserError: text"])
def test_a_workers_error_arrives_as_its_sentence(kind, message):
    with pytest.raises(kind) as caught:
        next(iter(DataLoader(Damaged(kind(message)), num_workers=1)))
    assert str(caught.value) == message.rpartition(f"{kind.__name__}: ")[2]


def test_an_error_is_reported_in_one_line(capsys):
    for error, said in (
        (UserError("a.json: no items; add some"), "prog: error: a.json: no items; add some\n"),
        (MissingFileError("a.json: no such file"), "prog: error: a.json: no such file\n"),
        (PermissionError(13, "Permission denied", "b.pt"), "prog: error: b.pt: Permission denied\n"),
    ):
        with pytest.raises(SystemExit) as stop, reported_errors("prog"):
            raise error
        assert stop.value.code == 1
        assert capsys.readouterr().err == said
    for fault in (ValueError("a fault of ours"), OSError("no file"), RuntimeError("shape")):
        with pytest.raises(SystemExit) as stop, reported_errors("prog"):
            raise fault
        assert stop.value.code == EXIT_FAULT
        said = capsys.readouterr().err
        assert said.startswith(f"prog: error: unexpected {type(fault).__name__} at test_files.py:")
        Path(re.search(r"its trace is in (\S+):", said)[1]).unlink()
    with pytest.raises(BrokenPipeError), reported_errors("prog"):
        raise BrokenPipeError


def test_names_of_parts_tell_whose_they_are(tmp_path):
    with replacing(tmp_path / "x.pt") as part:
        assert part.name.startswith(".x.pt.")
        assert f".{os.getpid()}." in part.name
        part.write_bytes(b"")


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_read(make, tmp_path):
    path = tmp_path / "texts.txt"
    make(path)
    with pytest.raises(UserError, match=r"cannot be read \(it is (a folder|no regular file)\); expected one text"):
        read_text(path, holding="one text per line")
