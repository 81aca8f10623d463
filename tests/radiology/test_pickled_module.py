"""The published series-name encoder is a pickled module of classes that nobody has: its tensors, and nothing else."""

from __future__ import annotations

import os
import pickle
import sys
import types
import zipfile

import pytest
import torch
from itemizedclip_radiology.models.pickled_module import read_pickled_module
from itemizedclip_radiology.models.series_names import SeriesNameEncoder, load_series_name_weights
from torch import nn

from itemizedclip.models.weights import CheckpointError


@pytest.fixture
def foreign(monkeypatch):
    """A module of another project, importable while files are made."""
    module = types.ModuleType("foreign_parts")

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(6.0).view(2, 3))
            self.register_buffer("scratch", torch.ones(1), persistent=False)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = SeriesNameEncoder()
            self.embed, self.transformer = inner.embed, inner.transformer
            self.positions = Positions()
            self.linear = nn.Linear(256, 3)
            self.activation = torch.tanh
            self.notes = {"names": ["a"], "seen": {1, 2}}

    for made in (Positions, Encoder):
        made.__module__, made.__qualname__ = "foreign_parts", made.__name__
        setattr(module, made.__name__, made)
    monkeypatch.setitem(sys.modules, "foreign_parts", module)
    return module


def save_and_forget(monkeypatch, foreign, path):
    saved = foreign.Encoder()
    torch.save(saved, path)
    monkeypatch.delitem(sys.modules, "foreign_parts")
    return saved


def test_published_file_loads_as_it_is(monkeypatch, foreign, tmp_path):
    path = tmp_path / "15t.pt"
    saved = save_and_forget(monkeypatch, foreign, path)
    with pytest.raises(ModuleNotFoundError):
        torch.load(path, weights_only=False)
    tensors = read_pickled_module(path)
    wanted = saved.state_dict()
    assert {name for name in tensors if name != "positions.scratch"} == set(wanted)
    assert all(torch.equal(tensors[name], value) for name, value in wanted.items())
    encoder = SeriesNameEncoder()
    report = load_series_name_weights(encoder, path)
    assert all(torch.equal(value, wanted[name]) for name, value in encoder.state_dict().items())
    assert {"linear.weight", "linear.bias", "positions.table"} <= set(report.skipped)
    assert "foreign_parts" not in sys.modules


class Runs:
    """Calls `call(*arguments)` when unpickled."""

    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [os.system, eval, exec, __import__, os.mkdir])
@pytest.mark.parametrize("place", ["alone", "inside"])
def test_nothing_of_a_hostile_file_runs(monkeypatch, foreign, tmp_path, call, place):
    made = tmp_path / "made"
    argument = {
        os.system: f"mkdir {made}",
        os.mkdir: str(made),
        __import__: "antigravity_that_is_not_there",
    }.get(call, f"__import__('os').mkdir({str(made)!r})")
    path = tmp_path / "hostile.pt"
    if place == "alone":
        torch.save(Runs(call, argument), path)
    else:
        encoder = foreign.Encoder()
        encoder.trap = Runs(call, argument)
        encoder._parameters["trap2"] = Runs(call, argument)
        torch.save(encoder, path)
    monkeypatch.delitem(sys.modules, "foreign_parts")
    if place == "alone":
        with pytest.raises(CheckpointError, match=r"hostile\.pt: holds no module with tensors"):
            load_series_name_weights(SeriesNameEncoder(), path)
    else:
        load_series_name_weights(SeriesNameEncoder(), path)
    assert not made.exists()


def test_files_that_are_no_modules(monkeypatch, foreign, tmp_path):
    path = tmp_path / "15t.pt"
    save_and_forget(monkeypatch, foreign, path)
    whole = path.read_bytes()
    middle = whole.index(b"PK\x03\x04", 2000) + 4000
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(whole[:middle] + bytes(b ^ 0xFF for b in whole[middle : middle + 64]) + whole[middle + 64 :])
    (tmp_path / "torn.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bare.pt").write_bytes(pickle.dumps([1, 2]))
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", pickle.dumps([]))
        archive.writestr("script/constants.pkl", pickle.dumps([]))
    torch.save(nn.Identity(), tmp_path / "empty.pt")
    for name in ("damaged.pt", "torn.pt", "bare.pt", "script.pt", "empty.pt", "absent.pt"):
        with pytest.raises(CheckpointError, match=rf"{name}: "):
            read_pickled_module(tmp_path / name)


def test_values_that_are_not_finite_are_refused(monkeypatch, foreign, tmp_path):
    encoder = foreign.Encoder()
    encoder.embed.weight.data[0, 0] = float("nan")
    torch.save(encoder, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match=r"nan\.pt: cannot be used, 1 of the .* embed\.weight are not finite"):
        read_pickled_module(tmp_path / "nan.pt")


def test_modules_nested_without_end_are_refused(tmp_path):
    inner = nn.Linear(1, 1)
    for _ in range(150):
        inner = nn.Sequential(inner)
    torch.save(inner, tmp_path / "deep.pt")
    with pytest.raises(CheckpointError, match="nested deeper than 100 levels"):
        read_pickled_module(tmp_path / "deep.pt")
