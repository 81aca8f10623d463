"""Checkpoints: written whole or not at all, holding tensors and plain data only, enough to continue or to evaluate.

A checkpoint is a dict with the fields of `Checkpoint`; `torch.load(path, weights_only=True)` reads it. No generator
state is stored: all randomness follows (seed, rank, step) and (seed, epoch, index).
"""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from itemizedclip.models.factory import CheckpointError, read_checkpoint
from itemizedclip.runtime.files import written_whole
from itemizedclip.training.options import flatten_options

FORMAT = 1
LATEST = "latest.pt"

logger = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """State of a run after `step` optimizer steps.

    Attributes:
        state_dict: the model's tensors under its own names, no prefix.
        optimizer: state of the optimizer.
        scaler: state of the loss scaler (precision amp), else None.
        step: optimizer steps taken, skipped ones included.
        epoch: epoch to go on in, from 0.
        step_in_epoch: steps of that epoch already taken; all of them when only its evaluation is left to do.
        samples_seen: images of all ranks.
        total_steps: length of the schedule.
        run_id: identity of the run, kept over resumes.
        options: plain options of the run, --precision as it was computed in.
        model_config: rebuilds the model.
        transform: what was done to images, as plain data.
        data_fingerprint: identity of the training data.
        world_size: ranks of the run.
        metrics: newest results of the evaluators.
        tracking: identities at external trackers.
        format: version of this layout.
    """

    state_dict: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    step: int
    epoch: int
    step_in_epoch: int
    samples_seen: int
    total_steps: int
    run_id: str
    options: dict[str, Any]
    model_config: dict[str, Any]
    transform: dict[str, Any]
    data_fingerprint: str
    world_size: int
    metrics: dict[str, float] = field(default_factory=dict)
    tracking: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def new_run_id() -> str:
    """Eight hexadecimal digits."""
    return uuid.uuid4().hex[:8]


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint; on the main rank only."""
    contents = {f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}
    with written_whole(path, durable=True) as file:
        torch.save(contents, file)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read the state of a run.

    Raises:
        CheckpointError: unreadable, weights without a training state, or of a newer layout.
    """
    contents = read_checkpoint(path)
    missing = [f.name for f in fields(Checkpoint) if f.name not in contents]
    if missing:
        raise CheckpointError(
            f"{path}: holds weights but no state of a run (lacks {', '.join(missing[:3])}), so it cannot be resumed; "
            f"start from its weights with --pretrained {path}"
        )
    if contents["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: written by a newer version (format {contents['format']}, this one reads {FORMAT}); update"
        )
    return Checkpoint(**{f.name: contents[f.name] for f in fields(Checkpoint)})


# --- finding, keeping, setting aside ---------------------------------------------------------------------------------


def epoch_path(folder: Path, epochs_done: int) -> Path:
    """checkpoints/epoch_N.pt of a run folder, N epochs done."""
    return folder / "checkpoints" / f"epoch_{epochs_done}.pt"


def latest_path(folder: Path) -> Path:
    """The rolling checkpoint of a run folder."""
    return folder / "checkpoints" / LATEST


