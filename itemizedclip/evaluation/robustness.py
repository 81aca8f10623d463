"""How much of a score is what it should be: one table per checkpoint of what a score must and must not depend on.

    itemizedclip evaluate robustness --data my.jsonl --checkpoint epoch_30.pt
    itemizedclip evaluate robustness --data scenes --checkpoint epoch_16.pt

Of every image one item is asked (its first), and beside it an item of another image that this one does not have:
a model that sees prefers its own, chance is one half. The same is asked again in other words, negated, and of the image
with regions erased or series missing; the first item that has an opposite is asked beside it, and of the mirror image.

Axes: N images, T texts of one image, S series; *grid token axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from itemizedclip.data.batch import BadSampleError, ItemSample, Tokenizer
from itemizedclip.data.jsonl import OwnFile, check_files, read_own
from itemizedclip.data.opposites import LEFT_RIGHT, OPPOSITES, negated, swapped
from itemizedclip.data.scenes import LEVELS, ScenesDataset
from itemizedclip.evaluation.attention import maps_of_features
from itemizedclip.evaluation.benchmark import Benchmark, BenchmarkOptions, Subject
from itemizedclip.evaluation.encoding import (
    EncodingOptions,
    encode_image_batch,
    encode_texts,
    evaluation_mode,
    in_order_of_rows,
    model_device,
    number_texts,
    own_batches,
    read_items,
)
from itemizedclip.evaluation.evaluator import ItemDataset, facts_of_unusable, joined_unusable, sample_id_of
from itemizedclip.evaluation.intervals import Resampling, weighted_mean
from itemizedclip.evaluation.own import open_for_model
from itemizedclip.evaluation.results import format_measure
from itemizedclip.evaluation.tcsim import create_scorer, float_head
from itemizedclip.models.dual_encoder import DualEncoder, ImageFeatures
from itemizedclip.models.factory import create_transform
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.flags import at_least
from itemizedclip.runtime.logs import OnProgress, literal
from itemizedclip.runtime.processes import on_main

WORDINGS: dict[str, Callable[[str], str]] = {
    "there_is": lambda text: f"there is {text}",
    "consistent_with": lambda text: f"findings consistent with {text}",
    "full_stop": lambda text: f"{text.rstrip('.')}.",
    "upper_case": str.upper,
}
"""Name → the same item in other words."""

ERASED_SHARE = 0.1
"""Of the patches, in `erased_…`."""

CURVE_STEPS = 10
"""Shares 0, 1 / CURVE_STEPS, … 1 of the patches in the deletion and insertion curves."""


MEASURES = {
    "own": "own item rather than another image's",
    **{f"wording/{name}": f"the same, worded {name!r}" for name in WORDINGS},
    "negation": "item rather than its denial, where it is true",
    "negation_absent": "denial rather than the item, where that is false",
    "opposite": "item rather than its opposite (left for right, small for large, …)",
    "mirrored": "mirrored image: the item with left and right exchanged rather than as it was",
    "erased_attended": "drop of the score, its most attended tenth erased",
    "erased_elsewhere": "drop of the score, as many other patches erased",
    "attended_matters": "the first drop is the larger",
    "deletion": "mean score while patches are erased, most attended first (lower is better)",
    "deletion_random": "the same in random order",
    "insertion": "mean score while patches come back, most attended first (higher is better)",
    "insertion_random": "the same in random order",
    "order_change": "largest change of a score by the order of the items (must be 0)",
    "series_missing": "mean change of the score, one series left out",
    "series_missing_own": "own item rather than another's, one series left out",
}
"""Measure → what it says."""

SHARES = frozenset(
    {"own", "negation", "negation_absent", "opposite", "mirrored", "attended_matters", "series_missing_own"}
    | {name for name in MEASURES if name.startswith("wording/")}
)
"""Measures that are shares of images; chance is one half."""

_COLUMNS = tuple(MEASURES)


@dataclass
class RobustnessEvaluator:
    """The battery of `MEASURES`, means over the images that have them.

    Attributes:
        dataset: images with items.
        tokenizer: texts → int64 (M, C).
        name: prefix for logs.
        normalise_tokens: see `TcsimScorer`.
        encoding: precision of the towers, what to do about images that cannot be used.
        seed: of the other images' items and random orders.
        patients: whose each image is; None: each stands for itself.
        unit, on_progress, facts, unusable, resampling: see `ExplainEvaluator`.
    """

    dataset: ItemDataset
    tokenizer: Tokenizer
    name: str = "robustness"
    normalise_tokens: bool = True
    encoding: EncodingOptions = field(default_factory=EncodingOptions)
    seed: int = 0
    patients: Sequence[str] | None = None
    unit: str = "images"
    on_progress: OnProgress | None = None
    resampling: Resampling | None = field(default=None, init=False)
    facts: dict[str, Any] = field(default_factory=dict, init=False)
    unusable: dict[int, str] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def run(self, model: DualEncoder) -> dict[str, float]:
        """The measures, the same on every rank; all ranks must call it.

        Raises:
            BadSampleError: an image that cannot be used, with on_bad_sample="stop".
            UserError: no image has items, or scores are not finite.
        """
        unusable: dict[int, str] = {}
        with evaluation_mode(model):
            items = read_items(self.dataset, self.encoding, unusable)
            if not items:
                raise UserError(f"{self.name}: no image has an item")
            asked = {row: self._texts(row, items) for row in items}
            different, number_M = number_texts([text for own in asked.values() for text in own.values()])
            features_UD = encode_texts(model, self.tokenizer, different, self.encoding)
            numbers = dict(zip(asked, number_M.split([len(own) for own in asked.values()])))
            rows, findings = [torch.empty(0, dtype=torch.int64)], [torch.empty((0, len(_COLUMNS)), dtype=torch.float64)]
            mine = [row for batch in own_batches(len(self.dataset), 1) for row in batch if row in items]
            for done, row in enumerate(mine, start=1):
                try:
                    sample = self.dataset[row]
                except BadSampleError as error:
                    if self.encoding.on_bad_sample == "stop":
                        raise
                    unusable[row] = str(error)
                    continue
                texts_TD = features_UD[numbers[row].to(features_UD.device)]
                found = self._findings(model, sample, list(asked[row]), texts_TD, row)
                rows.append(torch.tensor([row]))
                findings.append(torch.tensor([[found.get(name, math.nan) for name in _COLUMNS]], dtype=torch.float64))
                if self.on_progress:
                    self.on_progress(done, len(mine))
        self.unusable = joined_unusable(self, unusable, len(self.dataset))
        columns = in_order_of_rows(torch.cat(rows), torch.cat(findings)).numpy()
        names = self.patients or [sample_id_of(self.dataset, row) for row in range(len(self.dataset))]
        used = [names[row] for row in sorted(items) if row not in self.unusable]
        self.resampling = Resampling(
            used, lambda weights: {name: weighted_mean(columns[:, at], weights) for at, name in enumerate(_COLUMNS)}
        )
        counts = {name: int((~np.isnan(columns[:, at])).sum()) for at, name in enumerate(_COLUMNS)}
        self.facts = {
            "num_images": len(columns),
            "images_of_measure": {name: count for name, count in counts.items() if count},
            "normalise_tokens": self.normalise_tokens,
            "seed": self.seed,
            **facts_of_unusable(self.dataset, self.unusable),
        }
        return {name: float(np.nanmean(columns[:, at])) for at, name in enumerate(_COLUMNS) if counts[name]}

    def _texts(self, row: int, items: Mapping[int, Sequence[str]]) -> dict[str, str]:
        """What is asked of an image: name → text."""
        own = items[row][0]
        rng = np.random.default_rng((self.seed, row))
        mine = {text.casefold() for text in items[row]}
        others = sorted({text for texts in items.values() for text in texts if text.casefold() not in mine})
        texts: dict[str, str | None] = {"own": own, "negation": negated(own)}
        for name, pairs in (("opposite", OPPOSITES), ("mirrored", LEFT_RIGHT)):
            of = next((text for text in items[row] if swapped(text, pairs)), None)
            texts |= {} if of is None else {f"{name}/of": of, name: swapped(of, pairs)}
        texts |= {f"wording/{name}": wording(own) for name, wording in WORDINGS.items()}
        if others:
            other = others[int(rng.integers(len(others)))]
            texts |= {"other": other, "other/negation": negated(other)}
            texts |= {f"other/wording/{name}": wording(other) for name, wording in WORDINGS.items()}
        texts |= {f"item {number}": text for number, text in enumerate(items[row])}
        return {name: text for name, text in texts.items() if text}

    def _findings(
        self, model: DualEncoder, sample: ItemSample, names: list[str], texts_TD: Tensor, row: int
    ) -> dict[str, float]:
        at = {name: number for number, name in enumerate(names)}
        features = self._encode(model, sample.image[None], sample.series_names)
        scores = self._scores(model, features, texts_TD)[0]
        found: dict[str, float] = {}

        def prefers(first: str, second: str, values: Tensor = scores) -> float | None:
            if first not in at or second not in at:
                return None
            return float(0.5 + 0.5 * torch.sign(values[at[first]] - values[at[second]]))

        compared = {
            "own": prefers("own", "other"),
            "negation": prefers("own", "negation"),
            "negation_absent": prefers("other/negation", "other"),
            "opposite": prefers("opposite/of", "opposite"),
            **{f"wording/{name}": prefers(f"wording/{name}", f"other/wording/{name}") for name in WORDINGS},
        }
        if "mirrored" in at:
            mirrored = self._encode(model, sample.image[None].flip(-1), sample.series_names)
            compared["mirrored"] = prefers("mirrored", "mirrored/of", self._scores(model, mirrored, texts_TD)[0])
        found |= {name: value for name, value in compared.items() if value is not None}
        found |= self._erased(model, sample, features, texts_TD[at["own"]][None], float(scores[at["own"]]), row)
        items = [at[name] for name in names if name.startswith("item ")]
        if len(items) > 1:
            backwards = self._scores(model, features, texts_TD[items[::-1]])[0].flip(0)
            found["order_change"] = float((backwards - scores[items]).abs().max())
        if sample.image.dim() == 5 and len(sample.image) > 1:
            changes, kept = [], []
            for left_out in range(len(sample.image)):
                rest = [series for series in range(len(sample.image)) if series != left_out]
                series_names = None if sample.series_names is None else sample.series_names[rest]
                partly = self._encode(model, sample.image[rest][None], series_names)
                values = self._scores(model, partly, texts_TD)[0]
                changes.append(float((values[at["own"]] - scores[at["own"]]).abs()))
                kept.append(prefers("own", "other", values))
            found["series_missing"] = float(np.mean(changes))
            shares = [value for value in kept if value is not None]
            found |= {"series_missing_own": float(np.mean(shares))} if shares else {}
        return found

    def _erased(
        self, model: DualEncoder, sample: ItemSample, features: ImageFeatures, own_1D: Tensor, score: float, row: int
    ) -> dict[str, float]:
        """What erasing patches does to the own item's score."""
        exact = ImageFeatures(features.global_BD, features.tokens_BLD.float(), features.grid)
        maps = maps_of_features(float_head(model.head), exact, own_1D[None], normalise_tokens=self.normalise_tokens)[0]
        order = maps.weights[0].flatten().argsort(descending=True).numpy()
        rng = np.random.default_rng((self.seed, row, 1))
        L = len(order)
        count = max(1, round(ERASED_SHARE * L))
        shuffled = rng.permutation(L)
        elsewhere = rng.permutation(order[count:])[:count]
        steps = [round(share * L / CURVE_STEPS) for share in range(CURVE_STEPS + 1)]
        erased = [order[:count], elsewhere]
        erased += [order[:step] for step in steps] + [shuffled[:step] for step in steps]
        erased += [order[step:] for step in steps] + [shuffled[step:] for step in steps]
        scores = []
        batch = max(1, self.encoding.batch_size)
        for start in range(0, len(erased), batch):
            images = torch.stack([erase(sample.image, part, features.grid) for part in erased[start : start + batch]])
            names = None if sample.series_names is None else sample.series_names.expand(len(images), -1, -1)
            own = self._encode(model, images, sample.series_names if names is None else names, batched=True)
            scores += self._scores(model, own, own_1D)[:, 0].tolist()
        curves = np.asarray(scores[2:]).reshape(4, len(steps)).mean(1)
        drops = [score - scores[0], score - scores[1]]
        return {
            "erased_attended": drops[0],
            "erased_elsewhere": drops[1],
            "attended_matters": float(0.5 + 0.5 * np.sign(drops[0] - drops[1])),
            **dict(zip(("deletion", "deletion_random", "insertion", "insertion_random"), curves.tolist())),
        }

    def _encode(
        self, model: DualEncoder, images: Tensor, series_names: Tensor | None, *, batched: bool = False
    ) -> ImageFeatures:
        names = series_names if series_names is None or batched else series_names[None]
        return encode_image_batch(model, images.to(model_device(model)), self.encoding, series_names=names)

    def _scores(self, model: DualEncoder, features: ImageFeatures, texts_TD: Tensor) -> Tensor:
        scorer = create_scorer(model.head, texts_TD, "tcsim", normalise_tokens=self.normalise_tokens)
        scores_BT = scorer.score(features).cpu()
        if not torch.isfinite(scores_BT).all():
            raise UserError(f"{self.name}: scores are not finite: check the weights and the precision")
        return scores_BT


