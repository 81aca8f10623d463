"""`itemizedclip train NAME --plan`: memory, FLOP, time and traffic of a run, counted before it.

The towers are counted by taking two small batches without data through them and back (`training.counting`), and are
linear in the batch; the loss and the traffic follow from their formulas. Nothing is read but the model's config.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from itemizedclip.models.factory import create_model, load_model_config
from itemizedclip.objectives.block_size import GPU_SHARE
from itemizedclip.runtime.precision import Precision
from itemizedclip.training.counting import TowerLine, count_towers, loss_bytes, loss_flop, without_data
from itemizedclip.training.options import RunOptions
from itemizedclip.training.run import cast_towers, freeze_unused, set_patch_dropout, set_recomputation
from itemizedclip.training.task import ItemizedTask

TEXT_LENGTH = 32
"""Tokens of the longest text of a batch that a plan assumes; items are short, and padding is cut."""

STATED_MFU = 0.4

DEVICES = {24: ("RTX 4090", 165e12), 48: ("L40S", 362e12), 80: ("H100", 989e12), 141: ("H200", 989e12)}
"""GB → a GPU of that memory and its FLOP per second in 16 bits without sparsity, from the maker's data sheets."""

RANKS = (1, 8, 64)

PLANNED_RANKS = 8
"""Processes for which the largest batch is told, as the published runs have them."""

FREE_SHARE = 0.92
"""Of a GPU's memory; the rest is its context, its libraries and what lies between tensors."""


@dataclass(frozen=True)
class StepPlan:
    """One rank's step as functions of B, the images of its contrastive batch, and W, the ranks.

    Attributes:
        parameters: of the model, without the encoder of series names, which is small.
        trained: of them.
        parameter_bytes: of all parameters.
        trained_bytes: of those that are trained.
        towers: cost of both.
        items: K.
        width: D.
        heads: H, of the head.
        passes: attention passes of the loss.
        token_size: bytes of a number of the image tokens' gradient.
    """

    parameters: int
    trained: int
    parameter_bytes: int
    trained_bytes: int
    towers: TowerLine
    items: int
    width: int
    heads: int
    passes: int
    token_size: int

    @property
    def tokens(self) -> int:
        """L."""
        return self.towers.small.tokens

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's two moments."""
        return 2 * self.trained_bytes

    @property
    def kept_bytes(self) -> int:
        """Parameters, their gradients and AdamW's two moments; activations come on top."""
        return self.parameter_bytes + self.trained_bytes + self.optimizer_bytes

    def loss_bytes(self, B: int, W: int, work: int) -> float:
        """Bytes of the loss above its inputs; `work` of them may be a block's (`block_size.work_bytes`)."""
        return loss_bytes(
            B, self.items, self.tokens, self.width, self.heads, passes=self.passes, ranks=W, work=work,
            token_size=self.token_size,
        )  # fmt: skip

    def step_bytes(self, B: int, W: int, work: int) -> float:
        """Bytes of tensors at the peak of a step after the first: forward, loss, backward or update."""
        several = W > 1
        standing = self.parameter_bytes + self.optimizer_bytes
        at_loss = self.towers.kept(B) + self.loss_bytes(B, W, work) + (self.trained_bytes if several else 0)
        return standing + max(self.towers.peak(B, all_gradients=several), at_loss, self.trained_bytes)

    def largest_batch(self, memory: float, W: int, multiple: int = 1) -> int:
        """Images, a multiple of `multiple`, whose step a GPU of so many bytes holds; 0 when it holds none."""
        work = int(memory) // GPU_SHARE

        def fits(count: int) -> bool:
            return self.step_bytes(count * multiple, W, work) <= FREE_SHARE * memory

        if not fits(1):
            return 0
        most = 1
        while fits(2 * most):
            most *= 2
        step = most
        while step := step // 2:
            if fits(most + step):
                most += step
        return most * multiple

    def towers_flop(self, B: int) -> float:
        """FLOP of both towers, forward, backward and recomputation."""
        return self.towers.flop(B)

    def loss_flop(self, B: int, W: int) -> int:
        """FLOP of the loss on one rank."""
        return loss_flop(B, self.items, self.tokens, self.width, passes=self.passes, ranks=W)

    def sent_bytes(self, B: int, W: int) -> float:
        """Bytes a rank sends a step: gradients by a ring, items of all to all and their gradients back."""
        return 2 * (W - 1) / W * self.trained_bytes + 2 * (W - 1) * 4 * B * self.items * self.width


