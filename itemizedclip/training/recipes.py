"""Recipes: a domain's training run in one place, found by name.

A recipe is a function that returns `RunOptions`; its docstring's first line is what --help says of it. It takes no
arguments, or words that decide its defaults: `own(like, finetune)` gets the values of --like and --finetune. The
options' group `data` opens itself: `data.open(opening) -> TrainingData`. Packages register recipes under the
entry-point group `itemizedclip.recipes`.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from itemizedclip.data.batch import ItemCollator, Tokenizer
from itemizedclip.evaluation.encoding import EncodingOptions, ItemDataset
from itemizedclip.evaluation.retrieval import RetrievalEvaluator
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.factory import create_tokenizer, create_transform, is_shipped
from itemizedclip.runtime.errors import EXIT_WRONG_FLAG, UserError, reported_errors
from itemizedclip.runtime.flags import loader_processes, read_flags
from itemizedclip.runtime.logs import shown
from itemizedclip.runtime.processes import Ranks
from itemizedclip.runtime.registry import Registry, unknown_name
from itemizedclip.training.engine import TrainResult, train
from itemizedclip.training.loading import BatchSource
from itemizedclip.training.options import RunOptions, flatten_options, options_to_dict
from itemizedclip.training.run import Evaluator, launch_run

OptionsT = TypeVar("OptionsT", bound=RunOptions)
Recipe = Callable[..., RunOptions]

RECIPES: Registry[Recipe] = Registry("itemizedclip.recipes", "recipe")
"""Every recipe of the packages that are installed."""


DRY_RUN_FLAG = "--dry-run"
"""Look at everything and take a step instead of training (`itemizedclip.training.dryrun`); no property of a run."""

MAX_VALIDATION_BATCH = 64
"""Images that a validation encodes at once, at most; training batches may be larger than what evaluation needs."""


@dataclass(frozen=True)
class Opening:
    """What the data of a run are told when they are opened, on every rank.

    Attributes:
        options: the whole run.
        model: on the CPU, with its initial weights.
        tokenizer: texts → int64 (N, C).
        collator: samples → batches of K item slots.
        ranks: this process among all.
    """

    options: RunOptions
    model: DualEncoder
    tokenizer: Tokenizer
    collator: ItemCollator
    ranks: Ranks

    def transform(self, *, is_train: bool) -> Callable[..., Tensor]:
        """RGB picture → what a model of photographs takes; at random places in training."""
        return create_transform(self.model.config, is_train=is_train)

    def encoding(self, batch_size: int | None = None) -> EncodingOptions:
        """How evaluators of the run encode; batches as in training, at most 64, unless another size is asked for."""
        loading = self.options.loading
        return EncodingOptions(
            batch_size=batch_size or min(MAX_VALIDATION_BATCH, loading.batch_size),
            num_workers=loader_processes(loading.workers),
            on_bad_sample=loading.on_bad_sample,
        )

    def retrieval(self, dataset: ItemDataset, name: str, *, batch_size: int | None = None) -> RetrievalEvaluator:
        """Retrieval between the images of a validation split and their items."""
        return RetrievalEvaluator(
            dataset,
            self.tokenizer,
            name=name,
            scoring=self.options.objective.scoring,
            encoding=self.encoding(batch_size),
        )


@dataclass(frozen=True)
class TrainingData:
    """What a domain gives the engine.

    Attributes:
        dataset: keys (epoch, index) → training sample; the same on every rank.
        evaluators: run every --val-frequency epochs.
        fingerprint: identity of the training data, for checkpoints.
        source: batches of the dataset in an order of its own; None leaves the order to the engine.
        transform: what was done to images, for checkpoints; None: what the model config says of photographs.
        at_end: called on every rank when training has ended, such as to report what was left out.
    """

    dataset: Any
    evaluators: Sequence[Evaluator] = ()
    fingerprint: str = ""
    source: BatchSource | None = None
    transform: Mapping[str, Any] | None = None
    at_end: Callable[[], None] = field(default=lambda: None)


class DataGroup(Protocol):
    """The group `data` of a recipe's options: flags that know how to open what they name."""

    def open(self, opening: Opening) -> TrainingData:
        """Open the data; called on every rank, inside the process group.

        Raises:
            UserError: what is missing or wrong, in one sentence.
        """


def run_on(data: Any, **groups: Any) -> RunOptions:
    """A run on these data: `RunOptions` with the group `data`, whose fields become flags.

    Args:
        data: a dataclass, constructible without arguments, with the method `open`.
        groups: other groups of the options, such as `loading`.
    """
    kind = type(data)
    with_data = [("data", kind, field(default_factory=kind))]
    options: type = dataclasses.make_dataclass(f"{kind.__name__}Run", with_data, bases=(RunOptions,), frozen=True)
    return options(data=data, **groups)


def open_data(options: RunOptions, model: DualEncoder, ranks: Ranks) -> tuple[TrainingData, ItemCollator]:
    """The data of a run and the collator of its batches.

    Raises:
        UserError: options without data; what the data raise.
    """
    data: DataGroup | None = getattr(options, "data", None)
    if data is None:
        raise UserError(f"{type(options).__name__} has no group `data`; give it one whose open() returns TrainingData")
    tokenizer = create_tokenizer(model.config, fetch=is_shipped(options.model.model), source=options.model.model)
    num_items = options.loading.num_sampled_captions
    collator = ItemCollator(
        tokenizer,
        num_items,
        join_items=options.objective.joins_items,
        contradictions=options.objective.uses_contradictions,
    )
    return data.open(Opening(options, model, tokenizer, collator, ranks)), collator


