"""The embedded main job: train a small model on itemized scenes, evaluate it three ways, draw where its items looked.

    itemizedclip demo                          minutes on two CPU cores (recipe scenes)
    itemizedclip demo --recipe scenes_debug    seconds; the numbers mean nothing
    torchrun --nproc_per_node 2 -m itemizedclip demo

Nothing is downloaded: the scenes are made from handwritten digits that ship with scikit-learn. Every flag of training
is accepted; a finished run (`--name NAME --resume latest`) is evaluated and drawn again without training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from itemizedclip.data.batch import ItemCollator, Tokenizer
from itemizedclip.data.scenes import LEVELS, ScenesDataset
from itemizedclip.evaluation.attention import item_maps
from itemizedclip.evaluation.results import EvaluationReport, format_measure, write_results
from itemizedclip.evaluation.scenes import scene_evaluators
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.factory import create_transform
from itemizedclip.runtime.collectives import barrier
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.training.engine import Evaluator, TrainResult
from itemizedclip.training.options import (
    LoadingSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RunOptions,
    RunSettings,
)
from itemizedclip.training.own import OwnRun, own_like
from itemizedclip.training.recipes import Opening, TrainingData, open_data, parse_run, train_opened
from itemizedclip.training.run import launch_run
from itemizedclip.viewer.figures import attention_figure, save_figure
from itemizedclip.viewer.geometry import geometry_of_transform, map_to_input

logger = logging.getLogger(__name__)

DESCRIPTION = "Train a small model on the embedded itemized scenes, evaluate it, and draw where its items looked."


@dataclass(frozen=True)
class ScenesData:
    """Itemized scenes: how many and how hard."""

    level: str = "lattice"
    """Difficulty: lattice, easy, standard, crowded, held_out (a fifth of the pairs never in training), small, composed,
    relations, counts, negations, or hard (all of these)."""

    num_train: int = 2400
    """Training scenes."""

    num_test: int = 500
    """Test scenes, of handwriting that training never shows."""

    num_pictures: int = 3
    """Test scenes drawn with the attention of each of their items."""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UserError(f"--level is {self.level!r}; expected one of {', '.join(LEVELS)}")
        for name, lowest in (("num_train", 1), ("num_test", 1), ("num_pictures", 0)):
            if getattr(self, name) < lowest:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least {lowest}")

    def scenes(self, model: DualEncoder, split: Literal["train", "test"], seed: int) -> ScenesDataset:
        """Training scenes, whose items come in random order, or test scenes."""
        return ScenesDataset(
            split=split,
            num_scenes=self.num_train if split == "train" else self.num_test,
            level=self.level,
            seed=seed,
            transform=create_transform(model.config, is_train=False),
            shuffle_items=split == "train",
            keep_pixels=True,
        )

    def open(self, opening: Opening) -> TrainingData:
        """See `DataGroup`."""
        options = opening.options
        dataset = self.scenes(opening.model, "train", options.run.seed)
        test = self.scenes(opening.model, "test", options.run.seed)
        evaluators = scene_evaluators(test, opening.tokenizer, options.objective.scoring)
        return TrainingData(dataset, evaluators, dataset.fingerprint)


@dataclass(frozen=True)
class ScenesRun(RunOptions):
    """A run on itemized scenes."""

    data: ScenesData = field(default_factory=ScenesData)


def scenes() -> ScenesRun:
    """One to two minutes of training on two CPU cores; zero-shot macro AUC above 0.95, pointing game above 0.85."""
    return ScenesRun(
        run=RunSettings(val_frequency=0),
        model=ModelSettings(model="ViT-scenes-ItemizedCLIP", precision="auto"),
        objective=ObjectiveSettings(
            ila_weight=1.0,
            ila_keep_rate=1.0,
            kta_weight=1.0,
            key_token_fraction=0.1,
            mps_weight=0.5,
            iis_weight=1.0,
            worst_positive_factor=1.5,
            # 160 texts in batches of some 170 items: many negatives would read like the image's own items.
            mask_duplicates=True,
        ),
        optimizer=OptimizerSettings(lr=1e-3, lr_scheduler="const", weight_decay=0.1, eps=1e-8, warmup=50, epochs=16),
        loading=LoadingSettings(batch_size=32, num_sampled_captions=5, workers=0),
    )


def own_scenes() -> OwnRun:
    """Small pictures of your own, on a CPU: the smallest model, as itemized scenes train it."""
    recipe = replace(scenes(), model=ModelSettings(model="ViT-scenes-ItemizedCLIP", precision="auto"))
    return replace(own_like(recipe, join_items=False), run=RunSettings())


def scenes_debug() -> ScenesRun:
    """The same in seconds: a few steps on a few scenes, for tests; its numbers mean nothing."""
    recipe = scenes()
    return replace(
        recipe,
        optimizer=replace(recipe.optimizer, warmup=2, epochs=1),
        loading=replace(recipe.loading, batch_size=8),
        data=replace(recipe.data, num_train=48, num_test=60, num_pictures=1),
    )


RECIPES = {"scenes": scenes, "scenes_debug": scenes_debug}


# --- evaluation ----------------------------------------------------------------------------------------------------


def evaluate(
    model: DualEncoder, evaluators: Sequence[Evaluator], folder: Path, checkpoint: Path | None, *, is_main: bool
) -> dict[str, float]:
    """Run every evaluator and write results.json into the run folder."""
    metrics: dict[str, float] = {}
    facts: dict[str, Any] = {}
    for evaluator in evaluators:
        metrics |= {f"{evaluator.name}/{name}": value for name, value in evaluator.run(model).items()}
        facts[evaluator.name] = getattr(evaluator, "facts", {})
    if is_main:
        report = EvaluationReport("itemized scenes", "corrected", str(checkpoint), metrics, facts)
        write_results(folder / "results.json", report)
    return metrics


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_scenes(
    model: DualEncoder, tokenizer: Tokenizer, test: ScenesDataset, numbers: Sequence[int], folder: Path
) -> list[Path]:
    """One figure per scene: the image, and for each item where it looked, with the outline of the truth."""
    collate = ItemCollator(tokenizer)
    paths = []
    for number in numbers:
        scene = test.scene(number)
        maps = item_maps(model, collate([test[number]]))[0]
        geometry = geometry_of_transform(test.transform, (test.level.image_size, test.level.image_size))
        figure = attention_figure(
            scene.image,
            scene.items,
            map_to_input(maps.times_uniform(), geometry, "smooth"),
            maps.scores.tolist(),
            nowhere=maps.nowhere.tolist(),
            masks=scene.masks,
            title=f"scene {number}",
        )
        paths.append(save_figure(figure, folder / f"scene_{number}.png"))
    return paths


# --- entry -----------------------------------------------------------------------------------------------------------

SUMMARY = {
    "zero_shot/macro_auc": "zero-shot macro AUC over all colour-digit classes",
    "retrieval/text_to_image_R@1": "retrieval text → image, first",
    "retrieval/text_to_image_R@10": "retrieval text → image, among the first ten",
    "retrieval/image_to_text_R@1": "retrieval image → text, first",
    "contrast/mean": "right text rather than one wrong in one respect",
    "explain/pointing_game": "pointing game: attention peaks on the item",
    "explain/miou": "mIoU of attention and item",
    "explain/mll": "MLL: lowest score of an image's items (completeness)",
    "explain/mams": "mAMS: similarity of attention maps (independence; lower is better)",
}


def summary_table(result: TrainResult, metrics: dict[str, float]) -> Table:
    """What the run reached, for the terminal."""
    table = Table(title=f"Itemized scenes: {result.step} steps, {result.seconds:.0f} s", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, label in SUMMARY.items():
        if name in metrics:
            table.add_row(label, format_measure(name, metrics[name]))
    return table


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate, draw, summarise; returns the metrics."""
    options = parse_run(RECIPES, "scenes", argv, prog="itemizedclip demo", description=DESCRIPTION)
    with reported_errors("itemizedclip demo"), launch_run(options) as ranks:
        model = options.create_model()
        data, collator = open_data(options, model, ranks)
        result = train_opened(options, model, data, collator, ranks)
        model.eval()
        with torch.no_grad():
            metrics = evaluate(model, data.evaluators, result.folder, result.checkpoint, is_main=ranks.is_main)
        if ranks.is_main:
            scenes_drawn = options.data.num_pictures if options.objective.uses_head else 0
            test = options.data.scenes(model, "test", options.run.seed)
            numbers = range(min(scenes_drawn, len(test)))
            pictures = draw_scenes(model, collator.tokenizer, test, numbers, result.folder / "pictures")
            _print_summary(result, metrics, pictures)
        barrier()
        return metrics


def _print_summary(result: TrainResult, metrics: dict[str, float], pictures: Sequence[Path]) -> None:
    console = Console()
    console.print(summary_table(result, metrics))
    lines = [f"results    {result.folder / 'results.json'}", f"checkpoint {result.checkpoint}"]
    lines += [f"picture    {path}" for path in pictures]
    lines += [
        "",
        "What to run next:",
        "  itemizedclip demo --level crowded          the same on harder scenes (--help lists every flag)",
        "  itemizedclip --help                        reports, explanations and search with this checkpoint",
        "  bash train_rsicd.sh --help                 train on remote-sensing images",
        "  docs/own-data.md                           train on your own images",
    ]
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
