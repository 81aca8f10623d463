"""`itemizedclip train NAME --plan --nodes N --gpus N --network 200Gb`: a step's time on many processes, from its parts.

What one process does alone (towers, its own loss, optimizer, waiting for data) is measured by a run, `--measured
RUN_FOLDER`, or else counted (`training.plan`) at a stated share of a GPU's rate. What grows with the processes follows
from formulas: the loss by its pairs, the traffic by its bytes, the wait for the slowest by the spread of the steps.

Axes: W ranks = n nodes of g processes each, B images of a rank, K item slots, N = B·K items of a rank, D joint width.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import parse_json, read_json
from itemizedclip.runtime.flags import at_least
from itemizedclip.training.counting import loss_flop
from itemizedclip.training.options import RunOptions
from itemizedclip.training.plan import DEVICES, STATED_MFU, StepPlan

HIDDEN_SHARE = 2 / 3
"""Of the towers' time, the backward pass, beside which gradients travel."""

LAST_BUCKET_BYTES = 25e6
"""Gradients that DDP sends together; the last such lot has nothing left to hide behind."""

TABLE = (8, 64, 512, 4096)
"""Processes of the printed table."""


@dataclass(frozen=True)
class Cluster:
    """Machines and what joins them; only with --plan."""

    nodes: int = 1
    """Machines."""

    gpus: int = 8
    """Processes on each, one GPU each."""

    network: str = "200Gb"
    """What one machine sends a second to the others in all, in bits (200Gb) or bytes (25GB)."""

    inside: str = "300GB"
    """What one GPU sends a second to the others of its machine: NVLink 4 some 300 GB, PCIe 5 some 50 GB."""

    latency_us: float = 20.0
    """Microseconds of one message between machines."""

    measured: Annotated[Path | None, tyro.conf.arg(metavar="RUN_FOLDER")] = None
    """Folder of a run of this recipe whose metrics.jsonl tells the times of one process; else they are counted."""

    def __post_init__(self) -> None:
        at_least(self, nodes=1, gpus=1, latency_us=0)
        bytes_per_second(self.network, "--network")
        bytes_per_second(self.inside, "--inside")


def bytes_per_second(text: str, flag: str) -> float:
    """200Gb → 25e9, 25GB → 25e9."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(b|B)(?:it|yte)?(?:ps|/s)?", text)
    if found is None or not float(found[1]):
        raise UserError(f"{flag} is {text!r}; expected bits or bytes a second, such as 200Gb or 25GB")
    scale = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[found[2]]
    return float(found[1]) * scale / (8 if found[3] == "b" else 1)


@dataclass(frozen=True)
class Parts:
    """What one process does in a step, in seconds, and what it sends, in bytes.

    Attributes:
        towers_s: both towers, forward and backward.
        own_loss_s: the loss of this process's images and their own items.
        per_rank_s: what each other rank's items add to it.
        optimizer_s: update, clipping, checks.
        data_s: waiting for data.
        spread: standard deviation of a step over its mean, on one process.
        gradient_bytes: of one exchange of gradients.
        item_bytes: items of one rank on their way to another, and their gradients back.
        source: where the seconds are from.
    """

    towers_s: float
    own_loss_s: float
    per_rank_s: float
    optimizer_s: float
    data_s: float
    spread: float
    gradient_bytes: float
    item_bytes: float
    source: str


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on W processes, by what they go to."""

    towers: float
    loss: float
    optimizer: float
    data: float
    gradients: float
    items: float
    slowest: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, f.name) for f in fields(self))


# --- parts -----------------------------------------------------------------------------------------------------------


def traffic(plan: StepPlan, options: RunOptions) -> tuple[float, float]:
    """Bytes of gradients, as they travel, and of one rank's items."""
    halved = 0.5 if options.parallel.compress_gradients else 1.0
    passes = 1.5 if options.parallel.parallel == "fsdp2" else 1.0  # parameters twice and gradients once, for both ways
    B, K, D = options.loading.step_batch, plan.items, plan.width
    numbers = B * (K + 1 + K + B - 1)
    return plan.trained_bytes * halved * passes, 4.0 * (2 * B * K * D + numbers)


