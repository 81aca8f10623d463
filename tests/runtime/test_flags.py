"""Flags of commands, and commands whose output nobody reads to its end."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass

import pytest
from commands import ROOT, run
from toy import toy

from itemizedclip.runtime import flags
from itemizedclip.runtime.flags import loader_processes, read_flags, usable_cores
from itemizedclip.training.recipes import parse_run


@dataclass(frozen=True)
class Options:
    """What to do."""

    size: int = 3
    """How large, in pixels."""


def test_flags_override_the_default_given_or_the_fields_own():
    assert read_flags(Options, [], prog="p", description="d") == Options(3)
    assert read_flags(Options, ["--size", "5"], prog="p", description="d") == Options(5)
    assert read_flags(Options, [], prog="p", description="d", default=Options(7)) == Options(7)


def test_help_shows_docstrings_and_unknown_flags_are_one_message(capsys):
    with pytest.raises(SystemExit) as stop:
        read_flags(Options, ["--help"], prog="p", description="d")
    assert stop.value.code == 0
    assert "How large, in pixels" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        read_flags(Options, ["--sise", "5"], prog="p", description="d")
    assert stop.value.code == 2
    assert "--sise" in capsys.readouterr().err


@dataclass(frozen=True)
class Ruled:
    """Options with a rule."""

    count: int = 0
    """How many."""

    def __post_init__(self) -> None:
        flags.at_least(self, count=0)


def test_a_rule_of_ours_is_one_sentence_without_the_names_of_classes(capsys):
    with pytest.raises(SystemExit) as stop:
        read_flags(Ruled, ["--count=-1"], prog="count", description=None)
    assert stop.value.code == 2
    message = "count: error: --count is -1; expected at least 0 (count --help lists the flags)\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("command", ["2D_images_tasks/src/main.py --help", "-m itemizedclip.commands.cli demo --help"])
def test_help_that_nobody_reads_to_its_end_leaves_no_trace(command):
    # `true` reads nothing, so that the first line already finds the pipe closed.
    python = shlex.quote(sys.executable)
    result = run("bash", "-c", f"{{ sleep 0.2; {python} {command}; }} | true", cwd=ROOT)
    assert result.stderr == ""


@dataclass(frozen=True)
class Numbers:
    """Numbers of all kinds."""

    weight: float = 1.0
    """A weight."""

    weights: tuple[float, ...] = ()
    """More of them."""

    limit: float | None = None
    """Or none."""

    count: int = 1
    """A count."""


@dataclass(frozen=True)
class Nested:
    """A group within options."""

    numbers: Numbers = Numbers()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--weight", "nan"], "--weight is nan; expected a finite number"),
        (["--weight", "-inf"], "--weight is -inf"),
        (["--weight", "1e999"], "--weight is inf"),
        (["--weights", "1", "nan"], "--weights is nan"),
        (["--limit", "inf"], "--limit is inf"),
        (["--count", str(2**70)], f"--count is {2**70}; expected a whole number of at most"),
    ],
)
@pytest.mark.parametrize("kind", [Numbers, Nested])
def test_numbers_that_no_computer_holds_are_refused_in_every_command(capsys, kind, flags, said):
    with pytest.raises(SystemExit) as stop:
        read_flags(kind, flags, prog="p", description="d")
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ila-weight", "nan"], "--ila-weight is nan"),
        (["--lr", "inf"], "--lr is inf"),
        (["--seed", str(2**70)], "--seed is"),
        (["--threads", "100000"], "--threads is 100000; expected at most"),
        (["--workers", "100000"], "--workers is 100000; expected at most"),
        (["--num-sampled-captions", "999999999"], "--num-sampled-captions is 999999999; expected at most 4096"),
        (["--loader-timeout", "-1"], "--loader-timeout is -1"),
        (["--keep-last", "-1"], "--keep-last is -1"),
        (["--keep-best", "auc"], "--keep-best is 'auc'; expected evaluator/measure"),
        (["--keep-best", "toy/sum", "--val-frequency", "0"], "--keep-best needs evaluations"),
    ],
)
def test_absurd_flags_of_a_run_are_refused_at_once(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        parse_run({"toy": toy}, "toy", flags, prog="toy")
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_cores_of_a_container_are_its_share(tmp_path):
    every = len(os.sched_getaffinity(0))
    share = tmp_path / "cpu.max"
    share.write_text("100000 100000\n")
    assert usable_cores(share) == 1
    share.write_text("1 100000\n")
    assert usable_cores(share) == 1
    for unlimited in ("max 100000\n", f"{(every + 3) * 100000} 100000\n", "no numbers"):
        share.write_text(unlimited)
        assert usable_cores(share) == every
    assert usable_cores(tmp_path / "none") == every


def test_loader_processes_fit_the_cores(monkeypatch):
    monkeypatch.setattr(flags, "usable_cores", lambda: 12)
    assert [loader_processes(asked) for asked in (None, 0, 3, 40)] == [8, 0, 3, 40]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loader_processes(None) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert loader_processes(None) == 1
