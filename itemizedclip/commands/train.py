"""The command `itemizedclip train NAME`: a recipe by its name, of any package that is installed, or of your own file.

itemizedclip train --help                                       which recipes there are
itemizedclip train rsicd --rsicd-data-dir DIR --name rsicd
itemizedclip train shapes.py:shapes --folder DIR                function `shapes` of your own file
itemizedclip train mri --plan                                   what a step costs; no training
torchrun --nproc_per_node 8 -m itemizedclip train mri …         several processes
"""

from __future__ import annotations

from collections.abc import Sequence

from itemizedclip.commands.named import split_name
from itemizedclip.runtime.errors import reported_errors
from itemizedclip.training.engine import TrainResult
from itemizedclip.training.plan import plan_run, show_plan
from itemizedclip.training.recipes import RECIPES, parse_recipe, train_recipe

PROG = "itemizedclip train"


def main(argv: Sequence[str] | None = None) -> TrainResult | None:
    """Parse the name and its flags, train; with --plan only tell what it would cost."""
    name, rest = split_name(argv, PROG, RECIPES, "[--plan] [flags of training]")
    is_plan = "--plan" in rest
    rest = [flag for flag in rest if flag != "--plan"]
    options = parse_recipe(name, rest, prog=f"{PROG} {name}")
    with reported_errors(PROG):
        if is_plan:
            show_plan(plan_run(options), options)
            return None
        return train_recipe(options)
