"""`itemizedclip train NAME --dry-run`: everything a start needs, one real step, and what an epoch will cost.

Each question is asked the way a run asks it (folder, model, data, checks before the first step, loader, step), so that
what is found here is what would be found there. What does not depend on each other is all reported; no run folder, log
or checkpoint is written.

Axes: B images of one rank's contrastive batch, W ranks.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from itemizedclip.data.batch import BadSampleError, ItemBatch, ItemCollator
from itemizedclip.data.preflight import duplicate_warning
from itemizedclip.data.sampler import CheckedDataset
from itemizedclip.data.workers import SHARED_MEMORY, free_shared_memory, shared_memory_need, tensor_bytes
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.runtime.collectives import all_reduce_max, gather_objects
from itemizedclip.runtime.errors import EXIT_WRONG_FILE, foreseen
from itemizedclip.runtime.flags import loader_processes, usable_cores
from itemizedclip.runtime.logs import duration, literal, shown
from itemizedclip.runtime.processes import Ranks, StopRequest, on_main
from itemizedclip.training.engine import map_source, peak_memory_mib, train_step
from itemizedclip.training.folder import check_space, foresee_folder, size, standing_folder
from itemizedclip.training.loading import StepBatch, worker_failure
from itemizedclip.training.options import RunOptions
from itemizedclip.training.recipes import TrainingData, open_data
from itemizedclip.training.resume import restore, state_bytes
from itemizedclip.training.run import Evaluator, Position, Run, build, launch_run, start_from
from itemizedclip.training.tracking import check_trackers

BUDGET_S = 60.0
"""Seconds in which all is told, unless opening the data alone takes longer."""

PROBED = 8
"""Samples that are read one by one, from all over the data."""

PROBE_S = 15.0
"""Seconds after which no further one is begun."""

MAX_STEPS = 4
"""Steps that are timed at most; the first, which sets libraries up, does not count where there are more."""

ELSEWHERE = "another process says what is wrong"

Verdict = Literal["ok", "note", "wrong", "open"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: a word or two.
        verdict: "note" does not stop a run, "wrong" does, "open" could not be looked at because of something wrong.
        told: what was found; where something is wrong, with what to do.
    """

    what: str
    verdict: Verdict
    told: str


@dataclass(frozen=True)
class EpochCost:
    """What one epoch takes, evaluation not included.

    Attributes:
        steps: optimizer steps.
        compute_s: seconds of one step's computing.
        load_s: seconds that the loader processes of one rank need for the images of one step.
        parallel: whether both go on at the same time.
        measured: how many steps `compute_s` is the mean of; 0: reckoned from a few images.
        images: of all ranks.
        read_bytes: read from files for them; None where the system does not tell.
        tensor_bytes: of the batches made of that.
    """

    steps: int
    compute_s: float
    load_s: float
    parallel: bool
    measured: int
    images: int
    read_bytes: float | None
    tensor_bytes: float

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return max(self.compute_s, self.load_s) if self.parallel else self.compute_s + self.load_s

    @property
    def seconds(self) -> float:
        """Of the epoch."""
        return self.steps * self.step_s


@dataclass
class DryRun:
    """What a dry run found.

    Attributes:
        findings: in the order they were looked at.
        cost: None when no step could be taken.
    """

    findings: list[Finding] = field(default_factory=list)
    cost: EpochCost | None = None

    @property
    def is_sound(self) -> bool:
        """Whether a run would start."""
        return not any(finding.verdict == "wrong" for finding in self.findings)

    def tell(self, what: str, told: str, verdict: Verdict = "ok") -> None:
        """Add a finding."""
        self.findings.append(Finding(what, verdict, told))

    @contextmanager
    def about(self, what: str) -> Iterator[None]:
        """What a user can mend and the block raises becomes a finding, and the block ends there."""
        try:
            yield
        except Exception as error:
            known = foreseen(error)
            if known is None:
                raise
            self.tell(what, known[0] or ELSEWHERE, "wrong")
        except SystemExit as error:
            # `on_main` ends the other ranks where the main one failed.
            if error.code != EXIT_WRONG_FILE:
                raise
            self.tell(what, ELSEWHERE, "wrong")


