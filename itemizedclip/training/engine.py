"""The training loop of every domain: `train(options, model=…, dataset=…, collator=…, evaluators=…)`.

A run is a function of its options, its data and the number of processes: every step seeds itself from
(seed, rank, step), every sample from (seed, epoch, index), so a killed run that is resumed takes the same steps as one
that was not killed.

Axes: B images of one rank's contrastive batch, W ranks. "Step" counts optimizer steps, "samples" images of all ranks.
"""

from __future__ import annotations

import logging
import math
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from itemizedclip.data.batch import ItemBatch, ItemSample
from itemizedclip.data.preflight import check_dataset, duplicate_warning
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.factory import family_of, transform_spec
from itemizedclip.models.lora import CONFIG_KEY
from itemizedclip.runtime.claims import Claim
from itemizedclip.runtime.collectives import all_reduce_max, all_reduce_sum, barrier, gather_objects
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.logs import duration, logging_to_file, standard_error
from itemizedclip.runtime.processes import Ranks, SetupError, Stopped, StopRequest, on_main, seed_step
from itemizedclip.runtime.timing import timed
from itemizedclip.training.folder import check_space, opened_folder
from itemizedclip.training.health import check_same_model
from itemizedclip.training.loading import BatchSource, MapSource, StepBatch, worker_failure
from itemizedclip.training.optimizer import set_lr
from itemizedclip.training.options import RunOptions, options_to_dict
from itemizedclip.training.resume import is_due, is_late, restore, save_epoch, save_latest, settle, state_bytes
from itemizedclip.training.run import (
    Evaluator,
    Run,
    TrainResult,
    build,
    check_gradients,
    launch_run,
    set_patch_dropout,
    start_from,
)
from itemizedclip.training.tracking import ProgressView, Tracker, check_trackers
from itemizedclip.training.verdict import Finding, update_unless

logger = logging.getLogger(__name__)


class NonFiniteError(UserError):
    """Training diverged: too many steps in a row without a finite loss and gradient."""


# --- entry -----------------------------------------------------------------------------------------------------------


def train(
    options: RunOptions,
    *,
    model: DualEncoder,
    dataset: Any = None,
    collator: Callable[[Sequence[ItemSample]], ItemBatch] | None = None,
    source: BatchSource | None = None,
    evaluators: Sequence[Evaluator] = (),
    model_config: Mapping[str, Any] | None = None,
    transform: Mapping[str, Any] | None = None,
    data_fingerprint: str = "",
    ranks: Ranks | None = None,
) -> TrainResult:
    """Train `model` from its present weights, or go on where --resume points.

    Args:
        options: resolved options of the run.
        model: built under `launch`, on the CPU; it is moved, frozen and trained in place.
        dataset: keys (epoch, index) → ItemSample, on every rank the same; with `collator`.
        collator: samples → ItemBatch with K = --num-sampled-captions slots.
        source: instead of dataset and collator, a wing's own stream of batches.
        evaluators: run every --val-frequency epochs, on every rank.
        model_config: stored in checkpoints; the model's own by default.
        transform: what was done to images, stored in checkpoints; for photographs taken from the config by default.
        data_fingerprint: identity of the training data; a change is reported on resume.
        ranks: from an enclosing `launch_run(options)`; without it `train` makes its own.

    Raises:
        SetupError, PreflightError, CheckpointError, TrackingError, ClaimedError, NoSpaceError, BadSampleError,
            LoaderError, NonFiniteError: each one sentence with its remedy (see `reported_errors`).
        Stopped: a signal ended the run; it is saved, and the process ends with exit status 75.
    """
    if ranks is None:
        with launch_run(options) as own_ranks:
            return train(
                options, model=model, dataset=dataset, collator=collator, source=source, evaluators=evaluators,
                model_config=model_config, transform=transform, data_fingerprint=data_fingerprint, ranks=own_ranks,
            )  # fmt: skip
    check_trackers(options.logging)
    settings = options.run
    if source is None:
        source = map_source(options, dataset, collator, ranks)
    with ExitStack() as stack:
        claims: list[Claim | None] = [None]

        def open_folder() -> tuple[Path, Path | None]:
            opened = stack.enter_context(opened_folder(settings))
            claims[0] = opened.claim
            return opened.path, opened.resumed_from

        folder, resumed_from = on_main(open_folder)
        if ranks.is_main:
            stack.enter_context(logging_to_file(folder))
        stop = stack.enter_context(StopRequest.listening())
        config = dict(model_config or model.config)
        spec = dict(transform) if transform is not None else _transform_of(config)
        with stop.leaving_at_once():
            if resumed_from is None and options.model.pretrained is not None:
                start_from(model, options.model.pretrained)
            run = build(options, ranks, folder, model, source, evaluators, stop, spec, data_fingerprint)
            run.claim = claims[0]
            if CONFIG_KEY in model.config:  # adapters are part of what a checkpoint's config rebuilds
                config[CONFIG_KEY] = model.config[CONFIG_KEY]
            if resumed_from is not None:
                restore(run, resumed_from, config)
            elif settings.resume is not None:
                logger.info("--resume latest: no checkpoint yet, starting afresh")
            on_main(lambda: check_space(folder, state_bytes(run), is_resumed=resumed_from is not None))
        return _fit(run, config)


