"""Files that once made a reader fail, each made by a line of code: the reader's name and the content."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable

BRACKETS = b"[" * 10**6


def tar_with_a_long_header() -> bytes:
    """A pax header of 8 MB in 8 kB, which `tarfile` would hold in memory."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("x"), None)
        long = tarfile.TarInfo("h")
        long.type, long.size = tarfile.XHDTYPE, 2**23
        file.write(long.tobuf())
        file.write(bytes(2**23))
    return gzip.compress(file.getvalue(), mtime=0)


def zip_of_damaged_bytes() -> bytes:
    """Its deflated bytes are no deflated bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", b"DICM" * 1000)
    content = bytearray(file.getvalue())
    content[35:45] = b"\xff" * 10
    return bytes(content)


FELL: dict[str, tuple[str, bytes | Callable[[], bytes]]] = {
    "a config of brackets": ("config of photographs", BRACKETS),
    "a config that is a list": ("config of photographs", b"[1]"),
    "a config whose tower is an object": (
        "config of photographs", b'{"embed_dim": 8, "vision_cfg": {"tower": {}}, "text_cfg": {}}',
    ),
    "an index of brackets": ("index.json", BRACKETS),
    "an index that is a list": ("index.json", b"[]"),
    "an index with a format that is a text": ("index.json", b'{"format": "x"}'),
    "a vocabulary without [UNK]": ("BERT's vocabulary", b"[PAD]\n[CLS]\n[SEP]\na\n"),
    "scores of brackets": ("scores of an evaluation", BRACKETS),
    "scores that are a number of 400 digits": (
        "scores of an evaluation",
        b'{"study": "s", "scores": {"a": ' + b"9" * 400 + b', "b": 0}, "series": [], "skipped": []}',
    ),
    "metrics of brackets": ("metrics of a run", BRACKETS),
    "a picture with a name of 5,000 characters": (
        "COCO",
        lambda: json.dumps({"images": [{"id": 1, "file_name": "x" * 5000}], "annotations": []}).encode(),
    ),
    "labels of NUL": ("labels", b"\0" * 3000),
    "reports of NUL": ("reports", b"\0" * 3000),
    "official labels of NUL": ("official labels of CQ500", b"\0" * 3000),
    "a list of studies of NUL": ("list of studies", b"\0" * 3000),
    "official labels with an open quote": ("official labels of CQ500", b'name,"R1:ICH\nCQ500-CT-1,0\n'),
    "official labels with a column twice": ("official labels of RSNA", b"ID,Label,Label\nID_0_any,0,0\n"),
    "a question of brackets": ("a question", b"[" * 100_000),
    "items that are half a character": ("item lists", b'{"a": ["\\ud800"]}'),
    "a safetensors header of 2**62 bytes": ("safetensors", (2**62).to_bytes(8, "little") + b"{}"),
    "a checkpoint that is an empty archive": ("checkpoint", b"PK\x05\x06" + bytes(18)),
    "a study in a zip of damaged bytes": ("study .zip", zip_of_damaged_bytes),
    "a study in a tar with a header of 8 MB": ("study .tar.gz", tar_with_a_long_header),
    "masks that are an empty archive": ("masks .npz", b"PK\x05\x06" + bytes(18)),
}  # fmt: skip
