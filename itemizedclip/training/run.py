"""A run: everything it is made of, and how it is put together.

Axes: B images of one rank's contrastive batch, W ranks. "Step" counts optimizer steps, "samples" images of all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import nn

from itemizedclip.data.sampler import BadSampleCounter
from itemizedclip.evaluation.evaluator import Evaluator as Evaluator
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.lora import add_adapters, fold
from itemizedclip.models.weights import given_checkpoint, load_weights, read_checkpoint
from itemizedclip.runtime.claims import Claim
from itemizedclip.runtime.collectives import gather_objects
from itemizedclip.runtime.precision import Precision, resolve_precision
from itemizedclip.runtime.processes import Ranks, SetupError, StopRequest, launch, leaving_at_once, main_first, on_main
from itemizedclip.training.checkpoint import new_run_id
from itemizedclip.training.health import HealthReport
from itemizedclip.training.loading import BatchSource
from itemizedclip.training.meter import Meter
from itemizedclip.training.optimizer import create_optimizer, create_schedule
from itemizedclip.training.options import ModelSettings, RunOptions
from itemizedclip.training.parallel import Layout, lay_out
from itemizedclip.training.task import ItemizedTask
from itemizedclip.training.verdict import Findings

logger = logging.getLogger(__name__)


@contextmanager
def launch_run(options: RunOptions) -> Iterator[Ranks]:
    """`launch` with the device, seed and processes that a run's options ask for.

    As long as there is nothing to save, signals end the process with exit status 75.
    """
    settings = options.run
    with (
        leaving_at_once(),
        launch(settings.device, options.distributed, seed=settings.seed, deterministic=settings.deterministic) as ranks,
    ):
        yield ranks


@dataclass
class TrainResult:
    """How a run ended.

    Attributes:
        folder: the run folder.
        checkpoint: the newest checkpoint written or resumed from, None if there is none.
        step: optimizer steps of the run so far.
        epochs_done: finished epochs.
        metrics: newest evaluation, "evaluator/measure" → value.
        losses: loss and terms of the last logged step.
        seconds: of this process, resumed parts not included.
        interrupted: a signal ended the run early; --resume latest goes on. Such a result comes with `Stopped` alone.
    """

    folder: Path
    checkpoint: Path | None
    step: int
    epochs_done: int
    metrics: dict[str, float]
    losses: dict[str, float]
    seconds: float
    interrupted: bool


@dataclass
class Position:
    """Where a run is: the next step is step `step_in_epoch` of epoch `epoch`, both from 0."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    samples_seen: int = 0


@dataclass
class PendingSave:
    """A checkpoint on its way to the disk.

    Attributes:
        path: its file.
        step: of the weights.
        started: by the process's clock.
        written: ends when the tensors are written, by every rank that does.
        commit: on the main rank: makes it count, and removes what it stands for.
    """

    path: Path
    step: int
    started: float
    written: Future[None]
    commit: Callable[[], None]


@dataclass
class Run:
    """Everything a run is made of; built once by `build`."""

    options: RunOptions
    ranks: Ranks
    folder: Path
    task: ItemizedTask
    layout: Layout
    precision: Precision
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Callable[[int], float]
    total_steps: int
    source: BatchSource
    evaluators: Sequence[Evaluator]
    position: Position
    run_id: str
    data_fingerprint: str
    transform: dict[str, Any]
    bad_samples: BadSampleCounter
    stop: StopRequest
    meter: Meter
    health: HealthReport
    tracking: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    nonfinite_in_a_row: int = 0
    findings: Findings = field(default_factory=Findings)
    skip_messages: list[str] = field(default_factory=list)
    gradients_checked: bool = False
    last_checkpoint: Path | None = None
    claim: Claim | None = None
    saved_at: float = field(default_factory=monotonic)
    pending: PendingSave | None = None
    shard_group: Any = None
    """Processes that write shards, in the background, too; made by the first save."""
    save_asked: bool = False
    """Whether this rank wants latest.pt after this step; all agree on it in the step."""
    saved_step: int = -1
    """Of the last such save."""

    @property
    def module(self) -> nn.Module:
        """What a step calls."""
        return self.layout.module

    @property
    def model(self) -> DualEncoder:
        return self.task.model

    @property
    def global_batch(self) -> int:
        """Images of all ranks per step."""
        return self.options.loading.step_batch * self.ranks.world_size

    @property
    def is_last_epoch(self) -> bool:
        return self.position.epoch + 1 >= self.options.optimizer.epochs


