"""What a run leaves behind and shows: the run folder, metrics.jsonl, log, progress, and optional outside trackers.

`logs/<name>/` holds params.json, log.txt, metrics.jsonl and checkpoints/. Only the main rank writes; metrics.jsonl is
the record, wandb and TensorBoard are copies whose failure never stops training.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from itemizedclip.runtime.files import parse_json, write_json, written_whole
from itemizedclip.runtime.logs import duration
from itemizedclip.training.folder import TrackingError, explain_failed_write
from itemizedclip.training.meter import PARTS
from itemizedclip.training.options import LoggingSettings

logger = logging.getLogger(__name__)

Values = Mapping[str, float | int | str]


def write_params(folder: Path, params: Mapping[str, Any]) -> None:
    """params.json: the resolved options; replaced whole."""
    write_json(folder / "params.json", params)


def drop_lines_after(path: Path, samples: int, *, evaluation_is_due: bool = False) -> int:
    """Remove lines of a metrics.jsonl beyond `samples`, and those that are no lines of ours; returns how many.

    The latter are lines cut short by a kill, bytes that are no text, numbers that are none.

    Args:
        path: the file; it may be missing.
        samples: images seen at the point where the run goes on.
        evaluation_is_due: the run goes on with the evaluation at that point: it will be recorded again.
    """
    if not path.is_file():
        return 0
    lines = path.read_bytes().splitlines()
    kept = [line for line in lines if _belongs(line, samples, evaluation_is_due)]
    if len(kept) < len(lines):
        with written_whole(path) as file:
            file.write(b"".join(line + b"\n" for line in kept))
    return len(lines) - len(kept)


def _belongs(line: bytes, samples: int, evaluation_is_due: bool) -> bool:
    try:
        values = parse_json(line.decode("utf-8"), source="metrics.jsonl", holding="a line of metrics")
    except ValueError:
        return False
    if not isinstance(values, dict) or type(values.get("samples")) is not int:
        return False
    if values["samples"] == samples and values.get("kind") == "eval":
        return not evaluation_is_due
    return values["samples"] <= samples


# --- outside trackers ------------------------------------------------------------------------------------------------


def check_trackers(settings: LoggingSettings) -> None:
    """Fail at the start when a tracker's package is missing.

    Raises:
        TrackingError: names the package and the extra that brings it.
    """
    for name in settings.trackers:
        if importlib.util.find_spec(name) is None:
            raise TrackingError(f"--report-to {name}: the package is not installed; run: pip install -e '.[tracking]'")


class _Wandb:
    """A wandb run that goes offline without a network or a login."""

    def __init__(self, settings: LoggingSettings, folder: Path, params: Mapping[str, Any], wandb_id: str) -> None:
        import wandb

        arguments: dict[str, Any] = {
            "project": settings.wandb_project, "name": folder.name, "id": wandb_id, "resume": "allow",
            "dir": str(folder), "config": dict(params),
        }  # fmt: skip
        later = "recording offline, send it with `wandb sync`"
        if not os.environ.get("WANDB_MODE") and not _is_logged_in():
            # wandb.init would ask on the terminal and hold the run up.
            logger.warning("wandb: not logged in (`wandb login`); %s", later)
            arguments["mode"] = "offline"
        try:
            self.run = wandb.init(**arguments, settings=wandb.Settings(init_timeout=60))
        except Exception as error:  # no network, an outage
            logger.warning("wandb: %s; %s", _first_line(error), later)
            self.run = wandb.init(**{**arguments, "mode": "offline"})

    def log(self, step: int, values: Values) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def _is_logged_in() -> bool:
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except TypeError:  # versions that cannot be told not to ask
        return bool(wandb.api.api_key)


class _TensorBoard:
    """TensorBoard event files in the run folder."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- the tracker -----------------------------------------------------------------------------------------------------


