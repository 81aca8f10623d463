"""Towers of other libraries as initial weights: open_clip's CLIP, and models of this project's names without its head.

    open_clip   visual.conv1 …, visual.proj, text_projection; text parameters under text. where it has them so (also
                models of its own towers that were trained with SigLIP's loss)
    HLIP        visual.trunk.…, visual.head.proj, text.transformer.…, text.proj: this project's names

What such a file lacks (the head, the series-name encoder) starts from random weights, and is named. Towers of timm with
attention pooling, such as the published SigLIP models, are built differently and do not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itemizedclip.models.factory import (
    LoadedModel,
    create_model,
    create_tokenizer,
    is_shipped,
    list_models,
    load_model_config,
)
from itemizedclip.models.weights import CheckpointError, given_checkpoint, load_weights, read_checkpoint

_OPEN_CLIP = ("visual.conv1.weight", "visual.proj", "text_projection")
_OPEN_CLIP_NAMES = {"visual.proj": "image_post.proj", "text_projection": "text_post.proj"}
_HEAD_WIDTH = 64
"""Of open_clip's towers unless their config says otherwise; weights do not tell it."""

_MAY_BE_NEW = ("visual_proj.", "visual_attn.", "visual.trunk.serienameencoder.", "visual.trunk.sne_proj.", "logit_")
_NOT_OURS = ("visual.trunk.sequential_posemb", "text.transformer.pooler.")
"""Parameters of HLIP that ItemizedCLIP replaced: its position table of series, BERT's unused pooler."""


def load_towers(path: str | Path, *, config: str | Mapping[str, Any] | None = None, seed: int = 0) -> LoadedModel:
    """A model whose towers come from another library's file, and whose head is new.

    Args:
        path: .pt, .bin or .safetensors file of weights.
        config: name or config of one of our models, or open_clip's name of the file's, such as ViT-B-16; None: read
            from the shapes (open_clip's towers alone).
        seed: of what starts from random weights.

    Raises:
        CheckpointError: a file that cannot be read, or towers that do not fit.
    """
    path = given_checkpoint(Path(path))
    tensors = _plain_names(read_checkpoint(path)["state_dict"])
    is_open_clip = all(key in tensors for key in _OPEN_CLIP)
    if "visual.trunk.attn_pool.latent" in tensors or "visual.trunk.reg_token" in tensors:
        raise CheckpointError(
            f"{path}: its image tower has attention pooling or register tokens (SigLIP of timm, HLIP dualdinotxt), "
            "which no model here has; give CLIP towers of open_clip, or HLIP's single-token ones"
        )
    chosen, notes = _config_of(path, tensors, config, is_open_clip)
    if is_open_clip:
        tensors = {_OPEN_CLIP_NAMES.get(key, key): value for key, value in tensors.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(chosen, source=path)
    own = model.state_dict()
    new = sorted(key for key in own if key not in tensors and key.startswith(_MAY_BE_NEW))
    left_out = sorted(key for key in tensors if key not in own and key.startswith(_NOT_OURS))
    kept = {key: value for key, value in tensors.items() if key not in left_out}
    # What else is missing or unknown does not fit, which `load_weights` says.
    notes += load_weights(model, {**kept, **{key: own[key] for key in new}}, source=str(path))
    groups = sorted({key.rpartition(".")[0].split(".attn")[0].split(".transformer")[0] for key in new})
    notes.append(f"{len(new)} parameters start from random weights (seed {seed}): {', '.join(groups)}")
    if left_out:
        notes.append(f"{len(left_out)} parameters have no place here and are left out: {', '.join(left_out[:4])}")
    tokenizer = create_tokenizer(model.config, fetch=is_shipped(config), source=path)
    return LoadedModel(model.eval(), model.config, tokenizer, {}, notes, str(path))


def _plain_names(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without the prefixes of wrappers, and of open_clip's models with a text tower of their own."""
    named = {}
    for key, value in state_dict.items():
        while key.startswith(("module.", "_orig_mod.")):
            key = key.partition(".")[2]
        named[key] = value
    if "text.token_embedding.weight" in named:
        named = {key.removeprefix("text."): value for key, value in named.items()}
    # Buffers that are computed, and scales of one number that some versions store as (1,).
    named = {key: value for key, value in named.items() if not key.endswith(("attn_mask", "position_ids"))}
    return {key: value.reshape(()) if key.startswith("logit_") else value for key, value in named.items()}


def _config_of(
    path: Path, tensors: Mapping[str, Tensor], config: str | Mapping[str, Any] | None, is_open_clip: bool
) -> tuple[dict[str, Any], list[str]]:
    """The config of the model, and what must be known of it."""
    if config is not None and not isinstance(config, str):
        return dict(config), []
    if config is not None and (config in list_models() or Path(config).is_file()):
        return load_model_config(config), []
    if not is_open_clip:
        raise CheckpointError(
            f"{path}: are no towers of open_clip's CLIP (no {', '.join(_OPEN_CLIP)}); for weights under this project's "
            f"names give --model, one of {', '.join(list_models())}"
        )
    return _open_clip_config(path, tensors, config)


def _open_clip_config(path: Path, tensors: Mapping[str, Tensor], name: str | None) -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    head_width, text_heads = _HEAD_WIDTH, 0
    if name is not None:
        import open_clip

        known = open_clip.get_model_config(name)
        if known is None:
            raise CheckpointError(
                f"{name}: neither a model of this project nor of open_clip; see open_clip.list_models()"
            )
        head_width = known["vision_cfg"].get("head_width", _HEAD_WIDTH)
        text_heads = known["text_cfg"].get("heads", 0)
        if known.get("quick_gelu"):
            notes.append("its activations were QuickGELU and are GELU here: near as initial weights, not the same")
    conv, places = tensors["visual.conv1.weight"], tensors["visual.positional_embedding"]
    width, patch = conv.shape[0], conv.shape[-1]
    grid = round((places.shape[0] - 1) ** 0.5)
    text_width = tensors["token_embedding.weight"].shape[1]
    if grid * grid != places.shape[0] - 1:
        raise CheckpointError(f"{path}: {places.shape[0] - 1} positions are no square grid; expected a square image")
    if width % head_width:
        raise CheckpointError(f"{path}: width {width} has no heads of {head_width}; name its model with --model")
    if name is None:
        notes.append(f"heads of {head_width} are taken, which weights do not tell; name its model with --model")
    return {
        "name": name or "open_clip-towers",
        "embed_dim": tensors["visual.proj"].shape[1],
        "init_logit_bias": -10,
        "vision_cfg": {
            "image_size": grid * patch, "patch_size": patch, "width": width, "layers": _layers(tensors, "visual."),
            "head_width": head_width,
        },
        "text_cfg": {
            "context_length": tensors["positional_embedding"].shape[0],
            "vocab_size": tensors["token_embedding.weight"].shape[0], "width": text_width,
            "heads": text_heads or max(1, text_width // _HEAD_WIDTH), "layers": _layers(tensors, ""),
        },
    }, notes  # fmt: skip


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    start = f"{prefix}transformer.resblocks."
    return len({key[len(start) :].split(".")[0] for key in tensors if key.startswith(start)})
