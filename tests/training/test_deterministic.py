"""--deterministic: runs that are repeated end with the same bits, whoever loads the batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import fails
from test_engine import run_toy
from toy import ToyModel, toy_options, toy_train

from itemizedclip.commands.train import main
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.precision import resolve_precision
from itemizedclip.runtime.processes import SetupError, launch, repeatable
from itemizedclip.training.options import RunSettings

FLAGS = ("--deterministic", "--device", "cpu", "--val-frequency", "0")


def bits(folder: Path) -> list[torch.Tensor]:
    """All weights and moments of a finished run."""
    (path,) = (folder / "checkpoints").glob("epoch_*.pt")
    saved = torch.load(path, weights_only=True)
    moments = [value for state in saved["optimizer"]["state"].values() for value in state.values()]
    return [*saved["state_dict"].values(), *moments]


def curve(folder: Path) -> list[list[float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [[line[name] for name in ("loss", "ila", "kta", "mps", "iis", "grad_norm")] for line in lines]


def assert_same_bits(one: Path, other: Path) -> None:
    assert all(map(torch.equal, bits(one), bits(other)))
    assert curve(one) == curve(other)


def test_runs_that_are_repeated_are_equal_with_any_number_of_loader_processes(tmp_path):
    run = ("scenes_debug", *FLAGS, "--logs", str(tmp_path), "--log-every-n-steps", "1")
    for name, workers in (("a", "0"), ("b", "2"), ("c", "2")):
        main([*run, "--name", name, "--workers", workers])
    assert not torch.are_deterministic_algorithms_enabled()
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert_same_bits(tmp_path / "b", tmp_path / "c")
    main([*run, "--name", "d", "--workers", "0", "--seed", "1"])
    assert curve(tmp_path / "d") != curve(tmp_path / "a")


def test_two_ranks_that_are_repeated_are_equal(tmp_path):
    run = ("--deterministic", "--logs", tmp_path, "--epochs", 1, "--val-frequency", 0, "--workers", 1)
    run_toy(*run, "--name", "a", "+", *run, "--name", "b", ranks=2)
    assert_same_bits(tmp_path / "a", tmp_path / "b")


def test_operations_without_a_repeatable_form_are_refused_in_a_sentence(tmp_path, capsys, monkeypatch):
    def encode_text(self, tokens_NC):
        return self.text(tokens_NC).put_(torch.tensor([0]), torch.zeros(1))

    monkeypatch.setattr(ToyModel, "encode_text", encode_text)
    options = toy_options(tmp_path, run=RunSettings(logs=tmp_path, device="cpu", deterministic=True))

    def train() -> None:
        with reported_errors("toy"):
            toy_train(options)

    assert "--deterministic: PyTorch has no repeatable form of put_ on this device" in fails(capsys, train)


def test_nothing_is_decided_by_measured_time(monkeypatch):
    monkeypatch.setattr("itemizedclip.runtime.precision.cpu_bfloat16", lambda: pytest.fail("measured"))
    with launch("cpu", deterministic=True):
        assert resolve_precision("auto", torch.device("cpu")).name == "fp32"
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
    with pytest.raises(UserError, match="--torchcompile chooses kernels by measured time"):
        toy_options(run=RunSettings(deterministic=True), model=toy_options().model.__class__(torchcompile=True))


def test_an_environment_that_asks_cublas_for_something_else_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(SetupError, match="':0:0'; --deterministic needs :4096:8 or :16:8"), repeatable():
        pass
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with repeatable():
        assert torch.are_deterministic_algorithms_enabled()