def run_dry(options: RunOptions) -> None:
    """A dry run and its report on standard output.

    Raises:
        SystemExit: something is wrong (1).
        UserError: devices or processes that are not there.
    """
    with launch_run(options) as ranks:
        found = dry_run(options, ranks)
        if ranks.is_main:
            show_dry_run(found, options)
        for finding in found.findings:
            if not ranks.is_main and finding.verdict == "wrong" and finding.told != ELSEWHERE:
                print(f"process {ranks.rank}: {finding.what}: {shown(finding.told)}", file=sys.stderr)
        if not all(gather_objects(found.is_sound)):
            raise SystemExit(EXIT_WRONG_FILE)


def dry_run(options: RunOptions, ranks: Ranks, *, budget_s: float = BUDGET_S) -> DryRun:
    """Look at all that a run needs, and take a step; every rank must call it.

    Args:
        options: the run.
        ranks: from `launch_run(options)`.
        budget_s: seconds; steps that would take longer are reckoned from one of a few images.
    """
    deadline = perf_counter() + budget_s
    found = DryRun()
    _look_at_machine(found, ranks)
    resumed_from: Path | None = None
    with found.about("run folder"):
        folder, resumed_from = on_main(lambda: foresee_folder(options.run))
        goes_on = f"; goes on from {resumed_from}" if resumed_from else ""
        found.tell("run folder", f"{folder} can be written{goes_on}")
    with found.about("trackers"):
        check_trackers(options.logging)
    built = _set_up(found, options, ranks, resumed_from)
    if built is None:
        found.tell("a step", "not taken, because of the above", "open")
        return found
    with found.about("a step"):
        _take_steps(found, built, deadline)
    return found


# --- the machine -----------------------------------------------------------------------------------------------------


def _look_at_machine(found: DryRun, ranks: Ranks) -> None:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if ranks.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(ranks.device)
        # Some of it PyTorch itself has taken.
        is_shared = total - free > 0.1 * total
        found.tell(
            "device",
            f"{torch.cuda.get_device_name(ranks.device)}, {size(free)} of {size(total)} free"
            + ("; others use it too (nvidia-smi)" if is_shared else ""),
            "note" if is_shared else "ok",
        )
        idle = gpus > local
    else:
        idle = gpus > 0
        found.tell("device", f"the processor, {torch.get_num_threads()} of {usable_cores()} cores")
    unused = f"; this machine has {gpus} GPUs (--device, GPUS)" if idle else ""
    found.tell("processes", f"{ranks.world_size}{unused}", "note" if idle else "ok")
    found.tell("port", *_port(ranks.world_size))


