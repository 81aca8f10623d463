"""Itemized scenes as a benchmark: `itemizedclip evaluate scenes`, and what `itemizedclip demo` measures after training.

Nothing is read from disk: test scenes follow from a level and a seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from itemizedclip.data.batch import Tokenizer
from itemizedclip.data.scenes import LEVELS, SIZE_WORDS, ScenesDataset, class_labels, class_prompts
from itemizedclip.evaluation.benchmark import Benchmark, BenchmarkOptions, Subject
from itemizedclip.evaluation.classification import ClassPrompts, MultiLabelEvaluator
from itemizedclip.evaluation.contrast import ContrastEvaluator
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.explanation import ExplainEvaluator
from itemizedclip.evaluation.results import metrics_table
from itemizedclip.evaluation.retrieval import RetrievalEvaluator
from itemizedclip.evaluation.tcsim import Scoring
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.factory import create_transform
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.flags import at_least
from itemizedclip.runtime.logs import OnProgress

PATCH_PX = 8
"""Patch size of the recipes' model, px."""


def zero_shot_prompts(level: str) -> ClassPrompts:
    """Every colour-digit pair, asked for in each size: "a small red seven", "a large red seven"."""
    names = [prompt for prompt, _ in class_prompts(level)]
    bare = [name.partition(" ")[2] for name in names]
    return ClassPrompts(names, [[f"a {size} {name}" for size in SIZE_WORDS] for name in bare])


def scene_evaluators(
    test: ScenesDataset,
    tokenizer: Tokenizer,
    scoring: Scoring,
    encoding: EncodingOptions | None = None,
    *,
    patch_px: int = PATCH_PX,
) -> list[Any]:
    """Zero-shot over all colour-digit classes, retrieval, contrasts, and explanation metrics with the scenes' masks.

    A head that no objective trained (`--baseline clip`) has nothing to explain.
    """
    encoding = encoding or EncodingOptions(batch_size=50)
    evaluators: list[Any] = [
        MultiLabelEvaluator(
            test,
            tokenizer,
            zero_shot_prompts(test.level.name),
            class_labels(test),
            name="zero_shot",
            scorings=(scoring,),
            encoding=encoding,
        ),
        # Two scenes may both show "a small red seven": neither is wrong for the other.
        RetrievalEvaluator(
            test, tokenizer, name="retrieval", scoring=scoring, equal_texts_are_rivals=False, encoding=encoding
        ),
    ]
    evaluators.append(ContrastEvaluator(test, tokenizer, name="contrast", scoring=scoring, encoding=encoding))
    if scoring == "tcsim":
        # A map's peak is known to a patch: half of one (4 px) around the item's pen strokes still counts.
        evaluators.append(
            ExplainEvaluator(test, tokenizer, name="explain", tolerance_px=patch_px / 2, encoding=encoding)
        )
    return evaluators


@dataclass
class SceneEvaluators:
    """Several evaluators of the same images as one; see `ReportingEvaluator`."""

    evaluators: list[Any]
    name: str = "scenes"
    unit: str = "scenes"
    on_progress: OnProgress | None = None
    facts: dict[str, Any] = field(default_factory=dict, init=False)
    unusable: dict[int, str] = field(default_factory=dict, init=False)

    def run(self, model: DualEncoder) -> dict[str, float]:
        """The measures of each, its name in front; all ranks must call it."""
        metrics: dict[str, float] = {}
        for evaluator in self.evaluators:
            evaluator.on_progress = self.on_progress
            metrics |= {f"{evaluator.name}/{name}": value for name, value in evaluator.run(model).items()}
            self.facts[evaluator.name] = evaluator.facts
        return metrics


@dataclass(frozen=True, kw_only=True)
class ScenesOptions(BenchmarkOptions):
    """Itemized scenes, made from a seed: zero-shot AUC, retrieval, pointing game, mIoU, MLL and mAMS."""

    level: str = "lattice"
    """Difficulty: lattice, easy, standard, crowded, hard, … (docs/scenes.md)."""

    num_scenes: int = 500
    """Test scenes."""

    seed: int = 0
    """Seed of the scenes; that of the run gives the scenes it was tested on."""

    inference_with_flair: bool = True
    """Score by TCSim (item-conditioned attention), or by the cosine of global features (plain CLIP)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, num_scenes=1, seed=0)
        if self.level not in LEVELS:
            raise UserError(f"--level is {self.level!r}; expected one of {', '.join(LEVELS)}")

    def open(self, subject: Subject) -> Benchmark:
        """Test scenes of the level."""
        loaded = subject.loaded
        if loaded.input_kind != "photographs":
            raise UserError(f"{self.checkpoint}: its model takes studies; scenes are photographs")
        test = ScenesDataset(
            split="test",
            num_scenes=self.num_scenes,
            level=self.level,
            seed=self.seed,
            transform=create_transform(loaded.config, is_train=False),
            shuffle_items=False,
        )
        scoring: Scoring = "tcsim" if self.inference_with_flair else "global"
        patch_px = loaded.config["vision_cfg"]["patch_size"]
        evaluators = scene_evaluators(test, loaded.tokenizer, scoring, subject.encoding, patch_px=patch_px)
        return Benchmark(
            name="itemized scenes",
            evaluator=SceneEvaluators(evaluators),
            results=self.output or self.checkpoint.with_suffix(f".scenes.{self.level}.{scoring}.json"),
            table=partial(metrics_table, f"itemized scenes, {self.level}: {len(test):,} scenes"),
            facts=lambda: {"level": self.level, "seed": self.seed, "data": test.fingerprint},
        )