def build(
    options: RunOptions,
    ranks: Ranks,
    folder: Path,
    model: DualEncoder,
    source: BatchSource,
    evaluators: Sequence[Evaluator],
    stop: StopRequest,
    transform: dict[str, Any],
    data_fingerprint: str,
) -> Run:
    """Freeze, move, wrap: a run at its first step."""
    settings = options.model
    steps = gather_objects(source.steps_per_epoch)
    if len(set(steps)) > 1:
        raise SetupError(f"the ranks have different numbers of steps per epoch, {steps}; give every rank the same")
    best = options.run.keep_best
    if best and best.partition("/")[0] not in [evaluator.name for evaluator in evaluators]:
        names = ", ".join(evaluator.name for evaluator in evaluators) or "none: give the run something to evaluate"
        raise SetupError(f"--keep-best {best} names no evaluator of this run; there are: {names}")
    precision = resolve_precision(settings.precision, ranks.device)
    model.to(ranks.device)
    cast_towers(model, precision)
    model.lock(
        image=settings.lock_image, text=settings.lock_text, freeze_layer_norm=settings.lock_text_freeze_layer_norm
    )
    add_adapters(model, image=settings.lora_image, text=settings.lora_text)
    freeze_unused(model, options)
    set_recomputation(model, settings)
    task = ItemizedTask(model, options.objective, num_chunks=options.loading.accum_freq).train()
    if settings.torchcompile:
        compile_towers(model)
    layout = lay_out(task, ranks, options.parallel, precision)
    total_steps = options.optimizer.epochs * source.steps_per_epoch
    samples_per_epoch = source.steps_per_epoch * options.loading.step_batch
    try:
        schedule = create_schedule(options.optimizer, total_steps)
        optimizer = create_optimizer(task, options.optimizer, ranks.device)
    except ValueError as error:
        raise SetupError(str(error)) from error
    return Run(
        options=options,
        ranks=ranks,
        folder=folder,
        task=task,
        layout=layout,
        precision=precision,
        optimizer=optimizer,
        scaler=precision.scaler(),
        schedule=schedule,
        total_steps=total_steps,
        source=source,
        evaluators=evaluators,
        position=Position(),
        run_id=on_main(new_run_id),
        data_fingerprint=data_fingerprint,
        transform=transform,
        bad_samples=BadSampleCounter(samples_per_epoch, options.loading.max_bad_fraction),
        stop=stop,
        meter=Meter(ranks.device, precision.matmul_dtype, counts=not settings.torchcompile),
        health=HealthReport(folder, ranks.is_main, options.logging.health_every),
    )


def cast_towers(model: DualEncoder, precision: Precision) -> None:
    """For bf16: hold the towers' parameters in bfloat16; head, logit scale and logit bias stay float32."""
    if precision.name != "bf16":
        return
    for part in [*model.image_tower(), *model.text_tower()]:
        if isinstance(part, nn.Parameter):
            part.data = part.data.to(torch.bfloat16)
        else:
            part.to(torch.bfloat16)


def freeze_unused(model: DualEncoder, options: RunOptions) -> None:
    """Freeze the head, or the logit bias, when no term uses it: DDP would wait for its gradients for ever."""
    if not options.objective.uses_head:
        logger.info("no objective asks the head (the weights of ILA, KTA and IIS are 0): it stays as it is")
        model.head.requires_grad_(False)
    if not options.objective.uses_bias:
        model.logit_bias.requires_grad_(False)


def set_recomputation(model: DualEncoder, settings: ModelSettings) -> None:
    """What --grad-checkpointing asks for."""
    if settings.grad_checkpointing_keeps == "attention":
        model.set_grad_checkpointing(settings.grad_checkpointing, keep_attention=True)
    else:
        model.set_grad_checkpointing(settings.grad_checkpointing)


def set_patch_dropout(model: DualEncoder, settings: ModelSettings, step: int, total_steps: int) -> None:
    """The share of patches that a step leaves out.

    Args:
        step: from 0.
    """
    if settings.patch_dropout:
        is_on = step < settings.patch_dropout_until * total_steps
        model.set_patch_dropout(settings.patch_dropout if is_on else 0.0)


def compile_towers(model: DualEncoder, *, backend: str = "inductor") -> None:
    """Compile the blocks of both towers in place, or whole towers that have none; parameter names stay.

    Blocks that are alike but for a number, such as their drop path, are compiled once for each.

    Args:
        backend: of torch.compile.
    """
    # DDP's graph splitting under a compiled submodule is a known source of crashes, and gains nothing here.
    torch._dynamo.config.optimize_ddp = False
    blocks = model.blocks()
    towers = [part for part in (*model.image_tower(), *model.text_tower()) if isinstance(part, nn.Module)]
    # PyTorch 2.6 calls it cache_size_limit.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), 4 * len(blocks)))
    for part in blocks or towers:
        if any(True for _ in part.children()):
            part.compile(backend=backend)


def start_from(model: DualEncoder, source: Path) -> None:
    """Take the weights of a run's or a released checkpoint and say which keys were left out or changed."""
    path = main_first(lambda: given_checkpoint(source))
    notes = load_weights(model, fold(read_checkpoint(path))["state_dict"], source=str(path))
    logger.info("starting from the weights of %s", path)
    for note in notes:
        logger.info("  %s", note)


def check_gradients(task: ItemizedTask) -> None:
    """After the first backward pass: every trainable parameter must have got a gradient.

    Raises:
        SetupError: names the parameters; under DDP they would stop the next step.
    """
    idle = [name for name, p in task.model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise SetupError(
            f"{len(idle)} trainable parameters take no part in the loss ({', '.join(idle[:4])}"
            f"{' …' if len(idle) > 4 else ''}): freeze them in the model (requires_grad_(False)), or switch on the "
            "term that uses them"
        )
