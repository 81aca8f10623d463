"""A whole training step (towers, loss, optimizer) of the published models: time and memory over our settings, and the
published way among them.

    python benchmarks/full_step.py [--domains natural chest mri] [--settings published "as published" …] [--series 10]
    python benchmarks/full_step.py --count

"published" is written plainly: texts padded to the context length, as open_clip's tokenizers return them, both towers
with the recipe's recomputation, the loss of benchmarks/plain.py, AdamW without fusion. The others are ours. All are
float32 but for those that say bfloat16; weights and images are random, items fill 32 columns.

Each cell is a process of its own with one thread: processor seconds of one step, after a small one and an update that
makes AdamW's moments, and the peak of its memory above what it held before the model was built. Linux only. Figures:
benchmarks/README.md.

--count computes nothing: TFLOP of the towers and memory at the recipe's batch, in its precision, on one of 8 GPUs, as
`itemizedclip train NAME --plan` has them. Of the published way it leaves out the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from loss import memory_kib, peak_above
from plain import PlainHead, PlainSet, plain_losses
from torch import nn

from itemizedclip.data.batch import ItemBatch
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.factory import create_model, load_model_config
from itemizedclip.objectives.block_size import GPU_SHARE
from itemizedclip.objectives.pairing import ItemRows, sample_pairing
from itemizedclip.runtime.precision import Precision
from itemizedclip.training.optimizer import create_optimizer
from itemizedclip.training.options import RunOptions
from itemizedclip.training.plan import PLANNED_RANKS, TEXT_LENGTH, plan_run
from itemizedclip.training.recipes import parse_recipe
from itemizedclip.training.run import cast_towers, set_patch_dropout, set_recomputation
from itemizedclip.training.task import ItemizedTask

CPU = torch.device("cpu")

DOMAINS = {"natural": ("itemized_cc0.3M", 8), "rsicd": ("rsicd", 8), "chest": ("ctrate", 1), "mri": ("mri", 1)}
"""Name → recipe, and images of a step on one core."""

SETTINGS: dict[str, dict[str, object]] = {
    "published": {},
    "as published": {},
    "attention kept": {"grad_checkpointing": True, "grad_checkpointing_keeps": "attention"},
    "all recomputed": {"grad_checkpointing": True, "grad_checkpointing_keeps": "nothing"},
    "nothing recomputed": {"grad_checkpointing": False, "grad_checkpointing_keeps": "nothing"},
    "patch dropout 0.5": {"patch_dropout": 0.5},
    "bfloat16 products": {"precision": "amp_bf16"},
    "bfloat16 weights": {"precision": "bf16"},
    "bfloat16 weights, patch dropout 0.5": {"precision": "bf16", "patch_dropout": 0.5},
    "bfloat16 weights, attention kept": {
        "precision": "bf16", "grad_checkpointing": True, "grad_checkpointing_keeps": "attention",
    },
}  # fmt: skip
"""Name → fields of `ModelSettings` that differ from the recipe's; float32 where nothing is said."""


@dataclass(frozen=True)
class Inputs:
    """Random images, and items of TEXT_LENGTH tokens padded to the context length."""

    images: torch.Tensor
    texts_BKC: torch.Tensor


def make_inputs(model: DualEncoder, images: int, items: int, series: int) -> Inputs:
    shape = model.input_shape(series)
    context = model.config["text_cfg"]["context_length"]
    texts = torch.zeros(images, items, context, dtype=torch.int64)
    used = min(TEXT_LENGTH, context)
    texts[..., :used] = torch.randint(1, 20_000, (images, items, used))
    return Inputs(torch.randn(images, *shape), texts)


