"""The command `itemizedclip prepare WHAT`: what a person has → what training reads.

itemizedclip prepare items SOURCE --to OUT                  reports or redundant captions → independent text items
itemizedclip prepare studies SOURCE --to OUT --recipe mri   DICOM and NIfTI → volumes (of the radiology package)

Packages register theirs under the entry-point group `itemizedclip.preparations`: name → `main(argv)`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from itemizedclip.runtime.errors import EXIT_WRONG_FLAG, reported_errors
from itemizedclip.runtime.registry import Registry

PREPARATIONS: Registry[Callable[[Sequence[str]], object]] = Registry("itemizedclip.preparations", "preparation")
"""Name → `main(argv)` of a command."""


def usage() -> str:
    """The text of `itemizedclip prepare --help`."""
    names = ", ".join(PREPARATIONS.names())
    return (
        "usage: itemizedclip prepare WHAT [flags]        itemizedclip prepare WHAT --help\n\n"
        f"What a person has → what training reads. WHAT is one of: {names}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a preparation; exits 2 with the list of them when there is no such one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["--help"], ["-h"]):
        print(usage())
        return
    if not arguments or arguments[0] not in PREPARATIONS.names():
        problem = PREPARATIONS.unknown(arguments[0]) if arguments else "not said what to prepare"
        print(f"itemizedclip prepare: {problem}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(EXIT_WRONG_FLAG)
    with reported_errors("itemizedclip prepare"):
        command = PREPARATIONS.load(arguments[0])
    command(arguments[1:])
