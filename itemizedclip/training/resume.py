"""Saving a run and going on with it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch
from torch import Tensor

from itemizedclip.models import shards
from itemizedclip.models.archive import DamagedError
from itemizedclip.models.weights import CheckpointError
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.processes import on_main
from itemizedclip.training import checkpoint as checkpoints
from itemizedclip.training.checkpoint import Checkpoint
from itemizedclip.training.folder import explain_failed_write
from itemizedclip.training.options import options_to_dict
from itemizedclip.training.run import PendingSave, Position, Run

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
    # Verified by `find_resume`, on the main rank. Tensors in a folder are read below, by each rank what it needs.
    folder = checkpoints.shards_of(path)
    saved = checkpoints.load_checkpoint(path, verify=False, mapped=folder is not None)
    checkpoints.check_same_model(saved, config, path)
    try:
        if folder is None:
            run.layout.load_model(saved.state_dict)
        else:
            shards.read_shards(folder, shards.flat(run.model.state_dict(), {}))
    except (RuntimeError, DamagedError) as error:
        first = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"{path}: its weights do not fit the model it names ({first}); take another one"
        ) from error
    # Settings come from this run's options, not from the checkpoint: only the moments are taken over.
    settings = [{key: value for key, value in group.items() if key != "params"} for group in run.optimizer.param_groups]
    try:
        if folder is None:
            state = run.layout.shared_out(saved.optimizer, run.optimizer)
        else:
            state = {**saved.optimizer, "state": _moments(folder, saved.optimizer, run.optimizer)}
        run.optimizer.load_state_dict(state)
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


def _moments(folder: Path, saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """The optimizer's tensors in a folder, each laid out as its parameter is here.

    Raises:
        ValueError: they are those of other parameters.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(numbers) != len(parameters):
        raise ValueError(f"{len(numbers)} parameters there, {len(parameters)} here")
    by_number = dict(zip(numbers, parameters))
    there = {name: like for name, like in shards.read_index(folder).items() if name.startswith(shards.OPTIMIZER)}
    _, likes = shards.nested(there)
    state = {
        number: {
            name: torch.empty(like.shape, dtype=like.dtype)
            if like.ndim == 0
            else torch.zeros_like(by_number[number], dtype=like.dtype, requires_grad=False)
            for name, like in named.items()
        }
        for number, named in likes.items()
    }
    shards.read_shards(folder, shards.flat({}, state))
    return state


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


def save(run: Run, path: Path, after: Callable[[], None] = lambda: None) -> None:
    """Write the run's state; every rank must call it. With --save-async it counts once `settle` has found it written.

    Args:
        run: the run.
        path: the checkpoint file.
        after: called on the main rank when the checkpoint counts.

    Raises:
        NoSpaceError: the disk is full; names the last good checkpoint.
        ClaimedError: the run folder belongs to another run now.
    """
    settle(run, wait=True)
    if run.claim is not None and not run.claim.check():
        run.claim.renew()
        logger.warning("%s: its claim was removed while the run is at work; claimed again", run.folder)
        if run.last_checkpoint is not None and not run.last_checkpoint.is_file():
            run.last_checkpoint = None
    started, step, settings = perf_counter(), run.position.step, run.options.run
    write = _write_sharded if settings.save_sharded else _write_file
    written, commit = write(run, path)

    def finish() -> None:
        commit()
        after()

    run.saved_at = monotonic()
    run.pending = PendingSave(path, step, started, written, finish)
    if not settings.save_async:
        settle(run, wait=True)


def settle(run: Run, *, wait: bool) -> None:
    """See after a checkpoint that is being written; once it is, it counts. Every rank calls it, each for itself.

    Raises:
        NoSpaceError, UserError: it could not be written.
    """
    pending = run.pending
    if pending is None or not (wait or pending.written.done()):
        return
    run.pending = None
    try:
        pending.written.result()
        if run.ranks.is_main:
            pending.commit()
    except OSError as error:
        raise explain_failed_write(error, pending.path, run.last_checkpoint, state_bytes(run)) from error
    except UserError:
        raise
    except Exception as error:
        cause = _cause(error)
        raise explain_failed_write(cause, pending.path, run.last_checkpoint, state_bytes(run)) from error
    run.last_checkpoint = pending.path
    if run.ranks.is_main:
        seconds = perf_counter() - pending.started
        logger.info("saved %s at step %d (%.1f s)", pending.path, pending.step, seconds)


def _cause(error: Exception) -> OSError:
    """What the disk told one of the ranks, as `torch.distributed.checkpoint` passes it on."""
    for failure in getattr(error, "failures", {}).values():
        if isinstance(failure[0], OSError):
            return failure[0]
    return OSError(None, str(error).splitlines()[0] if str(error) else type(error).__name__)


Written = tuple["Future[None]", Callable[[], None]]


def _write_file(run: Run, path: Path) -> Written:
    """One file, by the main rank."""
    state = _state(run)
    done: Future[None] = Future()
    if not run.ranks.is_main:
        done.set_result(None)
        return done, _nothing
    if not run.options.run.save_async:
        done.set_result(None)
        return done, lambda: checkpoints.save_checkpoint(state, path)
    copied = replace(state, state_dict=_copied(state.state_dict), optimizer=_copied(state.optimizer))

    def write() -> None:
        try:
            checkpoints.save_checkpoint(copied, path)
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    # Not a daemon: an end of the program waits for it.
    threading.Thread(target=write, name="checkpoint").start()
    return done, _nothing


def _write_sharded(run: Run, path: Path) -> Written:
    """A folder that all ranks write, then the file that names it, by the main rank."""
    folder = path.parent / on_main(lambda: checkpoints.new_shards(path))
    if run.shard_group is None:
        run.shard_group = shards.cpu_group()
    optimizer = run.optimizer.state_dict()
    tensors = shards.flat(run.model.state_dict(), optimizer["state"])
    state = _state_of(run, {}, {**optimizer, "state": {}})
    written = shards.write_shards(tensors, folder, run.shard_group, in_background=run.options.run.save_async)

    def commit() -> None:
        before = checkpoints.shards_of(path)
        record = {"folder": folder.name, "files": shards.collect_digests(folder)}
        checkpoints.save_checkpoint(replace(state, shards=record, format=checkpoints.FORMAT_SHARDED), path)
        if before is not None:
            shards.remove_shards(before)

    return written, commit


def _nothing() -> None:
    pass


def _copied(state: Any) -> Any:
    """A state that training no longer changes."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, (list, tuple)) else state


def _state(run: Run) -> Checkpoint:
    """What a checkpoint holds; whole on the main rank alone."""
    return _state_of(run, run.layout.whole(run.model.state_dict()), run.layout.whole(run.optimizer.state_dict()))


def _state_of(run: Run, state_dict: dict[str, Any], optimizer: dict[str, Any]) -> Checkpoint:
    where = run.position
    return Checkpoint(
        state_dict=state_dict,
        optimizer=optimizer,
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

    def tidy_up() -> None:
        checkpoints.remove(checkpoints.latest_path(run.folder))
        checkpoints.prune(
            run.folder, 1 if settings.delete_previous_checkpoint else settings.keep_last, settings.keep_best
        )

    return save(run, path, tidy_up)


def _is_best(run: Run) -> bool:
    """Whether the run's newest evaluation beats those of all epoch files; on the main rank, which has the files."""
    keep_best = run.options.run.keep_best
    if not keep_best:
        return False
    measure, _, direction = keep_best.partition(":")
    best = checkpoints.best_checkpoint(run.folder, keep_best)
    value = run.metrics[measure]
    return best is None or (value < best[1] if direction == "min" else value > best[1])