def _port(world_size: int) -> tuple[str, Verdict]:
    """Where the processes have met; of one process, whether the port that several would meet at is free."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if world_size > 1:
        return f"all {world_size} processes have met at {address}:{port}", "ok"
    if not address or not port or "TORCHELASTIC_RUN_ID" in os.environ:
        return "none is needed by one process", "ok"
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        return f"MASTER_PORT is {port!r}; expected a number from 1 to 65535", "wrong"
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((address, int(port)))
        except socket.gaierror:
            return f"MASTER_ADDR {address} is no machine that this one knows", "wrong"
        except OSError as error:
            told = f"{address}:{port} is not free here ({error.strerror})"
            return f"{told}: where this machine is the first, set another MASTER_PORT", "note"
    return f"{address}:{port} is free", "ok"


# --- set-up ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """Samples read one by one.

    Attributes:
        seconds: for one.
        read_bytes: from files for one; None where the system does not tell.
        tensor_bytes: of one, collated.
        tried: how many.
        bad: why some cannot be used.
    """

    seconds: float
    read_bytes: float | None
    tensor_bytes: float
    tried: int
    bad: list[str]


@dataclass(frozen=True)
class Built:
    """A run at its first step, and what its batches are made of."""

    run: Run
    data: TrainingData
    collator: ItemCollator
    probe: Probe


def _set_up(found: DryRun, options: RunOptions, ranks: Ranks, resumed_from: Path | None) -> Built | None:
    """The run at its first step, told part by part; None where something is in the way of a step."""
    with found.about("model"):
        model = options.create_model()
        if options.model.pretrained is not None and resumed_from is None:
            start_from(model, options.model.pretrained)
        count = sum(p.numel() for p in model.parameters())
        found.tell("model", f"{options.model.model or options.model.pretrained}, {count / 1e6:.3g} M parameters")
        with found.about("data"):
            data, collator = open_data(options, model, ranks)
            source = data.source or map_source(options, data.dataset, collator, ranks)
            probed = on_main(lambda: probe(data.dataset, collator))
            _tell_data(found, options, data, probed)
            _look_at_labels(found, data.evaluators)
            _look_at_shared_memory(found, options, probed)
            with found.about("set-up"), tempfile.TemporaryDirectory(prefix="itemizedclip-dry-run-") as nowhere:
                stop = StopRequest()
                run = build(options, ranks, Path(nowhere), model, source, data.evaluators, stop, {}, data.fingerprint)
                with found.about("disk"):
                    _look_at_disk(found, options, state_bytes(run), is_resumed=resumed_from is not None)
                if resumed_from is not None:
                    _go_on(found, run, resumed_from, model)
                return Built(run, data, collator, probed)
    return None


def _look_at_disk(found: DryRun, options: RunOptions, need: int, *, is_resumed: bool) -> None:
    place = standing_folder(options.run.logs)
    on_main(lambda: check_space(place, need, is_resumed=is_resumed))
    found.tell("disk", f"{place} has room for two checkpoints of {size(need)}")


def _go_on(found: DryRun, run: Run, resumed_from: Path, model: DualEncoder) -> None:
    restore(run, resumed_from, model.config)
    if run.position.epoch >= run.options.optimizer.epochs:
        found.tell("set-up", f"{resumed_from}: all its epochs are done; raise --epochs", "note")
    run.position = Position(min(run.position.step, run.total_steps - 1), run.position.epoch)


def bytes_read() -> int | None:
    """Bytes that this process has read so far; None where the system does not tell."""
    try:
        return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return None


def probe(dataset: Any, collator: Callable[[Sequence[Any]], ItemBatch], count: int = PROBED) -> Probe:
    """Read samples from all over a dataset: the first, the last and others between.

    Raises:
        BadSampleError: none can be used.
    """
    rows = sorted({round(number * (len(dataset) - 1) / (count - 1)) for number in range(count)})
    sizes, bad = [], []
    started, before = perf_counter(), bytes_read()
    for row in rows:
        try:
            sizes.append(tensor_bytes(collator([dataset[(0, row)]])))
        except BadSampleError as error:
            bad.append(str(error))
        if perf_counter() - started > PROBE_S:
            break
    tried = len(sizes) + len(bad)
    seconds, after = (perf_counter() - started) / tried, bytes_read()
    if not sizes:
        raise BadSampleError(f"none of {tried} samples from all over the data can be used; the first: {bad[0]}")
    read = None if before is None or after is None else (after - before) / tried
    return Probe(seconds, read, float(np.mean(sizes)), tried, bad)


def _tell_data(found: DryRun, options: RunOptions, data: TrainingData, probed: Probe) -> None:
    held = getattr(data.dataset, "summary", None)
    held = held if isinstance(held, str) else f"{len(data.dataset):,} samples"
    if not probed.bad:
        found.tell("data", f"{held}; {probed.tried} from all over them were read")
        return
    told = f"{held}; of {probed.tried} from all over them {len(probed.bad)} cannot be used; the first: {probed.bad[0]}"
    if options.loading.on_bad_sample == "stop":
        found.tell("data", f"{told} (--on-bad-sample skip goes on without such samples)", "wrong")
    else:
        found.tell("data", f"{told}; a run ends where more than --max-bad-fraction are", "note")


def _look_at_labels(found: DryRun, evaluators: Sequence[Evaluator]) -> None:
    """What is evaluated during training, and classes of which nothing can be measured."""
    if not evaluators:
        found.tell("labels", "nothing is evaluated during training", "note")
    for evaluator in evaluators:
        dataset: Any = getattr(evaluator, "dataset", None)
        labels: Any = getattr(evaluator, "labels", None)
        told = f"{evaluator.name}" if dataset is None else f"{evaluator.name}: {len(dataset):,} to evaluate"
        idle: list[str] = []
        if labels is not None:
            names: Sequence[str] = evaluator.classes.names  # type: ignore[attr-defined]
            told += f", {len(names)} classes"
            idle = classes_without(np.asarray(labels), names)
        if idle:
            found.tell("labels", f"{told}; nothing is measured of {', '.join(idle)}: all labels alike", "note")
        else:
            found.tell("labels", told)


def classes_without(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Classes that no image has, or, where an image may have several, that each image has.

    Args:
        labels: number of the class (N,), or 0, 1 or NaN per class (N, C).
        names: C names.
    """
    if labels.ndim == 1:
        return [name for number, name in enumerate(names) if not (labels == number).any()]
    return [
        name for name, column in zip(names, labels.T) if not ((column == 1).any() and (column == 0).any())
    ]  # fmt: skip


