"""The functions of `import itemizedclip as ic`; import them from there.

Axes: N images, M texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from itemizedclip.data.batch import ItemCollator, Tokenizer
from itemizedclip.evaluation.benchmark import BENCHMARKS
from itemizedclip.evaluation.benchmark import evaluate as evaluate_benchmark
from itemizedclip.evaluation.calibration import FILE_NAME, Calibration, Judgement, calibration_of, judge_images
from itemizedclip.evaluation.encoding import EncodingOptions, encode_image_batch, encode_texts, number_texts
from itemizedclip.evaluation.tcsim import Scoring, create_scorer
from itemizedclip.models import factory, weights
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.factory import LoadedModel
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.processes import choose_device
from itemizedclip.search.index import open_index
from itemizedclip.training import engine
from itemizedclip.training.engine import TrainResult
from itemizedclip.training.options import RunOptions
from itemizedclip.training.recipes import RECIPES, train_recipe
from itemizedclip.training.run import Evaluator
from itemizedclip.viewer.explanation import Explainer, Explanation
from itemizedclip.viewer.inputs import ModelInput, open_input, photograph_input

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
"""A path (of a study too), a picture, a uint8 array (H, W, 3), or a tensor as the model takes it."""

__all__ = [
    "calibrated",
    "create_model_and_transforms",
    "evaluate",
    "explain",
    "list_benchmarks",
    "list_models",
    "list_recipes",
    "load",
    "open_index",
    "score",
    "train",
]


def load(
    source: str | Path, *, model: str | None = None, text_model: str | None = None, device: str = "auto"
) -> LoadedModel:
    """A trained model, in evaluation mode, on its device.

    Args:
        source: checkpoint of a run or a released one (.pt, .safetensors), a run folder, or "hf-hub:owner/name".
        model: model name or config .json; only for released checkpoints, which do not carry their config.
        text_model: BERT folder or hub name whose tokenizer a released checkpoint uses.
        device: auto (a GPU when there is one), cpu, cuda or cuda:N.

    Returns:
        `.model`, `.tokenizer`, `.transform`, `.config`, and what the checkpoint says of its run in `.meta`.

    Raises:
        UserError: no such file, weights that do not fit, no network; the message says what to do.

    >>> loaded = load("nowhere.pt")
    Traceback (most recent call last):
    itemizedclip.models.weights.CheckpointError: nowhere.pt: checkpoint does not exist
    """
    loaded = factory.load_pretrained(weights.find_checkpoint(source), config=model, text_model=text_model)
    loaded.model.to(choose_device(device, 0, 1))
    return loaded


def create_model_and_transforms(
    name: str | Mapping[str, Any],
) -> tuple[DualEncoder, Callable[..., Tensor], Tokenizer]:
    """A model with fresh weights, the transform of its images in evaluation, and its tokenizer.

    Args:
        name: one of `list_models()`, the path of a config .json, or a config.

    Raises:
        UserError: no such model, or a config that is none.

    >>> model, transform, tokenizer = create_model_and_transforms("ViT-scenes-ItemizedCLIP")
    >>> tokenizer(["a small red seven"]).shape[0]
    1
    """
    model = factory.create_model(name)
    loaded = LoadedModel(model, model.config, factory.create_tokenizer(model.config, fetch=factory.is_shipped(name)))
    return model, loaded.transform, loaded.tokenizer


def list_models() -> list[str]:
    """Names that `create_model_and_transforms` and `--model` accept.

    >>> "ViT-B-16-ItemizedCLIP" in list_models()
    True
    """
    return factory.list_models()


def list_recipes() -> list[str]:
    """Names that `train` and `itemizedclip train` accept.

    >>> "rsicd" in list_recipes()
    True
    """
    return RECIPES.names()


def list_benchmarks() -> list[str]:
    """Names that `evaluate` and `itemizedclip evaluate` accept."""
    return BENCHMARKS.names()


def calibrated(
    loaded: LoadedModel, images: ImageLike | Sequence[ImageLike], *, calibration: Calibration | None = None
) -> list[dict[str, Judgement]]:
    """What calibrated findings say of each image: probability, conformal set, yes or no at fixed sensitivities.

    Args:
        loaded: from `load`.
        images: N images or studies, or one.
        calibration: of these weights; None: calibration.json beside the checkpoint (`itemizedclip calibrate`).

    Returns:
        For each image finding → `Judgement`.

    Raises:
        UserError: no calibration of these weights, or a file that cannot be read.
    """
    if calibration is None:
        calibration = calibration_of(loaded.source) if loaded.source else None
    if calibration is None:
        raise UserError(
            f"{loaded.source or 'this model'}: no {FILE_NAME} of these weights beside it; make one with "
            "itemizedclip calibrate"
        )
    judgements = []
    for image in _listed(images):
        source = as_input(loaded, image)
        names = None if source.series_names is None else source.series_names[None]
        features = encode_image_batch(loaded.model, source.image[None], EncodingOptions(), series_names=names)
        judgements += judge_images(loaded.model, loaded.tokenizer, calibration, features)
    return judgements


@torch.no_grad()
def score(
    loaded: LoadedModel,
    images: ImageLike | Sequence[ImageLike],
    texts: str | Sequence[str],
    *,
    scoring: Scoring = "tcsim",
    normalise_tokens: bool = False,
) -> Tensor:
    """How well each text fits each image.

    Args:
        loaded: from `load`.
        images: N images or studies, or one.
        texts: M texts, or one.
        scoring: "tcsim" (paper: TCSim), or "global" for the cosine of global features, as plain CLIP scores.
        normalise_tokens: L2-normalise image tokens before the head, as the published zero-shot evaluations do; changes
            the third decimal.

    Returns:
        (N, M), float32, on the CPU: cosines, no probabilities.

    Raises:
        UserError: a file that cannot be read, or no text.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise UserError("no text to score; give at least one")
    different, number_M = number_texts(texts)
    options = EncodingOptions()
    features_UD = encode_texts(loaded.model, loaded.tokenizer, different, options)
    scorer = create_scorer(loaded.model.head, features_UD, scoring, normalise_tokens=normalise_tokens)
    rows = []
    for image in _listed(images):
        source = as_input(loaded, image)
        names = None if source.series_names is None else source.series_names[None]
        features = encode_image_batch(loaded.model, source.image[None], options, series_names=names)
        rows.append(scorer.score(features).cpu()[:, number_M])
    return torch.cat(rows) if rows else torch.empty(0, len(texts))


