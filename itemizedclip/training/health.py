"""How each rank fares: a line each in the log, `health.prom` for Prometheus, slow ranks and ranks that drifted apart.

In a synchronous step all ranks take the same time: a slow one shows by waiting less than the others. Its own time is
the step without the wait for other ranks' items; that of a rank on a throttled GPU or a busy disk is longer.

Axes: W ranks, P parameters.
"""

from __future__ import annotations

import logging
import socket
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from itemizedclip.runtime.collectives import all_reduce_max, gather_objects, gather_rows
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import write_text

logger = logging.getLogger(__name__)

FILE = "health.prom"

SLOW = 1.25
"""Own time over the median from which a rank counts as slow."""

SLOW_REPORTS = 3
"""Reports in a row after which that is said."""

MOST_LINES = 16
"""Ranks that get a line of the log each; of more, the slowest few."""


@dataclass(frozen=True)
class RankHealth:
    """Means over the last logged steps of one rank.

    Attributes:
        rank: its number.
        host: its machine.
        step_s: of a step.
        own_s: of a step without the wait for other ranks.
        data_wait_s: of a step, for data.
        memory_mib: largest so far.
        skipped: bad samples replaced so far.
    """

    rank: int
    host: str
    step_s: float
    own_s: float
    data_wait_s: float
    memory_mib: float
    skipped: int

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host}: step {self.step_s:.3g} s, own {self.own_s:.3g} s, data wait "
            f"{self.data_wait_s:.3g} s, memory {self.memory_mib:.0f} MiB, {self.skipped} samples skipped"
        )


class DesyncError(UserError):
    """The ranks no longer hold the same model: the message says which differ, and from when the run is to go on."""


@dataclass
class HealthReport:
    """Gathers, tells and remembers; made on every rank.

    Args:
        folder: run folder.
        is_main: whether this rank writes.
        every: steps between reports; 0: none.
    """

    folder: Path
    is_main: bool
    every: int
    reported: int = 0
    hosts: list[str] | None = None
    slow: Counter[int] = field(default_factory=Counter)

    def is_due(self, step: int) -> bool:
        """Whether to report at this logged step."""
        return bool(self.every) and step // self.every > self.reported // self.every

    def tell(self, step: int, speed: Mapping[str, float], memory_mib: float, skipped: int) -> list[RankHealth]:
        """Report; every rank must call it.

        Args:
            step: steps taken.
            speed: of this rank, as `Meter.speed` gives it.
            memory_mib: of this rank.
            skipped: by this rank.
        """
        self.reported = step
        if self.hosts is None:
            self.hosts = gather_objects(socket.gethostname())
        own = speed["step_s"] - speed.get("exchange_s", 0.0)
        row = [speed["step_s"], own, speed["data_wait_s"], memory_mib, float(skipped)]
        rows = gather_rows(torch.tensor([row], dtype=torch.float64)).tolist()
        ranks = [
            RankHealth(r, self.hosts[r], row[0], row[1], row[2], row[3], skipped=int(row[4]))
            for r, row in enumerate(rows)
        ]
        if self.is_main:
            for line in sorted(ranks, key=lambda one: -one.own_s)[:3] if len(ranks) > MOST_LINES else ranks:
                logger.info("%s", line)
            self._look_for_slow(ranks)
            write_text(self.folder / FILE, prometheus(self.folder.name, step, ranks))
        return ranks

    def _look_for_slow(self, ranks: Sequence[RankHealth]) -> None:
        # Of an even number the lower one: of two ranks, the other.
        median = statistics.median_low([one.own_s for one in ranks])
        for one in ranks:
            if one.own_s <= SLOW * median:
                if self.slow.pop(one.rank, 0) >= SLOW_REPORTS:
                    logger.info("rank %d on %s is as fast as the others again", one.rank, one.host)
                continue
            self.slow[one.rank] += 1
            if self.slow[one.rank] == SLOW_REPORTS:
                what = "data" if one.data_wait_s > (one.own_s - median) / 2 else "its GPU or processor"
                logger.warning(
                    "rank %d on %s holds the others up: %.3g s a step of its own, the median is %.3g s; look at %s",
                    one.rank, one.host, one.own_s, median, what,
                )  # fmt: skip


def prometheus(run: str, step: int, ranks: Sequence[RankHealth]) -> str:
    """The text format that Prometheus' node exporter reads from a folder of .prom files."""
    gauges = {
        "step_seconds": ("Mean seconds of a step.", "gauge", lambda one: one.step_s),
        "own_seconds": ("Of a step, without the wait for other ranks.", "gauge", lambda one: one.own_s),
        "data_wait_seconds": ("Of a step, waiting for data.", "gauge", lambda one: one.data_wait_s),
        "memory_bytes": ("Largest memory so far.", "gauge", lambda one: one.memory_mib * 2**20),
        "skipped_samples_total": ("Bad samples replaced.", "counter", lambda one: float(one.skipped)),
    }
    lines = [
        "# HELP itemizedclip_steps_total Steps taken.",
        "# TYPE itemizedclip_steps_total counter",
        f"itemizedclip_steps_total{{{_label('run', run)}}} {step}",
    ]
    for name, (said, kind, value) in gauges.items():
        lines += [f"# HELP itemizedclip_{name} {said}", f"# TYPE itemizedclip_{name} {kind}"]
        for one in ranks:
            labels = f'{_label("run", run)},rank="{one.rank}",{_label("host", one.host)}'
            lines.append(f"itemizedclip_{name}{{{labels}}} {value(one):.10g}")
    return "\n".join(lines) + "\n"


def _label(name: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{name}="{escaped}"'


# --- ranks that drifted apart ----------------------------------------------------------------------------------------


def checksums(model: nn.Module) -> tuple[list[str], Tensor]:
    """Names of the parameters that this rank holds whole, and the sum of each one's bits, int64 (P,)."""
    whole = [(name, p.detach()) for name, p in model.named_parameters() if not hasattr(p, "full_tensor")]
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [p.contiguous().view(bits[p.element_size()]).sum(dtype=torch.int64) for _, p in whole]
    return [name for name, _ in whole], torch.stack(sums)


def check_same_model(model: nn.Module, step: int, every: int) -> None:
    """Compare the parameters of all ranks, bit by bit; shards, of which there is one each, are not compared.

    Args:
        model: of the run.
        step: steps taken.
        every: steps between these checks.

    Raises:
        DesyncError: on every rank; names the ranks that differ from most.
    """
    names, sums_P = checksums(model)
    if torch.equal(all_reduce_max(sums_P), -all_reduce_max(-sums_P)):
        return
    by_rank = gather_rows(sums_P[None]).tolist()
    hosts = gather_objects(socket.gethostname())
    first = next(place for place in range(len(names)) if len({sums[place] for sums in by_rank}) > 1)
    most = Counter(sums[first] for sums in by_rank).most_common(1)[0][0]
    odd = [f"{rank} ({hosts[rank]})" for rank, sums in enumerate(by_rank) if sums[first] != most]
    raise DesyncError(
        f"the ranks no longer hold the same model: at step {step}, {names[first]} of rank {', '.join(odd)} differs "
        f"from the others'. The run ends: give up that machine or test its memory and GPU, and go on from a "
        f"checkpoint of step {max(0, step - every)} or before with --resume PATH"
    )
