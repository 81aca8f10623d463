"""Reader for the Python literals that some CSV files carry in their cells.

Accepted are exactly two shapes and nothing else:

- an array of strings as NumPy prints it, `['first caption .' "it's the second ."\\n 'third']`, with or without commas;
- a flat record as `str(dict)` prints it, `{'bytes': b'\\xff\\xd8…', 'path': None}`.

Quoted literals are found by scanning for their closing quote, in time linear in the cell and without recursion;
only such a literal, alone, is handed to `ast.literal_eval` for its escapes. Names, calls, operators and nested
containers never reach a parser, so a cell can neither run code nor exhaust the stack.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sized

from itemizedclip.runtime.errors import UserError

_SPACE = re.compile(r"\s*")
_SEPARATOR = re.compile(r"\s*,?\s*")

LiteralValue = str | bytes | None

MAX_ENTRIES = 1000
"""Most strings of an array or keys of a record; more is damaged or hostile data."""


class LiteralError(UserError):
    """The text is not the literal that was expected; the message gives the position and what stands there."""


def parse_string_array(text: str) -> list[str]:
    """Strings of a bracketed array, each quoted literal on its own.

    Python itself would join literals that no comma separates into one string; here they stay apart.

    Raises:
        LiteralError: anything but quoted strings, white space and single commas between the brackets, or more than
            MAX_ENTRIES strings.
    """
    position = _expect(text, _skip_space(text, 0), "[", "a list of quoted strings")
    position = _skip_space(text, position)
    strings: list[str] = []
    while not text.startswith("]", position):
        value, position = _read_literal(text, position, "a quoted string or ']'")
        if not isinstance(value, str):
            raise LiteralError(f"string {len(strings) + 1} of the list is a bytes literal; expected text")
        strings.append(value)
        _check_count(strings)
        position = _match_end(_SEPARATOR, text, position)
    _expect_end(text, position + 1)
    return strings


def parse_flat_record(text: str) -> dict[str, LiteralValue]:
    """A record `{'key': value, …}` whose values are strings, bytes or None.

    Raises:
        LiteralError: any other value, a nested container, a repeated key, or text after the record.
    """
    position = _expect(text, _skip_space(text, 0), "{", "a record such as {'bytes': b'...', 'path': None}")
    position = _skip_space(text, position)
    record: dict[str, LiteralValue] = {}
    while not text.startswith("}", position):
        key, position = _read_literal(text, position, "a quoted key or '}'")
        if not isinstance(key, str):
            raise LiteralError("a key of the record is a bytes literal; expected text")
        if key in record:
            raise LiteralError(f"key {_shown(key)} appears twice in the record")
        position = _expect(text, _skip_space(text, position), ":", f"':' after key {_shown(key)}")
        position = _skip_space(text, position)
        if text.startswith("None", position):
            record[key], position = None, position + len("None")
        else:
            record[key], position = _read_literal(text, position, f"a string, bytes or None for key {_shown(key)}")
        _check_count(record)
        position = _skip_space(text, position)
        if not text.startswith("}", position):
            position = _skip_space(text, _expect(text, position, ",", "',' or '}'"))
    _expect_end(text, position + 1)
    return record


def _read_literal(text: str, start: int, expected: str) -> tuple[str | bytes, int]:
    """Value of the quoted literal at `start`, and the position behind it."""
    opening = start + 1 if text.startswith("b", start) else start
    quote = text[opening : opening + 1]
    if quote not in ("'", '"'):
        raise _unexpected(text, start, expected)
    closing = _closing_quote(text, opening, quote)
    literal = text[start : closing + 1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape such as '\d' is kept as it stands, without a word
            value = ast.literal_eval(literal)
        if isinstance(value, str):
            value.encode("utf-8")  # a lone surrogate would only fail later, in the tokenizer
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise LiteralError(f"unreadable literal at character {start}, {_shown(literal)}: {reason}") from None
    return value, closing + 1


def _closing_quote(text: str, opening: int, quote: str) -> int:
    """Position of the quote that closes the literal opened at `opening`: the first one not escaped."""
    body = opening + 1
    candidate = text.find(quote, body)
    while candidate != -1:
        backslashes = 0
        while candidate - backslashes > body and text[candidate - backslashes - 1] == "\\":
            backslashes += 1
        if backslashes % 2 == 0:
            return candidate
        candidate = text.find(quote, candidate + 1)
    raise LiteralError(f"the quote opened at character {opening} is never closed (is the file cut short?)")


def _check_count(entries: Sized) -> None:
    if len(entries) > MAX_ENTRIES:
        raise LiteralError(f"more than {MAX_ENTRIES} entries; the cell is damaged")


def _match_end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return position if match is None else match.end()


def _skip_space(text: str, position: int) -> int:
    return _match_end(_SPACE, text, position)


def _expect(text: str, position: int, symbol: str, expected: str) -> int:
    if not text.startswith(symbol, position):
        raise _unexpected(text, position, expected)
    return position + len(symbol)


def _expect_end(text: str, position: int) -> None:
    if _skip_space(text, position) != len(text):
        raise _unexpected(text, position, "the end of the cell")


def _unexpected(text: str, position: int, expected: str) -> LiteralError:
    found = _shown(text[position : position + 60]) if position < len(text) else "the end of the cell"
    return LiteralError(f"expected {expected} at character {position}, found {found}")


def _shown(text: str, max_chars: int = 40) -> str:
    """Short printable form for messages: cells can be long and hold control characters."""
    return ascii(text if len(text) <= max_chars else text[:max_chars] + "...")
