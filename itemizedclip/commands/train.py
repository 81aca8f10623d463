"""The command `itemizedclip train NAME`: a recipe by its name, of any package that is installed, or of your own file.

itemizedclip train --help                                       which recipes there are
itemizedclip train rsicd --rsicd-data-dir DIR --name rsicd
itemizedclip train shapes.py:shapes --folder DIR                function `shapes` of your own file
itemizedclip train mri --plan                                   what a step costs; no training
itemizedclip train mri … --dry-run                              would it start, and what does an epoch cost? One step
itemizedclip train mri --plan --nodes 8 --gpus 8 --network 200Gb     what it takes on so many machines
torchrun --nproc_per_node 8 -m itemizedclip train mri …         several processes
"""

from __future__ import annotations

from collections.abc import Sequence

from itemizedclip.commands.named import split_name
from itemizedclip.runtime.errors import reported_errors
from itemizedclip.training.dryrun import run_dry
from itemizedclip.training.engine import TrainResult
from itemizedclip.training.plan import plan_run, show_plan
from itemizedclip.training.recipes import DRY_RUN_FLAG, RECIPES, parse_recipe, train_recipe
from itemizedclip.training.scaling import show_scaling, take_cluster_flags

PROG = "itemizedclip train"


def main(argv: Sequence[str] | None = None) -> TrainResult | None:
    """Parse the name and its flags, train; with --plan or --dry-run only tell what that would take."""
    name, rest = split_name(argv, PROG, RECIPES, "[--plan | --dry-run] [flags of training]")
    flags = [flag for flag in rest if flag not in ("--plan", DRY_RUN_FLAG)]
    is_plan = "--plan" in rest
    cluster, flags = take_cluster_flags(flags, PROG) if is_plan else (None, flags)
    options = parse_recipe(name, flags, prog=f"{PROG} {name}")
    with reported_errors(PROG):
        if is_plan:
            plan = plan_run(options)
            show_plan(plan, options)
            if cluster is not None:
                show_scaling(plan, options, cluster)
            return None
        if DRY_RUN_FLAG in rest:
            run_dry(options)
            return None
        return train_recipe(options)
