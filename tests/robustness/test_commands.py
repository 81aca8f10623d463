"""Flags that nobody should give: every command ends with one message and status 2, or 1 for the files it lacks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from itemizedclip_radiology.data.warm_cache import WarmCacheOptions
from itemizedclip_radiology.data.warm_cache import main as warm_cache
from itemizedclip_radiology.prepare.labels import main as prepare_labels
from itemizedclip_radiology.viewing.inference_chest_ct import main as inference_chest_ct

from itemizedclip.commands import demo, train
from itemizedclip.commands.cli import main as cli
from itemizedclip.commands.explain import ExplainOptions
from itemizedclip.commands.index import IndexOptions
from itemizedclip.commands.report import ReportOptions
from itemizedclip.commands.search import SearchOptions
from itemizedclip.evaluation.benchmark import BENCHMARKS
from itemizedclip.runtime import errors
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.training.recipes import RECIPES

from .bounds import bounded

EXAMPLES = int(os.environ.get("ROBUSTNESS_EXAMPLES", "8"))

STRANGE = [
    "", " ", "-1", "0", "1", "-0.5", "0.5", "nan", "inf", "-inf", "1e999", "1e-400", str(2**70), "9" * 5000, "0x10",
    "1_000", "true", "None", "null", "[]", "{}", "auto", "x", "größe", "a\x1b[31mb", "\udcff", "--", "-", "a,b", "a b",
    "x" * 3000, "nowhere.pt", "no/where", "/dev/null", "/dev/zero", "..", "~", "~nobody/x", "hf-hub:", "cuda:99",
    "mps", "'{0..9}'", "{0..99999999}.tar", "{", "a::b", "*", "%s", "$HOME", "\u202e",
]  # fmt: skip


def flags_of(kind: Any) -> Iterator[str]:
    """Flags of an options class or object, its groups' too."""
    for field in dataclasses.fields(kind):
        value = getattr(kind, field.name, None)
        nested = value if dataclasses.is_dataclass(value) else None
        if nested is None and callable(field.default_factory) and dataclasses.is_dataclass(field.default_factory):
            nested = field.default_factory
        if nested is None:
            yield f"--{field.name.replace('_', '-')}"
        else:
            yield from flags_of(nested)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, the flags it must have, and those it may."""

    main: Callable[[list[str]], object]
    needed: list[str]
    flags: list[str]


def of_cli(name: str, kind: type, *needed: str) -> Command:
    return Command(lambda argv: cli([*name.split(), *argv]), list(needed), list(flags_of(kind)))


COMMANDS: dict[str, Command] = {
    "index": of_cli("index", IndexOptions, "no/where", "--checkpoint", "no.pt"),
    "search": of_cli("search", SearchOptions, "a lake", "--index", "no/where"),
    "report": of_cli("report", ReportOptions, "no.png", "--checkpoint", "no.pt"),
    "explain": of_cli("explain", ExplainOptions, "no.png", "--checkpoint", "no.pt"),
    "demo": of_cli("demo", type(demo.scenes_debug())),
    "warm_cache": Command(warm_cache, ["--data-root", "no/where"], list(flags_of(WarmCacheOptions))),
    "labels rsna": Command(lambda argv: prepare_labels(["rsna", *argv]), [], ["--labels", "--output"]),
    "labels cq500": Command(lambda argv: prepare_labels(["cq500", *argv]), [], ["--reads", "--output"]),
    "inference_chest_ct": Command(
        lambda argv: inference_chest_ct(argv), ["--resume", "no.pt"], ["--items", "--input-filename", "--device"]
    ),
    **{f"evaluate {name}": of_cli(f"evaluate {name}", BENCHMARKS.load(name), "--checkpoint", "no.pt")
       for name in BENCHMARKS.names()},
    **{f"train {name}": Command(lambda argv, name=name: cli(["train", name, *argv]), [],
                                list(flags_of(RECIPES.load(name)())))
       for name in RECIPES.names()},
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_done(monkeypatch, tmp_path):
    """What flags are for is not done when they are right."""

    def reached(*arguments: object, **more: object) -> None:
        raise UserError("reached")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(train, "train_recipe", reached)
    monkeypatch.setattr(demo, "launch_run", reached)


def ends_well(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], object], argv: list[str]) -> int:
    """The exit status of a command that must not succeed, and must not fail but by one message."""
    with bounded(), pytest.raises(SystemExit) as ended:
        main(argv)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "unexpected" not in said, said
    assert said.strip()
    assert not any(character < " " and character != "\n" for character in said), repr(said)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_strange_flags(name, capsys):
    command = COMMANDS[name]
    flag = st.tuples(st.sampled_from(command.flags), st.lists(st.sampled_from(STRANGE), max_size=2))

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES == 8,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.lists(flag, min_size=1, max_size=2))
    def check(flags: list[tuple[str, list[str]]]) -> None:
        argv = [*command.needed, *(word for name, values in flags for word in (name, *values))]
        assert ends_well(capsys, command.main, argv) in (1, 2)

    check()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("argv", [["--no-such-flag", "1"], ["--nosuch"], ["--"], ["-z"], ["--=", "x"]])
def test_flags_that_do_not_exist(name, argv, capsys):
    command = COMMANDS[name]
    assert ends_well(capsys, command.main, [*command.needed, *argv]) == 2 or argv == ["--"]


@pytest.mark.parametrize("name", ["index", "search", "report", "explain", *(n for n in COMMANDS if "evaluate" in n)])
def test_files_that_are_not_there(name, capsys):
    command = COMMANDS[name]
    assert ends_well(capsys, command.main, command.needed) in (1, 2)


@pytest.mark.parametrize("argv", [[], ["x"], ["train"], ["train", "x"], ["evaluate", "--x"], ["evaluate", ""], [""]])
def test_names_that_do_not_exist(argv, capsys):
    assert ends_well(capsys, cli, argv) == 2


# --- errors that nobody foresaw --------------------------------------------------------------------------------------


def test_a_trace_goes_to_a_file_or_with_debug_to_the_terminal(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(errors, "_traces_are_shown", False)

    def fault(*arguments: object, **more: object) -> None:
        raise KeyError("a \x1b[31mname")

    monkeypatch.setattr(train, "train_recipe", fault)
    with pytest.raises(SystemExit) as ended:
        cli(["train", "scenes_debug"])
    assert ended.value.code == errors.EXIT_FAULT == 70
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "unexpected KeyError at test_commands.py:" in said
    assert "\x1b" not in said
    (kept,) = tmp_path.glob("itemizedclip-*.trace.txt")
    assert str(kept) in said
    assert "Traceback" in kept.read_text()
    with pytest.raises(KeyError):
        cli(["train", "scenes_debug", "--debug"])
    monkeypatch.setattr(errors, "_traces_are_shown", False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no" / "where"))
    with pytest.raises(SystemExit), reported_errors("x"):
        fault()
    assert "run again with --debug" in capsys.readouterr().err