def published_step(
    model: DualEncoder, head: PlainHead, options: RunOptions, inputs: Inputs, optimizer: torch.optim.Optimizer
) -> float:
    """One step the published way; the loss."""
    (B, K, C), image = inputs.texts_BKC.shape, model.encode_image(inputs.images)
    text_is_frozen = options.model.lock_text and options.model.lock_text_freeze_layer_norm
    with torch.set_grad_enabled(not text_is_frozen):
        items = model.encode_text(inputs.texts_BKC.view(B * K, C))
    mask = torch.ones(B, K, dtype=torch.bool)
    rows = ItemRows(mask, torch.zeros(B, dtype=torch.bool))
    own = PlainSet(items, rows, sample_pairing(mask).index_BT)
    scale = model.logit_scale.exp()
    loss = plain_losses(
        head, image.global_BD, image.tokens_BLD, [own], scale, model.logit_bias, options.objective
    )["loss"]  # fmt: skip
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def our_step(
    task: ItemizedTask, precision: Precision, inputs: Inputs, optimizer: torch.optim.Optimizer
) -> float:  # fmt: skip
    """One step of the trainer; the loss."""
    B, K, _ = inputs.texts_BKC.shape
    mask = torch.ones(B, K, dtype=torch.bool)
    texts = inputs.texts_BKC[..., :TEXT_LENGTH]
    batch = ItemBatch(inputs.images, texts, mask, torch.zeros(B, dtype=torch.bool), [""] * B)
    with precision.autocast():
        loss = task(batch)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def cell(domain: str, setting: str, images: int, series: int) -> dict[str, float]:
    """Run one cell in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = memory_kib("VmRSS")
    recipe, usual = DOMAINS[domain]
    options = parse_recipe(recipe, [])
    options = replace(options, model=replace(options.model, **{"precision": "fp32", **SETTINGS[setting]}))  # type: ignore[arg-type]
    settings = options.model
    config = load_model_config(settings.model)
    config["vision_cfg"] = {k: v for k, v in config["vision_cfg"].items() if k != "series_names"}
    model = create_model(config).train()
    dtype = None if settings.precision == "fp32" else torch.bfloat16
    precision = Precision(settings.precision, "cpu", dtype)
    cast_towers(model, precision)
    model.lock(
        image=settings.lock_image, text=settings.lock_text, freeze_layer_norm=settings.lock_text_freeze_layer_norm
    )
    set_recomputation(model, settings)
    set_patch_dropout(model, settings, 0, 1)
    items = options.loading.num_sampled_captions
    if setting == "published":
        head = PlainHead(config["embed_dim"], model.head.num_heads)
        both = nn.ModuleDict({"model": model, "head": head})
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([p for p in both.parameters() if p.requires_grad])
        step: Callable[[Inputs], float] = lambda inputs: published_step(model, head, options, inputs, optimizer)  # noqa: E731
    else:
        task = ItemizedTask(model, options.objective).train()
        optimizer = create_optimizer(task, options.optimizer, CPU)
        step = lambda inputs: our_step(task, precision, inputs, optimizer)  # noqa: E731
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    standing = memory_kib("VmRSS") - start
    inputs = make_inputs(model, images or usual, items, series)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    begin = time.process_time()
    loss = step(inputs)
    seconds = time.process_time() - begin
    return {"seconds": seconds, "peak_mb": peak_above(start), "standing_mb": standing / 1024, "loss": loss}


def count(domain: str, setting: str) -> dict[str, float]:
    """A step at the recipe's batch on one of 8 GPUs of 80 GB, counted."""
    options = parse_recipe(DOMAINS[domain][0], [])
    options = replace(options, model=replace(options.model, **SETTINGS[setting]))  # type: ignore[arg-type]
    is_published = setting == "published"
    plan = plan_run(options, text_length=10_000 if is_published else TEXT_LENGTH)
    B, work = options.loading.step_batch, int(80e9) // GPU_SHARE
    bytes_ = plan.parameter_bytes + plan.optimizer_bytes + plan.towers.peak(B, all_gradients=True)
    if not is_published:
        bytes_ = plan.step_bytes(B, PLANNED_RANKS, work)
    return {"images": B, "tflop": plan.towers_flop(B) / 1e12, "gb": bytes_ / 1e9}


def show_counts(domains: Sequence[str], settings: Sequence[str]) -> None:
    print(f"{'domain':8} {'setting':34} {'images':>6} {'TFLOP':>7} {'ratio':>6} {'GB':>7} {'ratio':>6}")
    for domain in domains:
        first: dict[str, float] = {}
        for setting in settings:
            found = count(domain, setting)
            first = first or found
            faster, larger = first["tflop"] / found["tflop"], found["gb"] / first["gb"]
            print(
                f"{domain:8} {setting:34} {found['images']:6} {found['tflop']:7.1f} {faster:6.2f} {found['gb']:7.2f} "
                f"{larger:6.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=["natural", "chest", "mri"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--images", type=int, default=0, help="of a step; 0: 8 photographs, 1 study or scan")
    parser.add_argument("--series", type=int, default=10, help="of an MRI study")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--cell", nargs=2, metavar=("DOMAIN", "SETTING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        series = args.series if args.cell[0] == "mri" else 1
        print(json.dumps(cell(args.cell[0], args.cell[1], args.images, series)))
        return
    if args.count:
        show_counts(args.domains, args.settings)
        return
    # Freed blocks go back to the system, so that the peak is that of the tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    print(f"{'domain':8} {'setting':34} {'seconds':>8} {'ratio':>6} {'peak MB':>8} {'ratio':>6} {'of it standing':>15}")
    for domain in args.domains:
        first: dict[str, float] = {}
        for setting in args.settings:
            command = [sys.executable, __file__, "--images", str(args.images), "--series", str(args.series)]
            done = subprocess.run(
                [*command, "--cell", domain, setting], check=True, stdout=subprocess.PIPE, text=True, env=environment
            )
            found = json.loads(done.stdout)
            first = first or found
            print(
                f"{domain:8} {setting:34} {found['seconds']:8.1f} {first['seconds'] / found['seconds']:6.2f} "
                f"{found['peak_mb']:8.0f} {found['peak_mb'] / first['peak_mb']:6.2f} {found['standing_mb']:15.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
