"""Volumes in compressed chunks: smaller than a `.pt`, and a crop reads only the chunks it touches.

A `.packed` file is a safetensors file, so its header is JSON and nothing in it is executed:

    metadata "volume"   {"shape": [D, H, W], "chunk": [d, h, w], "dtype": "int16"}
    ends                int64 (n,), where each chunk ends in `chunks`; chunks lie in C order of their place
    crcs                int64 (n,), CRC-32 of each chunk as it is stored
    chunks              uint8 (bytes,), each chunk's values compressed by Blosc2 (byte shuffle, Zstandard)

Values come back to the bit. Chunks at the far edges are cut, not padded.

Axes: D depth (slices), H rows, W columns; n chunks.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from itemizedclip.data.batch import BadSampleError
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.fields import Rule, check_fields, one_of
from itemizedclip.runtime.files import parse_json, replacing
from itemizedclip.runtime.registry import MissingExtraError

PACKED_SUFFIX = ".packed"

CHUNK = (16, 64, 64)
"""Voxels of a chunk: 128 kB of 16-bit values."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16, torch.float32, torch.float64)
}
_MOST_VOXELS = 2**33


def _is_size(value: Any) -> bool:
    return type(value) is list and len(value) == 3 and all(type(n) is int and 0 < n <= 2**16 for n in value)


_RULES = {
    "shape": Rule("three sizes", lambda value: _is_size(value) and math.prod(value) <= _MOST_VOXELS),
    "chunk": Rule("three sizes", _is_size),
    "dtype": one_of(_DTYPES),
}


def _blosc2() -> Any:
    try:
        import blosc2
    except ImportError as error:
        raise MissingExtraError("packed volumes need the package blosc2: pip install -e '.[packed]'") from error
    return blosc2


def write_packed(path: str | Path, volume: Tensor, *, chunk: Sequence[int] = CHUNK, level: int = 5) -> None:
    """Write a volume; the file appears whole or not at all.

    Args:
        path: the file, which ends in `.packed`.
        volume: (D, H, W), integers up to 32 bits or floats.
        chunk: voxels of a chunk.
        level: of Zstandard, 1 … 9.

    Raises:
        UserError: a tensor that is no such volume.
    """
    blosc2 = _blosc2()
    dtype = str(volume.dtype).removeprefix("torch.")
    if volume.dim() != 3 or 0 in volume.shape or dtype not in _DTYPES:
        raise UserError(f"{path}: {tuple(volume.shape)} values of {dtype}; expected D × H × W of {', '.join(_DTYPES)}")
    values = volume.contiguous().numpy()
    parts, ends, crcs, end = [], [], [], 0
    for box in _boxes(values.shape, chunk):
        content = np.ascontiguousarray(values[box])
        part = blosc2.compress2(
            content, typesize=content.itemsize, clevel=level, codec=blosc2.Codec.ZSTD,
            filters=[blosc2.Filter.SHUFFLE], filters_meta=[0], nthreads=1,
        )  # fmt: skip
        end += len(part)
        parts.append(part)
        ends.append(end)
        crcs.append(zlib.crc32(part))
    facts = {"shape": list(values.shape), "chunk": list(chunk), "dtype": dtype}
    tensors = {
        "ends": torch.tensor(ends),
        "crcs": torch.tensor(crcs),
        "chunks": torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8),
    }
    with replacing(path) as part_path:
        save_file(tensors, part_path, metadata={"volume": json.dumps(facts)})


def _boxes(shape: Sequence[int], chunk: Sequence[int]) -> list[tuple[slice, ...]]:
    """The box of each chunk, in C order."""
    edges = [[slice(s, min(s + c, n)) for s in range(0, n, c)] for n, c in zip(shape, chunk)]
    return list(itertools.product(*edges))