def map_source(
    options: RunOptions, dataset: Any, collator: Callable[[Sequence[ItemSample]], ItemBatch] | None, ranks: Ranks
) -> MapSource:
    """The batches of a dataset, once its first sample has been checked.

    Raises:
        PreflightError: see `check_dataset`.
    """
    if dataset is None or collator is None:
        raise TypeError("train() needs dataset and collator, or a source")
    step_batch = options.loading.step_batch
    on_main(lambda: _check(dataset, collator, step_batch, ranks.world_size))
    return MapSource(dataset, collator, options.loading, ranks, seed=options.run.seed)


def _check(dataset: Any, collator: Any, step_batch: int, world_size: int) -> None:
    check_dataset(dataset, collator, step_batch=step_batch, world_size=world_size)


def _transform_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The transform of photographs that a config describes; nothing for other models."""
    return transform_spec(config) if family_of(config).input_kind == "photographs" else {}


# --- one step --------------------------------------------------------------------------------------------------------


def train_step(run: Run, batch: ItemBatch) -> tuple[dict[str, Tensor], Tensor, Agreed]:
    """Forward, backward and update on one contrastive batch.

    Returns:
        Outputs of the task (detached), the gradient norm, and what is to follow; the last agreed by all ranks, where
        there are several a step late. A step whose loss or gradient is not finite on any rank updates
        nothing on any rank, which the log says after the next one.

    Raises:
        NonFiniteError: too many such steps in a row.
    """
    settings = run.options.optimizer
    seed_step(run.options.run.seed, run.ranks.rank, run.position.step)
    set_lr(run.optimizer, run.schedule(run.position.step))
    set_patch_dropout(run.model, run.options.model, run.position.step, run.total_steps)
    with run.precision.autocast():
        outputs = run.module(batch)
    with timed("towers"):
        run.scaler.scale(outputs["loss"]).backward()
    if not run.gradients_checked:
        check_gradients(run.task)
        run.gradients_checked = True
    clip = float("inf") if settings.grad_clip_norm is None else settings.grad_clip_norm
    with timed("optimizer"):
        run.scaler.unscale_(run.optimizer)
        norm = run.layout.clip_gradients(clip)
    is_bad = ~(torch.isfinite(outputs["loss"]) & torch.isfinite(norm))
    asked = torch.tensor([run.stop.signal is not None, run.save_asked]).to(is_bad.device, non_blocking=True)
    with timed("exchange"):
        flags = all_reduce_max(torch.cat([is_bad[None], asked]).to(torch.int64))
    with timed("optimizer"):
        update_unless(run.optimizer, flags[0])
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        run.model.clamp_logit_scale()
    with timed("exchange"):
        # The host waits for the step before, and only here: this one's work is under way.
        before = run.findings.swap(run.position.step + 1, flags, outputs["loss"], batch.sample_ids)
    agreed = judge(run, before)
    if run.ranks.world_size == 1:
        agreed = Agreed(stop=run.stop.signal is not None, save=run.save_asked)
    return {name: value.detach() for name, value in outputs.items()}, norm, agreed


class Agreed(NamedTuple):
    """What all ranks do after a step, because one of them wants it."""

    stop: bool
    save: bool


def judge(run: Run, finding: Finding | None) -> Agreed:
    """Report a step that updated nothing; what the ranks agreed on.

    Raises:
        NonFiniteError: too many such steps in a row.
    """
    if finding is None:
        return Agreed(stop=False, save=False)
    if finding.is_bad:
        _report_skipped(run, finding)
    else:
        run.nonfinite_in_a_row = 0
    # A step that was under way while the run was saved asked for what is done.
    return Agreed(finding.wants_stop, finding.wants_save and finding.step > run.saved_step)


def _report_skipped(run: Run, finding: Finding) -> None:
    """Report a step without a finite loss or gradient; end the run when there are too many in a row."""
    run.nonfinite_in_a_row += 1
    suspects = [] if math.isfinite(finding.loss) else finding.sample_ids
    culprits = [name for names in gather_objects(suspects) for name in names]
    if culprits:
        what = f"the loss is not finite; images: {', '.join(culprits[:8])}{' …' if len(culprits) > 8 else ''}"
    elif run.scaler.is_enabled():
        what = f"float16 gradients overflowed; the loss scale is lowered, to {run.scaler.get_scale():g} by now"
    else:
        what = "the gradient is not finite"
    logger.warning("step %d: %s; the update is skipped", finding.step, what)
    limit = run.options.optimizer.max_nonfinite_steps
    if run.nonfinite_in_a_row >= limit:
        raise NonFiniteError(
            f"{limit} steps in a row, up to step {finding.step}, had no finite loss or gradient ({what}): lower --lr, "
            "set --grad-clip-norm 1, use --precision amp_bf16 or fp32, or check those images; the weights of the last "
            f"checkpoint are finite ({run.last_checkpoint or 'none written yet'})"
        )


# --- epochs ----------------------------------------------------------------------------------------------------------


def _fit(run: Run, config: Mapping[str, Any]) -> TrainResult:
    """Train to the end or to a stop signal, record, summarise."""
    started, first_step = perf_counter(), run.position.step
    options = run.options
    params = {**options_to_dict(options), "model_config": dict(config)}
    tracker = Tracker(
        run.folder,
        options.logging,
        params,
        run_id=run.run_id,
        start_step=first_step,
        start_samples=run.position.samples_seen,
        evaluation_is_due=run.position.step_in_epoch == run.source.steps_per_epoch and _evaluates(run),
        tracking=run.tracking,
        enabled=run.ranks.is_main,
    )
    run.tracking = tracker.tracking
    _announce(run)
    progress = ProgressView(
        standard_error(), total_steps=run.total_steps, start_step=first_step, enabled=run.ranks.is_main
    )
    interrupted = False
    try:
        while run.position.epoch < options.optimizer.epochs and not interrupted:
            interrupted = train_epoch(run, tracker, progress)
            if not interrupted:
                finish_epoch(run, tracker)
        settle(run, wait=True)
    except Stopped as stopped:  # in an evaluation, before which the run was saved
        stopped.result = _result(run, started, interrupted=True)
        logger.warning("%s: stopped in an evaluation; --resume latest goes on with it", run.stop.signal)
        raise
    except RuntimeError as error:
        failure = worker_failure(error, run.source)
        if failure is None:
            raise
        raise failure from error
    finally:
        progress.close()
        tracker.close()
    result = _result(run, started, interrupted=interrupted)
    _summarise(run, result, run.position.step - first_step)
    if interrupted:
        raise Stopped(result)
    return result


def _result(run: Run, started: float, *, interrupted: bool) -> TrainResult:
    return TrainResult(
        run.folder, run.last_checkpoint, run.position.step, run.position.epoch, run.metrics, run.losses,
        perf_counter() - started, interrupted,
    )  # fmt: skip


def train_epoch(run: Run, tracker: Tracker, progress: ProgressView) -> bool:
    """The rest of the present epoch; whether a signal stopped it (the run is then saved)."""
    run.module.train()
    run.meter.reset()
    for loaded in run.source.epoch(run.position.epoch, run.position.step_in_epoch):
        run.bad_samples.add(run.position.epoch, loaded.skipped)
        if run.position.step == 0:
            _warn_of_duplicates(run, loaded.batch)
        run.save_asked = tracker.was_removed or is_late(run)
        with run.meter.step():
            outputs, norm, agreed = train_step(run, loaded.batch)
        _advance(run, loaded)
        _record(run, tracker, progress, outputs, norm)
        settle(run, wait=False)
        every = run.options.parallel.check_ranks_every
        if every and run.ranks.world_size > 1 and run.position.step % every == 0:
            check_same_model(run.model, run.position.step, every)
        if agreed.stop:
            judge(run, run.findings.take())
            _leave(run)
            return True
        if agreed.save or is_due(run):
            save_latest(run)
            run.saved_step = run.position.step
            tracker.was_removed = False
        tracker.last_checkpoint = run.last_checkpoint
    if judge(run, run.findings.take()).stop:
        _leave(run)
        return True
    return False


def _leave(run: Run) -> None:
    save_latest(run)
    settle(run, wait=True)
    # The first process to leave takes the others along: not before it is saved.
    barrier()
    logger.warning("%s: saved and stopped; --resume latest goes on", run.stop.signal or "a signal elsewhere")


def finish_epoch(run: Run, tracker: Tracker) -> None:
    """Evaluate when due, move to the next epoch, save."""
    evaluates = _evaluates(run)
    if evaluates:
        # An evaluation that fails or is killed then costs no training.
        save_latest(run)
        settle(run, wait=True)
        barrier()
        with run.stop.leaving_at_once():
            evaluate(run, tracker)
    run.position.epoch += 1
    run.position.step_in_epoch = 0
    save_epoch(run, evaluated=evaluates)


def _evaluates(run: Run) -> bool:
    """Whether the present epoch ends with an evaluation."""
    every = run.options.run.val_frequency
    return bool(run.evaluators and every and ((run.position.epoch + 1) % every == 0 or run.is_last_epoch))


def evaluate(run: Run, tracker: Tracker) -> None:
    """Run every evaluator on the bare model and record the results."""
    started = perf_counter()
    run.task.eval()
    results: dict[str, float] = {}
    with torch.no_grad(), run.precision.autocast(), run.layout.evaluated() as model:
        for evaluator in run.evaluators:
            for name, value in evaluator.run(model).items():
                results[f"{evaluator.name}/{name}"] = float(value)
    run.task.train()
    run.metrics = results
    where = run.position
    seconds = perf_counter() - started
    place = {"epoch": where.epoch + 1, "samples": where.samples_seen}
    _check_keep_best(run)
    tracker.log("eval", where.step, {**place, **results, "eval_s": seconds})
    shown = "  ".join(f"{name} {value:.4g}" for name, value in results.items())
    logger.info("epoch %d evaluation (%.1f s)  %s", where.epoch + 1, seconds, shown)


def _check_keep_best(run: Run) -> None:
    measure = run.options.run.keep_best.partition(":")[0]
    if measure and measure not in run.metrics:
        raise SetupError(
            f"--keep-best names {measure}; this run measures {', '.join(run.metrics)}: choose one of those"
        )


def _advance(run: Run, loaded: StepBatch) -> None:
    run.position.step += 1
    run.position.step_in_epoch += 1
    run.position.samples_seen += run.global_batch
    run.meter.steps += 1
    run.meter.wait_s += loaded.wait_s
    run.skip_messages += loaded.skipped


def _record(run: Run, tracker: Tracker, progress: ProgressView, outputs: dict[str, Tensor], norm: Tensor) -> None:
    """Every --log-every-n-steps steps, at the first and at the last: the mean over ranks of this step's losses."""
    where, meter = run.position, run.meter
    every = run.options.logging.log_every_n_steps
    is_logged = where.step % every == 0 or where.step in (1, run.total_steps)
    if not is_logged:
        progress.update(where.step, where.epoch, run.options.optimizer.epochs)
        return
    speed, memory = meter.speed(run.global_batch), peak_memory_mib(run.ranks.device)
    if run.health.is_due(where.step):
        run.health.tell(where.step, speed, memory, run.bad_samples.total)
    names = [name for name in outputs if name not in ("logit_scale", "logit_bias")]
    means = all_reduce_sum(torch.stack([outputs[name].float() for name in names])) / run.ranks.world_size
    losses = dict(zip(names, means.tolist()))
    values = {
        "epoch": where.epoch + 1,
        "samples": where.samples_seen,
        **losses,
        "lr": run.schedule(where.step - 1),
        "logit_scale": float(outputs["logit_scale"]),
        "logit_bias": float(outputs["logit_bias"]),
        "grad_norm": float(norm),
        **speed,
        "peak_memory_mib": memory,
        "skipped_samples": _report_skips(run),
    }
    run.losses = losses
    tracker.log("train", where.step, values)
    progress.update(where.step, where.epoch, run.options.optimizer.epochs, values)
    meter.reset()


