"""Files that once made a reader fail, each made by a line of code: the reader's name and the content."""

from __future__ import annotations

from collections.abc import Callable

FELL: dict[str, tuple[str, bytes | Callable[[], bytes]]] = {
    "brackets without end": ("config of photographs", b"[" * 10**6),
}
