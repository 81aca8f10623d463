"""Low-rank adapters (LoRA, Hu et al. 2021): W x → W x + (α/r)·B A x, with W as it was and only A and B trained.

Adapters are put into every linear layer of a tower by the package peft; checkpoints of such runs hold W, A and B, and
`fold` joins them to plain weights, so that using a model needs neither peft nor this file.

Axes: r rank; A (r, in), B (out, r).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.registry import MissingExtraError

CONFIG_KEY = "lora"
"""In a model config: {"image": r, "text": r}, the ranks of the adapters that a checkpoint's weights hold."""

ALPHA_OVER_RANK = 2.0
"""α/r, the usual choice."""


def add_adapters(model: DualEncoder, *, image: int = 0, text: int = 0) -> None:
    """Freeze a tower and put adapters into its linear layers; what is trained outside the towers stays trained.

    The model's config says so afterwards. Rank 0 leaves a tower as it is.

    Raises:
        MissingExtraError: peft is not installed.
        UserError: a tower without linear layers.
    """
    ranks = {"image": image, "text": text}
    if not any(ranks.values()):
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ModuleNotFoundError as error:
        raise MissingExtraError("adapters need the package peft: pip install -e '.[finetune]'") from error
    for tower, rank in ranks.items():
        if not rank:
            continue
        parts = model.image_tower() if tower == "image" else model.text_tower()
        inside = {id(module) for part in parts if isinstance(part, nn.Module) for module in part.modules()}
        # By their exact class: the output projection inside nn.MultiheadAttention is read past its forward().
        linear = [name for name, module in model.named_modules() if id(module) in inside and type(module) is nn.Linear]
        if not linear:
            raise UserError(f"the {tower} tower has no linear layer for adapters; drop --lora-{tower}")
        for part in parts:
            part.requires_grad_(False)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        # As a pattern of whole names: of a list, peft takes every module that ends with one.
        names = "|".join(map(re.escape, linear))
        settings = LoraConfig(r=rank, lora_alpha=round(ALPHA_OVER_RANK * rank), target_modules=names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are adapters of the other tower
            inject_adapter_in_model(settings, model, adapter_name=tower)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                # The later tower's adapter would switch the earlier one's off.
                module.set_adapter(list(module.lora_A))
        for name, parameter in model.named_parameters():
            # peft freezes everything else.
            parameter.requires_grad_(name in trained or ".lora_A." in name or ".lora_B." in name)
    model.config[CONFIG_KEY] = {tower: rank for tower, rank in ranks.items() if rank}


def fold(contents: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's contents with the adapters folded into the weights; one without adapters as it is.

    Args:
        contents: `state_dict`, and `model_config` where the checkpoint carries one.
    """
    config = contents.get("model_config")
    if not isinstance(config, Mapping) or not config.get(CONFIG_KEY):
        return dict(contents)
    plain_config = {key: value for key, value in config.items() if key != CONFIG_KEY}
    return {**contents, "state_dict": folded_weights(contents["state_dict"]), "model_config": plain_config}


def folded_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W + (α/r)·B A under the name that W has without adapters."""
    plain: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        if ".base_layer." not in name:
            plain[name] = value
            continue
        stem, _, kind = name.partition(".base_layer.")
        for tower in ("image", "text"):
            a = state_dict.get(f"{stem}.lora_A.{tower}.weight")
            b = state_dict.get(f"{stem}.lora_B.{tower}.weight")
            if kind == "weight" and a is not None and b is not None:
                change = ALPHA_OVER_RANK * torch.matmul(b.float(), a.float())
                value = (value.float() + change).to(value.dtype)
        plain[f"{stem}.{kind}"] = value
    return plain