def _report_skips(run: Run) -> int:
    """Log the samples replaced since the last time, of all ranks; the number of this run so far."""
    if run.options.loading.on_bad_sample == "stop":
        return 0
    gathered = gather_objects((run.skip_messages, run.bad_samples.total))
    run.skip_messages = []
    for messages, _ in gathered:
        for message in messages:
            logger.warning("bad sample replaced: %s", message)
    return sum(total for _, total in gathered)


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory so far, MiB: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _warn_of_duplicates(run: Run, batch: ItemBatch) -> None:
    if run.options.objective.mask_duplicates:
        return
    message = duplicate_warning(batch, normal_check=run.options.objective.normal_check)
    if message and run.ranks.is_main:
        logger.warning(message)


def _announce(run: Run) -> None:
    count = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    logger.info("run folder %s", run.folder)
    logger.info(
        "%s: %.3g M parameters, %.3g M trained; %s on %d × %s; %d epochs of %d steps of %d images",
        run.model.config.get("name", type(run.model).__name__), count / 1e6, trained / 1e6, run.precision.name,
        run.ranks.world_size, run.ranks.device.type, run.options.optimizer.epochs, run.source.steps_per_epoch,
        run.global_batch,
    )  # fmt: skip
    logger.info("matrix products on this device: %.3g TFLOP/s; mfu is the share a step reaches", run.meter.rate / 1e12)


def _summarise(run: Run, result: TrainResult, steps: int) -> None:
    speed = run.global_batch * steps / result.seconds if steps else 0.0
    lines = [
        f"{'stopped' if result.interrupted else 'finished'} after {result.step} of {run.total_steps} steps, "
        f"{result.epochs_done} of {run.options.optimizer.epochs} epochs",
        f"  time         {duration(result.seconds)} for {steps} steps, {speed:.3g} images/s, evaluation included",
        f"  checkpoint   {result.checkpoint or 'none'}",
    ]
    if result.losses:
        lines.append("  last losses  " + "  ".join(f"{name} {value:.4g}" for name, value in result.losses.items()))
    if result.metrics:
        lines.append("  evaluation   " + "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items()))
    if run.bad_samples.total:
        lines.append(f"  bad samples  {run.bad_samples.total} replaced on this rank; see log.txt")
    for line in lines:
        logger.info(line)
