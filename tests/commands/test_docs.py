"""Documents name only files, commands and flags that exist."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from commands import run
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.jsonl import ImageItems

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACES = (ROOT, ROOT / "itemizedclip", ROOT / "itemizedclip" / "objectives", ROOT / "docs")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page):
    # What docs/build.sh generates is checked by the build itself, which is strict.
    targets = [link for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()) if not link.startswith("generated/")]
    for target in targets:
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_paths_exist(page):
    for path in re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:sh|py|sbatch|toml|cff))`", page.read_text()):
        assert any((place / path).exists() for place in PLACES), f"{page.name} names {path}"


def test_every_script_of_the_project_folder_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    missing = [path.name for path in sorted(ROOT.glob("*.sh")) if path.name not in readme]
    assert missing == []


def code_of(page: str) -> str:
    """The first Python program of a page, as a user would save it."""
    program = re.search(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert program is not None
    return program[1]


def pictures(folder: Path) -> None:
    for number in range(8):
        Image.new("RGB", (90, 70), (30 * number, 100, 100)).save(folder / f"{number}.png")


def done(*command: str, cwd: Path, **variables: str) -> str:
    result = run(sys.executable, *command, cwd=cwd, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_program_for_own_images_runs(tmp_path):
    (tmp_path / "train_own.py").write_text(code_of("own-data.md"))
    pictures(tmp_path)
    items = {f"{n}.png": [f"colour number {n}", "a plain picture"] for n in range(8)}
    (tmp_path / "items.json").write_text(json.dumps(items))
    variables = {"PICTURES": str(tmp_path), "ITEMS_JSON": str(tmp_path / "items.json")}
    said = done("train_own.py", cwd=tmp_path, MODEL="ViT-scenes-ItemizedCLIP", **variables)
    assert "tensor" in said
    assert (tmp_path / "logs" / "mine" / "checkpoints" / "epoch_1.pt").is_file()


def test_own_images_need_no_program(tmp_path):
    """The JSONL of docs/own-data.md: trained on two processes, validated, explained; wrong lines are named."""
    (tmp_path / "a").mkdir()
    pictures(tmp_path / "a")
    lines = [{"image": f"a/{n}.png", "items": [f"colour {n}", "a plain picture"]} for n in range(8)]
    (tmp_path / "train.jsonl").write_text("\ufeff" + "".join(json.dumps(line) + "\n" for line in lines))
    common = ["train", "own", "--train-file", "train.jsonl", "--model", "ViT-scenes-ItemizedCLIP", "--warmup", "1",
              "--num-sampled-captions", "2", "--workers", "0", "--precision", "fp32", "--device", "cpu"]  # fmt: skip
    run_two = ["-m", "itemizedclip.runtime.torchrun", "--standalone", "--nproc_per_node", "2", "-m", "itemizedclip"]
    done(*run_two, *common, "--val-file", "train.jsonl", "--epochs", "1", "--batch-size", "4", "--name", "two",
         cwd=tmp_path)  # fmt: skip
    metrics = [json.loads(line) for line in (tmp_path / "logs/two/metrics.jsonl").read_text().splitlines()]
    assert any("val/text_to_image_R@1" in line for line in metrics)
    done("-m", "itemizedclip", "explain", "a/0.png", "--checkpoint", "logs/two/checkpoints/epoch_1.pt", "--items",
         "colour 0", "--output", "seen", cwd=tmp_path)  # fmt: skip
    assert (tmp_path / "seen/attention.png").is_file()
    for line, message in {
        "{": "line 9: not valid JSON",
        '{"image": "a/0.png", "items": "one"}': "line 9: field 'items': expected a list of texts",
        '{"image": "a/0.png", "items": [" "]}': "line 9: field 'items' holds no text",
        '{"items": ["x"]}': "line 9: field 'image'",
        "[1]": "line 9: expected",
    }.items():
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + line)
        with pytest.raises(BadSampleError, match=re.escape(message)):
            ImageItems(tmp_path / "bad.jsonl", pil_to_tensor, num_items=2, is_train=True)
        kept = ImageItems(tmp_path / "bad.jsonl", pil_to_tensor, num_items=2, is_train=True, on_bad_sample="skip")
        assert len(kept) == 8


def test_a_data_set_is_one_file(tmp_path):
    """docs/add-a-dataset.md: training, evaluation and pictures from one file of at most 60 lines."""
    program = code_of("add-a-dataset.md")
    assert len(program.splitlines()) <= 60
    (tmp_path / "shapes.py").write_text(program)
    (tmp_path / "shapes").mkdir()
    pictures(tmp_path / "shapes")
    (tmp_path / "shapes/classes.json").write_text(json.dumps({f"{n}.png": f"colour {n % 3}" for n in range(8)}))
    small = ["--model", "ViT-scenes-ItemizedCLIP", "--epochs", "1", "--warmup", "1", "--workers", "0"]
    done("-m", "itemizedclip", "train", "shapes.py:shapes", "--name", "try", *small, cwd=tmp_path)
    checkpoint = "logs/try/checkpoints/epoch_1.pt"
    done("-m", "itemizedclip", "evaluate", "shapes.py:ShapesBenchmark", "--checkpoint", checkpoint, "--workers", "0",
         cwd=tmp_path)  # fmt: skip
    results = json.loads((tmp_path / "shapes.json").read_text())
    assert set(results["metrics"]) == {"top1", "top5", "mean_rank"}
    done("-m", "itemizedclip", "explain", "shapes/3.png", "--checkpoint", checkpoint, "--items", "colour 0",
         "--output", "seen", cwd=tmp_path)  # fmt: skip
    assert (tmp_path / "seen/attention.png").is_file()
