"""Copies and shards on 1, 2 and 4 processes: equal to each other and to one process that plays all ranks."""

from __future__ import annotations

import errno
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_engine import curve, losses
from toy import ToyDataset, ToyModel, ToyRun, toy_options, toy_tokenizer, toy_train

from itemizedclip.data.batch import ItemCollator
from itemizedclip.models import shards
from itemizedclip.models.archive import DamagedError
from itemizedclip.models.weights import CheckpointError, read_checkpoint
from itemizedclip.objectives.exchange import Exchange, RemoteItems
from itemizedclip.objectives.loss import itemized_losses
from itemizedclip.objectives.pairing import sample_pairing
from itemizedclip.runtime.errors import NoSpaceError, UserError
from itemizedclip.runtime.precision import Precision
from itemizedclip.runtime.processes import Ranks, SetupError, seed_everything, seed_step
from itemizedclip.training import checkpoint as checkpoints
from itemizedclip.training.checkpoint import newest_checkpoint, prune, remove_orphans, set_aside_later
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
SHORT = ("--epochs", 1)
# Terms without sampled pairs: the same on any number of ranks that share the batch out.
EVEN = ObjectiveSettings(ila_weight=0, kta_weight=0, mps_weight=1, iis_weight=0.5)
FULL = ObjectiveSettings(ila_keep_rate=1.0)
# A constant rate, so that a shorter run takes the first steps of a longer one.
OPTIMIZER = OptimizerSettings(lr=1e-3, epochs=4, warmup=2, eps=1e-6, lr_scheduler="const")


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
    optimizer = ["--lr", OPTIMIZER.lr, "--epochs", OPTIMIZER.epochs, "--warmup", 2, "--eps", OPTIMIZER.eps,
                 "--lr-scheduler", "const"]  # fmt: skip
    return [
        "--logs", logs, "--name", name, "--dropout", 0, "--batch-size", GLOBAL_BATCH // ranks, "--precision", "fp32",
        "--val-frequency", 4, *optimizer, *weights, *more, "+",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of 20 steps on 1, 2 and 4 processes; folders are named after ranks, layout and objective."""
    logs = tmp_path_factory.mktemp("parallel")
    sharded = ("--parallel", "fsdp2")
    on_two = [
        flags(logs, "2-ddp-even", 2, EVEN),
        flags(logs, "2-fsdp2-even", 2, EVEN, *sharded, "--save-sharded", "--save-async", "--save-every-steps", 3),
        flags(logs, "2-ddp-full", 2, FULL, "--static-graph"),
        flags(logs, "2-fsdp2-full", 2, FULL, *sharded, "--save-async"),
        flags(logs, "2-bf16", 2, FULL, "--compress-gradients", "--save-sharded", *SHORT),
        flags(logs, "2-cached", 2, FULL, *sharded, "--batch-size", 2, "--accum-freq", 2, *SHORT),
        flags(logs, "2-clipped", 2, FULL, *sharded, "--grad-clip-norm", 1, *SHORT),
        flags(logs, "2-clipped-ddp", 2, FULL, "--grad-clip-norm", 1, *SHORT),
    ]
    run_ranks(2, [flag for one in on_two for flag in one][:-1], logs / "two.txt")
    in_parts, whole = (logs / f"2-{name}/checkpoints/epoch_2.pt" for name in ("fsdp2-even", "ddp-even"))
    on_four = [
        flags(logs, "4-ddp-even", 4, EVEN),
        flags(logs, "4-fsdp2-even", 4, EVEN, *sharded),
        flags(logs, "4-resumed-parts", 4, EVEN, *sharded, "--resume", in_parts),
        flags(logs, "4-resumed-whole", 4, EVEN, *sharded, "--resume", whole),
    ]
    run_ranks(4, [flag for one in on_four for flag in one][:-1], logs / "four.txt")
    toy_train(options(logs, "1-even", EVEN))
    toy_train(options(logs, "1-resumed-parts", EVEN, resume=str(in_parts)))
    toy_train(options(logs, "1-resumed-whole", EVEN, resume=str(whole)))
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
                    exchange=Exchange(tickets, lambda others=others: others, rank), fused=False,
                )["loss"]  # fmt: skip
            (total / world_size).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.clamp_logit_scale()
            found.append(total.item() / world_size)
    return found


def test_copies_shards_and_one_process_take_the_same_steps(runs):
    alone = losses(runs / "1-even")
    assert len(alone) == STEPS
    assert alone[-1] < 0.9 * alone[0]
    for name in ("2-ddp-even", "2-fsdp2-even", "4-ddp-even", "4-fsdp2-even"):
        assert losses(runs / name) == pytest.approx(alone, rel=1e-5), name
    evaluated = {name: curve(runs / name, "eval")[-1]["toy/sum"] for name in ("1-even", "2-fsdp2-even", "4-fsdp2-even")}
    assert evaluated == pytest.approx(dict.fromkeys(evaluated, evaluated["1-even"]), rel=1e-4)


def test_all_terms_are_those_of_one_process_that_plays_every_rank(runs):
    expected = all_ranks_in_one_process(2)
    assert expected[-1] < 0.9 * expected[0]
    for name in ("2-ddp-full", "2-fsdp2-full"):
        assert losses(runs / name) == pytest.approx(expected, rel=1e-5), name


def test_shards_cache_gradients_and_clip_them_like_copies(runs):
    plain = losses(runs / "2-ddp-full")
    assert losses(runs / "2-cached") == pytest.approx(plain[:5], rel=1e-5)
    sharded, copied = curve(runs / "2-clipped"), curve(runs / "2-clipped-ddp")
    assert [line["grad_norm"] for line in sharded] == pytest.approx([line["grad_norm"] for line in copied], rel=1e-4)
    assert [line["loss"] for line in sharded] == pytest.approx([line["loss"] for line in copied], rel=1e-5)
    assert [line["loss"] for line in sharded] != pytest.approx(plain[:5], rel=1e-5)


def test_compressed_gradients_round_and_still_learn(runs):
    plain, rounded = losses(runs / "2-ddp-full")[:5], losses(runs / "2-bf16")
    assert rounded[0] == pytest.approx(plain[0], rel=1e-6)
    assert rounded[1:] == pytest.approx(plain[1:], rel=1e-2)
    assert rounded[1:] != pytest.approx(plain[1:], rel=1e-7)


@pytest.mark.parametrize("kind", ["parts", "whole"])
def test_what_two_saved_goes_on_with_one_and_with_four(runs, kind):
    source = {"parts": "2-fsdp2-even", "whole": "2-ddp-even"}[kind]
    expected = losses(runs / source)[STEPS // 2 :]
    for ranks in (1, 4):
        name = f"{ranks}-resumed-{kind}"
        assert losses(runs / name) == pytest.approx(expected, rel=1e-5), name
        assert f"{ranks} processes instead of 2" in (runs / name / "log.txt").read_text()


@pytest.mark.parametrize("name", ["2-ddp-even", "2-fsdp2-even", "4-fsdp2-even"])
def test_a_checkpoint_is_the_same_under_every_layout_and_in_parts(runs, name):
    expected, found = (read_checkpoint(runs / run / "checkpoints/epoch_4.pt") for run in ("1-even", name))
    assert found.keys() - {"shards"} == expected.keys()
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=1e-3, atol=1e-5)
    assert found["optimizer"].keys() == expected["optimizer"].keys()
    torch.testing.assert_close(found["optimizer"]["state"], expected["optimizer"]["state"], rtol=1e-2, atol=1e-4)


def test_a_checkpoint_in_parts_is_found_verified_and_kept_like_others(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "2-fsdp2-even", run)
    files = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert [name for name in files if name.endswith(".pt")] == [f"epoch_{n}.pt" for n in (1, 2, 3, 4)]
    assert len(files) == 8, "one folder for each, and none left of latest.pt"
    last = checkpoints.shards_of(run / "checkpoints/epoch_4.pt")
    assert {path.name for path in last.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert newest_checkpoint(run).name == "epoch_4.pt"
    part = last / "__1_0.distcp"
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    part.write_bytes(bytes(damaged))
    with pytest.raises(CheckpointError, match=r"epoch_4.pt: is damaged \(the SHA-256 of epoch_4.*__1_0.distcp is not"):
        read_checkpoint(run / "checkpoints/epoch_4.pt")
    assert newest_checkpoint(run).name == "epoch_3.pt"
    shutil.rmtree(checkpoints.shards_of(run / "checkpoints/epoch_3.pt"))
    with pytest.raises(CheckpointError, match=r"its folder epoch_3\..*\.shards is not beside it\); copy both again"):
        read_checkpoint(run / "checkpoints/epoch_3.pt")
    assert newest_checkpoint(run).name == "epoch_2.pt"
    (run / "checkpoints/latest.0badcafe.shards").mkdir()
    assert [path.name for path in remove_orphans(run)] == ["latest.0badcafe.shards"]
    prune(run, 2, "")
    assert len(list((run / "checkpoints").iterdir())) == 2 + 1
    assert set_aside_later(run, run / "checkpoints/epoch_3.pt", 0, 0)[0].name == "epoch_4.pt"
    assert (run / "checkpoints/superseded" / last.name).is_dir()


class Evil:
    def __reduce__(self):
        return print, ("code of a stranger",)


def test_an_index_that_would_run_code_is_refused(runs, tmp_path, capsys):
    folder = tmp_path / "x.shards"
    shutil.copytree(checkpoints.shards_of(runs / "2-bf16/checkpoints/epoch_1.pt"), folder)
    assert shards.read_whole(folder).keys() >= {"model/logit_scale", "optimizer/0/exp_avg"}
    (folder / shards.INDEX).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DamagedError, match=r"asks for builtins\.print, which no index of tensors needs"):
        shards.read_index(folder)
    assert "stranger" not in capsys.readouterr().out
    for record in ({"folder": "../x.shards", "files": {}}, {"folder": "x.shards", "files": {"../y": "0"}}, []):
        assert not shards.check_record(record)


def test_saving_in_the_background_keeps_the_state_of_its_step(tmp_path):
    saved = []
    for name, more in {
        "plain": {},
        "file": {"save_async": True},
        "parts": {"save_async": True, "save_sharded": True},
    }.items():
        base = options(tmp_path, name, EVEN)
        base = replace(base, run=replace(base.run, save_every_steps=1, val_frequency=0, **more))
        toy_train(replace(base, optimizer=replace(base.optimizer, epochs=2)))
        saved.append(read_checkpoint(tmp_path / name / "checkpoints/epoch_1.pt"))
    for other in saved[1:]:
        assert other["step"] == saved[0]["step"] == 5
        torch.testing.assert_close(other["state_dict"], saved[0]["state_dict"], rtol=0, atol=0)
        torch.testing.assert_close(other["optimizer"]["state"], saved[0]["optimizer"]["state"], rtol=0, atol=0)


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_disk_that_refuses_a_background_save_ends_the_run_with_its_last_good_checkpoint(
    tmp_path, monkeypatch, in_parts
):
    base = options(tmp_path, "a", EVEN)
    base = replace(base, run=replace(base.run, save_async=True, save_sharded=in_parts, val_frequency=0))
    write = checkpoints.save_checkpoint

    def refuse(checkpoint, path):
        if path.name == "epoch_2.pt":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(checkpoint, path)

    monkeypatch.setattr(checkpoints, "save_checkpoint", refuse)
    with pytest.raises(NoSpaceError, match=r"epoch_2.pt: the disk is full: .* last good checkpoint is .*epoch_1.pt"):
        toy_train(base)


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
