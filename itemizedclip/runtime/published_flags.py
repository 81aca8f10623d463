"""Flags of the published scripts that these commands do not have: taken, and said to be without effect, or translated.

A flag that a command has itself is never looked up here.
"""

from __future__ import annotations

import dataclasses
import logging
import typing
from collections.abc import Sequence
from typing import Annotated, Any

logger = logging.getLogger(__name__)

IGNORED: dict[str, tuple[int, str]] = {
    "--add-mps-loss": (0, "the weight --mps-weight alone switches the term on"),
    "--batch-size": (1, "pictures are drawn one by one"),
    "--caption-pad-to-train": (1, "items are padded to --num-sampled-captions"),
    "--caption-pad-to-val": (1, "validation takes all items"),
    "--caption-sampling-mode": (1, "training draws items as the paper does, evaluation takes all"),
    "--classification-dataset": (1, "the script names the data set"),
    "--dataset-type": (1, "the recipe names the data set"),
    "--dist-url": (1, "torchrun tells the processes of each other"),
    "--global-retrieval": (0, "validation always reports it where the head is not trained"),
    "--inference-with-flair": (0, "scores are TCSim and the cosine of global features, both reported"),
    "--is-ct-rate": (0, "the recipe says so"),
    "--num-sampled-captions": (1, "all items are shown"),
    "--precision": (1, "pictures are drawn in the precision of the weights"),
    "--retrieval-coco": (0, "the script names the data set"),
    "--retrieval-flickr": (0, "the script names the data set"),
    "--save-and-eval-every": (1, "--save-frequency and --val-frequency count epochs"),
    "--train-data": (1, "the recipe finds its training split in the data folder"),
    "--train-dataset-type": (1, "the recipe names the data set"),
    "--train-num-samples": (1, "an epoch is every image once"),
    "--use-cxr-bert": (0, "the recipe names the text model; --text-model gives another"),
    "--use-flair-loss": (0, "the objective is itemized; --baseline names others"),
    "--use-itemizedclip-loss": (0, "it is the only loss but for --baseline"),
    "--val-data": (1, "the recipe finds its validation split in the data folder"),
    "--val-flair-retrieval-metrics": (0, "validation always reports them"),
    "--workers": (1, "pictures are read one by one"),
    "--zeroshot-ct-rate": (0, "labels beside the data are found; --labels names others"),
}
"""Flag → (values it takes, why it has no effect)."""

RENAMED = {"--wandb-project-name": "--wandb-project", "--zeroshot-frequency": "--val-frequency"}
"""Flag → what the command calls it."""


def own_flags(kind: Any) -> set[str]:
    """Every flag of a dataclass of options, its groups and aliases included."""
    flags: set[str] = set()
    hints = typing.get_type_hints(kind, include_extras=True)
    for entry in dataclasses.fields(kind):
        hint = hints[entry.name]
        extras: list[Any] = []
        if typing.get_origin(hint) is Annotated:
            hint, *extras = typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            flags |= own_flags(hint)
            continue
        flags.add("--" + entry.name.replace("_", "-"))
        for extra in extras:
            flags |= set(getattr(extra, "aliases", None) or ())
    return flags


def without_published(kind: Any, arguments: Sequence[str]) -> list[str]:
    """Arguments with the published flags that `kind` lacks taken out or renamed; each is said once in the log.

    Args:
        kind: the command's options.
        arguments: as given.
    """
    own = own_flags(kind)
    kept: list[str] = []
    said: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        flag, separator, value = rest[0].partition("=")
        is_bare = not separator and (len(rest) == 1 or rest[1].startswith("--"))
        if flag in RENAMED and flag not in own and RENAMED[flag] in own:
            kept.append(RENAMED[flag] + separator + value)
        elif flag in IGNORED and (flag not in own or (is_bare and IGNORED[flag][0] == 0)):
            num_values, said[flag] = IGNORED[flag]
            del rest[: 0 if separator else min(num_values, len(rest) - 1)]
        else:
            kept.append(rest[0])
        del rest[0]
    if said:
        reasons = "; ".join(f"{flag} ({reason})" for flag, reason in said.items())
        logger.info("flags of the published scripts without effect here: %s", reasons)
    return kept
