"""Checkpoints: written whole or not at all, holding tensors and plain data only, enough to continue or to evaluate.

A checkpoint is a dict with the fields of `Checkpoint`; `torch.load(path, weights_only=True)` reads it. No generator
state is stored: all randomness follows (seed, rank, step) and (seed, epoch, index).

None is trusted: its bytes are compared with its checksum, its tensors must be finite, its fields plausible. A run goes
on from the newest one for which all that holds.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from itemizedclip.models.archive import save_archive, unusable_tensor
from itemizedclip.models.shards import SUFFIX, remove_shards
from itemizedclip.models.weights import CheckpointError, read_checkpoint
from itemizedclip.training.options import flatten_options

FORMAT = 1
FORMAT_SHARDED = 2
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
        shards: where the tensors of both states are instead: the folder beside the file and the digests of what is in
            it (`itemizedclip.models.shards`). Such a file is written last: without it the folder counts for nothing.
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
    shards: dict[str, Any] | None = None


def new_run_id() -> str:
    """Eight hexadecimal digits."""
    return uuid.uuid4().hex[:8]


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint with its checksum; on the main rank only.

    Raises:
        OSError: the disk refused; what was there before is as it was.
    """
    contents = {f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}
    if checkpoint.shards is None:
        del contents["shards"]
    save_archive(contents, path)


def load_checkpoint(path: Path, *, verify: bool = True, mapped: bool = False) -> Checkpoint:
    """Read the state of a run.

    Args:
        path: the file.
        verify: compare it with its checksum and look at every tensor; False when that was done just before. The
            fields are checked always.
        mapped: let the tensors stay in the file, for a look that needs no memory.

    Raises:
        CheckpointError: unreadable, damaged, weights without a training state, of a newer layout, or a field that
            cannot be.
    """
    contents = read_checkpoint(path, verify=verify, mapped=mapped)
    contents.setdefault("shards", None)
    missing = [f.name for f in fields(Checkpoint) if f.name not in contents]
    if missing:
        raise CheckpointError(
            f"{path}: holds weights but no state of a run (lacks {', '.join(missing[:3])}), so it cannot be resumed; "
            f"start from its weights with --pretrained {path}"
        )
    check_fields(contents, path)
    if verify:
        problem = unusable_tensor(_optimizer_tensors(contents["optimizer"]))
        if problem:
            raise CheckpointError(f"{path}: cannot be resumed, {problem}; take another checkpoint")
    return Checkpoint(**{f.name: contents[f.name] for f in fields(Checkpoint)})


# --- what the fields may be ------------------------------------------------------------------------------------------


