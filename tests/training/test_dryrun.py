"""A dry run tells what a run would meet, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import run
from itemizedclip_radiology.synthetic.cohort import write_ct_rate, write_studies
from natural_files import write_shards
from PIL import Image
from rsicd_files import write_rsicd_folder

from itemizedclip.commands.train import main
from itemizedclip.runtime.claims import claimed
from itemizedclip.training import dryrun
from itemizedclip.training.dryrun import classes_without, described_cost

HERE = ("--device", "cpu", "--precision", "fp32", "--workers", "0", "--name", "a")


def write_own(folder: Path) -> list[str]:
    lines = []
    for number in range(6):
        Image.new("RGB", (70, 64), (40 * number, 0, 99)).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "items": [f"number {number}"]}))
    (folder / "own.jsonl").write_text("\n".join(lines))
    return ["own", "--data", str(folder / "own.jsonl"), "--like", "scenes", "--batch-size", "4", "--warmup", "1"]


def write_mri(folder: Path) -> list[str]:
    write_studies(folder, kind="mri", num_train=4, num_valid=2, seed=5, size=(8, 32, 32))
    return ["mri_debug", "--data-root", str(folder), "--json-root", str(folder), "--batch-size", "2",
            "--volume-size", "8", "32", "32"]  # fmt: skip


def write_chest(folder: Path) -> list[str]:
    write_ct_rate(folder, num_train=4, num_valid=2, seed=5, size=(16, 48, 48))
    return ["ctrate_debug", "--data-root", str(folder), "--items-json", str(next(folder.rglob("itemized.json"))),
            "--batch-size", "2", "--volume-size", "16", "48", "48"]  # fmt: skip


def write_rsicd(folder: Path) -> list[str]:
    written = write_rsicd_folder(folder)
    items = f"{written.items_path('train')};{written.items_path('test')}"
    return ["rsicd_debug", "--rsicd-data-dir", str(folder), "--external-captions", items, "--batch-size", "4"]


def write_natural(folder: Path) -> list[str]:
    write_shards(folder)
    shards, items = str(folder / "{00000..00001}.tar"), str(folder / "first_300000_rewrites.json")
    return ["itemized_cc0.3M_debug", "--train-data", shards, "--external-captions", items, "--batch-size", "4",
            "--val-data", str(folder / "00002.tar")]  # fmt: skip


def told_of(capsys, arguments: list[str]) -> tuple[int, str]:
    """Exit status and report of a dry run, in one line."""
    try:
        assert main([*arguments, *HERE, "--dry-run"]) is None
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("write", [write_rsicd, write_natural, write_own, write_mri, write_chest])
def test_every_domain_can_be_tried(write: Callable[[Path], list[str]], tmp_path, monkeypatch, capsys):
    data, work = tmp_path / "data", tmp_path / "work"
    data.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    arguments = write(data)
    code, told = told_of(capsys, arguments)
    assert code == 0, told
    for part in ("device", "port", "run folder", "data", "labels", "disk", "a step", "loss", "an epoch:", "can start"):
        assert part in told
    assert list(work.iterdir()) == []


def test_all_that_is_wrong_is_told_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = write_own(tmp_path)
    (tmp_path / "3.png").unlink()
    (tmp_path / "logs" / "a").mkdir(parents=True)
    with claimed(tmp_path / "logs" / "a"):
        code, told = told_of(capsys, arguments)
    assert code == 1
    assert "another run is at work here" in told
    assert "3.png" in told
    assert "2 things are wrong: a run would not start" in told
    assert [path.name for path in (tmp_path / "logs").rglob("*")] == ["a"]
    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "logs").write_text("no folder")
    assert "is no folder; give another place with --logs" in told_of(capsys, arguments)[1]


def test_flags_that_cannot_be_end_with_two(tmp_path, capsys):
    assert told_of(capsys, ["scenes_debug", "--lr", "nan"])[0] == 2


def test_a_bad_sample_is_found_before_it_is_met(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = write_own(tmp_path)
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:60])
    code, told = told_of(capsys, arguments)
    assert code == 1
    assert "5.png" in told
    assert "of 6 from all over them 1 cannot be used" in told
    code, told = told_of(capsys, [*arguments, "--on-bad-sample", "skip", "--max-bad-fraction", "0.5"])
    assert (code, "5.png" in told, "4 taken" in told or "1 taken" in told) == (0, True, True)


def test_two_checkpoints_must_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "itemizedclip.training.folder.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1)
    )
    code, told = told_of(capsys, ["scenes_debug"])
    assert code == 1
    assert "two checkpoints take 85" in told


def test_a_step_that_would_take_too_long_is_reckoned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dryrun.dry_run, "__kwdefaults__", {"budget_s": 0.0})
    code, told = told_of(capsys, ["scenes_debug"])
    assert code == 0
    assert "of 2 images was taken; one of 8 would take too long here" in told
    assert "reckoned from a step of a few images" in told


def test_the_port_that_several_would_meet_at(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        assert dryrun._port(1)[1] == "note"
    assert dryrun._port(1) == (f"127.0.0.1:{port} is free", "ok")
    monkeypatch.setenv("MASTER_PORT", "x")
    assert dryrun._port(1)[1] == "wrong"


def test_classes_of_which_nothing_can_be_measured():
    labels = np.array([[1, 0, 1], [0, 0, 1], [np.nan, 0, 1]])
    assert classes_without(labels, ["a", "b", "c"]) == ["b", "c"]
    assert classes_without(np.array([0, 2]), ["a", "b", "c"]) == ["b"]


def test_what_takes_longer_decides_the_cost():
    from itemizedclip.training.options import RunOptions

    cost = dryrun.EpochCost(10, compute_s=1.0, load_s=3.0, parallel=True, measured=2, images=80, read_bytes=8e9,
                            tensor_bytes=4e9)  # fmt: skip
    assert cost.seconds == 30
    told = described_cost(cost, RunOptions())
    assert "loading is what takes longest" in told
    assert "8 GB read from files, 4 GB as tensors" in told


@pytest.mark.slow
def test_two_processes_meet_and_step_together(tmp_path):
    done = run(
        sys.executable, "-m", "itemizedclip.runtime.torchrun", "--standalone", "--nproc_per_node", "2", "-m",
        "itemizedclip", "train", "scenes_debug", "--dry-run", "--device", "cpu", "--workers", "1", "--name", "a",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "all 2 processes have met at" in done.stdout
    assert list(tmp_path.iterdir()) == []