def erase(image: Tensor, patches: np.ndarray, grid: tuple[int, ...]) -> Tensor:
    """An image with patches replaced by its mean, per channel of a photograph, per series of a study.

    Args:
        image: (3, H, W) or (S, 1, D, H, W).
        patches: numbers of tokens, in the order of the flattened grid.
        grid: (h, w) or (S, d, h, w).
    """
    gone = torch.zeros(math.prod(grid), dtype=image.dtype)
    gone[torch.from_numpy(np.ascontiguousarray(patches))] = 1
    if len(grid) == 2:
        mask = F.interpolate(gone.view(1, 1, *grid), size=image.shape[1:], mode="nearest")[0]
        mean = image.mean((1, 2), keepdim=True)
    else:
        mask = F.interpolate(gone.view(grid[0], 1, *grid[1:]), size=image.shape[2:], mode="nearest")
        mean = image.mean((1, 2, 3, 4), keepdim=True)
    return torch.where(mask > 0, mean, image)


def robustness_table(title: str, metrics: Mapping[str, float]) -> Table:
    """The battery, with what each measure says."""
    table = Table(title=literal(title), title_justify="left")
    table.add_column("measure", no_wrap=True)
    table.add_column("", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    for name, value in metrics.items():
        shown = f"{100 * value:.1f} %" if name in SHARES else format_measure(name, value)
        table.add_row(literal(name), MEASURES[name], shown)
    return table


@dataclass(frozen=True, kw_only=True)
class RobustnessOptions(BenchmarkOptions):
    """What a score depends on: wording, negation, sides, erased regions, item order, missing series, in one table."""

    data: Path
    """File of your images or studies with items (docs/own-data.md), or scenes: embedded ones."""

    split: Literal["test", "val", "train", "all"] = "all"
    """Which entries of the file."""

    level: str = "relations"
    """Level of the embedded scenes."""

    num: int = 50
    """Images, the first ones; each takes some 50 forward passes."""

    image_root: Path | None = None
    """Folder that the paths are relative to; default: that of the file."""

    normalise_tokens: bool = True
    """L2-normalise image tokens before the head, as the published zero-shot evaluations do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, num=2)
        if self.level not in LEVELS:
            raise UserError(f"--level is {self.level!r}; expected one of {', '.join(LEVELS)}")

    def open(self, subject: Subject) -> Benchmark:
        """The images as the model reads them."""
        patients: list[str] | None = None
        dataset: Any
        if str(self.data) == "scenes":
            transform = create_transform(subject.loaded.config, is_train=False)
            dataset = ScenesDataset(split="test", num_scenes=self.num, level=self.level, seed=0, transform=transform)
            facts = {"level": self.level}
        else:
            file = on_main(self._read)
            dataset = open_for_model(file, subject.loaded)
            patients = [entry.patient or entry.name for entry in file.entries]
            facts = {"file": str(file.path), "data_fingerprint": file.fingerprint}
        evaluator = RobustnessEvaluator(
            dataset,
            subject.loaded.tokenizer,
            normalise_tokens=self.normalise_tokens,
            encoding=replace(subject.encoding, num_workers=0),
            patients=patients,
        )
        title = f"Robustness: {self.checkpoint.name}, {len(dataset):,} images; shares: chance is 50 %"
        return Benchmark(
            name="robustness",
            evaluator=evaluator,
            results=self.output or self.checkpoint.with_suffix(f".robustness.{self.data.stem}.json"),
            table=lambda metrics: robustness_table(title, metrics),
            facts=lambda: facts,
        )

    def _read(self) -> OwnFile:
        whole = read_own(self.data, root=self.image_root, on_bad_sample=self.on_bad_sample)
        entries = whole.entries if self.split == "all" else whole.part(self.split).entries
        kept = tuple(entry for entry in entries if entry.items)[: self.num]
        if not kept:
            raise UserError(f"{whole.path}: no entry of split {self.split} has items")
        file = replace(whole, entries=kept)
        check_files(file, max_missing=1.0 if self.on_bad_sample == "skip" else 0.0)
        return file
