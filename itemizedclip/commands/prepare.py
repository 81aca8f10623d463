"""The command `itemizedclip prepare WHAT`: what a person has → what training reads.

itemizedclip prepare items SOURCE --to OUT      reports or redundant captions → independent text items
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from itemizedclip.runtime.errors import EXIT_WRONG_FLAG

PREPARATIONS = {
    "items": ("itemizedclip.commands.prepare_items", "reports or redundant captions → independent text items"),
}
"""Name → (module with `main(argv)`, one line for --help)."""


def usage() -> str:
    """The text of `itemizedclip prepare --help`."""
    lines = [f"  {name:<10}{summary}" for name, (_, summary) in PREPARATIONS.items()]
    return "\n".join(["usage: itemizedclip prepare WHAT [flags]        itemizedclip prepare WHAT --help", "", *lines])


def main(argv: Sequence[str] | None = None) -> None:
    """Run a preparation; exits 2 with the list of them when there is no such one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["--help"], ["-h"]):
        print(usage())
        return
    if not arguments or arguments[0] not in PREPARATIONS:
        problem = f"nothing named {arguments[0]} to prepare" if arguments else "not said what to prepare"
        print(f"itemizedclip prepare: {problem}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(EXIT_WRONG_FLAG)
    importlib.import_module(PREPARATIONS[arguments[0]][0]).main(arguments[1:])