def train_recipe(options: RunOptions, *, ranks: Ranks | None = None) -> TrainResult:
    """Build the model, open the data, train: the whole of a recipe's run.

    Args:
        options: what a recipe returned, with the user's changes.
        ranks: from an enclosing `launch_run(options)`; without it the process group is joined here.

    Raises:
        UserError: what is missing or wrong, in one sentence.
    """
    if ranks is None:
        with launch_run(options) as own_ranks:
            return train_recipe(options, ranks=own_ranks)
    model = options.create_model()
    data, collator = open_data(options, model, ranks)
    return train_opened(options, model, data, collator, ranks)


def train_opened(
    options: RunOptions, model: DualEncoder, data: TrainingData, collator: ItemCollator, ranks: Ranks
) -> TrainResult:
    """Train a model on data that are open."""
    result = train(
        options,
        model=model,
        dataset=data.dataset,
        collator=collator,
        source=data.source,
        evaluators=data.evaluators,
        transform=data.transform,
        data_fingerprint=data.fingerprint,
        ranks=ranks,
    )
    data.at_end()
    return result


# --- flags -----------------------------------------------------------------------------------------------------------


def parse_recipe(
    name: str, argv: Sequence[str] | None = None, *, prog: str | None = None, recipe: Recipe | None = None
) -> RunOptions:
    """The options of a recipe with the flags that override it.

    Args:
        name: of a registered recipe, or FILE.py:NAME.
        argv: flags; the process's own when None.
        prog: name shown in messages.
        recipe: the recipe itself, where it is at hand.

    Raises:
        SystemExit: --help (0), or a recipe, a flag or a value that does not exist (2, after one message).
    """
    try:
        make = recipe or RECIPES.load(name)
        base = make(**_words(make, argv, prog))
    except UserError as error:
        _exit_with(prog, str(error))
    base = dataclasses.replace(base, run=dataclasses.replace(base.run, recipe=name))
    description = f"{inspect.getdoc(make) or ''}\n\nThe defaults below are those of the recipe {name}."
    return _writable(
        read_flags(type(base), argv, prog=prog, description=description, default=base, published=True), prog
    )


def _writable(options: OptionsT, prog: str | None) -> OptionsT:
    """Options that params.json and checkpoints can hold: paths whose names are no text they cannot."""
    for name, value in flatten_options(options_to_dict(options)).items():
        try:
            str(value).encode()
        except UnicodeEncodeError:
            flag = "--" + name.rpartition(".")[2].replace("_", "-")
            _exit_with(
                prog, f"{flag} is {value!r}, which is no text in UTF-8 and cannot be recorded: rename or link it"
            )
    return options


def _words(make: Recipe, argv: Sequence[str] | None, prog: str | None) -> dict[str, str]:
    """The flags that a recipe itself takes, which decide its other defaults."""
    names = list(inspect.signature(make).parameters)
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    for name in names:
        first.add_argument(f"--{name}", default="")
    found = first.parse_known_args(sys.argv[1:] if argv is None else list(argv))[0]
    return {name: getattr(found, name) for name in names}


def parse_run(
    recipes: Mapping[str, Callable[[], OptionsT]],
    default: str,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> OptionsT:
    """The options of one of several recipes, picked by --recipe, with the flags that override it.

    Args:
        recipes: name → function that returns options; the first line of its docstring is shown in --help.
        default: recipe used without --recipe.
        argv: flags; the process's own when None.
        prog: name shown in messages, such as train_rsicd.sh.
        description: first lines of --help.

    Raises:
        SystemExit: --help (0), or a flag, a value or a recipe that does not exist (2, after one message).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default=default)
    name = first.parse_known_args(arguments)[0].recipe
    if name not in recipes:
        _exit_with(prog, unknown_name("recipe", name, recipes))
    try:
        base = recipes[name]()
    except UserError as error:
        _exit_with(prog, f"recipe {name}: {error}")
    base = dataclasses.replace(base, run=dataclasses.replace(base.run, recipe=name))
    listed = "\n".join(
        f"  {key}: {(inspect.getdoc(make) or '').partition(chr(10))[0]}" for key, make in recipes.items()
    )
    shown = f"{description or ''}\n\nRecipes (--recipe NAME; defaults below are those of {name}):\n{listed}"
    return _writable(
        read_flags(type(base), arguments, prog=prog, description=shown, default=base, published=True), prog
    )


def train_door(
    names: Sequence[str], argv: Sequence[str] | None = None, *, prog: str = "main.py", description: str
) -> TrainResult | None:
    """Entry point of a published script: train one of these recipes, the first without --recipe; --dry-run: None."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    recipes: dict[str, Recipe] = {}
    with reported_errors(prog):
        recipes = {name: RECIPES.load(name) for name in names}
    flags = [flag for flag in arguments if flag != DRY_RUN_FLAG]
    options = parse_run(recipes, names[0], flags, prog=prog, description=description)
    with reported_errors(prog):
        if DRY_RUN_FLAG in arguments:
            from itemizedclip.training.dryrun import run_dry  # which opens recipes itself

            run_dry(options)
            return None
        return train_recipe(options)


def first_line(documented: Any) -> str:
    """First line of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _exit_with(prog: str | None, message: str) -> typing.NoReturn:
    print(f"{prog or Path(sys.argv[0]).name}: error: {shown(message)}", file=sys.stderr)
    raise SystemExit(EXIT_WRONG_FLAG)