def explain(
    loaded: LoadedModel,
    image: ImageLike | ModelInput,
    items: str | Sequence[str] | None = None,
    *,
    normalise_tokens: bool = False,
) -> Explanation:
    """Where each text looks in one image or study.

    Args:
        loaded: from `load`.
        image: an image or study.
        items: T texts, or one; None asks the items that belong to the input, such as a report's.
        normalise_tokens: see `score`.

    Returns:
        `.scores` (T,), `.maps` (attention over the token grid), `.save(folder)` (pictures, NIfTI volumes, JSON).

    Raises:
        UserError: a file that cannot be read, or no text.
    """
    source = image if isinstance(image, ModelInput) else as_input(loaded, image)
    texts = [items] if isinstance(items, str) else list(source.items if items is None else items)
    if not texts:
        raise UserError(f"{source.name}: no text to look for; give at least one item")
    return Explainer(loaded, source, normalise_tokens=normalise_tokens).explain(texts)


def as_input(loaded: LoadedModel, image: ImageLike) -> ModelInput:
    """An image as the model takes it and as viewers show it; a tensor has no view.

    Raises:
        UserError: a file that cannot be read, or an array that is no picture.
    """
    if isinstance(image, (str, Path)):
        return open_input(image, loaded)
    if isinstance(image, Tensor):
        return ModelInput("tensor", image, [])
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise UserError(f"an array of {image.dtype} {image.shape}; expected uint8 (H, W) or (H, W, 3)")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UserError(f"a {type(image).__name__}; expected a path, a picture, an array or a tensor")
    return photograph_input("image", image.convert("RGB"), loaded)


def _listed(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    if isinstance(images, (str, Path, Image.Image)):
        return [images]
    if isinstance(images, (np.ndarray, Tensor)):
        # One image has 2 or 3 axes as an array, 3 or 5 as a tensor; one axis more is a batch.
        single = images.ndim in ((2, 3) if isinstance(images, np.ndarray) else (3, 5))
        return [images] if single else list(images)
    return list(images)


def train(
    options: RunOptions | str,
    *,
    model: DualEncoder | None = None,
    dataset: Any = None,
    evaluators: Sequence[Evaluator] = (),
) -> TrainResult:
    """Train by a recipe, or any model on any dataset.

    Args:
        options: what a recipe returned, with your changes; or a recipe's name, to train with its defaults.
        model: instead of the recipe's, with its initial weights, on the CPU; needs `dataset`.
        dataset: keys (epoch, index) → `ItemSample`, instead of the recipe's data; needs `model`.
        evaluators: run every --val-frequency epochs; with `dataset`.

    Returns:
        The run's folder, newest checkpoint, metrics and losses.

    Raises:
        UserError: what is missing or wrong, in one sentence.
    """
    if isinstance(options, str):
        options = RECIPES.load(options)()
    assert isinstance(options, RunOptions)
    if dataset is None and model is None:
        return train_recipe(options)
    if dataset is None or model is None:
        raise UserError("train() takes model and dataset together, or neither for the recipe's own")
    tokenizer = factory.create_tokenizer(model.config)
    num_items = options.loading.num_sampled_captions
    collator = ItemCollator(
        tokenizer,
        num_items,
        join_items=options.objective.joins_items,
        contradictions=options.objective.uses_contradictions,
    )
    fingerprint = str(getattr(dataset, "fingerprint", ""))
    return engine.train(
        options,
        model=model,
        dataset=dataset,
        collator=collator,
        evaluators=evaluators,
        data_fingerprint=fingerprint,
    )


def evaluate(source: LoadedModel | str | Path, name: str, **settings: Any) -> dict[str, float]:
    """A benchmark by its name; writes its results beside the checkpoint, like `itemizedclip evaluate`.

    Args:
        source: a checkpoint, or what `load` made of one.
        name: one of `list_benchmarks()`, or FILE.py:NAME.
        settings: the benchmark's flags, with underscores.

    Returns:
        Measure → value.

    Raises:
        UserError: no such benchmark, a checkpoint or data that cannot be used.
    """
    checkpoint = Path(source.source) if isinstance(source, LoadedModel) else weights.find_checkpoint(source)
    return evaluate_benchmark(BENCHMARKS.load(name)(checkpoint=checkpoint, **settings))
