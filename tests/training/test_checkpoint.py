"""Checkpoints are whole, safe and sufficient: a killed run that is resumed takes the same steps to the last digit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from test_engine import TOY, curve, run_toy
from toy import TOY_CONFIG, ToyModel, ToyRun, toy_options, toy_train

from itemizedclip.models.weights import CheckpointError
from itemizedclip.runtime.errors import EXIT_STOPPED
from itemizedclip.training import checkpoint as checkpoints
from itemizedclip.training.checkpoint import (
    describe_changes,
    find_resume,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from itemizedclip.training.folder import choose_run_folder
from itemizedclip.training.options import options_to_dict

SAME = ("step", "epoch", "samples", "loss", "ila", "kta", "mps", "iis", "lr", "logit_scale", "logit_bias", "grad_norm")


def exact_curve(folder: Path) -> list[dict]:
    """What must not differ between two runs: everything but times and memory."""
    return [{key: line[key] for key in SAME} for line in curve(folder)]


def named(options: ToyRun, name: str, **run: object) -> ToyRun:
    return replace(options, run=replace(options.run, name=name, **run))


def with_data(options: ToyRun, **data: object) -> ToyRun:
    return replace(options, data=replace(options.data, **data))


# --- kill and resume -----------------------------------------------------------------------------------------------


def test_a_run_killed_within_an_epoch_goes_on_to_the_last_digit(tmp_path):
    flags = ["--logs", tmp_path, "--epochs", 3, "--save-every-steps", 4, "--workers", 1, "--grad-clip-norm", 50]
    killed = run_toy(*flags, "--name", "whole", "+", *flags, "--name", "cut", "--kill-at", 16, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [line["step"] for line in curve(tmp_path / "cut")] == list(range(1, 16))
    resumed = run_toy(*flags, "--name", "cut", "--resume", "latest")
    assert "resumed from" in resumed.stderr
    assert "latest.pt at step 12, in epoch 2" in resumed.stderr
    assert "dropped 3 lines" in resumed.stderr
    assert resumed.stderr.count("changed since") == resumed.stderr.count("data.kill_at: 16 → 0") == 1
    assert exact_curve(tmp_path / "cut") == exact_curve(tmp_path / "whole")
    assert len(exact_curve(tmp_path / "whole")) == 30
    whole, cut = (torch.load(tmp_path / n / "checkpoints/epoch_3.pt", weights_only=True) for n in ("whole", "cut"))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, cut["state_dict"][name]), name
    assert whole["metrics"] == cut["metrics"]
    assert [line["toy/sum"] for line in curve(tmp_path / "cut", "eval")] == [
        line["toy/sum"] for line in curve(tmp_path / "whole", "eval")
    ]


def test_two_ranks_killed_and_resumed_give_the_same_curve(tmp_path):
    flags = ["--logs", tmp_path, "--save-every-steps", 3]
    killed = run_toy(*flags, "--name", "whole", "+", *flags, "--name", "cut", "--kill-at", 5, ranks=2, check=False)
    assert killed.returncode != 0
    assert len(curve(tmp_path / "cut")) == 4
    run_toy(*flags, "--name", "cut", "--resume", "latest", ranks=2)
    assert exact_curve(tmp_path / "cut") == exact_curve(tmp_path / "whole")
    assert len(exact_curve(tmp_path / "cut")) == 10


def test_sigterm_on_one_rank_saves_and_stops_all(tmp_path):
    flags = ["--logs", tmp_path]
    done = run_toy(*flags, "--name", "cut", "--terminate-at", 4, ranks=2, check=False)
    assert done.returncode == EXIT_STOPPED
    assert "Traceback" not in done.stderr
    assert "saved and stopped; --resume latest goes on" in done.stderr
    # What ranks agree on arrives a step late.
    assert "stopped after 5 of 10 steps" in done.stderr
    saved = load_checkpoint(tmp_path / "cut/checkpoints/latest.pt")
    assert (saved.step, saved.epoch, saved.step_in_epoch, saved.world_size) == (5, 0, 5, 2)


def test_sigusr1_from_outside_saves_at_the_next_step(tmp_path):
    process = subprocess.Popen(
        [sys.executable, TOY, "--logs", str(tmp_path), "--name", "a", "--wait-s", "0.05", "--epochs", "50"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "step 3/" in line:
            process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == EXIT_STOPPED
    saved = load_checkpoint(tmp_path / "a/checkpoints/latest.pt")
    assert 3 <= saved.step < 20
    assert len(curve(tmp_path / "a")) == saved.step


def test_resuming_from_an_epoch_sets_later_checkpoints_aside(tmp_path):
    options = named(toy_options(tmp_path), "a")
    first = toy_train(options)
    before = exact_curve(first.folder)
    branch = replace(options, run=replace(options.run, resume=str(first.folder / "checkpoints/epoch_1.pt")))
    again = toy_train(branch)
    assert (first.folder / "checkpoints/superseded/epoch_2.pt").is_file()
    assert again.folder == first.folder
    assert exact_curve(first.folder) == before
    assert [line["epoch"] for line in curve(first.folder, "eval")] == [1, 2]


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    options = named(toy_options(tmp_path), "a")
    first = toy_train(options)
    again = toy_train(named(options, "a", resume="latest"))
    assert (again.step, again.epochs_done, again.checkpoint) == (first.step, 2, first.checkpoint)
    assert again.metrics == first.metrics
    assert len(curve(first.folder)) == 20


def test_a_run_killed_between_training_and_evaluation_still_evaluates(tmp_path):
    class Broken:
        name = "broken"

        def run(self, model):
            raise OSError("no labels")

    options = named(toy_options(tmp_path), "a")
    with pytest.raises(OSError, match="no labels"):
        toy_train(options, evaluators=[Broken()])
    saved = load_checkpoint(tmp_path / "a/checkpoints/latest.pt")
    assert (saved.step, saved.epoch, saved.step_in_epoch) == (10, 0, 10)
    toy_train(named(options, "a", resume="latest"))
    assert [line["epoch"] for line in curve(tmp_path / "a", "eval")] == [1, 2]
    assert [line["step"] for line in curve(tmp_path / "a")] == list(range(1, 21))


def test_latest_without_a_checkpoint_starts_afresh(tmp_path):
    result = toy_train(named(toy_options(tmp_path), "a", resume="latest"))
    assert result.step == 20
    assert "no checkpoint yet, starting afresh" in (result.folder / "log.txt").read_text()


def test_a_checkpoint_of_another_folder_starts_a_new_curve(tmp_path):
    first = toy_train(named(toy_options(tmp_path), "a"))
    path = str(first.folder / "checkpoints/epoch_1.pt")
    second = toy_train(named(toy_options(tmp_path), "b", resume=path))
    assert second.folder == tmp_path / "b"
    assert exact_curve(second.folder) == exact_curve(first.folder)[10:]
    assert (first.folder / "checkpoints/epoch_2.pt").is_file()


# --- what changed --------------------------------------------------------------------------------------------------


def test_changed_options_are_told_and_apply(tmp_path):
    options = named(toy_options(tmp_path), "a")
    first = toy_train(options)
    changed = replace(options, optimizer=replace(options.optimizer, epochs=4, weight_decay=0.9, lr=5e-3))
    result = toy_train(replace(changed, run=replace(changed.run, resume="latest")))
    log = (first.folder / "log.txt").read_text()
    for expected in (
        "optimizer.epochs: 2 → 4", "optimizer.lr: 0.01 → 0.005", "optimizer.weight_decay: 0.2 → 0.9",
        "the schedule is now 40 steps long instead of 20: the learning rate jumps at step 20",
    ):  # fmt: skip
        assert expected in log
    assert result.step == 40
    state = torch.load(result.checkpoint, weights_only=True)["optimizer"]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.0, 0.9]


def test_another_batch_size_keeps_the_place_in_the_data(tmp_path):
    options = named(toy_options(tmp_path), "a", save_every_steps=6)
    first = toy_train(options)
    path = first.folder / "checkpoints/epoch_1.pt"
    larger = named(toy_options(tmp_path), "b", resume=str(path))
    larger = replace(larger, loading=replace(larger.loading, batch_size=8))
    second = toy_train(larger)
    log = (second.folder / "log.txt").read_text()
    assert "an epoch now has 5 steps of 8 images instead of 10 of 4: step 10 becomes step 5 of the schedule" in log
    assert [line["step"] for line in curve(second.folder)] == [6, 7, 8, 9, 10]
    assert [line["samples"] for line in curve(second.folder)] == [48, 56, 64, 72, 80]


def test_other_data_and_ranks_are_told(tmp_path):
    result = toy_train(named(toy_options(tmp_path), "a"))
    saved = load_checkpoint(result.checkpoint)
    told = describe_changes(saved, saved.options, total_steps=20, data_fingerprint="other", world_size=2)
    assert len(told) == 2
    assert "2 processes instead of 1" in told[0]
    assert "the training data changed (fingerprint toy-40 → other)" in told[1]
    assert describe_changes(saved, saved.options, total_steps=20, data_fingerprint="toy-40", world_size=1) == []


def test_another_model_or_other_locks_are_refused(tmp_path):
    options = named(toy_options(tmp_path), "a")
    toy_train(options)
    resumed = named(options, "a", resume="latest")
    with pytest.raises(CheckpointError, match=r"another model \(dropout: 0.1 there, 0.5 here\).*--pretrained"):
        toy_train(with_data(resumed, dropout=0.5))
    with pytest.raises(CheckpointError, match=r"another set of parameters .*--lock-"):
        toy_train(replace(resumed, model=replace(resumed.model, lock_text=True)))


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_tensors_and_plain_data_with_all_that_evaluation_needs(tmp_path):
    result = toy_train(named(toy_options(tmp_path), "a"))
    saved = torch.load(result.checkpoint, weights_only=True)
    model = ToyModel()
    model.load_state_dict(saved["state_dict"])
    assert saved["model_config"] == {**TOY_CONFIG, "dropout": 0.1}
    assert (saved["step"], saved["epoch"], saved["step_in_epoch"], saved["samples_seen"]) == (20, 2, 0, 80)
    assert saved["metrics"] == result.metrics
    assert saved["data_fingerprint"] == "toy-40"
    assert saved["options"]["optimizer"]["lr"] == 0.01
    assert saved["format"] == 1
    json.dumps({k: v for k, v in saved.items() if k not in ("state_dict", "optimizer")})


def test_frequencies_decide_which_files_stay(tmp_path):
    options = named(toy_options(tmp_path), "a", save_frequency=2)
    options = replace(options, optimizer=replace(options.optimizer, epochs=5))
    folder = toy_train(options).folder / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["epoch_2.pt", "epoch_4.pt", "epoch_5.pt"]
    options = replace(options, run=replace(options.run, name="b", delete_previous_checkpoint=True))
    folder = toy_train(options).folder / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["epoch_5.pt"]


def make_checkpoint(path: Path, step: int) -> None:
    contents = checkpoints.Checkpoint(
        state_dict={}, optimizer={"state": {}, "param_groups": []}, scaler=None,
        step=step, epoch=0, step_in_epoch=step, samples_seen=step,
        total_steps=1000, run_id="r", options=options_to_dict(toy_options()), model_config={}, transform={},
        data_fingerprint="", world_size=1,
    )  # fmt: skip
    save_checkpoint(contents, path)


def test_the_newest_checkpoint_has_the_most_steps_and_can_be_read(tmp_path):
    run = tmp_path / "a"
    assert newest_checkpoint(run) is None
    for name, step in {"epoch_2": 20, "epoch_10": 100, "latest": 95}.items():
        make_checkpoint(run / "checkpoints" / f"{name}.pt", step)
    assert newest_checkpoint(run) == run / "checkpoints/epoch_10.pt"
    make_checkpoint(run / "checkpoints/latest.pt", 105)
    assert newest_checkpoint(run) == run / "checkpoints/latest.pt"
    (run / "checkpoints/latest.pt").write_bytes(b"cut")
    (run / "checkpoints/epoch_10.pt").write_bytes(b"cut")
    assert newest_checkpoint(run) == run / "checkpoints/epoch_2.pt"


def test_latest_without_a_name_is_the_recipes_newest_run(tmp_path):
    for name in ("toy-20260101-000000", "toy-20260201-000000", "toy-large-20270101-000000", "mine"):
        make_checkpoint(tmp_path / name / "checkpoints/latest.pt", 1)
    (tmp_path / "toy-20260301-000000").mkdir()  # died before its first checkpoint
    assert find_resume("latest", tmp_path, "", recipe="toy") == tmp_path / "toy-20260201-000000/checkpoints/latest.pt"
    assert find_resume("latest", tmp_path, "mine", recipe="toy") == tmp_path / "mine/checkpoints/latest.pt"
    assert find_resume("latest", tmp_path, "other", recipe="toy") is None
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        find_resume(str(tmp_path / "none.pt"), tmp_path, "", recipe="toy")
    settings = replace(toy_options(tmp_path).run, resume="latest")
    resumed = find_resume("latest", tmp_path, "", recipe="toy")
    assert choose_run_folder(settings, resumed) == tmp_path / "toy-20260201-000000"
    fresh = choose_run_folder(settings, None, datetime(2026, 5, 6, 7, 8, 9))
    assert fresh == tmp_path / "toy-20260506-070809"


def test_weights_alone_cannot_be_resumed_but_can_be_started_from(tmp_path):
    torch.manual_seed(5)
    weights = ToyModel().state_dict()
    path = tmp_path / "released.pt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, path)
    options = named(toy_options(tmp_path), "a")
    with pytest.raises(CheckpointError, match=r"holds weights but no state of a run .*--pretrained"):
        toy_train(named(options, "b", resume=str(path)))
    frozen = replace(options, model=replace(options.model, pretrained=path, lock_image=True))
    trained = torch.load(toy_train(frozen).checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(trained["image.patches.weight"], weights["image.patches.weight"])
    assert not torch.equal(trained["text.out.weight"], weights["text.out.weight"])


def test_checkpoints_of_a_newer_layout_are_refused(tmp_path):
    make_checkpoint(tmp_path / "x.pt", 1)
    contents = torch.load(tmp_path / "x.pt", weights_only=True)
    torch.save({**contents, "format": 99}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="written by a newer version"):
        load_checkpoint(tmp_path / "x.pt")


def test_hostile_checkpoints_are_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": {}, "payload": Hostile()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="could run"):
        load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "executed").exists()
