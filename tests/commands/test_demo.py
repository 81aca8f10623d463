"""The embedded main job end to end, at debug size: the command of quickstart.sh, on one and on two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import fails
from PIL import Image

from itemizedclip.commands.cli import COMMANDS
from itemizedclip.commands.cli import main as cli
from itemizedclip.commands.demo import RECIPES, main
from itemizedclip.commands.evaluate import main as evaluate_main

MEASURES = {"zero_shot/macro_auc", "retrieval/text_to_image_R@1", "contrast/binding", "explain/pointing_game",
            "explain/miou", "explain/mll", "explain/mams"}  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("demo")
    main(["--recipe", "scenes_debug", "--logs", str(logs), "--name", "one"])
    return logs / "one"


def test_trains_evaluates_and_draws(one_process):
    results = json.loads((one_process / "results.json").read_text())
    assert set(results["metrics"]) >= MEASURES
    assert results["protocol"] == "corrected"
    picture = Image.open(one_process / "pictures" / "scene_0.png")
    assert min(picture.size) > 300
    assert picture.convert("L").getextrema()[0] < 100
    steps = [json.loads(line) for line in (one_process / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in steps if line["kind"] == "train"]
    assert losses[-1] < losses[0]
    for term in ("ila", "kta", "mps", "iis"):
        assert term in steps[0]


def test_a_finished_run_is_evaluated_again_to_the_same_numbers(one_process):
    before = json.loads((one_process / "results.json").read_text())["metrics"]
    again = main(["--recipe", "scenes_debug", "--logs", str(one_process.parent), "--name", "one", "--resume", "latest"])
    assert again == pytest.approx(before, rel=1e-5)


def test_two_processes_evaluate_to_the_same_numbers(one_process):
    """The trained run, evaluated by two ranks: nothing is lost or counted twice."""
    before = json.loads((one_process / "results.json").read_text())["metrics"]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", "-m",
         "itemizedclip.commands.demo", "--recipe", "scenes_debug", "--batch-size", "4",
         "--logs", str(one_process.parent),
         "--name", "one", "--resume", "latest"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    after = json.loads((one_process / "results.json").read_text())["metrics"]
    assert after == pytest.approx(before, rel=1e-5)


def test_evaluated_by_name_to_the_same_numbers(one_process, tmp_path, capsys):
    before = json.loads((one_process / "results.json").read_text())
    seed = json.loads((one_process / "params.json").read_text())["run"]["seed"]
    checkpoint = str(one_process / "checkpoints" / "epoch_1.pt")
    flags = ["--num-scenes", "60", "--seed", str(seed), "--output", str(tmp_path / "r.json"), "--workers", "0"]
    found = evaluate_main(["scenes", "--checkpoint", checkpoint, *flags])
    assert found == pytest.approx(before["metrics"], rel=1e-5)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["metrics"] == found
    assert report["facts"]["explain"]["num_masks"] == before["facts"]["explain"]["num_masks"] > 60
    assert "pointing_game" in capsys.readouterr().out
    global_only = evaluate_main(["scenes", "--checkpoint", checkpoint, *flags, "--no-inference-with-flair"])
    assert {name.partition("/")[0] for name in global_only} == {"zero_shot", "retrieval", "contrast"}
    assert "expected one of easy" in fails(
        capsys, evaluate_main, ["scenes", "--checkpoint", checkpoint, "--level", "impossible"]
    )


def test_every_recipe_builds():
    for recipe in RECIPES.values():
        assert recipe().data.num_train >= recipe().loading.step_batch


def test_command_line(capsys):
    cli(["--help"])
    out = capsys.readouterr().out
    assert [name for name in COMMANDS if f"  {name} " not in out] == []
    for wrong, message in (([], "no command given"), (["dmeo"], "no command named dmeo")):
        with pytest.raises(SystemExit) as stopped:
            cli(wrong)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli(["demo", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--level", "--ila-fac", "--key-token-thresh", "--comp-upfac", "--mask-duplicates", "--resume"):
        assert flag in out


def test_wrong_flags_give_one_message(capsys):
    cases = {
        "expected one of": ["--level", "hopeless"],
        "nonsense": ["--nonsense"],
        "no recipe named x": ["--recipe", "x"],
    }
    for message, wrong in cases.items():
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert "Traceback" not in err
