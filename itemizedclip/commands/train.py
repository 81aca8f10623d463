"""The command `itemizedclip train NAME`: a recipe by its name, of any package that is installed, or of your own file.

itemizedclip train --help                                       which recipes there are
itemizedclip train rsicd --rsicd-data-dir DIR --name rsicd
itemizedclip train shapes.py:shapes --folder DIR                function `shapes` of your own file
itemizedclip train mri --plan                                   what a step costs; no training
itemizedclip train mri --plan --nodes 8 --gpus 8 --network 200Gb     what it takes on so many machines
torchrun --nproc_per_node 8 -m itemizedclip train mri …         several processes
"""

from __future__ import annotations

from collections.abc import Sequence

from itemizedclip.commands.named import split_name
from itemizedclip.runtime.errors import reported_errors
from itemizedclip.training.engine import TrainResult
from itemizedclip.training.plan import plan_run, show_plan
from itemizedclip.training.recipes import RECIPES, parse_recipe, train_recipe
from itemizedclip.training.scaling import show_scaling, take_cluster_flags

PROG = "itemizedclip train"


def main(argv: Sequence[str] | None = None) -> TrainResult | None:
    """Parse the name and its flags, train; with --plan only tell what it would cost."""
    name, rest = split_name(argv, PROG, RECIPES, "[--plan] [flags of training]")
    is_plan = "--plan" in rest
    rest = [flag for flag in rest if flag != "--plan"]
    cluster, rest = take_cluster_flags(rest, PROG) if is_plan else (None, rest)
    options = parse_recipe(name, rest, prog=f"{PROG} {name}")
    with reported_errors(PROG):
        if is_plan:
            plan = plan_run(options)
            show_plan(plan, options)
            if cluster is not None:
                show_scaling(plan, options, cluster)
            return None
        return train_recipe(options)
