"""AdamW, its parameter groups, and schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from itemizedclip.runtime.errors import UserError
from itemizedclip.training.options import OptimizerSettings


def decaying_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters under weight decay: no vectors or scalars (so neither logit scale nor logit bias), no
    bias, nothing of a norm layer."""
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not name.endswith("bias") and name not in norms
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups holding every trainable parameter exactly once, without decay first.

    Raises:
        ValueError: nothing is trainable.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise UserError("no parameter is trainable: both towers are locked and the head has no part in the loss")
    decaying = decaying_parameters(model)
    without = [p for name, p in trainable if name not in decaying]
    with_decay = [p for name, p in trainable if name in decaying]
    assert len({id(p) for p in without + with_decay}) == len(trainable), "a parameter is in no group, or in two"
    groups = [{"params": without, "weight_decay": 0.0}, {"params": with_decay, "weight_decay": weight_decay}]
    return [group for group in groups if group["params"]]


def create_optimizer(model: nn.Module, settings: OptimizerSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, in one pass over each parameter where PyTorch has it (GPUs and CPUs)."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=device.type in ("cuda", "cpu"),
    )


def create_schedule(settings: OptimizerSettings, total_steps: int) -> Callable[[int], float]:
    """step (0 … total_steps − 1) → learning rate: linear warm-up, then cosine to 0 or constant.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    lr, warmup = settings.lr, settings.warmup
    if warmup > total_steps:
        raise UserError(
            f"--warmup {warmup} is longer than the run of {total_steps} steps: lower --warmup or raise --epochs"
        )

    def schedule(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        if settings.lr_scheduler == "const":
            return lr
        return 0.5 * lr * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))

    return schedule


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
