"""Checkpoint files that tell whether they are as they were written.

A checkpoint is what `torch.save` writes, a zip archive, followed by an archive comment with the SHA-256 of all before
it. Whoever does not know of the comment reads the file as ever: `torch.load`, older versions, zip programs. Files
without the comment (older ones, released ones, those saved again by other programs) still carry a CRC per entry.

Reading a whole file once more is what verifying costs; nothing of it is kept in memory.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, Literal, cast

import torch
from torch import Tensor

from itemizedclip.runtime.files import written_whole

MARK = b"itemizedclip sha256 "
"""Beginning of the comment; 64 hexadecimal digits follow."""

Proof = Literal["sha256", "crc", "none"]

_COMMENT_BYTES = len(MARK) + 64
_END_BYTES = 22  # the end record of a zip archive; its last two bytes are the length of the comment
_BLOCK = 2**20


class DamagedError(ValueError):
    """A file that is not as it was written; the message says what does not fit."""


class _HashingFile:
    """What `torch.save` writes to: the file and its digest grow together.

    Attributes:
        failure: why the disk refused a write; PyTorch reports only its consequence.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, block: Any) -> int:
        try:
            written: int = self.file.write(block)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self.digest.update(block)
        return written

    def flush(self) -> None:
        self.file.flush()


def save_archive(contents: dict[str, Any], path: Path) -> None:
    """Write tensors and plain data, whole or not at all, and return when the disk has them.

    Raises:
        OSError: the disk refused; its file name is that of `path`.
    """
    try:
        with written_whole(path, durable=True) as file:
            hashing = _HashingFile(file)
            try:
                torch.save(contents, cast(IO[bytes], hashing))
            except Exception:
                if hashing.failure is not None:
                    raise hashing.failure from None
                raise
            comment = MARK + hashing.digest.hexdigest().encode()
            file.seek(-2, 2)
            file.write(struct.pack("<H", len(comment)) + comment)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_archive(path: Path) -> bool:
    """Whether a file is in PyTorch's format since 1.6, which is checked entry by entry and can be memory-mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def verify_archive(path: Path) -> Proof:
    """Read a file from end to end and compare it with what it says of itself.

    Returns:
        What it was compared with: the digest, the CRC of every entry, or nothing, for files in PyTorch's old format
        and those saved without.

    Raises:
        DamagedError: something does not fit.
    """
    if not is_archive(path):
        return "none"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise DamagedError("its entries are compressed, which PyTorch never does")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise DamagedError("its entries are larger than the file")
            if len({entry.filename for entry in entries}) < len(entries):
                raise DamagedError("two of its entries have the same name")
            if archive.comment.startswith(MARK):
                _compare_digest(path, archive.comment)
                return "sha256"
            if not any(entry.CRC for entry in entries):
                return "none"  # torch.serialization.set_crc32_options(False)
            for entry in entries:
                with archive.open(entry) as content:
                    while content.read(_BLOCK):
                        pass
            return "crc"
    except DamagedError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise DamagedError(str(error) or type(error).__name__) from error


def _compare_digest(path: Path, comment: bytes) -> None:
    digest = hashlib.sha256()
    left = path.stat().st_size - _END_BYTES - _COMMENT_BYTES
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            digest.update(block)
            left -= len(block)
        # The end record as torch.save wrote it: with a comment of length 0.
        digest.update(file.read(_END_BYTES - 2) + b"\0\0")
    if comment != MARK + digest.hexdigest().encode():
        raise DamagedError("its SHA-256 is not the one it was written with")


def unusable_tensor(tensors: dict[str, Any]) -> str | None:
    """What is wrong with the first tensor that no model can use, or None.

    That is one with values that are not finite, and one that is not what its bytes say (without storage, or larger
    than it).
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            continue
        if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized:
            return f"{name} is no plain tensor ({value.device.type}, {value.layout})"
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            return f"{name} is {tuple(value.shape)}, larger than the {value.untyped_storage().nbytes()} bytes it has"
        if not _is_finite(value):
            bad = int((~torch.isfinite(value)).sum())
            return f"{bad:,} of the {value.numel():,} values of {name} are not finite"
    return None


def _is_finite(value: Tensor) -> bool:
    if not (value.is_floating_point() or value.is_complex()) or value.numel() == 0:
        return True
    # A sum makes no copy; only one that overflows needs the second look, which does.
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())
