"""The vectors of the published implementation, through the same program a user runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden"


def check(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(GOLDEN / "check.py"), str(folder)], capture_output=True, text=True, check=False
    )


def test_every_vector_holds():
    result = check(GOLDEN)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 outside, 0 not covered" in result.stdout


def test_a_wrong_vector_fails(tmp_path):
    source = GOLDEN / "loss_2d_plain.safetensors"
    tensors = load_file(source)
    tensors["out.kta_loss"] = tensors["out.kta_loss"] * 1.001
    from safetensors import safe_open

    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / source.name, metadata)
    save_file({"x": torch.zeros(1)}, tmp_path / "something_new.safetensors", {"config": json.dumps({})})
    result = check(tmp_path)
    assert result.returncode == 1
    assert "FAIL  1.0e-03  loss_2d_plain.safetensors (20 tensors, worst: out.kta_loss)" in " ".join(
        result.stdout.replace("  (", " (").splitlines()
    )
    assert "not covered   something_new.safetensors" in result.stdout


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_a_folder_without_vectors_is_an_error(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    result = check(tmp_path / folder)
    assert result.returncode == 2
    assert "no *.safetensors vectors there" in result.stderr
