"""Whether a model config can be built, before anything is: its fields, how they fit, and how large the model would be.

Configs come from files and from checkpoints of strangers. None is trusted: one that cannot be built and one of a size
that no machine has are refused in one sentence, in milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.fields import (
    Rule,
    check_fields,
    is_plain,
    number,
    one_of,
    plain_object,
    several,
    text,
    whole,
)

MAX_WIDTH = 65_536
"""Of any layer; the largest published towers have 16,384."""

MAX_LAYERS = 1_000
"""Of any tower."""

MAX_SIDE = 4_096
"""Pixels or voxels along any axis of an input."""

MAX_NUMBERS = 10_000_000_000
"""Parameters and constants of a model, 40 GB in float32; the largest published dual encoders have half."""

_BYTES_PER_NUMBER = 4

_TOP_RULES: dict[str, Rule] = {
    "embed_dim": whole(1, MAX_WIDTH),
    "vision_cfg": plain_object(),
    "text_cfg": plain_object(),
    "head_heads": whole(1, 1024),
    "init_logit_scale": number(-100, 100),
    "init_logit_bias": number(-10_000, 10_000),
    "preprocess": plain_object(),
    "name": text(),
}

_PREPROCESS_RULES: dict[str, Rule] = {
    "image_size": whole(1, MAX_SIDE),
    "mean": several(number(-100, 100), 3),
    "std": several(number(1e-6, 1e6), 3),
    "interpolation": one_of(["bicubic", "bilinear"]),
    "resize_mode": one_of(["shortest", "longest", "squash"]),
    "train_scale": several(number(0.0001, 1), 2),
}


def check_common(config: Any) -> None:
    """Refuse a config whose fields that every family has cannot be; the towers are the family's to check.

    Raises:
        UserError: names the field, what it holds and what was expected.
    """
    if not isinstance(config, Mapping):
        raise UserError("expected a model config, an object {…}")
    if not is_plain(dict(config)):
        raise UserError("holds something that is no plain data, or is nested too deeply; expected a model config")
    check_fields(config, _TOP_RULES, required=("embed_dim", "vision_cfg", "text_cfg"), others=True)
    width, heads = config["embed_dim"], config.get("head_heads", 8)
    if width % heads:
        raise UserError(f"embed_dim {width} is not divisible by head_heads {heads}: choose heads that divide it")
    preprocess = check_fields(config.get("preprocess", {}), _PREPROCESS_RULES, place="preprocess")
    smallest, largest = preprocess.get("train_scale", (1, 1))
    if smallest > largest:
        raise UserError(f"preprocess.train_scale is [{smallest}, {largest}]; expected the smaller share first")


def check_size(numbers: int) -> None:
    """Refuse a model that this machine cannot hold.

    Args:
        numbers: its parameters and constants.

    Raises:
        UserError: says how large it would be.
    """
    memory = _memory_bytes()
    largest = min(MAX_NUMBERS, memory // _BYTES_PER_NUMBER) if memory else MAX_NUMBERS
    if numbers > largest:
        room = f"this machine has {memory / 1e9:.1f} GB of memory" if memory else "none is that large"
        raise UserError(
            f"describes a model of {numbers:,} numbers, {numbers * _BYTES_PER_NUMBER / 1e9:,.1f} GB; {room}, and at "
            f"most {MAX_NUMBERS:,} numbers are taken: mend its sizes"
        )


def _memory_bytes() -> int:
    """Memory of this machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


# --- how many numbers parts have -------------------------------------------------------------------------------------


def block_numbers(width: int, inner: int) -> int:
    """A transformer block: two LayerNorms, attention with biases, an MLP of `inner` hidden units."""
    return 2 * 2 * width + 4 * (width * width + width) + 2 * width * inner + inner + width


def head_numbers(width: int) -> int:
    """The head with its three LayerNorms, and logit scale and bias."""
    return 3 * 2 * width + 4 * (width * width + width) + 2
