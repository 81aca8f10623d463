"""The tutorials, as a reader follows them: each command of a page, in order; the first three pages share a folder."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from itemizedclip.commands import cli

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("tutorial-own-pictures.md", "tutorial-fine-tuning.md", "tutorial-sharing.md")
STUDY_PAGES = {
    "tutorial-head-ct.md": (
        "make_scans.py",
        ("items/review.html", "ct/contact_sheet.png", "ct/train.json", "measured.json", "seen/montage.png"),
    ),
    "tutorial-public-mri.md": (
        "make_mr_rate.py",
        ("mr/contact_sheet.png", "mr/test.json", "tested/mr_rate.results.json", "seen/montage.png"),
    ),
}
"""Page → its program, and files that its commands write."""


def commands_of(page: str) -> list[str]:
    """What stands in the page's shell blocks, a line each."""
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def write_program(page: str, path: Path) -> None:
    """The page's Python block as a file."""
    program = re.search(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    path.write_text(program[1])


def follow(page: str) -> None:
    """Run a page's commands; ours in this process, which saves the seconds that each import takes."""
    for command in commands_of(page):
        if command.startswith("itemizedclip "):
            cli.main(shlex.split(command)[1:])
        else:
            command = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", command)
            subprocess.run(["bash", "-e", "-c", command], check=True, capture_output=True, text=True)


@pytest.mark.slow
def test_the_tutorials_do_what_they_say(tmp_path, monkeypatch, capsys):
    for package in ("pysbd", "peft", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_program(PAGES[0], tmp_path / "make_pictures.py")
    said = {}
    for page in PAGES:
        follow(page)
        said[page] = capsys.readouterr().out
    for name in ("items/review.html", "seen/attention.png", "report.html", "shared/config.json", "to-send/README.md",
                 "onnx/head.onnx", "logs/lora/checkpoints/epoch_2.pt", "pictures.index/index.json"):  # fmt: skip
        assert (tmp_path / name).is_file(), name
    assert json.loads((tmp_path / "shared.json").read_text())["metrics"]["top1"] > 0.8
    assert re.search(r"left out: normalised +│ 120", said[PAGES[0]])
    assert "largest difference from PyTorch" in said[PAGES[2]]
    assert "top1" in (tmp_path / "to-send/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("page", STUDY_PAGES)
def test_the_tutorials_of_studies_do_what_they_say(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pysbd")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program, written = STUDY_PAGES[page]
    write_program(page, tmp_path / program)
    follow(page)
    for name in written:
        assert (tmp_path / name).is_file(), name
    said = capsys.readouterr()
    assert re.search(r"kept, train, of [56] studies", said.err)
    if page == "tutorial-head-ct.md":
        # The name that the reports held was struck out of them, and that of the scans is written nowhere.
        for path in (tmp_path / "ct").rglob("*.json"):
            assert "miller" not in path.read_text().lower()
        assert "hemorrhage" in (tmp_path / "ct/train.json").read_text()
        assert "auc" in (tmp_path / "measured.json").read_text()
    else:
        assert re.search(r"Cerebral infarction +│ +2 │ +4 │", said.out)


@pytest.mark.parametrize("page", [*PAGES, *STUDY_PAGES])
def test_every_command_exists(page):
    commands = commands_of(page)
    assert len(commands) >= 4
    assert {line.split()[1] for line in commands if line.startswith("itemizedclip")} <= set(cli.COMMANDS)
