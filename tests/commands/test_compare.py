"""Objectives against each other: the plan, what a finished run is, the finding, and two real runs."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from itemizedclip.commands.compare import (
    OBJECTIVES,
    CompareOptions,
    PlannedRun,
    Runner,
    comparison,
    finished,
    main,
    markdown,
    plan,
    read_metrics,
    write_finding,
)
from itemizedclip.commands.demo import RECIPES
from itemizedclip.evaluation.comparison import summarise, t_interval
from itemizedclip.runtime.errors import UserError
from itemizedclip.training.recipes import parse_run


def options(folder: Path, **fields) -> CompareOptions:
    return CompareOptions(output=folder, **{"data": "scenes_debug", **fields})


def finish(run: PlannedRun, **metrics: float) -> None:
    run.folder.mkdir(parents=True)
    (run.folder / "results.json").write_text(json.dumps({"command": run.command, "seconds": 1.0, "metrics": metrics}))


# --- the plan --------------------------------------------------------------------------------------------------------


def settings_of(name: str):
    return parse_run(RECIPES, "scenes", list(OBJECTIVES[name].flags)).objective


def test_the_ladder_adds_one_part_at_a_time():
    full = RECIPES["scenes"]().objective
    tcs = settings_of("tcs")
    assert (tcs.ila_weight, tcs.kta_weight, tcs.mps_weight, tcs.iis_weight) == (full.ila_weight, 0, 0, 0)
    assert (tcs.worst_positive_factor, tcs.ila_keep_rate, tcs.mask_duplicates) == (1, 1, False)
    steps = [
        ("+iis", {"iis_weight": full.iis_weight}),
        ("+mps", {"mps_weight": full.mps_weight}),
        ("+uwp", {"worst_positive_factor": full.worst_positive_factor}),
        ("+kta", {"kta_weight": full.kta_weight}),
        ("+mask", {"ila_keep_rate": 0.8}),
    ]
    expected = tcs
    for name, added in steps:
        assert 0 not in added.values()
        expected = replace(expected, **added)
        assert settings_of(name) == expected, name
    assert settings_of("recipe") == full
    for name in ("clip", "siglip", "concat", "flair", "flair_own"):
        assert settings_of(name).baseline == name
    mps = settings_of("mps")
    assert (mps.ila_weight, mps.kta_weight, mps.iis_weight, mps.mps_weight, mps.scoring) == (0, 0, 0, 1, "global")


def test_every_planned_command_is_one_that_its_recipe_takes(tmp_path):
    runs = plan(options(tmp_path, seeds=2, level="crowded", objectives=",".join(OBJECTIVES)), ["--epochs", "2"])
    assert len({run.folder for run in runs}) == len(runs) == 2 * len(OBJECTIVES)
    for run in runs:
        parsed = parse_run(RECIPES, "scenes", list(run.arguments[1:]))
        assert run.arguments[0] == "demo"
        assert parsed.run.seed == run.seed
        assert (parsed.data.level, parsed.optimizer.epochs) == ("crowded", 2)
        assert parsed.run.logs / parsed.run.name == run.folder / "run"


def test_other_data(tmp_path):
    own = plan(options(tmp_path, data="own:a.jsonl,b.jsonl", objectives="clip", seeds=1))[0]
    assert own.command.startswith("itemizedclip train own --train-file a.jsonl --val-file b.jsonl --baseline clip ")
    recipe = plan(options(tmp_path, data="rsicd", objectives="clip", seeds=1))[0]
    assert recipe.command.startswith("itemizedclip train rsicd --baseline clip ")
    for wrong in ("own:a.jsonl", "nothing"):
        with pytest.raises(UserError, match=f"--data is '{wrong}'; expected"):
            plan(options(tmp_path, data=wrong))


def test_a_finished_run_is_one_of_the_same_command(tmp_path):
    run = plan(options(tmp_path, objectives="clip", seeds=1))[0]
    assert finished(run) is None
    finish(run, **{"zero_shot/macro_auc": 0.7})
    found = finished(run)
    assert found is not None
    assert found["metrics"] == {"zero_shot/macro_auc": 0.7}
    other = plan(options(tmp_path, objectives="clip", seeds=1), ["--epochs", "3"])[0]
    with pytest.raises(UserError, match="is of another command") as error:
        finished(other)
    assert str(run.folder / "results.json") in str(error.value)


def test_metrics_of_a_training_run_are_its_last_evaluation(tmp_path):
    lines = [{"kind": "eval", "step": 1, "val/sum": 1.0}, {"kind": "train", "loss": 2.0},
             {"kind": "eval", "step": 2, "val/sum": 3.0, "eval_s": 1.0}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_metrics(tmp_path) == {"val/sum": 3.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[1]))
    with pytest.raises(UserError, match="holds no evaluation"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objectives", "clip,flare"], "no objective named flare (did you mean flair?)"),
        (["--objectives", "clip,clip"], "expected each once"),
        (["--objectives", "clip", "--reference", "flair"], "--reference flair is not among"),
        (["--shard", "3/2"], "--shard is '3/2'; expected i/n"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--level", "hopeless"], "--level is 'hopeless'"),
        (["--data", "rsicd", "--level", "easy"], "levels belong to scenes"),
    ],
)
def test_wrong_flags_give_one_message(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path), *flags])
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said
    assert "Traceback" not in said


# --- the finding -----------------------------------------------------------------------------------------------------


def test_intervals_are_students():
    values = [0.3, -0.1, 0.25, 0.7]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert t_interval(values) == pytest.approx(expected)
    assert t_interval([1.0]) is None


def test_differences_are_taken_seed_by_seed():
    scores = {
        "flair": {0: {"auc": 0.5}, 1: {"auc": 0.9}, 2: {"auc": 0.1}},
        "recipe": {0: {"auc": 0.6, "mll": 0.2}, 1: {"auc": 1.0}},
        "late": {7: {"auc": 0.4}},
    }
    found = summarise(scores, "flair")
    assert found["flair"]["auc"].difference is None
    recipe = found["recipe"]["auc"]
    assert (recipe.count, recipe.mean, recipe.deviation) == pytest.approx((2, 0.8, np.std([0.6, 1.0], ddof=1)))
    # Far apart from seed to seed, yet always 0.1 more than the reference.
    assert (recipe.difference, recipe.low, recipe.high) == pytest.approx((0.1, 0.1, 0.1))
    assert recipe.differs
    assert (found["recipe"]["mll"].count, found["recipe"]["mll"].deviation) == (1, None)
    assert found["recipe"]["mll"].difference is None
    assert found["late"]["auc"].difference is None
    assert summarise({"late": scores["late"]}, "flair")["late"]["auc"].mean == 0.4


def test_the_finding_holds_commands_figures_and_what_is_missing(tmp_path):
    asked = options(tmp_path, objectives="clip,flair", seeds=3)
    runs = plan(asked)
    for run in runs[:-1]:
        base = 0.8 if run.objective == "flair" else 0.7
        finish(run, **{"zero_shot/macro_auc": base + 0.01 * run.seed, "zero_shot/auc/a red one": 0.5})
    found = comparison(asked, runs)
    assert found["missing"] == [runs[-1].command]
    assert [run["command"] for run in found["runs"]] == [run.command for run in runs[:-1]]
    assert found["reference"] == "flair"
    assert found["runs"][0]["metrics"] == {"zero_shot/macro_auc": 0.7}
    paths = write_finding(asked, found)
    assert json.loads(paths[0].read_text()) == found
    table = paths[1].read_text()
    assert table == markdown(found)
    assert "| `clip` | 3 | 0.710 ± 0.010 |" in table
    assert "| `flair` | 2 | 0.805 ± 0.007 |" in table
    assert "| `clip` | 3 | **-0.100 [-0.100, -0.100]** |" in table
    assert np.asarray(Image.open(paths[2]).convert("L")).min() < 100


@pytest.mark.slow
def test_runs_are_done_in_parts_and_never_twice(tmp_path, capsys, monkeypatch):
    """Two real runs, one in each part; the second part sees the first one's; a third call does nothing."""
    monkeypatch.chdir(tmp_path)
    command = ["--data", "scenes_debug", "--objectives", "concat,recipe", "--seeds", "1", "--output", "out"]
    sizes = ["--", "--num-train", "16", "--num-test", "20", "--batch-size", "8"]
    main([*command, "--shard", "1/2", *sizes])
    assert len(json.loads(Path("out/compare.json").read_text())["missing"]) == 1
    main([*command, "--shard", "2/2", *sizes])
    found = json.loads(Path("out/compare.json").read_text())
    assert found["missing"] == []
    metrics = {run["objective"]: run["metrics"] for run in found["runs"]}
    assert "explain/pointing_game" in metrics["recipe"]
    assert "explain/pointing_game" not in metrics["concat"]
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*-seed0/results.json")}
    main([*command, *sizes])
    assert {path: path.stat().st_mtime_ns for path in Path("out").glob("*-seed0/results.json")} == before
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*command, *sizes, "--nonsense", "1"])
    assert "is of another command" in capsys.readouterr().err


def test_a_stopped_comparison_leaves_no_run_behind(tmp_path, monkeypatch):
    """The first of two runs is at work when the runner is stopped: it is ended, and the second never starts."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 300\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    first, second = plan(options(tmp_path / "out", objectives="clip", seeds=2))
    runner = Runner(1)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(runner.run, first)
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        runner.stop()
        assert done.result().startswith("clip, seed 0: ")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert runner.run(second) == "stopped"
    assert finished(first) is None


def test_a_run_that_fails_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["--data", "scenes_debug", "--objectives", "clip", "--seeds", "1", "--output", "out", "--", "--nonsense"])
    assert stopped.value.code == 1
    assert "1 of 1 runs failed; the first: clip, seed 0: " in capsys.readouterr().err
    assert Path("out/clip-seed0/output.txt").is_file()