def _is_count(value: Any, lowest: int = 0) -> bool:
    return type(value) is int and lowest <= value < 2**62


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Plain data, as JSON holds it, nested no deeper than options and configs are."""
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(entry, depth + 1) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(entry, depth + 1) for entry in value)
    return value is None or type(value) in (bool, int, float, str)


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(type(k) is str and isinstance(v, Tensor) for k, v in value.items())


def _is_optimizer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and all(isinstance(state, dict) for state in value["state"].values())
        and isinstance(value.get("param_groups"), list)
        and all(
            isinstance(group, dict) and isinstance(group.get("params"), list) and _is_plain(group)
            for group in value["param_groups"]
        )
    )


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if type(value) in (int, float) and abs(value) < 2**1000 and math.isfinite(value) else None


def _is_scaler(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return value is None or value == {}
    scale = _number(value.get("scale"))
    return _is_plain(value) and scale is not None and scale > 0


def _has_batches(options: Any) -> bool:
    """The numbers that place the run in its data (`resume._reposition`)."""
    if not isinstance(options, dict) or not _is_plain(options):
        return False
    loading, optimizer = options.get("loading"), options.get("optimizer")
    return (
        isinstance(loading, dict)
        and isinstance(optimizer, dict)
        and all(_is_count(loading.get(name), 1) for name in ("batch_size", "accum_batch", "accum_freq"))
        and _is_count(optimizer.get("epochs"), 1)
    )


MAX_DEPTH = 32

_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "state_dict": ("named tensors", _is_state),
    "optimizer": ("the state of an optimizer", _is_optimizer),
    "scaler": ("the state of a loss scaler, or none", _is_scaler),
    "step": ("a whole number from 0", _is_count),
    "epoch": ("a whole number from 0", _is_count),
    "step_in_epoch": ("a whole number from 0", _is_count),
    "samples_seen": ("a whole number from 0", _is_count),
    "total_steps": ("a whole number from 1", lambda value: _is_count(value, 1)),
    "run_id": ("a text", lambda value: type(value) is str),
    "options": ("the options of a run, batch sizes and epochs among them", _has_batches),
    "model_config": ("plain data by name", lambda value: isinstance(value, dict) and _is_plain(value)),
    "transform": ("plain data by name", lambda value: isinstance(value, dict) and _is_plain(value)),
    "data_fingerprint": ("a text", lambda value: type(value) is str),
    "world_size": ("a whole number from 1", lambda value: _is_count(value, 1)),
    "metrics": ("numbers by name", lambda value: isinstance(value, dict) and _is_plain(value)
                and all(type(entry) in (int, float) for entry in value.values())),
    "tracking": ("texts by name", lambda value: isinstance(value, dict) and _is_plain(value)
                 and all(type(entry) is str for entry in value.values())),
}  # fmt: skip
"""Field → what is expected, whether a value is that."""


def check_fields(contents: Mapping[str, Any], path: Path) -> None:
    """Whether every field of a checkpoint is of its kind and the counters fit each other.

    Raises:
        CheckpointError: names the field, its value and what was expected.
    """
    layout = contents["format"]
    if _is_count(layout, 1) and layout > FORMAT_SHARDED:
        newest = FORMAT_SHARDED
        raise CheckpointError(f"{path}: written by a newer version (format {layout}, this one reads {newest}); update")
    wrong = [("format", "a whole number from 1")] if not _is_count(layout, 1) else []
    wrong += [(name, expected) for name, (expected, holds) in _RULES.items() if not holds(contents[name])]
    if not wrong:
        epochs = contents["options"]["optimizer"]["epochs"]
        if contents["total_steps"] < epochs:
            wrong.append(("total_steps", f"at least one step in each of {epochs} epochs"))
        for name, highest in (
            ("epoch", epochs), ("step_in_epoch", contents["total_steps"]), ("step", contents["total_steps"]),
        ):  # fmt: skip
            if contents[name] > highest:
                wrong.append((name, f"at most {highest}"))
    if wrong:
        name, expected = wrong[0]
        raise CheckpointError(
            f"{path}: its field {name} is {_shown(contents[name])}; expected {expected}: the file is damaged or was "
            "not written by a run; take another checkpoint"
        )


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list, tuple, Tensor)):
        return f"a {type(value).__name__} of another form"
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 256 else "a number of many digits"
    return text if len(text) <= 60 else text[:60] + " …"


def _optimizer_tensors(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{name} of parameter {index} in the optimizer": value
        for index, state in optimizer["state"].items()
        for name, value in state.items()
    }


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


def has_checkpoints(folder: Path) -> bool:
    """Whether a run folder holds checkpoints, good or damaged."""
    return bool(epoch_checkpoints(folder)) or latest_path(folder).is_file()


def newest_checkpoint(folder: Path) -> Path | None:
    """The verified checkpoint of a run folder with the most steps; damaged ones are passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    found = 0
    for path in _by_falling_steps(folder):
        found += 1
        try:
            load_checkpoint(path, mapped=True)
            return path
        except CheckpointError as error:
            logger.warning("%s; looking for an older one", error)
    if found:
        raise CheckpointError(
            f"{folder / 'checkpoints'}: every one of its {found} checkpoints is damaged (see above), nothing "
            "is left to go on from. They are left as they are: copy a good one there, or give another --name"
        )
    return None


def _by_falling_steps(folder: Path) -> Iterator[Path]:
    """Epoch files from the newest on, latest.pt before the first with fewer steps, or first when it cannot be read."""
    latest = latest_path(folder)
    pending = latest.is_file()
    for path in epoch_checkpoints(folder)[::-1]:
        if pending:
            steps, other = _step_of(latest), _step_of(path)
            if steps is None or (other is not None and steps > other):
                yield latest
                pending = False
        yield path
    if pending:
        yield latest


def _step_of(path: Path) -> int | None:
    """Steps a checkpoint says it has taken; None when it cannot be asked."""
    step = _peek(path).get("step")
    return step if _is_count(step) else None


def _peek(path: Path) -> Mapping[str, Any]:
    """A checkpoint's plain data, not verified; its tensors are not read. Empty when it cannot be read."""
    try:
        return read_checkpoint(path, verify=False, mapped=True)
    except CheckpointError:
        return {}


def find_resume(resume: str, logs: Path, name: str, *, recipe: str = "") -> Path | None:
    """The checkpoint that --resume names.

    Args:
        resume: a path, or "latest": the newest checkpoint of run `name`, or without a name of the newest run folder
            that `recipe` named ("<recipe>-<date>-<time>").
        logs: folder of runs.

    Returns:
        A verified checkpoint; None when "latest" finds nothing.

    Raises:
        CheckpointError: the path does not exist, or what it names is damaged; for "latest", all there are.
    """
    if resume != "latest":
        path = Path(resume)
        if not path.is_file():
            raise CheckpointError(f"--resume {resume}: no such checkpoint; give a .pt file, or latest")
        load_checkpoint(path, mapped=True)
        return path
    pattern = re.compile(re.escape(recipe) + r"-\d{8}-\d{6}(-\d+)?")
    folders = [logs / name] if name else sorted(f for f in logs.glob(f"{recipe}-*") if pattern.fullmatch(f.name))[::-1]
    for folder in folders:
        found = newest_checkpoint(folder)
        if found:
            return found
    return None


