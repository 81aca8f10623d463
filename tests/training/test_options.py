"""Recipes, flags, published flag names, cross-field rules, and options as plain data."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from commands import fails

from itemizedclip.objectives.loss import ObjectiveOptions
from itemizedclip.runtime.errors import UserError
from itemizedclip.training.options import (
    LoadingSettings,
    LoggingSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RunOptions,
    RunSettings,
    flatten_options,
    options_from_dict,
    options_to_dict,
)
from itemizedclip.training.recipes import parse_recipe, parse_run


@dataclass(frozen=True)
class FruitData:
    """Fruit on disk."""

    fruit_dir: Path | None = None
    """Folder of fruit."""

    crops: tuple[str, ...] = ("centre", "left")
    """Crops to take."""


@dataclass(frozen=True)
class FruitRun(RunOptions):
    """Options of a fruit run."""

    data: FruitData = field(default_factory=FruitData)


def apples() -> FruitRun:
    """Apples on eight GPUs."""
    return FruitRun(optimizer=OptimizerSettings(lr=3e-4, warmup=100), objective=ObjectiveSettings(mps_weight=2.0))


def pears() -> FruitRun:
    """Pears on a CPU.

    More about pears.
    """
    return FruitRun(loading=LoadingSettings(batch_size=4))


RECIPES = {"apples": apples, "pears": pears}


def parse(*argv: str) -> FruitRun:
    return parse_run(RECIPES, "apples", list(argv), prog="train_fruit.sh", description="Trains on fruit.")


def failure(capsys, *argv: str) -> str:
    """What the parser prints when it refuses, on one line without box characters."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.translate(str.maketrans("╭╮╰╯│─", "      ")).split())


def test_the_default_recipe_is_taken_and_flags_override_it():
    options = parse()
    assert options == replace(apples(), run=RunSettings(recipe="apples"))
    options = parse("--lr", "0.1", "--batch-size=3", "--fruit-dir", "/f", "--grad-clip-norm", "1")
    assert (options.optimizer.lr, options.optimizer.warmup) == (0.1, 100)
    assert (options.loading.batch_size, options.data.fruit_dir) == (3, Path("/f"))
    assert options.optimizer.grad_clip_norm == 1.0


@pytest.mark.parametrize("argv", [("--recipe", "pears"), ("--recipe=pears",), ("--lr", "0.1", "--recipe", "pears")])
def test_a_recipe_is_picked_wherever_the_flag_stands(argv):
    options = parse(*argv)
    assert (options.run.recipe, options.loading.batch_size) == ("pears", 4)


@pytest.mark.parametrize(
    ("flag", "value", "group", "name"),
    [
        ("--iis-loss", 0.3, "objective", "iis_weight"),
        ("--mps-fac", 0.3, "objective", "mps_weight"),
        ("--ila-fac", 0.3, "objective", "ila_weight"),
        ("--ila-mask-rate", 0.3, "objective", "ila_keep_rate"),
        ("--ila-keep-rate", 0.3, "objective", "ila_keep_rate"),
        ("--comp-upfac", 3.0, "objective", "worst_positive_factor"),
        ("--key-token-alignment-loss", 0.3, "objective", "kta_weight"),
        ("--key-token-thresh", 0.3, "objective", "key_token_fraction"),
        ("--num-sampled-captions", 5, "loading", "num_sampled_captions"),
        ("--accum-batch", 5, "loading", "accum_batch"),
        ("--accum-freq", 5, "loading", "accum_freq"),
        ("--batch-size", 5, "loading", "batch_size"),
        ("--workers", 5, "loading", "workers"),
        ("--logs", Path("/l"), "run", "logs"),
        ("--logs-dir", Path("/l"), "run", "logs"),
        ("--resume", "latest", "run", "resume"),
        ("--name", "n", "run", "name"),
        ("--seed", 5, "run", "seed"),
        ("--save-frequency", 5, "run", "save_frequency"),
        ("--val-frequency", 5, "run", "val_frequency"),
        ("--lr", 0.3, "optimizer", "lr"),
        ("--wd", 0.3, "optimizer", "weight_decay"),
        ("--beta1", 0.3, "optimizer", "beta1"),
        ("--beta2", 0.3, "optimizer", "beta2"),
        ("--eps", 0.3, "optimizer", "eps"),
        ("--warmup", 5, "optimizer", "warmup"),
        ("--epochs", 5, "optimizer", "epochs"),
        ("--lr-scheduler", "const", "optimizer", "lr_scheduler"),
        ("--grad-clip-norm", 0.3, "optimizer", "grad_clip_norm"),
        ("--precision", "amp_bf16", "model", "precision"),
        ("--model", "m.json", "model", "model"),
        ("--report-to", "wandb", "logging", "report_to"),
    ],
)
def test_every_published_flag_sets_its_field(flag, value, group, name):
    assert getattr(getattr(parse(flag, str(value)), group), name) == value


