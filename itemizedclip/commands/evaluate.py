"""The command `itemizedclip evaluate`: a checkpoint on a named benchmark.

itemizedclip evaluate rsicd --checkpoint epoch_100.pt --rsicd-data-dir DIR
itemizedclip evaluate rsna --checkpoint epoch_24.pt --data-dir DIR
torchrun --nproc_per_node 8 -m itemizedclip.commands.evaluate rsna …          the same numbers
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from itemizedclip.evaluation.benchmark import BENCHMARKS, description_of, evaluate_from_flags
from itemizedclip.runtime.errors import EXIT_WRONG_FLAG, reported_errors
from itemizedclip.runtime.registry import MissingExtraError

PROG = "itemizedclip evaluate"


def usage() -> str:
    """The text of `itemizedclip evaluate --help`."""
    names = BENCHMARKS.names()
    width = max(map(len, names), default=0) + 2
    return "\n".join(
        [
            f"usage: {PROG} BENCHMARK [flags]        {PROG} BENCHMARK --help",
            "",
            "A checkpoint on a benchmark: a table, and results.json for programs.",
            "",
            "benchmarks:",
            *(f"  {name:<{width}}{_summary(name)}" for name in names),
        ]
    )


def _summary(name: str) -> str:
    try:
        return description_of(BENCHMARKS.load(name))
    except MissingExtraError as error:
        return f"needs {error.remedy}"


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Entry point of `itemizedclip evaluate`; exits 2 when there is no such benchmark."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["--help"], ["-h"]):
        print(usage())
        return {}
    if not arguments or arguments[0] not in BENCHMARKS.names():
        names = ", ".join(BENCHMARKS.names())
        problem = BENCHMARKS.unknown(arguments[0]) if arguments else f"name a benchmark first: {names}"
        print(f"{PROG}: error: {problem}", file=sys.stderr)
        raise SystemExit(EXIT_WRONG_FLAG)
    name, *flags = arguments
    with reported_errors(PROG):
        kind = BENCHMARKS.load(name)
    return evaluate_from_flags(kind, flags, prog=f"{PROG} {name}")


if __name__ == "__main__":
    main()