class PackedVolume:
    """A packed file, opened; chunks are read when a part is asked for.

    Attributes:
        shape: voxels (D, H, W).
        dtype: of the values.

    Raises:
        BadSampleError: no packed volume, or a damaged one.
    """

    def __init__(self, path: Path, *, source: object = None) -> None:
        """Read the header.

        Args:
            path: the file.
            source: what messages call it, when it is a copy.
        """
        self._blosc2 = _blosc2()
        self.source = source or path
        try:
            self._file = safe_open(path, framework="pt")
            facts = parse_json((self._file.metadata() or {}).get("volume", ""), source=path, holding="a packed volume")
            check_fields(facts, _RULES, required=_RULES)
            self._chunk: list[int] = facts["chunk"]
            self.shape: tuple[int, int, int] = tuple(facts["shape"])
            self.dtype = _DTYPES[facts["dtype"]]
            self._grid = [-(-n // c) for n, c in zip(self.shape, self._chunk)]
            ends, self._crcs = self._file.get_tensor("ends"), self._file.get_tensor("crcs")
            self._chunks = self._file.get_slice("chunks")
            (stored,) = self._chunks.get_shape()
            starts = torch.cat((torch.zeros(1, dtype=torch.int64), ends[:-1]))
            if ends.shape != (math.prod(self._grid),) or self._crcs.shape != ends.shape:
                raise ValueError(f"{len(ends)} chunks do not fill a volume of {'×'.join(map(str, self.shape))}")
            if bool((starts > ends).any()) or int(ends[-1]) != stored:
                raise ValueError("its chunks do not fill the file")
            self._ends, self._starts = ends.tolist(), starts.tolist()
        except (OSError, SafetensorError, UserError, ValueError, TypeError, RuntimeError) as error:
            raise BadSampleError(
                f"{self.source}: is no packed volume, or damaged ({str(error)[:160]}); copy or pack it again"
            ) from None

    def read(self, box: Sequence[slice]) -> Tensor:
        """The voxels of a box, its bounds within the volume; (D, H, W), of the file's type.

        Raises:
            BadSampleError: a chunk that does not have its checksum.
        """
        bounds = [s.indices(n)[:2] for s, n in zip(box, self.shape)]
        out = np.empty([max(0, last - first) for first, last in bounds], dtype=_numpy_dtype(self.dtype))
        if out.size:
            touched = [range(first // c, -(-last // c)) for (first, last), c in zip(bounds, self._chunk)]
            for place in itertools.product(*touched):
                starts = [p * c for p, c in zip(place, self._chunk)]
                sizes = [min(c, n - s) for c, n, s in zip(self._chunk, self.shape, starts)]
                number = (place[0] * self._grid[1] + place[1]) * self._grid[2] + place[2]
                content = self._decompressed(number, sizes)
                inside, target = [], []
                for (first, last), start, size in zip(bounds, starts, sizes):
                    low, high = max(first, start), min(last, start + size)
                    inside.append(slice(low - start, high - start))
                    target.append(slice(low - first, high - first))
                out[tuple(target)] = content[tuple(inside)]
        return torch.from_numpy(out)

    def whole(self) -> Tensor:
        """All voxels."""
        return self.read([slice(0, n) for n in self.shape])

    def _decompressed(self, number: int, sizes: Sequence[int]) -> np.ndarray:
        stored = self._chunks[self._starts[number] : self._ends[number]].numpy().tobytes()
        if zlib.crc32(stored) != int(self._crcs[number]):
            raise BadSampleError(f"{self.source}: chunk {number} is damaged (CRC-32); copy or pack it again")
        content = np.empty(sizes, dtype=_numpy_dtype(self.dtype))
        try:
            told = self._blosc2.get_cbuffer_sizes(stored)[0]
            if told != content.nbytes:
                raise ValueError(f"{told:,} bytes where {content.nbytes:,} are")
            self._blosc2.decompress2(stored, dst=content, nthreads=1)  # loader processes are forked
        except (ValueError, RuntimeError, TypeError) as error:
            raise BadSampleError(f"{self.source}: chunk {number} cannot be unpacked ({error}); pack it again") from None
        return content


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype
