"""Flags of commands, and commands whose output nobody reads to its end."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass

import pytest
from commands import ROOT, run

from itemizedclip.runtime.flags import read_flags


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


@pytest.mark.parametrize("command", ["2D_images_tasks/src/main.py --help", "-m itemizedclip.commands.cli demo --help"])
def test_help_that_nobody_reads_to_its_end_leaves_no_trace(command):
    # `true` reads nothing, so that the first line already finds the pipe closed.
    python = shlex.quote(sys.executable)
    result = run("bash", "-c", f"{{ sleep 0.2; {python} {command}; }} | true", cwd=ROOT)
    assert result.stderr == ""
