"""Reading the flags of a command into its options."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

import tyro

from itemizedclip.runtime.errors import DEBUG_FLAG, UserError, show_traces
from itemizedclip.runtime.logs import logging_to_console, shown
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
    if DEBUG_FLAG in arguments:
        arguments.remove(DEBUG_FLAG)
        show_traces()
    description = f"{description or ''}\n\nWith {DEBUG_FLAG} an unexpected error shows its whole trace."
    if published:
        with logging_to_console(int(os.environ.get("RANK", 0))):
            arguments = without_published(kind, arguments)
    program = prog or Path(sys.argv[0]).name
    said = _Held(sys.stderr)
    try:
        with ending_quietly(), redirect_stderr(cast(TextIO, said)):
            options: OptionsT = tyro.cli(
                kind, args=arguments, prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,), **more
            )
            check_numbers(options)
    except ValueError as error:  # a number that is refused; tyro before 1.0 lets through what a field's class raises
        broken: ValueError | None = error
    except SystemExit as stop:
        broken = _broken_rule(stop)
        if broken is None:
            # The parser repeats what was typed.
            said.release(escaped=any(shown(argument) != argument for argument in arguments))
            raise
    else:
        said.release(escaped=False)
        return options
    print(f"{program}: error: {shown(broken)} ({program} --help lists the flags)", file=sys.stderr)
    raise SystemExit(2)


def _broken_rule(stop: SystemExit) -> UserError | None:
    """The sentence of an options class whose rule ended the parsing; the parser would name the class beside it."""
    error: BaseException | None = stop
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return error


class _Held:
    """Standard error during parsing, until it is known whether a sentence of our own says it better."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._written: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._written.append(text)
        return len(text)

    def flush(self) -> None:
        """Nothing yet."""

    def release(self, *, escaped: bool) -> None:
        """Say it; escaped, when an argument holds what a terminal would obey (the message has no colours then)."""
        text = "".join(self._written)
        self._stream.write(shown(text) if escaped else text)
        self._stream.flush()


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

LARGEST = 2**63 - 1
"""Of any whole number: PyTorch and NumPy hold no larger ones."""


def check_numbers(options: Any, flag: str = "") -> None:
    """Fail with a sentence when a number of options, however deep, is not finite or larger than 64 bits hold.

    Raises:
        UserError: names the flag and its value.
    """
    if dataclasses.is_dataclass(options):
        for field in dataclasses.fields(options):
            check_numbers(getattr(options, field.name), f"--{field.name.replace('_', '-')}")
    elif isinstance(options, (list, tuple)):
        for entry in options:
            check_numbers(entry, flag)
    elif isinstance(options, float):
        check(math.isfinite(options), f"{flag} is {options}; expected a finite number")
    elif isinstance(options, int):
        check(abs(options) <= LARGEST, f"{flag} is {_shortened(options)}; expected a whole number of at most {LARGEST}")


def _shortened(number: int) -> str:
    # Python refuses to write numbers of thousands of digits.
    return str(number) if number.bit_length() < 256 else f"a number of {number.bit_length()} bits"


def usable_cores(quota: str | Path = "/sys/fs/cgroup/cpu.max") -> int:
    """Cores this process may use: those it may run on, fewer where a container has a share of processor time.

    Args:
        quota: the control group's file, such as "200000 100000" for two cores (docker run --cpus 2).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        allowed, period = Path(quota).read_text().split()
        return max(1, min(cores, round(int(allowed) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no such control group, or "max"
        return cores


def max_processes() -> int:
    """More loader processes, or threads, than this are a slip, and may end the process or the machine."""
    return max(64, 16 * usable_cores())


def loader_processes(asked: int | None) -> int:
    """How many processes load data for this one: as asked, or one per core that it has to itself, at most 8."""
    if asked is not None:
        return asked
    return min(8, max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


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


def at_most(owner: object, **maximum: float) -> None:
    """Fail with a sentence when a field of `owner` lies above its maximum; None is no value and passes.

    Raises:
        UserError: names the flag, its value and the maximum.
    """
    for name, highest in maximum.items():
        value = getattr(owner, name)
        if value is not None:
            shown = _shortened(value) if isinstance(value, int) else value
            check(value <= highest, f"--{name.replace('_', '-')} is {shown}; expected at most {highest}")