def counted_parts(plan: StepPlan, options: RunOptions, gigabytes: int = 80) -> Parts:
    """From counted FLOP, at the stated share of a GPU's rate."""
    name, rate = DEVICES[gigabytes]
    B = options.loading.step_batch
    per_second = rate * STATED_MFU
    own, two = plan.loss_flop(B, 1), plan.loss_flop(B, 2)
    # AdamW reads and writes parameters, gradients and two moments: 28 bytes a parameter, at 2 TB a second.
    optimizer = 7 * plan.trained_bytes / 2e12
    gradient_bytes, item_bytes = traffic(plan, options)
    return Parts(
        plan.towers_flop(B) / per_second, own / per_second, (two - own) / per_second, optimizer, 0.0, 0.02,
        gradient_bytes, item_bytes, f"counted, at {STATED_MFU:.0%} of the rate of a {name}",
    )  # fmt: skip


def measured_parts(plan: StepPlan, options: RunOptions, folder: Path) -> Parts:
    """From the metrics of a run with the same batch; its share of loss by FLOP, where several ranks ran.

    Raises:
        UserError: no run with timed steps, or one of another batch.
    """
    params = read_json(folder / "params.json", holding="the options of a run")
    batch = _step_batch(params, folder)
    if batch != options.loading.step_batch:
        raise UserError(
            f"{folder}: measured {batch} images a process and step, this plan has {options.loading.step_batch}; "
            f"give the same --batch-size, or another --measured"
        )
    lines = _timed_steps(folder)
    median = {name: statistics.median(line.get(name, 0.0) for line in lines) for name in _SECONDS}
    steps = [line["step_s"] for line in lines]
    ranks = max(1, round(lines[-1]["images_per_s"] * lines[-1]["step_s"] / batch))
    B, K, L, D = batch, plan.items, plan.tokens, plan.width
    attended = min(ranks, 1 + (options.objective.remote_ranks or ranks))
    own, two, all_of = (loss_flop(B, K, L, D, passes=plan.passes, ranks=W) for W in (1, 2, attended))
    per_flop = median["loss_s"] / all_of
    gradient_bytes, item_bytes = traffic(plan, options)
    centre = statistics.median(steps)
    near = [step for step in steps if step < 2 * centre]
    return Parts(
        median["towers_s"], own * per_flop, (two - own) * per_flop, median["optimizer_s"], median["data_wait_s"],
        statistics.pstdev(near) / centre, gradient_bytes, item_bytes,
        f"measured by {folder}, {len(lines)} steps on {ranks} {'process' if ranks == 1 else 'processes'}",
    )  # fmt: skip


_SECONDS = ("towers_s", "loss_s", "optimizer_s", "data_wait_s")