def _look_at_shared_memory(found: DryRun, options: RunOptions, probed: Probe) -> None:
    loading = options.loading
    workers, free = loader_processes(loading.workers), free_shared_memory()
    if not workers:
        found.tell("shared memory", "none is needed: --workers 0")
    elif free is None:
        found.tell("shared memory", "has no limit of its own here")
    else:
        need = shared_memory_need(round(loading.batch_size * probed.tensor_bytes), workers)
        told = f"{SHARED_MEMORY} has {size(free)} free, {workers} loader processes want {size(need)}"
        if free < need:
            told += ": batches go through pipes, slower (docker run --shm-size, fewer --workers)"
        found.tell("shared memory", told, "note" if free < need else "ok")


# --- steps -----------------------------------------------------------------------------------------------------------


def _take_steps(found: DryRun, built: Built, deadline: float) -> None:
    """A step of a few images, and real ones where there is time for them."""
    run, loading = built.run, built.run.options.loading
    step_batch, workers = loading.step_batch, loader_processes(loading.workers)
    few = min(step_batch, 2 * loading.accum_freq)
    dataset = CheckedDataset(built.data.dataset, seed=run.options.run.seed, on_bad_sample=loading.on_bad_sample)
    rows = [(0, (run.ranks.rank * few + number) % len(dataset)) for number in range(few)]
    batch = built.collator([dataset[row][0] for row in rows]).to(run.ranks.device)
    run.module.train()
    compute_s, measured = _seconds_of_step(run, batch) * step_batch / few, 0
    load_s = built.probe.seconds * step_batch / max(1, min(workers, usable_cores()))
    expected = torch.tensor([compute_s + load_s, perf_counter()], dtype=torch.float64, device=run.ranks.device)
    has_time = all_reduce_max(expected)[0].item() < deadline - perf_counter()
    if not all(gather_objects(has_time)):
        found.tell("a step", f"of {few} images was taken; one of {step_batch} would take too long here", "note")
    else:
        compute_s, measured = _real_steps(found, run, deadline)
    images = run.source.steps_per_epoch * run.global_batch
    read = built.probe.read_bytes
    found.cost = EpochCost(
        steps=run.source.steps_per_epoch,
        compute_s=compute_s,
        load_s=load_s,
        parallel=workers > 0,
        measured=measured,
        images=images,
        read_bytes=None if read is None else read * images,
        tensor_bytes=built.probe.tensor_bytes * images,
    )
    used = peak_memory_mib(run.ranks.device) * 2**20
    where = "on the GPU" if run.ranks.device.type == "cuda" else "of this process, without its loader processes"
    found.tell("memory", f"at most {size(used)} {where}")


