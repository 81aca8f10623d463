"""Time and memory of the loss, forward and backward, against the published way (benchmarks/plain.py), in one run.

    python benchmarks/loss.py [--sizes natural mri] [--ways plain ours] [--ranks 1 2 4 8] [--repeats 2]

Each cell is a process of its own with one thread: processor seconds of its fastest step, and the peak of its memory
above what it held once the inputs were there (features of the images, of every rank's items, the head). Other ranks are
simulated: their items are given, so the exchange itself is not in the figures. The first line of a size counts
multiply-adds and bytes. Linux only. Figures: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from plain import PlainHead, PlainSet, plain_losses
from torch import Tensor

from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.objectives.exchange import Exchange, RemoteItems
from itemizedclip.objectives.loss import LossInputs, ObjectiveOptions, itemized_losses
from itemizedclip.objectives.pairing import ItemRows, sample_pairing

D, H = 512, 8


@dataclass(frozen=True)
class Size:
    """A published recipe's loss: images and items per rank, tokens per image, options."""

    images: int
    items: int
    tokens: int
    options: ObjectiveOptions


def _options(keep: float, kta: float, fraction: float, mps: float, iis: float, factor: float) -> ObjectiveOptions:
    return ObjectiveOptions(
        ila_keep_rate=keep, kta_weight=kta, key_token_fraction=fraction, mps_weight=mps, iis_weight=iis,
        worst_positive_factor=factor,
    )  # fmt: skip


SIZES = {
    "rsicd": Size(64, 6, 196, _options(0.6, 1.5, 0.2, 2.0, 1.0, 1.5)),
    "natural": Size(128, 7, 196, _options(0.8, 1.0, 0.2, 0.1, 0.1, 1.5)),
    "natural64": Size(64, 7, 196, _options(0.8, 1.0, 0.2, 0.1, 0.1, 1.5)),
    "chest": Size(16, 10, 2744, _options(0.95, 1.0, 0.05, 0.1, 1.0, 1.0)),
    "mri": Size(8, 7, 11760, _options(0.9, 1.0, 0.05, 0.01, 1.0, 1.5)),
}


def count(size: Size, ranks: int) -> str:
    """Multiply-adds of forward and backward pass in units of 10⁹, and bytes no way around."""
    B, L, T = size.images, size.tokens, size.items + size.images - 1
    rows = B * T
    # One pass: keys and values 2·L·D² an image, queries and output 2·D² a query, scores and sums 2·L·D a query.
    once = B * 2 * L * D * D + rows * (2 * D * D + 2 * L * D)
    plain = ranks * (3 * once + 2 * once + 2 * 2 * once)
    projected = B * 6 * L * D * D + ranks * rows * 9 * L * D
    folded = ranks * rows * 9 * H * L * D + ranks * rows * 6 * D * D
    ours = min(projected, folded) + ranks * rows * 4 * D * D
    table = 4 * ranks * B * size.items * D
    grads = 4 * B * L * D + table
    return (
        f"multiply-adds: published {plain / 1e9:.0f}·10⁹, ours {ours / 1e9:.0f}·10⁹ ({plain / ours:.1f}×); "
        f"gradient of the inputs {grads / 2**20:.0f} MB, {table / 2**20:.1f} of it items"
    )


def memory_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise ValueError(field)


def peak_above(start_kib: int) -> float:
    """MB by which the process' peak is above `start_kib`."""
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_kib) / 1024


def cell(name: str, way: str, ranks: int, repeats: int) -> dict[str, float]:
    """Run one cell in this process."""
    torch.set_num_threads(1)
    size = SIZES[name]
    small = Size(2, size.items, 64, size.options)
    _step(way, *_inputs(small, ranks), small.options)  # loads every library; leaves no large block behind
    inputs = _inputs(size, ranks)
    start = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    best, loss, peak = float("inf"), 0.0, 0.0
    for repeat in range(repeats):
        begin = time.process_time()
        loss = _step(way, *inputs, size.options)
        best = min(best, time.process_time() - begin)
        if repeat == 0:
            peak = peak_above(start)
    return {"seconds": best, "peak_mb": peak, "loss": loss}


def _inputs(size: Size, ranks: int) -> tuple[ItemAttention, Tensor, Tensor, list[PlainSet]]:
    torch.manual_seed(0)
    B, K, L = size.images, size.items, size.tokens
    head = ItemAttention(D, H)
    tokens, image = torch.randn(B, L, D, requires_grad=True), torch.randn(B, D, requires_grad=True)
    table = torch.randn(ranks, B * K, D)
    sets = []
    for rank in range(ranks):
        mask = torch.arange(K) < torch.randint(1, K + 1, (B, 1))
        rows = ItemRows(mask, torch.zeros(B, dtype=torch.bool))
        sets.append(PlainSet(table[rank].requires_grad_(), rows, sample_pairing(mask).index_BT))
    return head, image, tokens, sets


def _step(
    way: str, head: ItemAttention, image: Tensor, tokens: Tensor, sets: list[PlainSet], options: ObjectiveOptions
) -> float:
    scale = torch.tensor(14.0, requires_grad=True)
    bias = torch.tensor(-10.0, requires_grad=True)
    for tensor in (image, tokens, *(s.items_ND for s in sets)):
        tensor.grad = None
    if way == "plain":
        plain = PlainHead(D, H)
        plain.load_state_dict(head.state_dict())
        loss = plain_losses(plain, image, tokens, sets, scale, bias, options)["loss"]
    else:
        exchange = None
        if len(sets) > 1:
            ticket = torch.zeros((), requires_grad=True).expand(len(sets), *sets[0].items_ND.shape)
            remotes = [RemoteItems(s.items_ND.detach(), s.rows, s.index_BT, i) for i, s in enumerate(sets) if i]
            exchange = Exchange(ticket, lambda: remotes)
        own = sets[0]
        inputs = LossInputs(image, tokens, own.items_ND, own.rows.mask_BK, own.rows.is_normal_B)
        loss = itemized_losses(
            head, inputs, scale, bias, options, index_BT=own.index_BT, exchange=exchange, fused=way == "ours"
        )["loss"]
    loss.backward()
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--ways", nargs="+", choices=("plain", "autograd", "ours"), default=["plain", "ours"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cell", nargs=3, metavar=("SIZE", "WAY", "RANKS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(args.cell[0], args.cell[1], int(args.cell[2]), args.repeats)))
        return
    print(f"{'size':10} {'ranks':>5} {'way':>9} {'seconds':>9} {'MB':>7} {'ratio':>6}   loss")
    for name in args.sizes:
        for ranks in args.ranks:
            print(f"{name}, {ranks} rank(s): {count(SIZES[name], ranks)}")
            first: dict[str, float] = {}
            for way in args.ways:
                command = [sys.executable, __file__, "--cell", name, way, str(ranks), "--repeats", str(args.repeats)]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                first = first or found
                ratio = f"{first['seconds'] / found['seconds']:6.2f}"
                print(
                    f"{name:10} {ranks:5} {way:>9} {found['seconds']:9.2f} {found['peak_mb']:7.0f} {ratio}   "
                    f"{found['loss']:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
