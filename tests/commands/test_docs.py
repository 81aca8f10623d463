"""Documents name only files, commands and flags that exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACES = (ROOT, ROOT / "itemizedclip", ROOT / "itemizedclip" / "objectives", ROOT / "docs")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_paths_exist(page):
    for path in re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:sh|py|sbatch|toml|cff))`", page.read_text()):
        assert any((place / path).exists() for place in PLACES), f"{page.name} names {path}"


def test_every_script_of_the_project_folder_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    missing = [path.name for path in sorted(ROOT.glob("*.sh")) if path.name not in readme]
    assert missing == []


def test_the_program_for_own_images_runs(tmp_path):
    """The code block of docs/own-data.md, as a user would save it."""
    program = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "own-data.md").read_text(), re.DOTALL)
    assert program is not None
    (tmp_path / "train_own.py").write_text(program[1])
    items = {}
    for number in range(8):
        Image.new("RGB", (90, 70), (30 * number, 100, 100)).save(tmp_path / f"{number}.png")
        items[f"{number}.png"] = [f"colour number {number}", "a plain picture"]
    (tmp_path / "items.json").write_text(json.dumps(items))
    result = subprocess.run(
        [sys.executable, "train_own.py", "--name", "mine", "--model", "ViT-scenes-ItemizedCLIP", "--epochs", "1",
         "--batch-size", "4", "--warmup", "1", "--workers", "0"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PICTURES": str(tmp_path), "ITEMS_JSON": str(tmp_path / "items.json")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "logs" / "mine" / "checkpoints" / "epoch_1.pt").is_file()
