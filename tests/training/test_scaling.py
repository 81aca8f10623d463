"""A step's time on many machines, against sums by hand and against a run that was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from itemizedclip.commands.train import main
from itemizedclip.runtime.errors import UserError
from itemizedclip.training.counting import TowerCost, TowerLine, loss_flop
from itemizedclip.training.options import LoadingSettings, ObjectiveSettings, ParallelSettings, RunOptions
from itemizedclip.training.plan import StepPlan
from itemizedclip.training.scaling import (
    Cluster,
    Parts,
    bottleneck,
    bytes_per_second,
    measured_parts,
    step_time,
    take_cluster_flags,
    traffic,
)

PARTS = Parts(
    towers_s=1.0, own_loss_s=0.01, per_rank_s=0.001, optimizer_s=0.02, data_s=0.03, spread=0.0, gradient_bytes=1e9,
    item_bytes=1e6, source="by hand",
)  # fmt: skip
CLUSTER = Cluster(network="80Gb", inside="100GB", latency_us=0.0)


def test_bits_and_bytes():
    assert bytes_per_second("200Gb", "--network") == bytes_per_second("25GB", "--network") == 25e9
    assert bytes_per_second("100 Mbit/s", "--network") == 12.5e6
    for text in ("fast", "0Gb", "10", "-1Gb"):
        with pytest.raises(UserError, match=r"--network is .*expected bits or bytes a second, such as 200Gb or 25GB"):
            Cluster(network=text)


def test_one_process_talks_to_nobody():
    step = step_time(PARTS, CLUSTER, 1, 1)
    assert step.total == pytest.approx(1.0 + 0.01 + 0.02 + 0.03)


def test_parts_of_a_step_on_four_machines_of_two_by_hand():
    step = step_time(PARTS, CLUSTER, 4, 2)
    ring = 2 * (0.75 * 1e9 / 10e9 + 0.5 * 1e9 / 100e9)
    assert step.gradients == pytest.approx(ring * 0.025), "all but the last 25 MB goes beside the backward pass"
    assert step.items == pytest.approx(3 * 2 * 1e6 / 10e9 + 7 * 1e6 / 100e9)
    assert step.loss == pytest.approx(0.01 + 7 * 0.001)
    assert step_time(PARTS, CLUSTER, 4, 2, remote_ranks=3).loss == pytest.approx(0.01 + 3 * 0.001)
    slow = step_time(PARTS, replace(CLUSTER, network="1Gb"), 4, 2)
    slow_ring = 2 * (0.75 * 1e9 / 0.125e9 + 0.5 * 1e9 / 100e9)
    assert slow.gradients == pytest.approx(slow_ring - 2 / 3)
    assert bottleneck(slow, step_time(PARTS, CLUSTER, 1, 1))[0] == "gradients"
    late = step_time(replace(PARTS, spread=0.1), CLUSTER, 4, 2)
    assert late.slowest == pytest.approx(0.1 * (1.0 + 0.017 + 0.02) * math.sqrt(2 * math.log(8)))
    far = step_time(PARTS, replace(CLUSTER, latency_us=1000), 4, 2)
    assert far.total - step.total == pytest.approx(5 * 3 * 1e-3)


def plan(trained_bytes: int = 4_000_000) -> StepPlan:
    return StepPlan(
        parameters=1_000_000, trained=1_000_000, parameter_bytes=4_000_000, trained_bytes=trained_bytes,
        towers=TowerLine(TowerCost(1, 10**9, 0, (0,), (0,), 64), TowerCost(2, 2 * 10**9, 0, (0,), (0,), 64)),
        items=4, width=32, heads=4, passes=2, token_size=4,
    )  # fmt: skip


def options(**groups: object) -> RunOptions:
    return RunOptions(loading=LoadingSettings(batch_size=8, num_sampled_captions=4), **groups)  # type: ignore[arg-type]


def test_what_travels():
    gradients, items = traffic(plan(), options())
    assert gradients == 4e6
    assert items == 4 * (2 * 8 * 4 * 32 + 8 * (4 + 1 + 4 + 7)), "features there and back, mask, flag and index"
    assert traffic(plan(), options(parallel=ParallelSettings(compress_gradients=True)))[0] == 2e6
    assert traffic(plan(), options(parallel=ParallelSettings("fsdp2")))[0] == 6e6


def write_run(folder, *, ranks: int, batch: int = 8, steps: int = 10) -> None:
    folder.mkdir()
    loading = {"batch_size": batch, "accum_batch": 1, "accum_freq": 1}
    (folder / "params.json").write_text(json.dumps({"loading": loading}))
    per_flop = 1e-9
    flop = loss_flop(8, 4, 64, 32, passes=2, ranks=ranks)
    lines = []
    for number in range(steps):
        step_s = 10.0 if number == 0 else 2.0 + 0.1 * (-1) ** number
        times = {"towers_s": 1.5, "loss_s": flop * per_flop, "optimizer_s": 0.1, "data_wait_s": 0.05}
        speed = {"step_s": step_s, "images_per_s": batch * ranks / step_s}
        lines.append({"kind": "train", "step": number, "samples": number, **speed, **times})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "eval", "samples": 3}\n{"broken')


def test_a_measured_run_gives_the_parts_whatever_its_number_of_ranks(tmp_path):
    for ranks in (1, 4):
        write_run(tmp_path / str(ranks), ranks=ranks)
    one, four = (measured_parts(plan(), options(), tmp_path / name) for name in ("1", "4"))
    assert "9 steps on 1 process" in one.source
    assert "9 steps on 4 processes" in four.source
    assert (one.towers_s, one.optimizer_s, one.data_s) == (1.5, 0.1, 0.05)
    assert one.spread == pytest.approx(0.1 / 2.1, rel=0.1)
    assert four.own_loss_s == pytest.approx(one.own_loss_s)
    assert four.per_rank_s == pytest.approx(one.per_rank_s)
    assert step_time(four, CLUSTER, 2, 2).loss == pytest.approx(loss_flop(8, 4, 64, 32, passes=2, ranks=4) * 1e-9)
    drawn = options(objective=ObjectiveSettings(remote_ranks=1))
    assert measured_parts(plan(), drawn, tmp_path / "4").per_rank_s > four.per_rank_s


def test_runs_that_tell_nothing_are_refused(tmp_path):
    write_run(tmp_path / "short", ranks=1, steps=2)
    with pytest.raises(UserError, match="2 timed steps; expected 3 or more: run it with --log-every-n-steps 1"):
        measured_parts(plan(), options(), tmp_path / "short")
    write_run(tmp_path / "other", ranks=1, batch=16)
    with pytest.raises(UserError, match="measured 16 images a process and step, this plan has 8; give the same"):
        measured_parts(plan(), options(), tmp_path / "other")
    (tmp_path / "short/params.json").write_text("[]")
    with pytest.raises(UserError, match=r"params\.json: no options of a run"):
        measured_parts(plan(), options(), tmp_path / "short")


def test_flags_of_the_cluster_are_told_from_those_of_training():
    cluster, rest = take_cluster_flags(["--nodes", "8", "--lr", "1", "--network=100Gb", "--gpus", "4"], "x")
    assert cluster == Cluster(nodes=8, gpus=4, network="100Gb")
    assert rest == ["--lr", "1"]
    assert take_cluster_flags(["--lr", "1"], "x") == (None, ["--lr", "1"])


def test_the_command_tells_what_is_lost_and_to_what(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["scenes_debug", "--plan", "--nodes", "512", "--gpus", "8", "--network", "10Gb"]
    assert main(flags) is None
    told = " ".join(capsys.readouterr().out.split())
    for expected in (
        "efficiency",
        "4096",
        "counted, at 40% of the rate of a H100",
        "On 4096 processes most is lost to",
    ):
        assert expected in told
