"""Scores that survive: one JSON line per image as soon as it is scored, so that a stopped evaluation goes on.

    scores.<fingerprint>.jsonl          main process        scores.<fingerprint>.rank1.jsonl    second process, …
    {"study": "ID_1", "scores": {"Any": 0.21, …}, "series": ["AX_…", …], "skipped": []}

The fingerprint is that of all that scores depend on: scores of other weights, texts or settings lie in other files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from itemizedclip.runtime.files import parse_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredScores:
    """The scores of one image or study.

    Attributes:
        sample_id: its name.
        parts: names of all its parts, such as series; with other parts than these it is scored again.
        skipped: why parts could not be used; such an image is scored again, it may have been mended.
        scores: one per column.
    """

    sample_id: str
    parts: list[str]
    skipped: list[str]
    scores: list[float]


@dataclass(frozen=True)
class ScoreStore:
    """The score files of one key.

    Attributes:
        folder: where the files are.
        key: plain data that the scores depend on.
        columns: names of the scores of an image, all different.
        anew: forget scores of earlier evaluations instead of taking them over.
    """

    folder: Path
    key: Mapping[str, Any]
    columns: Sequence[str]
    anew: bool = False

    @property
    def fingerprint(self) -> str:
        """The key's part of the file names."""
        return hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, rank: int) -> Path:
        """The file that one process appends to."""
        return self.folder / f"scores.{self.fingerprint}{f'.rank{rank}' if rank else ''}.jsonl"

    def take_over(self) -> dict[str, StoredScores]:
        """Scores of earlier evaluations by name, of all processes; call it on one rank, before any appends."""
        paths = sorted(self.folder.glob(f"scores.{self.fingerprint}*.jsonl"))
        found: dict[str, StoredScores] = {}
        for path in paths:
            if self.anew:
                path.unlink()
                continue
            unreadable = 0
            for line in path.read_bytes().splitlines():
                try:
                    entry = self._parse(parse_json(line, source=path, holding="scores"))
                except (ValueError, TypeError, KeyError, OverflowError):
                    unreadable += 1  # a killed process left it unfinished
                    continue
                found[entry.sample_id] = entry
            if unreadable:
                logger.warning("%s: %d unfinished lines passed over, which are scored again", path, unreadable)
        return found

    def _parse(self, line: dict[str, Any]) -> StoredScores:
        scores = [float(line["scores"][name]) for name in self.columns]
        if not all(map(math.isfinite, scores)):
            raise ValueError("not finite")
        return StoredScores(str(line["study"]), list(line["series"]), list(line["skipped"]), scores)

    @contextmanager
    def appending(self, rank: int) -> Iterator[ScoreWriter]:
        """Append to one process's file inside the block."""
        path = self.path(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            yield ScoreWriter(file, self.columns)


@dataclass
class ScoreWriter:
    """Appends lines; those of a batch are on their way to the disk before the next one is scored."""

    file: IO[bytes]
    columns: Sequence[str]

    def add(self, entries: Iterable[StoredScores]) -> None:
        """Append the scores of a batch."""
        lines = [
            {
                "study": entry.sample_id,
                "scores": dict(zip(self.columns, entry.scores, strict=True)),
                "series": entry.parts,
                "skipped": entry.skipped,
            }
            for entry in entries
        ]
        self.file.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
        self.file.flush()
