"""Saving a run and going on with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from itemizedclip.models.factory import CheckpointError
from itemizedclip.training import checkpoint as checkpoints
from itemizedclip.training.checkpoint import Checkpoint
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
    saved = checkpoints.load_checkpoint(path)
    checkpoints.check_same_model(saved, config, path)
    run.model.load_state_dict(saved.state_dict)
    # Settings come from this run's options, not from the checkpoint: only the moments are taken over.
    settings = [{key: value for key, value in group.items() if key != "params"} for group in run.optimizer.param_groups]
    try:
        run.optimizer.load_state_dict(saved.optimizer)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its optimizer trained another set of parameters ({error}); give the same --lock-* flags and term "
            f"weights, or start a new run from its weights with --pretrained {path}"
        ) from error
    for group, values in zip(run.optimizer.param_groups, settings):
        group.update(values)
    if saved.scaler and run.scaler.is_enabled():
        run.scaler.load_state_dict(saved.scaler)
    run.position = _reposition(run, saved)
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
        for moved in checkpoints.set_aside_later(run.folder, path, saved.step):
            logger.info("moved the later checkpoint %s to %s", moved.name, moved.parent)
    where = run.position
    logger.info("resumed from %s at step %d, in epoch %d", path, where.step, where.epoch + 1)


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
    """Write the run's state, on the main rank."""
    run.last_checkpoint = path
    if not run.ranks.is_main:
        return
    started, where = perf_counter(), run.position
    checkpoints.save_checkpoint(
        Checkpoint(
            state_dict=run.model.state_dict(),
            optimizer=run.optimizer.state_dict(),
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
        ),
        path,
    )
    logger.info("saved %s at step %d (%.1f s)", path, where.step, perf_counter() - started)


def save_latest(run: Run) -> None:
    """Write the rolling checkpoint."""
    save(run, checkpoints.latest_path(run.folder))


def save_epoch(run: Run) -> None:
    """After an epoch: epoch_N.pt when one is due, which makes latest.pt needless; else latest.pt."""
    done, settings = run.position.epoch, run.options.run
    if done % settings.save_frequency and done < run.options.optimizer.epochs:
        return save_latest(run)
    path = checkpoints.epoch_path(run.folder, done)
    save(run, path)
    if run.ranks.is_main:
        checkpoints.latest_path(run.folder).unlink(missing_ok=True)
        if settings.delete_previous_checkpoint:
            checkpoints.keep_only(run.folder, path)
    return None