class Tracker:
    """Records a run on the main rank; on other ranks every method does nothing.

    Args:
        folder: run folder.
        settings: where to report.
        params: plain options, for params.json and the outside trackers.
        run_id: identity of the run.
        start_step: steps already taken.
        start_samples: images already seen; later lines of an earlier attempt are dropped, so the curve stays one.
        evaluation_is_due: whether the run goes on with an evaluation, of which an earlier attempt may have a line.
        tracking: identities at outside trackers from the checkpoint, if resumed.
        enabled: whether this is the main rank.

    Attributes:
        tracking: identities at outside trackers, for the checkpoint.
        last_checkpoint: named when the disk is full.
        was_removed: somebody removed the run folder; whoever saves a checkpoint sets it back.
    """

    def __init__(
        self,
        folder: Path,
        settings: LoggingSettings,
        params: Mapping[str, Any],
        *,
        run_id: str,
        start_step: int,
        start_samples: int,
        evaluation_is_due: bool = False,
        tracking: Mapping[str, str] | None = None,
        enabled: bool = True,
    ) -> None:
        self.tracking = {"wandb": run_id, **(tracking or {})}
        self.copies: list[_Wandb | _TensorBoard] = []
        self.file: BinaryIO | None = None
        self.last_checkpoint: Path | None = None
        self.was_removed = False
        self.folder, self.params = folder, params
        self.path = folder / "metrics.jsonl"
        if not enabled:
            return
        write_params(folder, params)
        dropped = drop_lines_after(self.path, start_samples, evaluation_is_due=evaluation_is_due)
        if dropped:
            logger.info("dropped %d lines of %s beyond step %d", dropped, self.path, start_step)
        self.file = self._opened()
        for name in settings.trackers:
            try:
                if name == "wandb":
                    self.copies.append(_Wandb(settings, folder, params, self.tracking["wandb"]))
                else:
                    self.copies.append(_TensorBoard(folder, start_step))
            except Exception as error:
                logger.warning("%s: cannot start (%s); going on without it", name, _first_line(error))

    def log(self, kind: str, step: int, values: Values) -> None:
        """One line of metrics.jsonl, at once on disk; the outside trackers get it under "kind/"."""
        if self.file is None:
            return
        line = {"kind": kind, "step": step, **{name: _finite_or_text(value) for name, value in values.items()}}
        try:
            if not self.path.exists():
                self._start_again(step)
            text = json.dumps(line).encode() + b"\n"
            if self.file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise explain_failed_write(error, self.path, self.last_checkpoint) from error
        for other in list(self.copies):
            try:
                other.log(step, {f"{kind}/{name}": value for name, value in values.items()})
            except Exception as error:
                logger.warning("%s: %s; going on without it", type(other).__name__.strip("_"), _first_line(error))
                self.copies.remove(other)

    def _start_again(self, step: int) -> None:
        """After somebody removed the file or the run folder: what comes from here on is recorded."""
        logger.warning("%s: was removed while the run is at work; lines before step %d are lost", self.path, step)
        self.was_removed = True
        if self.file is not None:
            self.file.close()
        write_params(self.folder, self.params)
        self.file = self._opened()

    def _opened(self) -> BinaryIO:
        # Nothing is held back, so that nothing is left to write, and to fail, when the file is closed.
        return self.path.open("ab", buffering=0)

    def close(self) -> None:
        """Flush and close everything."""
        if self.file is not None:
            self.file.close()
            self.file = None
        for other in self.copies:
            try:
                other.close()
            except Exception as error:
                logger.warning("%s: %s", type(other).__name__.strip("_"), _first_line(error))
        self.copies = []


def _finite_or_text(value: float | int | str) -> float | int | str:
    """JSON has no NaN: write such values as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --- progress of training ---------------------------------------------------------------------------------------------


class _Bar(Progress):
    """A progress bar with a line of numbers below."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.numbers)


class ProgressView:
    """A live bar on a terminal; otherwise one plain line per logged step. Silent on other ranks.

    Args:
        console: standard error.
        total_steps: of the whole run.
        start_step: steps already taken.
        enabled: whether this is the main rank.
    """

    def __init__(self, console: Console, *, total_steps: int, start_step: int, enabled: bool) -> None:
        self.total_steps = total_steps
        self.start_step = start_step
        self.enabled = enabled
        self.started = time.perf_counter()
        self.bar: _Bar | None = None
        self.task: TaskID | None = None
        if enabled and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self.bar = _Bar(*columns, console=console, refresh_per_second=4)
            self.task = self.bar.add_task("epoch", total=total_steps, completed=start_step)
            self.bar.start()

    def update(self, step: int, epoch: int, epochs: int, values: Mapping[str, float] | None = None) -> None:
        """Show one step; `values`, as in metrics.jsonl, come with logged steps only."""
        if not self.enabled:
            return
        if self.bar is not None and self.task is not None:
            if values is not None:
                self.bar.numbers = _numbers(values)
            self.bar.update(self.task, completed=step, description=f"epoch {epoch + 1}/{epochs}")
        elif values is not None:
            logger.info(
                "epoch %d/%d  step %d/%d  %s  left %s",
                epoch + 1, epochs, step, self.total_steps, _numbers(values), self._left(step),
            )  # fmt: skip

    def _left(self, step: int) -> str:
        done = step - self.start_step
        seconds = (time.perf_counter() - self.started) / max(1, done) * (self.total_steps - step)
        return duration(seconds)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _numbers(values: Mapping[str, float]) -> str:
    terms = ("loss", "ila", "kta", "mps", "iis", "coverage", "contradiction")
    shown = [f"{name} {values[name]:.4g}" for name in terms if name in values]
    if "lr" in values:
        shown.append(f"lr {values['lr']:.2e}")
    if "images_per_s" in values:
        shown.append(f"{values['images_per_s']:.3g} images/s")
    if "data_wait_s" in values and values.get("step_s"):
        shown.append(f"data wait {100 * values['data_wait_s'] / values['step_s']:.0f}%")
        parts = [part for part in PARTS if f"{part}_s" in values]
        shown += [f"{part} {100 * values[f'{part}_s'] / values['step_s']:.0f}%" for part in parts]
    if "mfu" in values:
        shown.append(f"{values['tflop_per_s']:.3g} TFLOP/s ({100 * values['mfu']:.0f}% mfu)")
    return "  ".join(shown)
