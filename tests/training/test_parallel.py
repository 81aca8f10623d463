"""Copies and shards on 1, 2 and 4 processes: equal to each other and to one process that plays all ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_engine import curve, losses, run_toy
from toy import ToyDataset, ToyModel, ToyRun, toy_options, toy_tokenizer, toy_train

from itemizedclip.data.batch import ItemCollator
from itemizedclip.objectives.exchange import Exchange, RemoteItems
from itemizedclip.objectives.loss import itemized_losses
from itemizedclip.objectives.pairing import sample_pairing
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.precision import Precision
from itemizedclip.runtime.processes import Ranks, SetupError, seed_everything, seed_step
from itemizedclip.training.loading import MapSource
from itemizedclip.training.optimizer import create_optimizer, create_schedule, set_lr
from itemizedclip.training.options import (
    LoadingSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    ParallelSettings,
    RunOptions,
)
from itemizedclip.training.parallel import lay_out, units_of
from itemizedclip.training.task import ItemizedTask

GLOBAL_BATCH, STEPS = 8, 20
# Terms without sampled pairs: the same on any number of ranks that share the batch out.
EVEN = ObjectiveSettings(ila_weight=0, kta_weight=0, mps_weight=1, iis_weight=0.5)
FULL = ObjectiveSettings(ila_keep_rate=1.0)
OPTIMIZER = OptimizerSettings(lr=1e-3, epochs=4, warmup=2, eps=1e-6)


def options(logs: Path, name: str, objective: ObjectiveSettings, ranks: int = 1, resume: str | None = None) -> ToyRun:
    base = toy_options(
        logs, objective=objective, optimizer=OPTIMIZER, model=ModelSettings("toy", precision="fp32"),
        loading=LoadingSettings(GLOBAL_BATCH // ranks, workers=0, num_sampled_captions=4),
    )  # fmt: skip
    return replace(
        base,
        run=replace(base.run, name=name, resume=resume, val_frequency=4),
        data=replace(base.data, dropout=0.0),
    )


def flags(logs: Path, name: str, ranks: int, objective: ObjectiveSettings, *more: object) -> list[object]:
    weights = [
        value
        for term in ("ila_weight", "kta_weight", "mps_weight", "iis_weight", "ila_keep_rate")
        for value in (f"--{term.replace('_', '-')}", getattr(objective, term))
    ]
    optimizer = ["--lr", OPTIMIZER.lr, "--epochs", OPTIMIZER.epochs, "--warmup", 2, "--eps", OPTIMIZER.eps]
    return [
        "--logs", logs, "--name", name, "--dropout", 0, "--batch-size", GLOBAL_BATCH // ranks, "--precision", "fp32",
        "--val-frequency", 4, *optimizer, *weights, *more, "+",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of 20 steps on 1, 2 and 4 processes; folders are named after ranks, layout and objective."""
    logs = tmp_path_factory.mktemp("parallel")
    sharded = ("--parallel", "fsdp2")
    run_toy(
        *flags(logs, "2-ddp-even", 2, EVEN),
        *flags(logs, "2-fsdp2-even", 2, EVEN, *sharded),
        *flags(logs, "2-ddp-full", 2, FULL, "--static-graph"),
        *flags(logs, "2-fsdp2-full", 2, FULL, *sharded),
        *flags(logs, "2-bf16", 2, FULL, "--compress-gradients"),
        *flags(logs, "2-cached", 2, FULL, *sharded, "--batch-size", 2, "--accum-freq", 2),
        *flags(logs, "2-clipped", 2, FULL, *sharded, "--grad-clip-norm", 1),
        *flags(logs, "2-clipped-ddp", 2, FULL, "--grad-clip-norm", 1)[:-1],
        ranks=2,
    )
    second = logs / "2-fsdp2-even/checkpoints/epoch_2.pt"
    run_toy(
        *flags(logs, "4-ddp-even", 4, EVEN),
        *flags(logs, "4-fsdp2-even", 4, EVEN, *sharded),
        *flags(logs, "4-fsdp2-full", 4, FULL, *sharded),
        *flags(logs, "4-resumed", 4, EVEN, *sharded, "--resume", second)[:-1],
        ranks=4,
    )
    toy_train(options(logs, "1-even", EVEN))
    toy_train(options(logs, "1-resumed", EVEN, resume=str(second)))
    return logs