def set_aside_later(folder: Path, resumed_from: Path, step: int, epoch: int) -> list[Path]:
    """Move checkpoints beyond `step` to checkpoints/superseded/, so that "latest" follows the resumed branch.

    Only when the resumed checkpoint lies in this folder. Of one that cannot be read its name tells: epoch_N.pt is later
    when N is more than `epoch`, latest.pt is in the way. Nothing that lies in superseded/ is replaced.

    Returns:
        Their new paths.
    """
    if resumed_from.resolve().parent != (folder / "checkpoints").resolve():
        return []
    moved = []
    for path in [*epoch_checkpoints(folder), latest_path(folder)]:
        if not path.is_file() or path.resolve() == resumed_from.resolve():
            continue
        steps = _step_of(path)
        later = steps > step if steps is not None else path.name == LATEST or _epochs_of(path) > epoch
        if later:
            target = _free_name(path.parent / "superseded" / path.name)
            target.parent.mkdir(exist_ok=True)
            shards = shards_of(path)
            if shards is not None and shards.is_dir():
                shutil.move(shards, target.parent / shards.name)
            shutil.move(path, target)
            moved.append(target)
    return moved


def _free_name(path: Path) -> Path:
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return candidate


def _epochs_of(path: Path) -> int:
    """N of epoch_N.pt."""
    return int(path.stem.rpartition("_")[2])


def measured(path: Path, measure: str) -> float | None:
    """A measure of the evaluation a checkpoint carries; None without one."""
    metrics = _peek(path).get("metrics")
    value = metrics.get(measure) if isinstance(metrics, dict) else None
    return _number(value)


def best_checkpoint(folder: Path, keep_best: str) -> tuple[Path, float] | None:
    """The epoch_N.pt that --keep-best is about, and its value; of equals the first, None when none has the measure."""
    measure, _, direction = keep_best.partition(":")
    found = [(path, value) for path in epoch_checkpoints(folder) if (value := measured(path, measure)) is not None]
    if not found:
        return None
    return (min if direction == "min" else max)(found, key=lambda entry: entry[1])


def prune(folder: Path, keep_last: int, keep_best: str) -> None:
    """Delete every epoch_N.pt but the newest `keep_last` (0: all) and the best of `keep_best`."""
    best = best_checkpoint(folder, keep_best) if keep_best else None
    for path in epoch_checkpoints(folder)[:-keep_last] if keep_last else []:
        if best is None or path != best[0]:
            remove(path)


def shards_of(path: Path) -> Path | None:
    """The folder that holds a checkpoint's tensors; None when the file itself holds them, or there is none."""
    record = _peek(path).get("shards")
    return (
        path.parent / record["folder"] if isinstance(record, dict) and isinstance(record.get("folder"), str) else None
    )


def remove(path: Path) -> None:
    """Remove a checkpoint with its folder, the file first; one that is not there is no matter."""
    folder = shards_of(path)
    path.unlink(missing_ok=True)
    if folder is not None:
        remove_shards(folder)


def new_shards(path: Path) -> str:
    """Name of a new folder for the tensors of a checkpoint."""
    return f"{path.stem}.{uuid.uuid4().hex[:8]}{SUFFIX}"


def remove_orphans(folder: Path) -> list[Path]:
    """Remove folders of tensors that no checkpoint names, such as a killed run leaves; by whoever holds the claim.

    One whose checkpoint cannot be read stays.
    """
    checkpoints = list((folder / "checkpoints").glob("*.pt"))
    named = {shards_of(path) for path in checkpoints}
    unreadable = {path.stem for path in checkpoints if not _peek(path)}
    removed = []
    for found in (folder / "checkpoints").glob(f"*{SUFFIX}"):
        if found not in named and found.name.partition(".")[0] not in unreadable:
            remove_shards(found)
            removed.append(found)
    return removed


# --- what changed ----------------------------------------------------------------------------------------------------

UNREMARKABLE = ("run.resume", "run.name", "run.logs", "run.device", "run.recipe", "loading.workers", "logging.",
                "distributed.", "parallel.", "run.save_", "run.keep_", "run.delete_", "run.val_frequency",
                "loading.loader_timeout")  # fmt: skip
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
