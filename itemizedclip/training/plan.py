"""`itemizedclip train NAME --plan`: FLOP, time and traffic of a run, counted before it.

The towers are counted by taking a small batch without data through them and back (`training.counting`), and are linear
in the batch; the loss and the traffic follow from their formulas. Nothing is read but the model's config.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from itemizedclip.models.factory import create_model, load_model_config
from itemizedclip.runtime.precision import Precision
from itemizedclip.training.counting import TowerCost, count_towers, loss_flop, without_data
from itemizedclip.training.options import RunOptions
from itemizedclip.training.run import cast_towers, freeze_unused
from itemizedclip.training.task import ItemizedTask

TEXT_LENGTH = 32
"""Tokens of the longest text of a batch that a plan assumes; items are short, and padding is cut."""

STATED_MFU = 0.4

DEVICES = {24: ("RTX 4090", 165e12), 48: ("L40S", 362e12), 80: ("H100", 989e12), 141: ("H200", 989e12)}
"""GB → a GPU of that memory and its FLOP per second in 16 bits without sparsity, from the maker's data sheets."""

RANKS = (1, 8, 64)


@dataclass(frozen=True)
class StepPlan:
    """One rank's step as functions of B, the images of its contrastive batch, and W, the ranks.

    Attributes:
        parameters: of the model, without the encoder of series names, which is small.
        trained: of them.
        parameter_bytes: of all parameters.
        trained_bytes: of those that are trained.
        cost: of the towers for a small batch.
        counted: images of it.
        items: K.
        width: D.
        passes: attention passes of the loss.
    """

    parameters: int
    trained: int
    parameter_bytes: int
    trained_bytes: int
    cost: TowerCost
    counted: int
    items: int
    width: int
    passes: int

    @property
    def kept_bytes(self) -> int:
        """Parameters, their gradients and AdamW's two moments; activations come on top."""
        return self.parameter_bytes + 3 * self.trained_bytes

    def towers_flop(self, B: int) -> float:
        """FLOP of both towers, forward, backward and recomputation."""
        return self.cost.flop / self.counted * B

    def loss_flop(self, B: int, W: int) -> int:
        """FLOP of the loss on one rank."""
        return loss_flop(B, self.items, self.cost.tokens, self.width, passes=self.passes, ranks=W)

    def sent_bytes(self, B: int, W: int) -> float:
        """Bytes a rank sends a step: gradients by a ring, items of all to all and their gradients back."""
        return 2 * (W - 1) / W * self.trained_bytes + 2 * (W - 1) * 4 * B * self.items * self.width


def plan_run(options: RunOptions) -> StepPlan:
    """Count a run's step on this processor, in seconds and without data.

    Raises:
        UserError: a model that does not exist.
    """
    config = load_model_config(options.model.model)
    # The encoder of series names sorts names out by their values, which there are none of; it is frozen or small.
    config["vision_cfg"] = {name: value for name, value in config["vision_cfg"].items() if name != "series_names"}
    model = create_model(config)
    settings, loading, objective = options.model, options.loading, options.objective
    dtypes = {"fp32": torch.float32, "amp": torch.float16}
    dtype = dtypes.get(settings.precision, torch.bfloat16)
    cast_towers(model, Precision(settings.precision, "cpu", dtype))
    model.lock(
        image=settings.lock_image, text=settings.lock_text, freeze_layer_norm=settings.lock_text_freeze_layer_norm
    )
    freeze_unused(model, options)
    model.set_grad_checkpointing(settings.grad_checkpointing)
    shape = model.input_shape(getattr(getattr(options, "data", None), "num_series", 1))
    context = config["text_cfg"]["context_length"]
    mode = FakeTensorMode()
    every = list(model.parameters())
    trained = [parameter for parameter in every if parameter.requires_grad]
    without_data(model, mode)
    task = ItemizedTask(model, objective, num_chunks=loading.accum_freq).train()
    counted = 2 * loading.accum_freq
    cost = count_towers(
        task, mode, images=counted, image_shape=shape, items=loading.num_sampled_captions,
        text_length=min(TEXT_LENGTH, context), dtype=dtype,
    )  # fmt: skip
    return StepPlan(
        parameters=sum(p.numel() for p in every),
        trained=sum(p.numel() for p in trained),
        parameter_bytes=sum(p.nbytes for p in every),
        trained_bytes=sum(p.nbytes for p in trained),
        cost=cost,
        counted=counted,
        items=loading.num_sampled_captions,
        width=config["embed_dim"],
        passes=bool(objective.ila_weight or objective.iis_weight) + bool(objective.kta_weight),
    )


def show_plan(plan: StepPlan, options: RunOptions, console: Console | None = None) -> None:
    """Print a plan on standard output."""
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    B = options.loading.step_batch
    console.print(
        f"{options.model.model}: {plan.parameters / 1e6:.4g} M parameters, {plan.trained / 1e6:.4g} M trained; "
        f"{B} images a process and step, {plan.items} items of up to {TEXT_LENGTH} tokens, {plan.cost.tokens} image "
        f"tokens; precision {options.model.precision}"
    )
    console.print(
        f"parameters, gradients and optimizer take {plan.kept_bytes / 1e9:.3g} GB of each process; activations, which "
        "are not counted here, come on top"
    )
    devices = Table(title=f"by GPU, at {STATED_MFU:.0%} of its stated rate in 16 bits", title_justify="left")
    for name in ("GB", "such as", "TFLOP/s", "seconds a step"):
        devices.add_column(name, justify="left" if name == "such as" else "right")
    for size, (name, rate) in DEVICES.items():
        seconds = (plan.towers_flop(B) + plan.loss_flop(B, 1)) / rate / STATED_MFU
        devices.add_row(str(size), name, f"{rate / 1e12:.0f}", f"{seconds:.3g}")
    console.print(devices)
    traffic = Table(title=f"by number of processes, {B} images each", title_justify="left")
    for name in ("processes", "images a step", "TFLOP towers", "TFLOP loss", "MB sent by each"):
        traffic.add_column(name, justify="right")
    for W in RANKS:
        flop = (plan.towers_flop(B) / 1e12, plan.loss_flop(B, W) / 1e12)
        traffic.add_row(str(W), str(B * W), *(f"{n:.3g}" for n in flop), f"{plan.sent_bytes(B, W) / 1e6:.4g}")
    console.print(traffic)
    console.print("Counted, not measured on a GPU; TFLOP are of one process, recomputation included.")