@pytest.mark.parametrize(
    "flag",
    ["grad-checkpointing", "torchcompile", "lock-image", "lock-text", "delete-previous-checkpoint", "normal-check"],
)
def test_switches_have_both_forms(flag):
    flat = {name.rpartition(".")[2]: v for name, v in flatten_options(options_to_dict(parse(f"--{flag}"))).items()}
    assert flat[flag.replace("-", "_")] is True
    flat = {name.rpartition(".")[2]: v for name, v in flatten_options(options_to_dict(parse(f"--no-{flag}"))).items()}
    assert flat[flag.replace("-", "_")] is False


@pytest.mark.parametrize("flag", ["--gather-with-grad", "--local-loss", "--optimizer.lr", "--bath-size", "extra"])
def test_unknown_flags_fail(capsys, flag):
    assert flag in failure(capsys, flag)


def test_an_unknown_recipe_lists_what_exists(capsys):
    assert failure(capsys, "--recipe", "pear") == (
        "train_fruit.sh: error: no recipe named pear (did you mean pears?); there are: apples, pears"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--ila-keep-rate", "0"), "expected a keep probability in (0, 1]"),
        (("--ila-fac", "0", "--key-token-alignment-loss", "0", "--mps-fac", "0"), "nothing aligns images"),
        (("--batch-size", "0"), "--batch-size is 0; expected at least 1"),
        (("--lr", "-1"), "--lr is -1.0; expected at least 0"),
        (("--beta2", "1"), "expected 0 ≤ beta2 < 1"),
        (("--grad-clip-norm", "0"), "expected a positive norm or None"),
        (("--precision", "fp8"), "'amp', 'amp_bf16', 'bf16', 'fp32'"),
        (("--torchcompile", "--accum-freq", "2"), "use --accum-batch or drop --torchcompile"),
        (("--patch-dropout", "1"), "expected a share below 1"),
        (("--grad-checkpointing-keeps", "attention"), "add it"),
        (("--name", "a/b"), "expected a plain folder name"),
        (("--device", "gpu"), "expected auto, cpu, cuda or cuda:N"),
        (("--report-to", "wandb,mlflow"), "--report-to names mlflow"),
        (("--max-bad-fraction", "2"), "expected a share in [0, 1]"),
        (("--dist-timeout", "0"), "expected minutes, more than 0"),
        (("--epochs", "many"), "many"),
    ],
)
def test_values_that_cannot_work_fail_with_the_remedy(capsys, argv, message):
    assert message in failure(capsys, *argv)


def test_help_shows_groups_recipes_and_the_recipes_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--recipe", "apples", "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for expected in (
        "Trains on fruit.", "apples: Apples on eight GPUs.", "pears: Pears on a CPU.", "Fruit on disk.",
        "loading options", "objective options", "--iis-loss", "(default: 0.0003)", "--no-torchcompile",
    ):  # fmt: skip
        assert expected in text
    assert "More about pears" not in text


def test_the_objective_group_repeats_no_default():
    assert ObjectiveSettings() == ObjectiveSettings(**vars(ObjectiveOptions()))
    assert isinstance(ObjectiveSettings(), ObjectiveOptions)


def test_options_survive_json():
    options = parse("--fruit-dir", "/f", "--crops", "a", "--resume", "latest", "--grad-clip-norm", "2")
    plain = json.loads(json.dumps(options_to_dict(options)))
    assert plain["data"] == {"fruit_dir": "/f", "crops": ["a"]}
    assert options_from_dict(FruitRun, plain) == options
    assert flatten_options(plain)["objective.mps_weight"] == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"lrr": 1.0}}, "params.json: optimizer: unknown field lrr"),
        ({"optimizer": {"lr": "fast"}}, "params.json: optimizer: lr: expected float, found 'fast'"),
        ({"loading": {"batch_size": True}}, "batch_size: expected int, found True"),
        ({"model": {"precision": "fp8"}}, "expected one of auto"),
        ({"run": 3}, "params.json: run: expected an object"),
    ],
)
def test_plain_data_that_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        options_from_dict(FruitRun, change)


def test_trackers_are_resolved_once():
    assert LoggingSettings(report_to="all").trackers == ("wandb", "tensorboard")
    assert LoggingSettings(report_to="tensorboard, wandb").trackers == ("wandb", "tensorboard")
    assert LoggingSettings().trackers == ()


def test_the_step_batch_is_the_product():
    assert LoadingSettings(batch_size=8, accum_batch=4, accum_freq=2).step_batch == 64
    assert ModelSettings().torchcompile is False


@pytest.mark.parametrize("name", ["a\nb", "x" * 5000, "a\x1b[2J", "\udcff"])
def test_names_of_runs_can_be_shown_and_made(name):
    with pytest.raises(UserError, match="expected a plain folder name of at most 200 characters"):
        RunSettings(name=name)


def test_paths_that_cannot_be_recorded_are_refused(capsys):
    told = fails(capsys, parse_recipe, "scenes_debug", ["--logs", "l\udcff"])
    assert "--logs is 'l\\udcff', which is no text in UTF-8 and cannot be recorded" in told


def test_ranks_of_adapters_are_bounded():
    with pytest.raises(UserError, match="--lora-image is 1000000000; expected at most 4096"):
        ModelSettings(lora_image=10**9)
