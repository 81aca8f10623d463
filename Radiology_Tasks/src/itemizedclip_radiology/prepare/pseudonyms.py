"""Names that tell nobody: keyed pseudonyms, and texts without what identifies a patient."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import read_text

_KEY_BYTES = 32
_SHORTEST = 3
"""Shorter words of names, such as initials, would take half of every text with them."""


@dataclass(frozen=True)
class Pseudonyms:
    """Stable names from a secret key: the same patient gets the same name in every run with the same key.

    Attributes:
        key: secret bytes; without them nobody can try names and compare.
    """

    key: bytes

    def name(self, kind: str, identity: str) -> str:
        """Such as "s3f2a91c04d77": one letter of the kind and twelve hex digits."""
        return f"{kind[0]}{self._digest(kind, identity)[:12]}"

    def number(self, kind: str, identity: str) -> int:
        """A whole number of up to nine digits."""
        return int(self._digest(kind, identity)[:12], 16) % 10**9

    def share(self, kind: str, identity: str) -> float:
        """A number in [0, 1), such as for splits."""
        return int(self._digest(kind, identity)[:12], 16) / 16**12

    def _digest(self, kind: str, identity: str) -> str:
        return hmac.new(self.key, f"{kind}\0{identity}".encode(), hashlib.sha256).hexdigest()


def open_key(path: Path) -> Pseudonyms:
    """The key in a file; a new one, that only its owner can read, where there is none.

    Raises:
        UserError: a file that holds no key.
    """
    path = path.expanduser()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:  # another shard was faster
            return open_key(path)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(_KEY_BYTES) + "\n")
    text = read_text(path, holding="a key of 64 hexadecimal digits").strip()
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise UserError(f"{path}: holds no key; expected 64 hexadecimal digits: give another --key-file")
    return Pseudonyms(bytes.fromhex(text))


def without_identities(text: str, identities: Iterable[str]) -> str:
    """A text in which everything that identifies the patient is "…": names by their parts, numbers and dates."""
    words = set()
    for identity in identities:
        words.add(identity)
        words.update(re.split(r"[\^\s,=]+", identity))
    for word in sorted((w for w in words if len(w) >= _SHORTEST), key=len, reverse=True):
        text = re.sub(rf"(?i)(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", "…", text)
    return text
