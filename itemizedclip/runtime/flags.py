"""Reading the flags of a command into its options."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tyro

from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.logs import logging_to_console
from itemizedclip.runtime.published_flags import without_published

OptionsT = TypeVar("OptionsT")


def read_flags(
    kind: type[OptionsT],
    argv: Sequence[str] | None,
    *,
    prog: str | None,
    description: str | None,
    default: OptionsT | None = None,
    published: bool = False,
) -> OptionsT:
    """Options from flags, which are the names of their fields with dashes, without the names of groups.

    Args:
        kind: dataclass of the options.
        argv: flags; the process's own when None.
        prog: name shown in messages.
        description: first lines of --help.
        default: what the flags override; the fields' own defaults when None.
        published: take the published scripts' flags too, see `published_flags`.

    Raises:
        SystemExit: --help (0), or a flag, a value or a rule across fields that does not hold (2, after one message).
    """
    more: dict[str, Any] = {} if default is None else {"default": default}
    arguments = list(sys.argv[1:] if argv is None else argv)
    if published:
        with logging_to_console(int(os.environ.get("RANK", 0))):
            arguments = without_published(kind, arguments)
    try:
        with ending_quietly():
            return tyro.cli(
                kind, args=arguments, prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,), **more
            )
    except ValueError as error:  # tyro before 1.0 lets what a field's class raises through
        print(f"{prog or Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def ending_quietly() -> Iterator[None]:
    """Exit with 1 and without a trace when whoever reads the output, such as `head`, had enough of it."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter's last flush shall not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


# --- rules of fields -------------------------------------------------------------------------------------------------


def check(holds: bool, message: str) -> None:
    """Fail with a sentence when a rule of an option does not hold.

    Raises:
        UserError: the sentence.
    """
    if not holds:
        raise UserError(message)


def at_least(owner: object, **minimum: float) -> None:
    """Fail with a sentence when a field of `owner` lies below its minimum; None is no value and passes.

    Raises:
        UserError: names the flag, its value and the minimum.
    """
    for name, lowest in minimum.items():
        value = getattr(owner, name)
        if value is not None:
            check(value >= lowest, f"--{name.replace('_', '-')} is {value}; expected at least {lowest}")
