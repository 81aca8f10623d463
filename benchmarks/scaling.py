"""A step's time on W processes, predicted from parts that one process measured, against real runs on W = 1, 2 and 4.

    python benchmarks/scaling.py                # some two minutes of processor time

Everything counts in processor seconds of all ranks, so that other jobs of the machine do not matter: on c idle cores a
step takes that time divided by min(W, c). Parts: towers, loss and optimizer of one rank alone; what each other rank's
items add to the loss, from an exchange that is given in the same process; what gradients and items cost on their way,
from the same bytes sent by gloo without any training.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from itemizedclip.data.batch import ItemBatch
from itemizedclip.models.factory import create_model
from itemizedclip.objectives.exchange import Exchange, RemoteItems
from itemizedclip.objectives.loss import itemized_losses
from itemizedclip.objectives.pairing import sample_pairing
from itemizedclip.runtime.processes import Ranks, leave_process_group, seed_step
from itemizedclip.training.optimizer import create_optimizer
from itemizedclip.training.options import LoadingSettings, OptimizerSettings, ParallelSettings, RunOptions
from itemizedclip.training.parallel import Layout
from itemizedclip.training.scaling import Cluster, Parts, step_time
from itemizedclip.training.task import ItemizedTask

MODEL, B, K, CONTEXT = "ViT-scenes-ItemizedCLIP", 16, 4, 16
WARM = 3


def batch() -> ItemBatch:
    """Random images and items of one rank."""
    texts = torch.randint(1, 100, (B, K, CONTEXT))
    mask = torch.ones(B, K, dtype=torch.bool)
    return ItemBatch(torch.randn(B, 3, 64, 64), texts, mask, torch.zeros(B, dtype=torch.bool), [""] * B)


def run_options() -> RunOptions:
    """Of every run here."""
    return RunOptions(
        optimizer=OptimizerSettings(lr=1e-4), loading=LoadingSettings(batch_size=B, num_sampled_captions=K, workers=0)
    )


def one_step(layout: Layout, optimizer: torch.optim.Optimizer, data: ItemBatch) -> None:
    """What the engine does in a step, without its bookkeeping."""
    layout.module(data)["loss"].backward()
    layout.clip_gradients(float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def processor_seconds(function: Any, steps: int) -> float:
    """Processor time of all threads of this process, the tenth of the steps that other jobs disturbed least."""
    found = []
    for _ in range(WARM + steps):
        if dist.is_initialized():
            dist.barrier()
        started = time.process_time()
        function()
        found.append(time.process_time() - started)
    return statistics.quantiles(found[WARM:], n=10)[0]


def _rank(rank: int, W: int, port: int, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if W > 1:
        dist.init_process_group("gloo", rank=rank, world_size=W)
    torch.manual_seed(0)
    task = ItemizedTask(create_model(MODEL), run_options().objective).train()
    ranks = Ranks(rank, rank, W, torch.device("cpu"))
    layout = Layout(task, ranks, ParallelSettings())
    optimizer = create_optimizer(task, run_options().optimizer, ranks.device)
    seed_step(0, rank, 0)
    data = batch()
    found = {"step": processor_seconds(lambda: one_step(layout, optimizer, data), steps)}
    if W == 1:
        found |= _parts(task, optimizer, data, steps)
    else:
        gradients = torch.zeros(sum(p.numel() for p in task.parameters()))
        found["gradients"] = processor_seconds(lambda: dist.all_reduce(gradients), steps)
        found["gradient_bytes"] = 4 * gradients.numel()
    (Path(folder) / f"{W}-{rank}.json").write_text(json.dumps(found))
    leave_process_group()


def _parts(task: ItemizedTask, optimizer: torch.optim.Optimizer, data: ItemBatch, steps: int) -> dict[str, float]:
    """Seconds of one rank's parts; the loss with the items of 0, 1 and 3 other ranks."""
    inputs = task.encode(data)
    names = ("image_global_BD", "image_tokens_BLD", "item_features_ND")
    leaves = replace(inputs, **{name: getattr(inputs, name).detach().requires_grad_() for name in names})
    N, D = leaves.item_features_ND.shape
    found: dict[str, float] = {}
    for others in (0, 1, 3):
        index = [sample_pairing(data.item_mask).index_BT for _ in range(others + 1)]
        remotes = [RemoteItems(torch.randn(N, D), leaves.rows, index[r], r) for r in range(1, others + 1)]

        def loss(others: int = others, index: list[Tensor] = index, remotes: list[RemoteItems] = remotes) -> None:
            ticket = torch.zeros((), requires_grad=True).expand(others + 1, N, D)
            exchange = Exchange(ticket, lambda: remotes) if others else None
            scale, bias = task.model.logit_scale.exp(), task.model.logit_bias
            head, objective = task.model.head, task.objective
            itemized_losses(head, leaves, scale, bias, objective, index_BT=index[0], exchange=exchange)[
                "loss"
            ].backward()

        found[f"loss{others}"] = processor_seconds(loss, steps)

    def towers() -> None:
        encoded = task.encode(data)
        features = [getattr(encoded, name) for name in names]
        torch.autograd.backward(features, [torch.ones_like(feature) for feature in features])

    found["towers"] = processor_seconds(towers, steps)
    layout = Layout(task, Ranks(0, 0, 1, torch.device("cpu")), ParallelSettings())

    def update() -> None:
        layout.clip_gradients(float("inf"))
        optimizer.step()

    found["optimizer"] = processor_seconds(update, steps)
    return found


def run(W: int, steps: int, folder: str) -> list[dict[str, float]]:
    """What each of W ranks found."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["itemizedclip.training.engine"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, W, port, steps, folder)) for rank in range(W)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [json.loads((Path(folder) / f"{W}-{rank}.json").read_text()) for rank in range(W)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        found = {W: run(W, steps, folder) for W in (1, 2, 4)}
    alone = found[1][0]
    # Processor time of sending, by byte, from two ranks that do nothing else; four follow from it.
    sent = statistics.mean(rank["gradients"] for rank in found[2])
    per_second = found[2][0]["gradient_bytes"] / sent
    N = B * K
    D = create_model(MODEL).config["embed_dim"]
    parts = Parts(
        towers_s=alone["towers"], own_loss_s=alone["loss0"], per_rank_s=(alone["loss3"] - alone["loss0"]) / 3,
        optimizer_s=alone["optimizer"], data_s=0.0, spread=0.0, gradient_bytes=found[2][0]["gradient_bytes"],
        item_bytes=4.0 * (2 * N * D + B * (K + 1 + K + B - 1)), source="",
    )  # fmt: skip
    cluster = Cluster(latency_us=0.0, inside=f"{per_second:.0f}B")
    print(f"{MODEL}, {B} images and {K} items each: " + ", ".join(f"{k} {1000 * v:.1f} ms" for k, v in alone.items()))
    for W, ranks in found.items():
        predicted = step_time(parts, cluster, 1, W)
        # Nothing is hidden in processor time: sending takes its own.
        sending = 2 * (W - 1) / W * parts.gradient_bytes / per_second
        seconds = predicted.total - predicted.gradients + sending
        measured = statistics.mean(rank["step"] for rank in ranks)
        print(f"W = {W}: predicted {1000 * seconds:.1f} ms of processor a rank, measured {1000 * measured:.1f}, "
              f"ratio {seconds / measured:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