def plan_run(options: RunOptions, *, text_length: int = TEXT_LENGTH) -> StepPlan:
    """Count a run's step on this processor, in seconds and without data.

    Args:
        options: of the run.
        text_length: tokens of a batch's longest text; no more than the model takes are counted.

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
    set_recomputation(model, settings)
    set_patch_dropout(model, settings, 0, 1)
    shape = model.input_shape(getattr(getattr(options, "data", None), "num_series", 1))
    context = config["text_cfg"]["context_length"]
    mode = FakeTensorMode()
    every = list(model.parameters())
    trained = [parameter for parameter in every if parameter.requires_grad]
    without_data(model, mode)
    task = ItemizedTask(model, objective, num_chunks=loading.accum_freq).train()
    small, large = (
        count_towers(
            task, mode, images=images * loading.accum_freq, image_shape=shape, items=loading.num_sampled_captions,
            text_length=min(text_length, context), dtype=dtype,
        )
        for images in (2, 4)
    )  # fmt: skip
    return StepPlan(
        parameters=sum(p.numel() for p in every),
        trained=sum(p.numel() for p in trained),
        parameter_bytes=sum(p.nbytes for p in every),
        trained_bytes=sum(p.nbytes for p in trained),
        towers=TowerLine(small, large),
        items=loading.num_sampled_captions,
        width=config["embed_dim"],
        heads=model.head.num_heads,
        passes=bool(objective.ila_weight or objective.iis_weight) + bool(objective.kta_weight),
        token_size=2 if dtype == torch.bfloat16 else 4,
    )


def show_plan(plan: StepPlan, options: RunOptions, console: Console | None = None) -> None:
    """Print a plan on standard output."""
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    B = options.loading.step_batch
    console.print(
        f"{options.model.model}: {plan.parameters / 1e6:.4g} M parameters, {plan.trained / 1e6:.4g} M trained; "
        f"{B} images a process and step, {plan.items} items of up to {TEXT_LENGTH} tokens, {plan.tokens} image "
        f"tokens; precision {options.model.precision}"
    )
    memory = Table(title=f"GB of a process, {B} images, on a GPU of 80 GB", title_justify="left")
    memory.add_column("part")
    for W in RANKS:
        memory.add_column(f"{W} process{'es' if W > 1 else ''}", justify="right")
    work = int(80e9) // GPU_SHARE
    rows: dict[str, Callable[[int], float]] = {
        "parameters": lambda W: plan.parameter_bytes,
        "gradients": lambda W: plan.trained_bytes,
        "optimizer": lambda W: plan.optimizer_bytes,
        "batch and activations kept": lambda W: plan.towers.kept(B),
        "loss, above them": lambda W: plan.loss_bytes(B, W, work),
        "peak of a step": lambda W: plan.step_bytes(B, W, work),
    }
    for name, size in rows.items():
        memory.add_row(name, *(f"{size(W) / 1e9:.2f}" for W in RANKS))
    console.print(memory)
    console.print("not all parts are there at once: the peak is less than their sum, or more by what is recomputed")
    title = f"by GPU, {PLANNED_RANKS} of them, at {STATED_MFU:.0%} of its stated rate in 16 bits"
    devices = Table(title=title, title_justify="left")
    for name in ("GB", "such as", "TFLOP/s", "largest batch", "seconds a step of it", f"of {B} images"):
        devices.add_column(name, justify="left" if name == "such as" else "right")
    for gigabytes, (name, rate) in DEVICES.items():
        largest = plan.largest_batch(gigabytes * 1e9, PLANNED_RANKS, options.loading.accum_freq)
        seconds = _seconds(plan, largest, rate) if largest else "–"
        here = _seconds(plan, B, rate) if largest >= B else f"{_seconds(plan, B, rate)}, does not fit"
        devices.add_row(str(gigabytes), name, f"{rate / 1e12:.0f}", str(largest), seconds, here)
    console.print(devices)
    traffic = Table(title=f"by number of processes, {B} images each", title_justify="left")
    for name in ("processes", "images a step", "TFLOP towers", "TFLOP loss", "MB sent by each"):
        traffic.add_column(name, justify="right")
    for W in RANKS:
        flop = (plan.towers_flop(B) / 1e12, plan.loss_flop(B, W) / 1e12)
        traffic.add_row(str(W), str(B * W), *(f"{n:.3g}" for n in flop), f"{plan.sent_bytes(B, W) / 1e6:.4g}")
    console.print(traffic)
    console.print(
        "Counted, not measured on a GPU; TFLOP are of one process, recomputation included; "
        f"{1 - FREE_SHARE:.0%} of a GPU's memory are left to its libraries and to what lies between tensors."
    )


def _seconds(plan: StepPlan, B: int, rate: float) -> str:
    flop = plan.towers_flop(B) + plan.loss_flop(B, PLANNED_RANKS)
    return f"{flop / rate / STATED_MFU:.3g}"