def _real_steps(found: DryRun, run: Run, deadline: float) -> tuple[float, int]:
    """Mean seconds of steps as a run takes them, and their number."""
    seconds: list[float] = []
    outputs: dict[str, torch.Tensor] = {}
    batches = run.source.epoch(min(run.position.epoch, run.options.optimizer.epochs - 1), 0)
    for loaded in islice(batches, MAX_STEPS):
        if not seconds:
            _tell_batch(found, run, loaded)
        seconds.append(_seconds_of_step(run, loaded.batch, outputs))
        enough = perf_counter() + 2 * seconds[-1] > deadline
        if any(gather_objects(enough)):
            break
    losses = "  ".join(f"{name} {float(value):.4g}" for name, value in outputs.items() if not name.startswith("logit"))
    finite = bool(torch.isfinite(outputs["loss"]))
    told = f"{len(seconds)} taken; {losses}"
    found.tell("a step", told if finite else f"{told}: the loss is not finite", "ok" if finite else "wrong")
    counted = seconds[1:] or seconds
    return float(np.mean(counted)), len(counted)


def _tell_batch(found: DryRun, run: Run, loaded: StepBatch) -> None:
    found.tell("loading", f"the first batch of {len(loaded.batch)} images came after {loaded.wait_s:.3g} s")
    objective = run.options.objective
    alike = None if objective.mask_duplicates else duplicate_warning(loaded.batch, normal_check=objective.normal_check)
    if alike:
        found.tell("items", alike, "note")


def _seconds_of_step(run: Run, batch: ItemBatch, outputs: dict[str, torch.Tensor] | None = None) -> float:
    """Take a step; its outputs are put into `outputs`."""
    started = perf_counter()
    try:
        told = train_step(run, batch)[0]
    except RuntimeError as error:
        failure = worker_failure(error, run.source)
        if failure is None:
            raise
        raise failure from error
    if run.ranks.device.type == "cuda":
        torch.cuda.synchronize()
    if outputs is not None:
        outputs.update(told)
    return perf_counter() - started


# --- the report ------------------------------------------------------------------------------------------------------

_SIGNS = {"ok": "ok", "note": "note", "wrong": "WRONG", "open": "-"}
_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red", "open": "dim"}


def show_dry_run(found: DryRun, options: RunOptions, console: Console | None = None) -> None:
    """Print what was found, and the cost of an epoch, on standard output."""
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found.findings:
        sign = literal(_SIGNS[finding.verdict])
        sign.stylize(_STYLES[finding.verdict])
        table.add_row(sign, literal(finding.what), literal(finding.told))
    console.print(table)
    if found.cost is not None:
        console.print(literal(described_cost(found.cost, options)))
    wrong = sum(finding.verdict == "wrong" for finding in found.findings)
    end = f"{wrong} thing{'s are' if wrong > 1 else ' is'} wrong: a run would not start" if wrong else "a run can start"
    console.print(literal(f"{end}; no run folder was made"))


def described_cost(cost: EpochCost, options: RunOptions) -> str:
    """The cost of an epoch in words."""
    how = f"mean of {cost.measured} measured" if cost.measured else "reckoned from a step of a few images"
    epochs = options.optimizer.epochs
    bound = "; loading is what takes longest" if cost.parallel and cost.load_s > cost.compute_s else ""
    read = "" if cost.read_bytes is None else f"{size(cost.read_bytes)} read from files, "
    return "\n".join(
        [
            f"an epoch: {cost.steps:,} steps, {duration(cost.seconds)}, evaluation not included; all {epochs} epochs "
            f"{duration(epochs * cost.seconds)}",
            f"  a step    {cost.step_s:.3g} s: computing {cost.compute_s:.3g} s ({how}), loading {cost.load_s:.3g} s "
            f"({'at the same time' if cost.parallel else 'before it'}){bound}",
            f"  data      {cost.images:,} images, {read}{size(cost.tensor_bytes)} as tensors",
        ]
    )
