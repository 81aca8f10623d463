"""The command `itemizedclip evaluate`: a checkpoint on a named benchmark.

itemizedclip evaluate rsicd --checkpoint epoch_100.pt --rsicd-data-dir DIR
itemizedclip evaluate rsna --checkpoint epoch_24.pt --data-dir DIR
torchrun --nproc_per_node 8 -m itemizedclip evaluate rsna …          the same numbers
"""

from __future__ import annotations

from collections.abc import Sequence

from itemizedclip.commands.named import load_named, split_name
from itemizedclip.evaluation.benchmark import BENCHMARKS, evaluate_from_flags

PROG = "itemizedclip evaluate"


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Entry point of `itemizedclip evaluate`; exits 2 when there is no such benchmark."""
    name, flags = split_name(argv, PROG, BENCHMARKS, "[flags]")
    kind = load_named(BENCHMARKS, name, PROG)
    return evaluate_from_flags(kind, flags, prog=f"{PROG} {name}")
