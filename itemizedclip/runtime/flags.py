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
from itemizedclip.runtime.logs import shown

OptionsT = TypeVar("OptionsT")


def read_flags(
    kind: type[OptionsT],
    argv: Sequence[str] | None,
    *,
    prog: str | None,
    description: str | None,
    default: OptionsT | None = None,
) -> OptionsT:
    """Options from flags, which are the names of their fields with dashes, without the names of groups.

    Args:
        kind: dataclass of the options.
        argv: flags; the process's own when None.
        prog: name shown in messages.
        description: first lines of --help.
        default: what the flags override; the fields' own defaults when None.

    Raises:
        SystemExit: --help (0), or a flag, a value or a rule across fields that does not hold (2, after one message).
    """
    more: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with ending_quietly():
            return tyro.cli(
                kind, args=argv, prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,), **more
            )
    except ValueError as error:  # tyro before 1.0 lets what a field's class raises through
        print(f"{prog or Path(sys.argv[0]).name}: error: {shown(error)}", file=sys.stderr)
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