def all_ranks_in_one_process(world_size: int) -> list[float]:
    """Losses of FULL where one process computes what `world_size` ranks do, by the plain loss."""
    opts = options(Path("logs"), "", FULL, world_size)
    seed_everything(0)
    model = ToyModel(0.0)
    task = ItemizedTask(model, FULL).train()
    optimizer = create_optimizer(task, opts.optimizer, torch.device("cpu"))
    schedule = create_schedule(opts.optimizer, STEPS)
    sources = [
        MapSource(
            ToyDataset(40), ItemCollator(toy_tokenizer, 4), opts.loading, Ranks(r, r, world_size, torch.device("cpu")),
            seed=0,
        )
        for r in range(world_size)
    ]  # fmt: skip
    found: list[float] = []
    for epoch in range(opts.optimizer.epochs):
        for loaded in zip(*(source.epoch(epoch, 0) for source in sources)):
            set_lr(optimizer, schedule(len(found)))
            inputs = [task.encode(one.batch) for one in loaded]
            index = []
            for rank, one in enumerate(inputs):
                seed_step(0, rank, len(found))
                index.append(sample_pairing(one.item_mask_BK).index_BT)
            tickets = torch.stack([one.item_features_ND for one in inputs])
            items = [RemoteItems(one.item_features_ND, one.rows, index[r], r) for r, one in enumerate(inputs)]
            total = torch.zeros(())
            for rank, one in enumerate(inputs):
                others = [item for item in items if item.slot != rank]
                total = total + itemized_losses(
                    model.head, one, model.logit_scale.exp(), model.logit_bias, FULL, index_BT=index[rank],
                    exchange=Exchange(tickets, lambda others=others: others), fused=False,
                )["loss"]  # fmt: skip
            (total / world_size).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.clamp_logit_scale()
            found.append(float(total) / world_size)
    return found


def test_copies_shards_and_one_process_take_the_same_steps(runs):
    alone = losses(runs / "1-even")
    assert len(alone) == STEPS
    assert alone[-1] < 0.9 * alone[0]
    for name in ("2-ddp-even", "2-fsdp2-even", "4-ddp-even", "4-fsdp2-even"):
        assert losses(runs / name) == pytest.approx(alone, rel=1e-5), name
    evaluated = {name: curve(runs / name, "eval")[-1]["toy/sum"] for name in ("1-even", "2-fsdp2-even", "4-fsdp2-even")}
    assert evaluated == pytest.approx(dict.fromkeys(evaluated, evaluated["1-even"]), rel=1e-4)


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_terms_are_those_of_one_process_that_plays_every_rank(runs, ranks):
    expected = all_ranks_in_one_process(ranks)
    assert expected[-1] < 0.9 * expected[0]
    assert losses(runs / f"{ranks}-fsdp2-full") == pytest.approx(expected, rel=1e-5)
    if ranks == 2:
        assert losses(runs / "2-ddp-full") == pytest.approx(expected, rel=1e-5)


def test_shards_cache_gradients_and_clip_them_like_copies(runs):
    assert losses(runs / "2-cached") == pytest.approx(losses(runs / "2-ddp-full"), rel=1e-5)
    sharded, copied = curve(runs / "2-clipped"), curve(runs / "2-clipped-ddp")
    assert [line["grad_norm"] for line in sharded] == pytest.approx([line["grad_norm"] for line in copied], rel=1e-4)
    assert [line["loss"] for line in sharded] == pytest.approx([line["loss"] for line in copied], rel=1e-5)
    assert losses(runs / "2-clipped")[-1] != pytest.approx(losses(runs / "2-ddp-full")[-1], rel=1e-4)


def test_compressed_gradients_round_and_still_learn(runs):
    plain, rounded = losses(runs / "2-ddp-full"), losses(runs / "2-bf16")
    assert rounded[0] == pytest.approx(plain[0], rel=1e-6)
    assert rounded[1:] == pytest.approx(plain[1:], rel=1e-2)
    assert rounded[1:] != pytest.approx(plain[1:], rel=1e-7)


def test_what_two_saved_goes_on_with_one_and_with_four(runs):
    expected = losses(runs / "2-fsdp2-even")[STEPS // 2 :]
    for name in ("1-resumed", "4-resumed"):
        assert losses(runs / name) == pytest.approx(expected, rel=1e-5), name
        assert "processes instead of 2" in (runs / name / "log.txt").read_text()
    saved = {
        name: torch.load(runs / name / "checkpoints/epoch_4.pt", weights_only=True)
        for name in ("1-even", "2-ddp-even", "2-fsdp2-even")
    }
    for name in ("2-ddp-even", "2-fsdp2-even"):
        assert saved[name].keys() == saved["1-even"].keys()
        torch.testing.assert_close(saved[name]["state_dict"], saved["1-even"]["state_dict"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            saved[name]["optimizer"]["state"], saved["1-even"]["optimizer"]["state"], rtol=1e-2, atol=1e-4
        )


def test_blocks_of_towers_are_units():
    model = ToyModel()
    assert units_of(model) == [model.image.mlp[0], model.image.mlp[3]]


def test_what_does_not_go_together_is_said():
    with pytest.raises(UserError, match="--static-graph belongs to --parallel ddp"):
        ParallelSettings("fsdp2", static_graph=True)
    with pytest.raises(UserError, match="--torchcompile together with --parallel fsdp2"):
        RunOptions(model=ModelSettings(torchcompile=True), parallel=ParallelSettings("fsdp2"))
    task = ItemizedTask(ToyModel(), FULL)
    two = Ranks(0, 0, 2, torch.device("cpu"))
    with pytest.raises(SetupError, match=r"--parallel fsdp2 with --precision amp: .* use --precision amp_bf16 or fp32"):
        lay_out(task, two, ParallelSettings("fsdp2"), Precision("amp", "cpu", torch.float16))
    assert lay_out(task, replace(two, world_size=1), ParallelSettings("fsdp2"), Precision("amp", "cpu", torch.float16))