def epoch_checkpoints(folder: Path) -> list[Path]:
    """epoch_N.pt files of a run folder by rising N."""
    found = [
        (int(match[1]), path)
        for path in (folder / "checkpoints").glob("epoch_*.pt")
        if (match := re.fullmatch(r"epoch_(\d+)\.pt", path.name))
    ]
    return [path for _, path in sorted(found)]


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a run folder with the most steps; unreadable ones are passed over with a warning."""
    candidates = epoch_checkpoints(folder)[::-1]
    if latest_path(folder).is_file():
        candidates.insert(0, latest_path(folder))
    best: tuple[int, Path] | None = None
    for path in candidates:
        if best is not None and path.name != LATEST and best[1].name != LATEST:
            break  # epoch files come newest first
        try:
            step = _step_of(path)
        except CheckpointError as error:
            logger.warning("%s; looking for an older one", error)
            continue
        if best is None or step > best[0]:
            best = (step, path)
    return best[1] if best else None


def _step_of(path: Path) -> int:
    # Memory-mapped: the tensors are not read.
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable checkpoint of a run ({type(error).__name__})") from error


def find_resume(resume: str, logs: Path, name: str, *, recipe: str = "") -> Path | None:
    """The checkpoint that --resume names.

    Args:
        resume: a path, or "latest": the newest checkpoint of run `name`, or without a name of the newest run folder
            that `recipe` named ("<recipe>-<date>-<time>").
        logs: folder of runs.

    Returns:
        None when "latest" finds nothing.

    Raises:
        CheckpointError: the path does not exist.
    """
    if resume != "latest":
        path = Path(resume)
        if not path.is_file():
            raise CheckpointError(f"--resume {resume}: no such checkpoint; give a .pt file, or latest")
        return path
    pattern = re.compile(re.escape(recipe) + r"-\d{8}-\d{6}")
    folders = [logs / name] if name else sorted(f for f in logs.glob(f"{recipe}-*") if pattern.fullmatch(f.name))[::-1]
    for folder in folders:
        found = newest_checkpoint(folder)
        if found:
            return found
    return None


def set_aside_later(folder: Path, resumed_from: Path, step: int) -> list[Path]:
    """Move checkpoints beyond `step` to checkpoints/superseded/, so that "latest" follows the resumed branch.

    Only when the resumed checkpoint lies in this folder. Returns their new paths.
    """
    if resumed_from.resolve().parent != (folder / "checkpoints").resolve():
        return []
    moved = []
    for path in [*epoch_checkpoints(folder), latest_path(folder)]:
        if not path.is_file() or path.resolve() == resumed_from.resolve():
            continue
        try:
            later = _step_of(path) > step
        except CheckpointError:
            later = True
        if later:
            target = path.parent / "superseded" / path.name
            target.parent.mkdir(exist_ok=True)
            shutil.move(path, target)
            moved.append(target)
    return moved


def keep_only(folder: Path, newest: Path) -> None:
    """Delete every epoch_N.pt but `newest`."""
    for path in epoch_checkpoints(folder):
        if path != newest:
            path.unlink()


# --- what changed ----------------------------------------------------------------------------------------------------

UNREMARKABLE = ("run.resume", "run.name", "run.logs", "run.device", "run.recipe", "loading.workers", "logging.",
                "distributed.", "run.save_", "run.delete_", "run.val_frequency")  # fmt: skip
"""Options whose change does not change the curve."""


def describe_changes(
    checkpoint: Checkpoint, options: Mapping[str, Any], *, total_steps: int, data_fingerprint: str, world_size: int
) -> list[str]:
    """One sentence per difference between a run and the checkpoint it continues; empty when it continues unchanged."""
    old, new = flatten_options(checkpoint.options), flatten_options(options)
    changes = [
        f"{key}: {old.get(key, '(absent)')} → {new.get(key, '(absent)')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(UNREMARKABLE)
    ]
    if checkpoint.total_steps != total_steps:
        changes.append(
            f"the schedule is now {total_steps} steps long instead of {checkpoint.total_steps}: "
            f"the learning rate jumps at step {checkpoint.step}"
        )
    if checkpoint.world_size != world_size:
        changes.append(f"{world_size} processes instead of {checkpoint.world_size}")
    if checkpoint.data_fingerprint != data_fingerprint:
        changes.append(
            f"the training data changed (fingerprint {checkpoint.data_fingerprint} → {data_fingerprint}): "
            "the order of samples is another one from here on"
        )
    return changes


def check_same_model(checkpoint: Checkpoint, model_config: Mapping[str, Any], path: Path) -> None:
    """Refuse to continue with another model.

    Raises:
        CheckpointError: names the first differing fields.
    """
    old, new = flatten_options(checkpoint.model_config), flatten_options(model_config)
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if differing:
        listed = "; ".join(f"{key}: {old.get(key)} there, {new.get(key)} here" for key in differing[:4])
        raise CheckpointError(
            f"{path}: was trained with another model ({listed}); give the same --model, or start a new run from its "
            f"weights with --pretrained {path}"
        )