def _step_batch(params: Any, folder: Path) -> int:
    try:
        loading = params["loading"]
        return int(loading["batch_size"] * loading["accum_batch"] * loading["accum_freq"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'params.json'}: no options of a run; give the folder of a run") from error


def _timed_steps(folder: Path) -> list[dict[str, float]]:
    """The logged steps of a run but the first, which sets things up."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of a run of this recipe")
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = parse_json(text, source=str(path), holding="a line of metrics")
        except (UserError, json.JSONDecodeError):
            continue
        wanted = (*_SECONDS, "step_s", "images_per_s")
        if isinstance(line, dict) and line.get("kind") == "train" and all(
            isinstance(line.get(name), (int, float)) for name in wanted
        ):  # fmt: skip
            found.append(line)
    if len(found) < 3:
        raise UserError(f"{path}: {len(found)} timed steps; expected 3 or more: run it with --log-every-n-steps 1")
    return found[1:]


# --- the step --------------------------------------------------------------------------------------------------------


def step_time(parts: Parts, cluster: Cluster, nodes: int, gpus: int, *, remote_ranks: int = 0) -> StepTime:
    """A step on `nodes` × `gpus` processes.

    Gradients go by rings, inside a machine and between machines, beside the backward pass; items of all ranks by one
    gather, and their gradients back, beside nothing. Every message between machines takes its latency in log₂ W steps.
    """
    W = nodes * gpus
    network, inside = bytes_per_second(cluster.network, "--network"), bytes_per_second(cluster.inside, "--inside")
    if W == 1:
        return StepTime(parts.towers_s, parts.own_loss_s, parts.optimizer_s, parts.data_s, 0.0, 0.0, 0.0)
    latency = cluster.latency_us * 1e-6 * math.log2(W)
    ring = 2 * parts.gradient_bytes * ((nodes - 1) / nodes / network + (gpus - 1) / gpus / inside)
    last = min(1.0, LAST_BUCKET_BYTES / parts.gradient_bytes) if parts.gradient_bytes else 0.0
    gradients = max(ring - HIDDEN_SHARE * parts.towers_s, ring * last) + 2 * latency
    # What comes from outside passes the machine's network once and then every GPU of it.
    outside = (nodes - 1) * gpus * parts.item_bytes / network if nodes > 1 else 0.0
    items = outside + (W - 1) * parts.item_bytes / inside + 3 * latency
    attended = min(W - 1, remote_ranks) if remote_ranks else W - 1
    loss = parts.own_loss_s + attended * parts.per_rank_s
    work = parts.towers_s + loss + parts.optimizer_s
    # The expected largest of W normal values.
    slowest = parts.spread * work * math.sqrt(2 * math.log(W))
    return StepTime(parts.towers_s, loss, parts.optimizer_s, parts.data_s, gradients, items, slowest)


REMEDIES = {
    "loss": "--remote-ranks 32 attends the items of 32 drawn ranks",
    "gradients": "--compress-gradients, a larger --batch-size or --accum-freq, a faster network",
    "items": "fewer, larger processes' batches (--accum-freq), or fewer --num-sampled-captions",
    "data": "more --workers, a cache, shards on a local disk",
    "slowest": "look for the slow rank (docs/cluster.md)",
    "optimizer": "--parallel fsdp2 shares it out",
}


def bottleneck(step: StepTime, alone: StepTime) -> tuple[str, float]:
    """The part that grew most over one process, and its share of the step."""
    grown = {f.name: getattr(step, f.name) - getattr(alone, f.name) for f in fields(step)}
    name = max(grown, key=lambda part: grown[part])
    return name, grown[name] / step.total


# --- flags and the table ---------------------------------------------------------------------------------------------


def take_cluster_flags(argv: Sequence[str], prog: str) -> tuple[Cluster | None, list[str]]:
    """The cluster that flags name, None without any, and the flags that are left."""
    names = {f"--{f.name.replace('_', '-')}" for f in fields(Cluster)}
    own: list[str] = []
    rest: list[str] = []
    flags = iter(argv)
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-")
        if name not in names:
            rest.append(flag)
            continue
        own.append(flag)
        if "=" not in flag and (value := next(flags, None)) is not None:
            own.append(value)
    return (tyro.cli(Cluster, args=own, prog=prog) if own else None), rest


def show_scaling(plan: StepPlan, options: RunOptions, cluster: Cluster, console: Console | None = None) -> None:
    """Print the table on standard output."""
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    parts = (
        counted_parts(plan, options) if cluster.measured is None else measured_parts(plan, options, cluster.measured)
    )
    B, remote = options.loading.step_batch, options.objective.remote_ranks
    alone = step_time(parts, cluster, 1, 1)
    wanted = cluster.nodes * cluster.gpus
    table = Table(title=f"a step by number of processes, {B} images each, in milliseconds", title_justify="left")
    columns = [f.name for f in fields(StepTime)]
    for name in ("processes", *columns, "step", "images/s", "efficiency"):
        table.add_column(name, justify="right")
    worst = ("", 0.0)
    for W in sorted({1, *TABLE, wanted}):
        gpus = min(W, cluster.gpus)
        nodes = max(1, W // gpus) if wanted != W else cluster.nodes
        step = step_time(parts, cluster, nodes, gpus if wanted != W else cluster.gpus, remote_ranks=remote)
        values = [f"{1000 * getattr(step, name):.3g}" for name in columns]
        style = "bold" if wanted == W else None
        table.add_row(
            str(W), *values, f"{1000 * step.total:.4g}", f"{B * W / step.total:.4g}",
            f"{alone.total / step.total:.0%}", style=style,
        )  # fmt: skip
        if wanted == W:
            worst = bottleneck(step, alone)
    console.print(table)
    console.print(f"One process: {parts.source}. Machines of {cluster.gpus}, {cluster.network} between them.")
    if wanted > 1 and worst[1] > 0.05:
        console.print(f"On {wanted} processes most is lost to: {worst[0]} ({worst[1]:.0%}). {REMEDIES[worst[0]]}.")
