"""Saving a run and going on with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch

from itemizedclip.models.factory import CheckpointError
from itemizedclip.runtime.processes import on_main
from itemizedclip.training import checkpoint as checkpoints
from itemizedclip.training.checkpoint import Checkpoint
from itemizedclip.training.folder import explain_failed_write
from itemizedclip.training.options import options_to_dict
from itemizedclip.training.run import Position, Run

logger = logging.getLogger(__name__)


def plain_options(run: Run) -> dict[str, Any]:
    """The options as checkpoints keep them: --precision auto as what it became, which on another machine may differ."""
    options = options_to_dict(run.options)
    return {**options, "model": {**options["model"], "precision": run.precision.name}}


def restore(run: Run, path: Path, config: Mapping[str, Any]) -> None:
    """Bring a built run to the state of a checkpoint and say what differs.

    Raises:
        CheckpointError: another model, or another set of trained parameters.
    """
    # Verified by `find_resume`, on the main rank.
    saved = checkpoints.load_checkpoint(path, verify=False)
    checkpoints.check_same_model(saved, config, path)
    try:
        run.layout.load_model(saved.state_dict)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"{path}: its weights do not fit the model it names ({first}); take another one"
        ) from error
    # Settings come from this run's options, not from the checkpoint: only the moments are taken over.
    settings = [{key: value for key, value in group.items() if key != "params"} for group in run.optimizer.param_groups]
    try:
        run.optimizer.load_state_dict(run.layout.shared_out(saved.optimizer, run.optimizer))
        _check_moments(run.optimizer)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: its optimizer trained another set of parameters ({error}); give the same --lock-* flags and term "
            f"weights, or start a new run from its weights with --pretrained {path}"
        ) from error
    for group, values in zip(run.optimizer.param_groups, settings):
        group.update(values)
    if saved.scaler and run.scaler.is_enabled():
        run.scaler.load_state_dict(saved.scaler)
    run.position = _reposition(run, saved)
    run.saved_at = monotonic()
    run.metrics = dict(saved.metrics)
    if path.resolve().is_relative_to(run.folder.resolve()):
        # The same run goes on; in another folder it is a new one that starts from there.
        run.run_id, run.tracking = saved.run_id, dict(saved.tracking)
    run.last_checkpoint = path
    for change in checkpoints.describe_changes(
        saved,
        plain_options(run),
        total_steps=run.total_steps,
        data_fingerprint=run.data_fingerprint,
        world_size=run.ranks.world_size,
    ):
        logger.warning("changed since %s: %s", path.name, change)
    if run.ranks.is_main:
        for moved in checkpoints.set_aside_later(run.folder, path, saved.step, saved.epoch):
            logger.info("moved the later checkpoint %s to %s", moved.name, moved.parent)
    where = run.position
    logger.info("resumed from %s at step %d, in epoch %d", path, where.step, where.epoch + 1)


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """The moments of a parameter are of its shape; PyTorch would find out in the first step."""
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(state[name].shape)} for a parameter {tuple(parameter.shape)}")


def _reposition(run: Run, saved: Checkpoint) -> Position:
    """Where a checkpoint's position lies in this run, whose steps may be of another size or number."""
    loading, epochs = saved.options["loading"], saved.options["optimizer"]["epochs"]
    old_batch = loading["batch_size"] * loading["accum_batch"] * loading["accum_freq"] * saved.world_size
    old_steps, new_steps = saved.total_steps // epochs, run.source.steps_per_epoch
    if (old_batch, old_steps) == (run.global_batch, new_steps):
        return Position(saved.step, saved.epoch, saved.step_in_epoch, saved.samples_seen)
    if saved.step_in_epoch == old_steps:
        step_in_epoch = new_steps
    else:
        step_in_epoch = min(new_steps, saved.step_in_epoch * old_batch // run.global_batch)
    step = saved.epoch * new_steps + step_in_epoch
    logger.warning(
        "an epoch now has %d steps of %d images instead of %d of %d: step %d becomes step %d of the schedule",
        new_steps, run.global_batch, old_steps, old_batch, saved.step, step,
    )  # fmt: skip
    return Position(step, saved.epoch, step_in_epoch, saved.samples_seen)


def save(run: Run, path: Path) -> None:
    """Write the run's state, on the main rank; every rank must call it.

    Raises:
        NoSpaceError: the disk is full; names the last good checkpoint.
        ClaimedError: the run folder belongs to another run now.
    """
    state = _state(run)
    if not run.ranks.is_main:
        run.last_checkpoint = path
        return
    if run.claim is not None and not run.claim.check():
        run.claim.renew()
        logger.warning("%s: its claim was removed while the run is at work; claimed again", run.folder)
        if run.last_checkpoint is not None and not run.last_checkpoint.is_file():
            run.last_checkpoint = None
    started, where = perf_counter(), run.position
    try:
        checkpoints.save_checkpoint(state, path)
    except OSError as error:
        raise explain_failed_write(error, path, run.last_checkpoint, state_bytes(run)) from error
    run.last_checkpoint, run.saved_at = path, monotonic()
    logger.info("saved %s at step %d (%.1f s)", path, where.step, perf_counter() - started)


def _state(run: Run) -> Checkpoint:
    """What a checkpoint holds; whole on the main rank alone."""
    where = run.position
    return Checkpoint(
        state_dict=run.layout.whole(run.model.state_dict()),
        optimizer=run.layout.whole(run.optimizer.state_dict()),
        scaler=run.scaler.state_dict() if run.scaler.is_enabled() else None,
        step=where.step,
        epoch=where.epoch,
        step_in_epoch=where.step_in_epoch,
        samples_seen=where.samples_seen,
        total_steps=run.total_steps,
        run_id=run.run_id,
        options=plain_options(run),
        model_config=dict(run.model.config),
        transform=run.transform,
        data_fingerprint=run.data_fingerprint,
        world_size=run.ranks.world_size,
        metrics=dict(run.metrics),
        tracking=dict(run.tracking),
    )


def state_bytes(run: Run) -> int:
    """What a checkpoint of this run takes on disk: the weights, and two moments of what is trained."""
    weights = sum(value.numel() * value.element_size() for value in run.model.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad)
    return weights + 2 * trained + 2**16


def save_latest(run: Run) -> None:
    """Write the rolling checkpoint."""
    save(run, checkpoints.latest_path(run.folder))


def is_due(run: Run) -> bool:
    """Whether --save-every-steps asks for a checkpoint now."""
    every = run.options.run.save_every_steps
    return bool(every) and run.position.step % every == 0


def is_late(run: Run) -> bool:
    """Whether --save-every-minutes asks for a checkpoint, by this rank's clock."""
    minutes = run.options.run.save_every_minutes
    return bool(minutes) and monotonic() - run.saved_at >= 60 * minutes


def save_epoch(run: Run, *, evaluated: bool) -> None:
    """After an epoch: epoch_N.pt when one is due or is the best yet, which makes latest.pt needless; else latest.pt.

    Args:
        run: the run, moved on to the next epoch.
        evaluated: whether `run.metrics` is of the weights as they are now.
    """
    done, settings = run.position.epoch, run.options.run
    due = done % settings.save_frequency == 0 or done >= run.options.optimizer.epochs
    if not due and not (evaluated and on_main(lambda: _is_best(run))):
        return save_latest(run)
    path = checkpoints.epoch_path(run.folder, done)
    save(run, path)
    if run.ranks.is_main:
        checkpoints.latest_path(run.folder).unlink(missing_ok=True)
        checkpoints.prune(
            run.folder, 1 if settings.delete_previous_checkpoint else settings.keep_last, settings.keep_best
        )
    return None


def _is_best(run: Run) -> bool:
    """Whether the run's newest evaluation beats those of all epoch files; on the main rank, which has the files."""
    keep_best = run.options.run.keep_best
    if not keep_best:
        return False
    measure, _, direction = keep_best.partition(":")
    best = checkpoints.best_checkpoint(run.folder, keep_best)
    value = run.metrics[measure]
    return best is None or (value < best[1] if direction == "min" else value > best[1])
