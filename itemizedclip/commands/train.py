"""The command `itemizedclip train NAME`: a recipe by its name, of any package that is installed, or of your own file.

itemizedclip train --help                                       which recipes there are
itemizedclip train rsicd --rsicd-data-dir DIR --name rsicd
itemizedclip train shapes.py:shapes --folder DIR                function `shapes` of your own file
torchrun --nproc_per_node 8 -m itemizedclip train mri …         several processes
"""

from __future__ import annotations

from collections.abc import Sequence

from itemizedclip.commands.named import split_name
from itemizedclip.runtime.errors import reported_errors
from itemizedclip.training.engine import TrainResult
from itemizedclip.training.recipes import RECIPES, parse_recipe, train_recipe

PROG = "itemizedclip train"


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Parse the name and its flags, train."""
    name, rest = split_name(argv, PROG, RECIPES, "[flags of training]")
    options = parse_recipe(name, rest, prog=f"{PROG} {name}")
    with reported_errors(PROG):
        return train_recipe(options)
