"""Commands that begin with a name out of a registry: `itemizedclip train NAME`, `itemizedclip evaluate NAME`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from itemizedclip.runtime.errors import EXIT_WRONG_FILE, EXIT_WRONG_FLAG, reported_errors
from itemizedclip.runtime.registry import Registry

T = TypeVar("T")


def usage(prog: str, registry: Registry[Any], arguments: str) -> str:
    """The list of what a registry has, for `itemizedclip train --help` and its like."""
    names = registry.names()
    width = max(map(len, names), default=0)
    listed = [f"  {name:<{width}}  {registry.summary(name)}" for name in names]
    return "\n".join(
        [
            f"usage: {prog} NAME {arguments}        {prog} NAME --help",
            "",
            f"{registry.what}s (NAME may also be FILE.py:NAME, of a Python file of your own):",
            *listed,
        ]
    )


def split_name(argv: Sequence[str] | None, prog: str, registry: Registry[Any], arguments: str) -> tuple[str, list[str]]:
    """The name a command begins with, and the rest.

    Raises:
        SystemExit: --help without a name (0), or no name (2).
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] in (["--help"], ["-h"]):
        print(usage(prog, registry, arguments))
        raise SystemExit(0)
    if not given or given[0].startswith("-"):
        print(f"{prog}: no {registry.what} named first\n\n{usage(prog, registry, arguments)}", file=sys.stderr)
        raise SystemExit(EXIT_WRONG_FLAG)
    return given[0], given[1:]


def load_named(registry: Registry[T], name: str, prog: str) -> T:
    """What a registry has under a name.

    Raises:
        SystemExit: no such thing (2), or packages that are not installed (1), after one message.
    """
    try:
        with reported_errors(prog):
            return registry.load(name)
    except SystemExit as stop:
        known = name in registry.names()
        raise SystemExit(EXIT_WRONG_FILE if known else EXIT_WRONG_FLAG) from stop
