"""What becomes of sound files: fields of strangers, and damage to bytes."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


STRANGE = [
    None, True, False, 0, -1, 1, 2, 7, 10**7, 2**31, 2**63, 2**70, -(2**70), 0.5, -0.0, 1e308, 1e-320,
    "", " ", "0", "\0", "../../etc/passwd", "/etc/passwd", "hf-hub:evil/model", "evil/model", "https://evil.example/x",
    "a\x1b[31mb", "x" * 5000, "größe 語", [], {}, [None], [0], ["x"], [[]], {"": ""}, {"a": {"b": [1]}}, deep(20),
    deep(60), [1] * 300,
]  # fmt: skip
"""Values that no field expects, or few do."""


def places(value: Any, above: tuple = ()) -> list[tuple]:
    """Where something can be changed: the path of every entry."""
    found = [above] if above else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        found += places(entry, (*above, key))
    return found


@st.composite
def changed_data(draw: st.DrawFn, sound: Any) -> Any:
    """Plain data with one to three fields that are strange, missing, renamed or there twice."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        found = places(value)
        if not found:
            break
        *above, last = draw(st.sampled_from(found))
        place = value
        for key in above:
            place = place[key]
        what = draw(st.sampled_from(["replace"] * 6 + ["delete", "repeat", "wrap", "rename"]))
        if what == "replace":
            place[last] = copy.deepcopy(draw(st.sampled_from(STRANGE)))
        elif what == "delete":
            del place[last]
        elif what == "repeat" and isinstance(place, list):
            place.append(copy.deepcopy(place[last]))
        elif what == "wrap":
            place[last] = [place[last]]
        elif isinstance(place, dict):
            place[draw(st.sampled_from(["", " ", "x", "\0", "a\x1b[2J"]))] = place.pop(last)
    return draw(st.sampled_from([value] * 20 + STRANGE))


STRANGE_BYTES = [
    b"\0", b"\xff", b'"', b"\n", b"\r", b",", b"{", b"[" * 2000, b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"NaN",
    b"-1", b"9" * 400, b"1e999", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0" * 512, b"PK\x03\x04", b"\x80\x02",
    b"../../",
]  # fmt: skip


@st.composite
def changed_bytes(draw: st.DrawFn, sound: bytes) -> bytes:
    """Bytes that are cut short, flipped, overwritten, inserted, taken out or repeated, one to four times."""
    value = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        size = len(value)
        # Headers and ends of files are where most depends on a byte.
        begin = draw(
            st.one_of(st.integers(0, min(size, 600)), st.integers(0, size), st.integers(max(0, size - 200), size))
        )
        length = draw(st.integers(0, max(1, min(64, size))))
        what = draw(st.sampled_from(["cut", "flip", "flip", "write", "write", "insert", "remove", "repeat"]))
        if what == "cut":
            del value[begin:]
        elif what == "flip" and begin < size:
            value[begin] ^= draw(st.integers(1, 255))
        elif what == "write":
            strange = draw(st.sampled_from(STRANGE_BYTES))
            value[begin : begin + len(strange)] = strange
        elif what == "insert":
            value[begin:begin] = draw(st.sampled_from(STRANGE_BYTES))
        elif what == "remove":
            del value[begin : begin + length]
        elif what == "repeat":
            value[begin:begin] = value[begin : begin + length] * draw(st.integers(1, 20))
    return bytes(value)
